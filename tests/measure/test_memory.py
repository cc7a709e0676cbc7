"""The watched process is real; only the engine in it is ours, and takes a known amount of memory."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from flyweight.errors import EngineError
from flyweight.measure import memory
from flyweight.measure.latency import Point
from flyweight.measure.memory import peak_memory, tree_memory

ENGINE = """
import sys, types
import numpy as np
from flyweight.engines import engine

module = types.ModuleType("hungry")

class Hungry:
    def __init__(self, megabytes): self.megabytes = megabytes
    def run(self, arrays):
        assert arrays["input_ids"].shape == (2, 16) and arrays["input_ids"].max() < 50
        block = np.ones(self.megabytes * 2**20, np.uint8)  # gone again after the call: only the peak shows it
        return block[:2].astype(np.float32)
    def close(self): pass

def open(folder, threads=1):
    assert threads == 2
    megabytes = int((folder / "megabytes").read_text())
    if megabytes < 0: raise RuntimeError("no such model")
    return Hungry(megabytes)

module.open = open
sys.modules["hungry"] = module
engine.ENGINES["hungry"] = "hungry"
"""


@pytest.fixture
def hungry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder and an engine that child processes know: `sitecustomize` runs at their start."""
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(ENGINE)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])]))
    return tmp_path


def peak(folder: Path, megabytes: int) -> float:
    (folder / "megabytes").write_text(str(megabytes))
    figure = peak_memory((folder, "hungry"), Point(2, 16), vocabulary=50, threads=2, repeats=1)
    assert figure.unit == "B"
    assert "2x16" in figure.method
    return figure.value


def test_the_peak_of_a_short_lived_block_is_seen(hungry: Path) -> None:
    small, large = peak(hungry, 1), peak(hungry, 201)
    assert large - small == pytest.approx(200 * 2**20, rel=0.1)


def test_repeats_give_the_median_and_the_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = iter([300, 100, 200, 50])
    monkeypatch.setattr(memory, "_watch", lambda arguments, timeout_s: (next(peaks), "pss"))
    figure = peak_memory((Path("x"), "y"), Point(1, 1), 50)
    assert (figure.value, figure.low, figure.high, figure.n) == (200, 100, 300, 3)
    monkeypatch.setattr(memory, "ENOUGH_S", 0.0)
    single = peak_memory((Path("x"), "y"), Point(1, 1), 50)
    assert (single.value, single.low, single.high, single.n) == (50, None, None, 1)


def test_a_child_that_fails_is_an_error_with_its_last_line(hungry: Path) -> None:
    with pytest.raises(EngineError, match="no such model"):
        peak(hungry, -1)


def test_a_child_that_hangs_is_ended(hungry: Path) -> None:
    (hungry / "megabytes").write_text("1")
    with pytest.raises(EngineError, match="a longer one"):
        peak_memory((hungry, "hungry"), Point(2, 16), 50, threads=2, repeats=1, timeout_s=0.01)
    assert not [
        child for child in psutil.Process().children() if "flyweight.measure.memory" in " ".join(child.cmdline())
    ]


def test_the_kind_of_memory_is_named() -> None:
    used, kind = tree_memory(psutil.Process())
    assert kind in {"pss", "uss", "rss"}
    assert used > 10 * 2**20


def test_the_peak_of_this_process() -> None:
    """A block of 200 MiB that is gone again before the end, and an error inside."""
    start = psutil.Process().memory_info().rss
    with memory.OwnPeak() as peak:
        block = np.ones(200 * 2**20, np.uint8)
        time.sleep(0.1)
        del block
    assert 190 * 2**20 < peak.bytes - start < 300 * 2**20
    before = threading.active_count()
    with pytest.raises(ZeroDivisionError), memory.OwnPeak() as other:
        raise ZeroDivisionError
    assert other.bytes >= 2**20
    assert threading.active_count() == before
