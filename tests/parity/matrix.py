"""The table family x step x engine: None where `test_matrix.py` runs the cell, else the reason why it does not."""

from __future__ import annotations

from typing import Any

ENCODERS = ("bert", "distilbert", "roberta", "electra", "mpnet")
DECODERS = ("llama", "gpt2")
SEQ2SEQ = ("t5", "marian")
FAMILIES = (*ENCODERS, *DECODERS, *SEQ2SEQ)
ENGINES = ("onnxruntime", "openvino", "torch")

# name in the table -> (step, settings)
STEPS: dict[str, tuple[str, dict[str, Any]]] = {
    "finetune": ("finetune", {"max_steps": 2, "learning_rate": 1e-3}),
    "distill": ("distill", {"layers": "every-other", "max_steps": 2}),
    "prune heads": ("prune", {"target": "heads", "amount": 0.25}),
    "prune heads by Taylor": ("prune", {"target": "heads", "amount": 0.5, "criterion": "taylor", "samples": 16}),
    "prune neurons": ("prune", {"target": "neurons", "amount": 0.5}),
    "prune neurons over all layers": (
        "prune",
        {"target": "neurons", "amount": 0.5, "scope": "global", "criterion": "taylor", "samples": 16},
    ),
    "prune layers": ("prune", {"target": "layers", "amount": 0.5}),
    "prune weights": ("prune", {"target": "weights", "amount": 0.9}),
    "prune weights 2:4": ("prune", {"target": "weights", "pattern": "2:4"}),
    "prune weights, gradually": ("prune", {"target": "weights", "amount": 0.5, "gradual": "cubic", "max_steps": 2}),
    "quantize 8 bits, int8 kernels": ("quantize", {"bits": 8}),
    "quantize 8 bits asymmetric": ("quantize", {"bits": 8, "scheme": "asymmetric", "granularity": "tensor"}),
    "quantize 4 bits in groups": (
        "quantize",
        {"bits": 4, "granularity": "group", "group_size": 8, "activations": "none", "embeddings": 4},
    ),
    "quantize 3 bits, weights only": ("quantize", {"bits": 3, "activations": "none"}),
    "quantize binary": ("quantize", {"bits": 1, "scheme": "binary", "activations": "none", "embeddings": 8}),
}

NOT_YET = {
    "decoder": "a decoder: its surgery is tested (tests/models/test_surgery.py); steps and engines come with the causal task",
    "openvino": "1-bit weights with float inputs: OpenVINO takes no integers that the graph unpacks, and says so; onnxruntime does",
    "seq2seq": "an encoder-decoder: its surgery is tested (tests/models/test_surgery.py); steps and engines come with translation",
}


def reason(family: str, step: str, engine: str) -> str | None:
    """Why a cell is not tested."""
    if family in DECODERS:
        return NOT_YET["decoder"]
    if family in SEQ2SEQ:
        return NOT_YET["seq2seq"]
    if engine == "openvino" and step == "quantize binary":
        return NOT_YET["openvino"]
    return None


CELLS = {(f, s, e): reason(f, s, e) for f in FAMILIES for s in STEPS for e in ENGINES}
