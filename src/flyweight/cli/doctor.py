"""`flyweight doctor`: what this machine can run fast, and what is missing."""

from __future__ import annotations

import importlib.metadata
from typing import Any

from flyweight.cli.options import Json
from flyweight.cli.output import bytes_text, print_json, print_table
from flyweight.extras import EXTRAS, have


def doctor(json: Json = False) -> None:
    """What this machine can run fast: processor, engines, installed extras, energy counters."""
    from flyweight.measure.environment import environment

    machine = environment()
    report: dict[str, Any] = {
        "machine": machine,
        "int8": int8_outlook(machine["flags"], machine["machine"]),
        "saturates": saturating(),
        "engines": engines(),
        "extras": extras(),
        "energy": energy(),
        "cache": cache(),
    }
    if json:
        print_json(report)
        return
    print_table(("machine", ""), machine_rows(machine, report["int8"], report["saturates"]))
    print_table(("engine", "state"), [(name, row["reason"] or "ready") for name, row in report["engines"].items()])
    print_table(("extra", "state"), [(name, extra_text(name, row)) for name, row in report["extras"].items()])
    print_table(("elsewhere", ""), [("energy", report["energy"]["text"]), ("cache", cache_text(report["cache"]))])


def machine_rows(machine: dict[str, Any], int8: str, saturates: dict[str, bool]) -> list[tuple[str, str]]:
    return [
        ("processor", machine["cpu"]),
        ("cores", f"{machine['cores']} usable"),
        ("memory", bytes_text(machine["memory_bytes"])),
        ("features", " ".join(machine["flags"]) or "the system does not tell"),
        ("int8", int8),
        ("int8 sums", sums_text(saturates)),
        ("system", f"{machine['system']}, Python {machine['python']}"),
    ]


def int8_outlook(flags: list[str], machine: str) -> str:
    """What 8-bit integer kernels do on a processor with these features, in a sentence."""
    have_flag = set(flags).__contains__
    if have_flag("amx_int8"):
        return "AMX: int8 matrix products run in tiles, many times the rate of fp32"
    if have_flag("avx512_vnni") or have_flag("avx_vnni"):
        return "VNNI: int8 products take one instruction; int8 models should be both smaller and faster"
    if have_flag("avx2"):
        return (
            "no VNNI: int8 products take three instructions and sums of pairs can saturate at 16 bits; "
            "models get smaller, hardly faster, and their quality has to be measured here"
        )
    if have_flag("i8mm"):
        return "i8mm: int8 matrix products in hardware; int8 models should be both smaller and faster"
    if have_flag("asimddp"):
        return "dot-product instructions: int8 models should be both smaller and faster"
    known = "no int8 instructions found" if flags else f"unknown: {machine} does not tell its features"
    return f"{known}; measure before you rely on int8"


def saturating() -> dict[str, bool]:
    """By engine that is here: whether its int8 kernel adds pairs of products in 16 bits, found by multiplying."""
    from flyweight.engines import onnxruntime, openvino

    return {
        name.__name__.rpartition(".")[2]: name.saturates() for name in (onnxruntime, openvino) if not name.available()
    }


def sums_text(saturates: dict[str, bool]) -> str:
    wrong = [name for name, saturating in saturates.items() if saturating]
    if not wrong:
        return f"exact in {' and '.join(saturates) or 'no engine'}: 8-bit weights need no reduced range"
    return (
        f"saturate in {' and '.join(wrong)}: quantize takes 7 bits for linears here (reduce_range: auto); "
        "8-bit weights made elsewhere run in a slower, exact kernel of onnxruntime, and are refused by openvino"
    )


def engines() -> dict[str, dict[str, str | None]]:
    from flyweight.engines.engine import ENGINES, engine_named

    return {name: {"reason": engine_named(name).available(), "version": version(name)} for name in ENGINES}


def extras() -> dict[str, dict[str, Any]]:
    """By extra: the packages that are there with their versions, and those missing."""
    found: dict[str, dict[str, Any]] = {}
    for module, extra in EXTRAS.items():
        row = found.setdefault(extra, {"installed": {}, "missing": []})
        if have(module):
            row["installed"][module] = version(module)
        else:
            row["missing"].append(module)
    return found


def extra_text(name: str, row: dict[str, Any]) -> str:
    if not row["missing"]:
        return ", ".join(f"{module} {number or ''}".strip() for module, number in row["installed"].items())
    return f'{", ".join(row["missing"])} missing; run: pip install "flyweight[{name}]"'


def version(module: str) -> str | None:
    distribution = {"pynvml": "nvidia-ml-py"}.get(module, module)
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def energy() -> dict[str, Any]:
    from flyweight.measure.energy import POWERCAP, Meter, nvml_joules

    meter = Meter()
    card = nvml_joules() is not None
    if meter.rapl is not None:
        text = "processor counter readable (rapl)"
    elif POWERCAP.is_dir() and any(POWERCAP.glob("intel-rapl:*")):
        text = "processor counter there, but not readable by this user: energy is estimated from CPU time"
    else:
        text = "no processor counter (usual in virtual machines): energy is estimated from CPU time"
    return {"rapl": meter.rapl is not None, "nvml": card, "text": text + ("; cards readable (nvml)" if card else "")}


def cache() -> dict[str, Any]:
    from flyweight.cache import Cache

    store = Cache()
    return {"path": store.root, "bytes": sum(entry.bytes for entry in store.entries()), "cap_bytes": store.cap()}


def cache_text(state: dict[str, Any]) -> str:
    return f"{state['path']}, {bytes_text(state['bytes'])} of at most {bytes_text(state['cap_bytes'])}"
