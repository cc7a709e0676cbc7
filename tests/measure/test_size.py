"""Counts and bytes against sums made the long way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flyweight.artifact import MANIFEST, Engine, Manifest, QuantizedTensor, write_manifest
from flyweight.errors import ArtifactError
from flyweight.measure import size

FAMILIES = ("bert", "distilbert", "roberta", "electra", "mpnet", "llama", "gpt2", "t5")


def bundle_of(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers", reason="needs the extra `compress`")
    from flyweight.models.bundle import Bundle
    from flyweight.models.families import family_of

    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder)
    nothing: Any = None
    return Bundle(model, nothing, family_of(model.config), "text-classification", nothing)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_parts_add_up_and_each_weight_has_its_place(tiny: Callable[..., Path], model_type: str) -> None:
    bundle = bundle_of(tiny(model_type, ("a", "b")))
    total = sum(p.numel() for p in bundle.model.parameters())
    parts = size.part_parameters(bundle)
    assert sum(parts.values()) == total
    assert set(parts) == {"embeddings", "attention", "mlp", "norms", "head"}  # nothing is "other"
    for name, parameter in bundle.model.named_parameters():
        part = size.part_of(name, bundle)
        if "mlp" in name or "ffn" in name or "intermediate" in name or "DenseReluDense" in name:
            assert part == "mlp", name
        if part == "norms":
            assert parameter.ndim == 1, name
        if part == "attention":
            assert "att" in name.lower(), name
    assert sum(m.value for m in size.part_bytes(bundle).values()) == 4 * total


def test_bert_by_hand(tiny: Callable[..., Path]) -> None:
    bundle = bundle_of(tiny("bert", ("a", "b")))
    vocabulary = bundle.model.config.vocab_size
    assert size.part_parameters(bundle) == {
        "embeddings": (vocabulary + 64 + 2) * 32,
        "attention": 4 * 4 * (32 * 32 + 32),
        "mlp": 4 * (2 * 32 * 64 + 64 + 32),
        "norms": (1 + 2 * 4) * 64,
        "head": 32 * 32 + 32 + 2 * 32 + 2,
    }


def test_packed_and_sparse_weights(tiny: Callable[..., Path]) -> None:
    bundle = bundle_of(tiny("bert", ("a", "b")))
    torch = pytest.importorskip("torch")
    from flyweight.models.bundle import Codes

    plain = {part: figure.value for part, figure in size.part_bytes(bundle).items()}
    counts = {key: figure.value for key, figure in size.weights(bundle).items()}
    assert counts["parameters"] - counts["nonzero_parameters"] == 32  # the padding token's row
    query = "bert.encoder.layer.0.attention.self.query.weight"  # [32, 32]
    up = "bert.encoder.layer.1.intermediate.dense.weight"  # [64, 32]
    info = QuantizedTensor(shape=(32, 32), bits=3, scheme="asymmetric", granularity="channel")
    codes = torch.zeros(32, 32, dtype=torch.uint8)
    bundle.quantized[query] = Codes(info, codes, torch.ones(32, 1), torch.zeros(32, 1, dtype=torch.uint8))
    with torch.no_grad():
        bundle.model.get_parameter(up)[:60] = 0
    bundle.sparse[up] = "unstructured"
    packed = {part: figure.value for part, figure in size.part_bytes(bundle).items()}
    assert plain["bytes.attention"] - packed["bytes.attention"] == 4 * 1024 - (3 * 1024 / 8 + 32 * 4 + 32)
    assert plain["bytes.mlp"] - packed["bytes.mlp"] == 4 * 2048 - (2048 / 8 + 4 * 4 * 32)
    after = {key: figure.value for key, figure in size.weights(bundle).items()}
    assert after["parameters"] == counts["parameters"]
    assert after["nonzero_parameters"] == counts["nonzero_parameters"] - 60 * 32


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_bytes_of_the_weights_are_those_of_the_file(tiny: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    from flyweight.models.bundle import Codes
    from flyweight.models.load import load
    from flyweight.models.storage import WEIGHTS, save
    from flyweight.tasks import task_named

    bundle = load(str(tiny(model_type, ("a", "b"))), task_named("text-classification"))
    names = [name for name, p in bundle.model.named_parameters() if p.ndim == 2][2:6]
    for number, name in enumerate(names):
        parameter = bundle.model.get_parameter(name)
        with torch.no_grad():
            parameter[torch.rand(parameter.shape) < 0.9] = 0
        if number < 2:
            bundle.sparse[name] = "unstructured"
        if number:  # the second is both pruned and quantized
            transposed = model_type == "gpt2"
            shape = tuple(reversed(parameter.shape)) if transposed else tuple(parameter.shape)
            info = QuantizedTensor(
                shape=shape, bits=number + 2, scheme="symmetric", granularity="channel", transposed=transposed
            )
            mask = (parameter.t() if transposed else parameter) != 0 if number == 1 else None
            codes = torch.randint(0, 4, shape, dtype=torch.uint8)
            bundle.quantized[name] = Codes(info, codes, torch.ones(shape[0], 1), None, mask)
    save(bundle, tmp_path)
    file = sum(tensor.numel() * tensor.element_size() for tensor in load_file(tmp_path / WEIGHTS).values())
    assert sum(figure.value for figure in size.part_bytes(bundle).values()) == file


def artifact(folder: Path) -> Manifest:
    (folder / "onnx").mkdir()
    (folder / "onnx" / "model.onnx").write_bytes(b"x" * 1000)
    (folder / "tokenizer.json").write_bytes(b"x" * 200)
    (folder / "vocab.txt").write_bytes(b"x" * 30)
    (folder / "report.html").write_bytes(b"x" * 5000)
    (folder / "model.safetensors").write_bytes(b"x" * 700)
    engine = Engine(file="onnx/model.onnx", inputs=("input_ids",), outputs=("logits",), precision="fp32", parity=0.0)
    manifest = Manifest(
        flyweight="0", created="now", task="text-classification", family="bert", inputs=("input_ids",),
        pad_token_id=0, max_length=64, origin="0" * 64, engines={"onnxruntime": engine},
    )  # fmt: skip
    return write_manifest(folder, manifest)


def test_bytes_on_disk(tmp_path: Path) -> None:
    artifact(tmp_path)
    manifest = (tmp_path / MANIFEST).stat().st_size
    found = size.disk(tmp_path, "onnxruntime")
    assert found["bytes"].value == 1000 + 230 + manifest
    assert found["artifact_bytes"].value == 1000 + 230 + 5000 + 700 + manifest
    assert size.disk(tmp_path, "torch")["bytes"].value == 700 + 230 + manifest


def test_a_plain_folder_counts_its_config(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 700)
    (tmp_path / "config.json").write_text(json.dumps({}))
    assert size.disk(tmp_path, "torch")["bytes"].value == 702


def test_an_engine_that_has_no_file_here(tmp_path: Path) -> None:
    artifact(tmp_path)
    assert (
        size.disk(tmp_path, "openvino")["bytes"].value == size.disk(tmp_path, "onnxruntime")["bytes"].value
    )  # one file
    with pytest.raises(ArtifactError, match="other's file"):
        size.disk(tmp_path, "other")
