"""Counters from trees like Linux's, their wrap, and the estimate."""

from __future__ import annotations

import sys
import time
import types
from pathlib import Path

import pytest

from flyweight.measure import energy
from flyweight.measure.energy import Meter, Rapl, nvml_joules


def zone(root: Path, path: str, name: str, joules: float, wrap: float = 262143.0) -> Path:
    folder = root / path
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{name}\n")
    (folder / "energy_uj").write_text(f"{int(joules * 1e6)}\n")
    (folder / "max_energy_range_uj").write_text(f"{int(wrap * 1e6)}\n")
    return folder


def spend(folder: Path, joules: float) -> None:
    (folder / "energy_uj").write_text(str(int(joules * 1e6)))


def test_packages_and_memory_count_once(tmp_path: Path) -> None:
    zones = [
        zone(tmp_path, "intel-rapl:0", "package-0", 10),
        zone(tmp_path, "intel-rapl:0:0", "core", 7),
        zone(tmp_path, "intel-rapl:0:1", "dram", 1),
        zone(tmp_path, "intel-rapl:1", "package-1", 20),
        zone(tmp_path, "intel-rapl:2", "psys", 40),
    ]
    meter = Meter(powercap=tmp_path)
    with meter:
        for folder, joules in zip(zones, (13, 900, 1.5, 24, 900), strict=True):
            spend(folder, joules)
    assert meter.joules == pytest.approx(3 + 0.5 + 4)
    assert meter.method == "rapl"


def test_a_counter_that_wraps(tmp_path: Path) -> None:
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 95, wrap=100)
    with Meter(powercap=tmp_path) as meter:
        spend(folder, 5)
    assert meter.joules == pytest.approx(10)


def test_no_tree_and_unreadable_counters_mean_an_estimate(tmp_path: Path) -> None:
    assert Rapl.find(tmp_path / "nowhere") is None
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    (folder / "energy_uj").unlink()  # as good as unreadable, whoever runs the test
    assert Rapl.find(tmp_path) is None
    assert Meter(powercap=tmp_path).method == "estimated"


def test_the_estimate_is_cpu_time_times_watts(tmp_path: Path) -> None:
    with Meter(watts_per_core=8.0, powercap=tmp_path) as meter:
        end = time.process_time() + 0.5
        while time.process_time() < end:
            sum(range(1000))
    assert meter.joules == pytest.approx(8.0 * 0.5, rel=0.15)
    assert meter.seconds >= 0.45
    assert "8 W a core" in meter.about
    with Meter(watts_per_core=8.0, powercap=tmp_path) as idle:
        time.sleep(0.2)
    assert idle.joules < 0.8


def test_cards_count_when_the_work_runs_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counters = iter([1_000, 1_000, 4_500, 0])
    module = types.ModuleType("pynvml")
    module.NVMLError = RuntimeError  # type: ignore[attr-defined]
    module.nvmlInit = lambda: None  # type: ignore[attr-defined]
    module.nvmlDeviceGetCount = lambda: 1  # type: ignore[attr-defined]
    module.nvmlDeviceGetHandleByIndex = lambda i: i  # type: ignore[attr-defined]
    module.nvmlDeviceGetTotalEnergyConsumption = lambda card: next(counters)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(energy, "have", lambda name: True)
    folder = zone(tmp_path, "intel-rapl:0", "package-0", 1)
    with Meter(card=True, powercap=tmp_path) as meter:
        spend(folder, 2)
    assert meter.joules == pytest.approx(1 + 3.5)
    assert meter.method == "rapl+nvml"


def test_a_card_without_a_counter_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("pynvml")
    module.NVMLError = RuntimeError  # type: ignore[attr-defined]

    def fail() -> None:
        raise RuntimeError("no driver")

    module.nvmlInit = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "pynvml", module)
    monkeypatch.setattr(energy, "have", lambda name: True)
    assert nvml_joules() is None
    assert Meter(card=True, powercap=tmp_path).method == "estimated"
