from __future__ import annotations

import getpass
import json
import platform
from pathlib import Path

from flyweight.measure.environment import cpu_flags, cpu_model, environment, usable_memory

X86 = """processor\t: 0
model name\t: Some CPU @ 2.00GHz
flags\t\t: fpu sse2 avx2 fma avx512f avx512_vnni amx_int8

processor\t: 1
model name\t: Another
"""
ARM = "processor\t: 0\nFeatures\t: fp asimd asimddp i8mm bf16 sve\n"


def test_reads_linux_processors(tmp_path: Path) -> None:
    (tmp_path / "x86").write_text(X86)
    (tmp_path / "arm").write_text(ARM)
    assert cpu_model(tmp_path / "x86") == "Some CPU @ 2.00GHz"
    assert cpu_flags(tmp_path / "x86") == ("avx2", "fma", "avx512f", "avx512_vnni", "amx_int8")
    assert cpu_flags(tmp_path / "arm") == ("neon", "asimddp", "i8mm", "bf16", "sve")
    assert cpu_model(tmp_path / "none")


def test_a_control_group_limits_memory(tmp_path: Path) -> None:
    limit = tmp_path / "memory.max"
    limit.write_text("268435456\n")
    assert usable_memory(limit) == 268435456
    limit.write_text("max\n")
    assert usable_memory(limit) == usable_memory(tmp_path / "none") > 268435456


def test_json_without_names() -> None:
    found = environment()
    text = json.dumps(found)
    assert found["versions"]["numpy"]
    assert found["cores"] >= 1
    if len(platform.node()) > 3:
        assert platform.node() not in text
    assert f'"{getpass.getuser()}"' not in text
    assert str(Path.home()) not in text or str(Path.home()) == "/"
