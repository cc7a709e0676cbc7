"""A manifest as a real run writes it, with made-up figures."""

from __future__ import annotations

from typing import Any

from flyweight.artifact import (
    BlockShape,
    Engine,
    FileEntry,
    Manifest,
    Measurement,
    QuantizedTensor,
    StepRecord,
    Verdict,
)

Figures = dict[str, Measurement]
# what a torch reference costs, what onnxruntime and compression make of it: (value, unit, factors)
TORCH: dict[str, tuple[float, str, float, float]] = {
    "parameters": (22_713_986, "weights", 1, 0.62),
    "nonzero_parameters": (22_713_602, "weights", 1, 0.62),
    "flops": (2_867_000_000, "FLOP", 1, 0.36),
    "bytes": (91_700_000, "B", 0.993, 0.16),
    "artifact_bytes": (183_400_000, "B", 1, 0.33),
    "bytes.embeddings": (46_890_000, "B", 1, 0.25),
    "bytes.attention": (14_190_000, "B", 1, 0.094),
    "bytes.mlp": (28_350_000, "B", 1, 0.094),
    "bytes.norms": (19_968, "B", 1, 0.5),
    "bytes.head": (594_440, "B", 1, 1),
    "peak_memory_bytes": (612_000_000, "B", 0.5, 0.21),
    "latency_ms.p50@1x32": (16.1, "ms", 0.55, 0.11),
    "latency_ms.p50@1x128": (42.3, "ms", 0.77, 0.13),
    "latency_ms.p50@32x32": (281.0, "ms", 0.9, 0.17),
    "latency_ms.p50@32x128": (1163.0, "ms", 0.93, 0.18),
    "latency_ms.p90@1x128": (47.7, "ms", 0.8, 0.13),
    "latency_ms.p99@1x128": (58.0, "ms", 0.8, 0.14),
    "throughput_per_s@32x32": (113.9, "items/s", 1.1, 5.9),
    "throughput_per_s@32x128": (27.5, "items/s", 1.07, 5.5),
    "energy_j_per_item": (0.41, "J", 0.93, 0.19),
    "co2e_g_per_item": (5.46e-5, "g", 0.93, 0.19),
    "cost_per_million": (1.01, "price", 0.93, 0.18),
}


def figure(value: float, unit: str, spread: float = 0.02) -> Measurement:
    plain = unit in ("weights", "FLOP") or (unit == "B" and spread == 0)
    method = (
        "estimated: CPU time x 10 W a core" if unit == "J" else "wall clock, 1 thread, random ids, interleaved rounds"
    )
    if plain:
        return Measurement(value=value, unit=unit, method="counted")
    return Measurement(value=value, unit=unit, low=value * (1 - spread), high=value * (1 + spread), n=30, method=method)


def share(value: float, low: float, high: float) -> Measurement:
    return Measurement(value=value, unit="share", low=low, high=high, n=1696, method="held-out examples")


def measurements() -> dict[str, Figures]:
    def column(which: int) -> Figures:
        factor = (lambda row: 1.0, lambda row: row[2], lambda row: row[3])[which]
        return {
            key: figure(row[0] * factor(row), row[1], 0 if "bytes" in key and "memory" not in key else 0.02)
            for key, row in TORCH.items()
        }

    torch, onnx, result = (column(i) for i in range(3))
    torch |= {"quality.accuracy": share(0.839, 0.821, 0.856), "quality.macro_f1": share(0.8388, 0.8209, 0.8559)}
    onnx |= {
        "quality.accuracy": share(0.839, 0.821, 0.856),
        "quality.macro_f1": share(0.8388, 0.8209, 0.8559),
        "quality.accuracy.difference": share(0.0, 0.0, 0.0),
        "speedup.reference_torch@1x128": figure(1.3, "x"),
    }
    result |= {
        "quality.accuracy": share(0.834, 0.816, 0.851),
        "quality.macro_f1": share(0.8339, 0.816, 0.8509),
        "quality.accuracy.difference": share(-0.005, -0.0165, 0.0065),
        "quality.macro_f1.difference": share(-0.0049, -0.0166, 0.0066),
        "speedup.reference_torch@1x128": figure(7.7, "x"),
        "speedup.reference_onnxruntime@1x128": figure(5.9, "x"),
    }
    return {"reference_torch": torch, "reference_onnxruntime": onnx, "result": result}


def history(steps: int, first: float, last: float) -> list[dict[str, float]]:
    return [
        {"step": 213 * i, "epoch": i, "loss": 0.6 / i, "metric": first + (last - first) * i / steps}
        for i in range(1, steps + 1)
    ]


def records() -> tuple[StepRecord, ...]:
    def step(name: str, seconds: float, after: tuple[float, float, float], **notes: Any) -> StepRecord:
        weights, size, quality = after
        left = {"parameters": weights, "nonzero_parameters": weights, "bytes": size, "quality": quality}
        settings = {"epochs": 3.0, "learning_rate": 5e-05, "layers": "every-other", "skip": [], "teacher": "reference"}
        return StepRecord(name=name, settings=settings, seconds=seconds, notes={**notes, "after": left})

    control = {"history": history(3, 0.79, 0.821), "best_metric": 0.821}
    return (
        step("finetune", 412.0, (22.71e6, 90.9e6, 0.842), history=history(3, 0.81, 0.842), best_metric=0.842),
        step(
            "distill", 388.2, (17.4e6, 69.6e6, 0.838),
            history=history(3, 0.80, 0.838), best_metric=0.838, teacher_metric=0.842, control=control,
        ),
        step("prune", 9.1, (16.9e6, 67.7e6, 0.825)),
        step("prune", 11.7, (14.1e6, 56.5e6, 0.812)),
        step("distill", 245.0, (14.1e6, 56.5e6, 0.836), history=history(2, 0.83, 0.836), best_metric=0.836),
        step("quantize", 2.2, (14.1e6, 14.3e6, 0.834), bits_per_weight=8.08),
    )  # fmt: skip


def make(**changes: Any) -> Manifest:
    engine = Engine(
        file="onnx/model.onnx", inputs=("input_ids", "attention_mask", "token_type_ids"), outputs=("logits",),
        precision="int8-dynamic", parity=0.0123,
    )  # fmt: skip
    names = (
        "README.md",
        "config.json",
        "model.safetensors",
        "onnx/model.onnx",
        "recipe.yaml",
        "report.html",
        "tokenizer.json",
    )
    fields: dict[str, Any] = {
        "flyweight": "0.1.0", "created": "2026-11-22T10:00:00+00:00", "task": "text-classification",
        "labels": ("negative", "positive"), "family": "bert", "inputs": engine.inputs, "pad_token_id": 0,
        "max_length": 256, "origin": "9f86d081884c7d65" * 4, "seed": 0, "plain": False, "activations": "dynamic",
        "blocks": {"encoder": tuple(BlockShape(heads=((0, 1, 2, 4),), neurons=1152) for _ in range(3))},
        "steps": records(), "engines": {"onnxruntime": engine},
        "quantized": {"w": QuantizedTensor(shape=(2, 2), bits=8, scheme="symmetric", granularity="channel")},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "environment": {
            "cpu": "Some CPU @ 2.0GHz", "flags": ["avx2", "avx512_vnni"], "cores": 2, "memory_bytes": 24_800_000_000,
            "system": "Linux 6.1", "python": "3.11.9", "versions": {"onnxruntime": "1.31.1", "numpy": "2.4.6"},
        },
        "measurements": measurements(),
        "verdict": Verdict(accepted=True, text="Accepted: accuracy 83.4 against 83.9 of the reference."),
        "files": {name: FileEntry(sha256="ab" * 32, bytes=123_456) for name in names},
    }  # fmt: skip
    return Manifest(**{**fields, **changes})
