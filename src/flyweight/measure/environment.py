"""The machine and the versions that figures were taken with. No host name, no user name, no path."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

__all__ = ["FLAGS", "cpu_flags", "cpu_model", "environment"]

FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "neon",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
)
"""CPU features that decide which kernels an engine takes."""
PACKAGES = ("flyweight", "numpy", "onnxruntime", "tokenizers", "torch", "transformers", "openvino")
CPUINFO = Path("/proc/cpuinfo")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")


def environment() -> dict[str, Any]:
    """JSON: cpu, flags, cores, memory_bytes, system, python, versions of the packages that are installed."""
    return {
        "cpu": cpu_model(),
        "flags": list(cpu_flags()),
        "cores": usable_cores(),
        "physical_cores": psutil.cpu_count(logical=False),
        "memory_bytes": usable_memory(),
        "machine": platform.machine(),
        "system": f"{platform.system()} {platform.release().partition('-')[0]}",
        "python": platform.python_version(),
        "versions": versions(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def usable_cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def usable_memory(limit: Path = CGROUP_LIMIT) -> int:
    """Bytes of memory, or of the control group where that is less."""
    total = int(psutil.virtual_memory().total)
    with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
        total = min(total, int(limit.read_text()))
    return total


def cpu_model(cpuinfo: Path = CPUINFO) -> str:
    if name := _cpuinfo(cpuinfo).get("model name"):
        return name
    if platform.system() == "Darwin":
        return _sysctl("machdep.cpu.brand_string") or platform.machine()
    return platform.processor() or platform.machine() or "unknown"


def cpu_flags(cpuinfo: Path = CPUINFO) -> tuple[str, ...]:
    """Those of FLAGS that the processor has, empty where the system does not tell."""
    fields = _cpuinfo(cpuinfo)
    given = set((fields.get("flags") or fields.get("Features") or "").split())
    if not given and platform.system() == "Darwin":
        pairs = {"neon": "neon", "asimddp": "arm.FEAT_DotProd", "i8mm": "arm.FEAT_I8MM", "bf16": "arm.FEAT_BF16"}
        given = {flag for flag, key in pairs.items() if _sysctl(f"hw.optional.{key}") == "1"}
        given |= {"avx2"} if _sysctl("hw.optional.avx2_0") == "1" else set()
    if "asimd" in given:  # what Linux calls NEON on 64-bit ARM
        given.add("neon")
    return tuple(flag for flag in FLAGS if flag in given)


def _cpuinfo(path: Path) -> dict[str, str]:
    """Fields of the first processor in Linux's /proc/cpuinfo."""
    found: dict[str, str] = {}
    with contextlib.suppress(OSError):
        for line in path.read_text(errors="replace").splitlines():
            name, separator, value = line.partition(":")
            if separator:
                found.setdefault(name.strip(), value.strip())
    return found


def _sysctl(name: str) -> str:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(["sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=True)
        return done.stdout.strip()
    return ""
