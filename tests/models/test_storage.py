"""What is saved is really smaller and comes back bit for bit, in a fresh process, and as plain Hugging Face where it can."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from flyweight import artifact
from flyweight.artifact import Manifest
from flyweight.errors import ArtifactError
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.codes import parameter_value
from flyweight.models.load import load
from flyweight.models.packing import packed_bytes
from flyweight.models.storage import WEIGHTS, restore, save
from flyweight.tasks import task_named
from tiny import CLASSIFIERS, ENCODERS, SENTENCES

TASK = task_named("text-classification")
Tiny = Callable[..., Path]


def opened(tiny: Tiny, model_type: str = "bert", **changes: Any) -> Bundle:
    return load(tiny(model_type, ("negative", "positive"), **changes), TASK)


def batch(bundle: Bundle) -> dict[str, torch.Tensor]:
    arrays = bundle.encoder.examples(SENTENCES[:4]).batch(range(4), bundle.encoder.pad)
    return {name: torch.from_numpy(array) for name, array in arrays.items() if name in bundle.family.inputs}


def outputs(bundle: Bundle) -> torch.Tensor:
    with torch.no_grad():
        answer: torch.Tensor = bundle.model(**batch(bundle)).logits
    return answer


def stored(bundle: Bundle, folder: Path) -> Manifest:
    return artifact.write_manifest(folder, save(bundle, folder))


def prune(bundle: Bundle, share: float, name_part: str = "encoder.layer") -> Bundle:
    """Zero the smallest weights of every block linear, as the step does."""
    sparse = {}
    with torch.no_grad():
        for name, module in surgery.linears(bundle.model, bundle.family).items():
            weight = module.get_parameter("weight")
            weight[weight.abs() <= weight.abs().flatten().kthvalue(int(share * weight.numel())).values] = 0
            sparse[f"{name}.weight"] = "unstructured"
    return replace(bundle, sparse=sparse)


def quantized(bundle: Bundle, grid: Grid) -> Bundle:
    """Quantize every block linear, as the step does."""
    found = {}
    for name, module in surgery.linears(bundle.model, bundle.family).items():
        weight = surgery.weight_2d(module).detach()
        mask = weight != 0 if f"{name}.weight" in bundle.sparse else None
        found[f"{name}.weight"] = codes = quantize_weight(weight, grid, mask, hasattr(module, "nf"))
        with torch.no_grad():
            module.get_parameter("weight").copy_(parameter_value(codes))
    return replace(bundle, quantized=found)


def weight_bytes(folder: Path, names: list[str]) -> int:
    """Bytes in model.safetensors of these weights, in whatever parts they are stored."""
    tensors = load_file(folder / WEIGHTS)
    parts = [t for key, t in tensors.items() if any(key == name or key.startswith(f"{name}.") for name in names)]
    return sum(part.numel() * part.element_size() for part in parts)


def assert_same(a: Bundle, b: Bundle) -> None:
    left, right = a.model.state_dict(), b.model.state_dict()
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert torch.equal(tensor, right[name]), name
    assert torch.equal(outputs(a), outputs(b))
    assert (a.labels, a.sparse, a.activations, a.origin) == (b.labels, b.sparse, b.activations, b.origin)
    assert a.encoder[1:] == b.encoder[1:]
    assert a.quantized.keys() == b.quantized.keys()
    for name, codes in a.quantized.items():
        other = b.quantized[name]
        assert codes.info == other.info
        for field in ("codes", "scale", "zero_point", "mask"):
            one, two = getattr(codes, field), getattr(other, field)
            assert (one is None) == (two is None), field
            assert one is None or (one.dtype == two.dtype and torch.equal(one, two)), field


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_dense_models_come_back_and_are_plain_hugging_face(tiny: Tiny, model_type: str, tmp_path: Path) -> None:
    bundle = opened(tiny, model_type)
    manifest = stored(bundle, tmp_path / "a")
    assert manifest.plain
    assert_same(bundle, restore(tmp_path / "a"))
    model = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "a")
    with torch.no_grad():
        assert torch.equal(model.eval()(**batch(bundle)).logits, outputs(bundle))
    tokens = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert tokens(SENTENCES)["input_ids"] == [
        list(ids) for ids, _ in bundle.encoder.encode([("", s, None) for s in SENTENCES])
    ]


@pytest.mark.parametrize("model_type", CLASSIFIERS)
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize(
    "grid", [Grid(3), Grid(8, "asymmetric", "tensor"), Grid(5, "asymmetric", "group", 8), Grid(1, "binary")]
)
def test_packed_models_come_back(tiny: Tiny, model_type: str, sparse: bool, grid: Grid, tmp_path: Path) -> None:
    bundle = opened(tiny, model_type)
    bundle = quantized(prune(bundle, 0.7) if sparse else bundle, grid)
    bundle.activations = "dynamic"
    manifest = stored(bundle, tmp_path / "a")
    assert not manifest.plain
    assert_same(bundle, restore(tmp_path / "a"))


def test_cut_shapes_come_back(tiny: Tiny, tmp_path: Path) -> None:
    for model_type in ENCODERS:
        bundle = opened(tiny, model_type)
        surgery.keep_layers_of(bundle, {"encoder": [0, 2, 3]})
        surgery.keep_heads(bundle.model, bundle.family, "encoder", 1, 0, [1, 3])
        surgery.keep_neurons(bundle.model, bundle.family, "encoder", 2, range(0, 64, 3))
        bundle = quantized(prune(bundle, 0.5), Grid(4))
        manifest = stored(bundle, tmp_path / model_type)
        assert not manifest.plain
        assert manifest.blocks["encoder"][1].heads == ((1, 3),)
        again = restore(tmp_path / model_type)
        assert_same(bundle, again)
        assert surgery.shapes(again.model, again.family) == manifest.blocks


def test_a_fresh_process_gives_the_same_answers(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantized(prune(opened(tiny), 0.6), Grid(3, "asymmetric"))
    stored(bundle, tmp_path / "a")
    np.savez(tmp_path / "in.npz", **{name: tensor.numpy() for name, tensor in batch(bundle).items()})
    code = """
import sys, numpy, torch
from flyweight.models.storage import restore
folder, inputs, out = sys.argv[1:]
model = restore(folder).model
with torch.no_grad():
    logits = model(**{name: torch.from_numpy(array) for name, array in numpy.load(inputs).items()}).logits
numpy.save(out, logits.numpy())
"""
    arguments = [str(tmp_path / name) for name in ("a", "in.npz", "out.npy")]
    subprocess.run([sys.executable, "-c", code, *arguments], check=True)
    assert np.load(tmp_path / "out.npy").tobytes() == outputs(bundle).numpy().tobytes()


def test_ninety_percent_zeros_take_at_most_15_percent(tiny: Tiny, tmp_path: Path) -> None:
    bundle = prune(opened(tiny), 0.9)
    stored(bundle, tmp_path / "a")
    names = list(bundle.sparse)
    dense = sum(bundle.model.get_parameter(name).numel() * 4 for name in names)
    assert weight_bytes(tmp_path / "a", names) <= 0.15 * dense
    assert_same(bundle, restore(tmp_path / "a"))


@pytest.mark.parametrize("bits", range(1, 9))
def test_k_bits_take_k_bits(tiny: Tiny, tmp_path: Path, bits: int) -> None:
    grid = Grid(1, "binary") if bits == 1 else Grid(bits)
    bundle = quantized(
        opened(tiny, hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_hidden_layers=1), grid
    )
    bundle.activations = "dynamic"  # our own layout; see test_pack_quantized.py for the other one
    stored(bundle, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    for name, codes in bundle.quantized.items():
        rows, columns = codes.info.shape
        assert tensors[f"{name}.codes"].numel() == packed_bytes(rows * columns, bits)
        assert tensors[f"{name}.scale"].numel() == rows
        assert name not in tensors
    if bits == 1:  # the whole block, with its biases and norms
        block = [name for name, _ in bundle.model.named_parameters() if "encoder.layer" in name]
        dense = sum(bundle.model.get_parameter(name).numel() * 4 for name in block)
        assert weight_bytes(tmp_path / "a", block) <= dense / 25


def test_sparse_and_quantized_takes_codes_of_the_kept_only(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantized(prune(opened(tiny), 0.75), Grid(4, "asymmetric"))
    stored(bundle, tmp_path / "a")
    tensors = load_file(tmp_path / "a" / WEIGHTS)
    for name in bundle.quantized:
        total = bundle.model.get_parameter(name).numel()
        assert tensors[f"{name}.codes"].numel() == packed_bytes(total // 4, 4)
        assert tensors[f"{name}.bitmask"].numel() == total // 8


def test_nothing_private_is_written(tiny: Tiny, tmp_path: Path) -> None:
    source = tiny("bert", ("negative", "positive"))
    stored(load(source, TASK), tmp_path / "a")
    for path in (tmp_path / "a").iterdir():
        assert str(source.parent).encode() not in path.read_bytes(), path.name


def test_files_that_do_not_fit_the_manifest(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantized(prune(opened(tiny), 0.5), Grid(4, "asymmetric"))
    stored(bundle, tmp_path)
    whole = load_file(tmp_path / WEIGHTS)
    name = next(iter(bundle.quantized))

    def message(**changes: torch.Tensor | None) -> str:
        tensors = {**whole, **changes}
        save_file({key: t for key, t in tensors.items() if t is not None}, tmp_path / WEIGHTS, {"format": "pt"})
        with pytest.raises(ArtifactError) as caught:
            restore(tmp_path)
        return str(caught.value)

    assert f"expected the weight '{name}.scale'" in message(**{f"{name}.scale": None})
    assert "'extra' beside them" in message(extra=torch.zeros(1))
    assert "bytes for" in message(**{f"{name}.codes": torch.zeros(3, dtype=torch.uint8)})
    assert "expected torch.float32 (2,) as 'classifier.bias'" in message(**{"classifier.bias": torch.zeros(3)})
    (tmp_path / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes()[:-9])
    with pytest.raises(ArtifactError, match="expected a readable"):
        restore(tmp_path)


def test_a_full_disk_leaves_nothing_behind(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("resource", reason="limits on file sizes need a POSIX system")
    code = """
import resource, signal, sys
from pathlib import Path
from flyweight import artifact
from flyweight.errors import StorageError
from flyweight.models.load import load
from flyweight.models.storage import save
from flyweight.tasks import task_named
bundle = load(sys.argv[1], task_named("text-classification"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), resource.RLIM_INFINITY))
try:
    with artifact.write_folder(Path(sys.argv[2]), overwrite=True) as folder:
        save(bundle, folder)
except StorageError as error:
    print(error)
"""
    out = tmp_path / "a"
    stored(opened(tiny), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    for limit in ("100", "5000", "50000"):  # in the config, the tokenizer, the weights
        command = [sys.executable, "-c", code, str(tiny("bert", ("negative", "positive"))), str(out), limit]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.stdout.startswith("expected room and permission to write"), done.stderr
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_the_real_model_embeds_as_before(minilm: Path, tmp_path: Path) -> None:
    task = task_named("embedding")
    bundle = load(minilm, task)
    manifest = stored(bundle, tmp_path / "a")
    assert manifest.plain
    model = transformers.AutoModel.from_pretrained(tmp_path / "a").eval()
    with torch.no_grad():
        left = bundle.model(**batch(bundle)).last_hidden_state
        assert torch.equal(model(**batch(bundle)).last_hidden_state, left)
        assert torch.equal(restore(tmp_path / "a").model(**batch(bundle)).last_hidden_state, left)
    content = json.loads((tmp_path / "a" / "tokenizer.json").read_text(encoding="utf-8"))
    assert content["truncation"] is None
    assert content["padding"] is None
    reloaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    long = " ".join(SENTENCES)
    assert len(reloaded(long)["input_ids"]) == len(bundle.encoder.encode([("", long, None)])[0][0]) > 128
