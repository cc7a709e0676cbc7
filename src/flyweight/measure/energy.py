"""Energy of a stretch of work: from the processor's or the graphics card's own counter, else estimated and said to be."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import psutil

from flyweight.extras import have

__all__ = ["Meter", "Rapl", "nvml_joules"]

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True)
class Rapl:
    """Intel's and AMD's running average power limit counters, as Linux shows them.

    Packages, and memory controllers that are counted apart from them; cores and graphics are inside their package,
    and `psys` would count everything twice.
    """

    zones: tuple[Path, ...]

    @classmethod
    def find(cls, root: Path = POWERCAP) -> Self | None:
        """None where there is no counter or it may not be read (usual in virtual machines and without rights)."""
        zones = []
        for zone in sorted(root.glob("intel-rapl:*")) if root.is_dir() else []:
            with contextlib.suppress(OSError, ValueError):
                name = (zone / "name").read_text().strip()
                if name.startswith("package") or name == "dram":
                    int((zone / "energy_uj").read_text())
                    zones.append(zone)
        return cls(tuple(zones)) if zones else None

    def read(self) -> tuple[int, ...]:
        """Microjoules of every zone. Raises OSError when a counter has gone."""
        return tuple(int((zone / "energy_uj").read_text()) for zone in self.zones)

    def joules(self, before: tuple[int, ...], after: tuple[int, ...]) -> float:
        """Between two readings at most one wrap of the counter apart (about 20 minutes at 200 W)."""
        total = 0
        for zone, first, last in zip(self.zones, before, after, strict=True):
            if last < first:
                last += int((zone / "max_energy_range_uj").read_text())
            total += last - first
        return total / 1e6


def nvml_joules() -> float | None:
    """Energy that all NVIDIA cards have used since their driver was loaded, or None (extra `energy`, Volta or newer)."""
    if not have("pynvml"):
        return None
    import pynvml

    try:
        pynvml.nvmlInit()
        cards = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        return float(sum(pynvml.nvmlDeviceGetTotalEnergyConsumption(card) for card in cards)) / 1e3
    except pynvml.NVMLError:
        return None


def cpu_seconds() -> float:
    """CPU time of this process and all below it, those that ended included."""
    own = psutil.Process()
    times = own.cpu_times()
    total = float(times.user + times.system + getattr(times, "children_user", 0) + getattr(times, "children_system", 0))
    for child in own.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            used = child.cpu_times()
            total += used.user + used.system
    return total


class Meter:
    """`with Meter() as meter: work()`, then `meter.joules`, `meter.seconds` and `meter.method`.

    watts_per_core: assumed power of a busy core where no counter can be read
    card:           count NVIDIA cards as well (the work runs on one)
    method:         "rapl", "estimated", "rapl+nvml" or "estimated+nvml", with what it covers in `about`
    """

    def __init__(self, watts_per_core: float = 10.0, card: bool = False, powercap: Path = POWERCAP) -> None:
        self.watts_per_core = watts_per_core
        self.rapl = Rapl.find(powercap)
        self.card = card and nvml_joules() is not None
        self.joules = self.seconds = self._start = 0.0

    @property
    def method(self) -> str:
        source = "estimated" if self.rapl is None else "rapl"
        return f"{source}+nvml" if self.card else source

    @property
    def about(self) -> str:
        """The method with what a reader must know of it."""
        if self.rapl is None:
            text = f"estimated: CPU time x {self.watts_per_core:g} W a core, no energy counter could be read"
        else:
            text = "rapl: whole processor package, idle power included"
        return f"{text}; cards by nvml" if self.card else text

    @property
    def elapsed(self) -> float:
        """Seconds since the beginning of the block."""
        return time.perf_counter() - self._start

    def __enter__(self) -> Self:
        self._before = self._read()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: Any) -> None:
        self.seconds = self.elapsed
        cpu, zones, card = self._read()
        if self.rapl is not None:
            self.joules = self.rapl.joules(self._before[1], zones)
        else:
            self.joules = (cpu - self._before[0]) * self.watts_per_core
        self.joules += card - self._before[2]

    def _read(self) -> tuple[float, tuple[int, ...], float]:
        card = nvml_joules() if self.card else None
        return cpu_seconds(), () if self.rapl is None else self.rapl.read(), card or 0.0
