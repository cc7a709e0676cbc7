"""What is asked of `flyweight quantize`, and what each costs: the one place where flags and estimates stand."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.models import CALIBRATION


class Variant(NamedTuple):
    """flags: of `flyweight quantize`; minutes: on 2 quiet cores, for MiniLM and for MPNet, with judging 2,000 sentences.

    timed: whether it takes part in the row of times; variants that differ in numbers only run the same kernels
    """

    key: str
    summary: str
    flags: str
    minutes: tuple[float, float]
    timed: bool = False


GROUPS = "--granularity group --group-size 128 --activations none"
TABLES = "--embeddings 4"  # half of a small encoder: with them in 8 bits MiniLM does not come below 13 MB
LADDER = {"nearest": "round to nearest", "hqq": "HQQ", "awq": "AWQ", "gptq": "GPTQ", "reconstruct": "reconstruction"}
CALIBRATED = ("awq", "gptq", "reconstruct")
MINUTES = {"nearest": (1.2, 6), "hqq": (1.3, 7), "awq": (2.5, 12), "gptq": (2, 10), "reconstruct": (6, 28)}


def weights_only(bits: int, method: str, rest: str = "") -> Variant:
    """Asymmetric groups of 128 for every method, so that nothing else differs."""
    flags = f"--bits {bits} --scheme asymmetric --method {method} {GROUPS} {rest}".strip()
    return Variant(f"{bits}bit-{method}", f"{bits} bits, groups of 128, {LADDER[method]}", flags, MINUTES[method])


INT8 = (
    Variant("int8-dynamic", "int8, dynamic", "--bits 8 --activations dynamic", (1.2, 5), True),
    Variant("int8-token", "int8, one scale a token", "--bits 8 --activations token", (1.2, 5), True),
    Variant(
        "int8-static",
        "int8, static, GPTQ, tables of 7 bits",
        "--bits 8 --activations static --method gptq --embeddings 7",
        (3, 10),
        True,
    ),
    Variant("int8-static-nearest", "int8, static, round to nearest", "--bits 8 --activations static", (2, 8), True),
)
FOUR = tuple(weights_only(4, method, TABLES)._replace(timed=method == "gptq") for method in LADDER)
THREE = tuple(weights_only(3, method) for method in LADDER)
OTHERS = (
    Variant(
        "4bit-int8",
        "4 bits per channel, GPTQ, int8 activations",
        f"--bits 4 --method gptq --activations dynamic {TABLES}",
        (2, 10),
        True,
    ),
    Variant(
        "mixed",
        "mixed bits, 3.5 a weight, GPTQ",
        f"--bits-per-weight 3.5 --scheme asymmetric --method gptq {GROUPS} {TABLES}",
        (5, 28),
        True,
    ),
)
VECTORS = (*INT8, *FOUR, *OTHERS, *THREE)

TRAINED = (
    Variant(
        "2bit-train",
        "2 bits, trained",
        "--bits 2 --scheme asymmetric --method train --activations none --epochs 4",
        (14, 0),
    ),
    Variant(
        "ternary-train",
        "ternary, int8 activations, trained",
        "--bits 2 --scheme ternary --method train --activations dynamic --epochs 5",
        (17, 0),
    ),
    Variant(
        "binary-train",
        "binary, int8 activations, trained, 8 -> 4 -> 2 -> 1 bits",
        "--bits 1 --scheme binary --method train --activations dynamic --step-down 8,4,2,1 --epochs 6 --learning-rate 5e-4",
        (22, 0),
    ),
)
"""With --train, labels and the fine-tuned model as teacher. For MiniLM: MPNet's training takes hours here."""
CLASSES = (INT8[2], *(v for v in FOUR if v.key in ("4bit-nearest", "4bit-gptq", "4bit-reconstruct")))
"""Without training, on fine-tuned models."""


def arguments(variant: Variant, trial: bool) -> list[str]:
    """The flags, with calibration texts or training steps in number."""
    flags = variant.flags.split()
    if "train" in flags:
        return [*flags, "--max-steps", "4"] if trial else flags
    calibrated = "static" in flags or "--bits-per-weight" in flags or any(method in flags for method in CALIBRATED)
    flags += ["--samples", "16" if trial else str(CALIBRATION)] if calibrated else []
    return [*flags, "--iterations", "3"] if trial and "reconstruct" in flags else flags
