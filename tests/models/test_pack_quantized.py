"""Folders in the layout of compressed-tensors: AutoModel answers as we do in a fresh process, and we read them back bit for bit."""

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
from safetensors.torch import load_file

from engine_cases import LABELS, arrays_of, bundle_of, quantize
from flyweight import artifact
from flyweight.methods.quantize.grid import Grid, quantize_weight
from flyweight.models import pack_quantized
from flyweight.models.bundle import Bundle
from flyweight.models.codes import described, parameter_value
from flyweight.models.storage import WEIGHTS, restore, save
from flyweight.report.card import what

Tiny = Callable[..., Path]
AUTO = """
import sys, numpy, torch, transformers
folder, auto, inputs, out = sys.argv[1:]
model = getattr(transformers, auto).from_pretrained(folder).eval()
with torch.no_grad():
    answer = model(**{name: torch.from_numpy(array) for name, array in numpy.load(inputs).items()})[0]
numpy.save(out, answer.numpy())
assert "flyweight" not in sys.modules
"""


def inputs(bundle: Bundle) -> dict[str, np.ndarray[Any, Any]]:
    arrays = arrays_of(replace(bundle, encoder=bundle.encoder._replace(truncate=True)))[0]
    return {name: arrays[name] for name in bundle.family.inputs}


def ours(bundle: Bundle) -> np.ndarray[Any, Any]:
    with torch.no_grad():
        answer = bundle.model.eval()(**{name: torch.from_numpy(array) for name, array in inputs(bundle).items()})
    return answer[0].numpy()  # type: ignore[no-any-return]


def stored(bundle: Bundle, folder: Path) -> artifact.Manifest:
    return artifact.write_manifest(folder, save(bundle, folder))


def loaded_by_transformers(bundle: Bundle, folder: Path, work: Path) -> np.ndarray[Any, Any]:
    pytest.importorskip("compressed_tensors")
    np.savez(work / "in.npz", **inputs(bundle))
    auto = "AutoModelForSequenceClassification" if bundle.task == "text-classification" else "AutoModel"
    subprocess.run([sys.executable, "-c", AUTO, folder, auto, work / "in.npz", work / "out.npy"], check=True)
    answer: np.ndarray[Any, Any] = np.load(work / "out.npy")
    return answer


def eight_bit_head(bundle: Bundle, grid: Grid, embeddings: Grid | None) -> Bundle:
    """What the step makes: blocks as asked, the head with 8 bits."""
    head = bundle.model.get_submodule("classifier") if bundle.labels else None
    quantize(bundle, grid, "none", embeddings, skip="classifier*")
    if head is not None:
        codes = quantize_weight(head.weight.detach(), Grid(8))
        head.weight.data.copy_(parameter_value(codes))
        bundle.quantized["classifier.weight"] = codes
    return bundle


@pytest.mark.parametrize("task", ["text-classification", "embedding"])
@pytest.mark.parametrize(
    ("grid", "embeddings"),
    [
        (Grid(4), None),
        (Grid(4, "symmetric", "group", 16), None),
        (Grid(8), None),
        (Grid(8, "symmetric", "group", 16), None),
        (Grid(8), Grid(8)),
    ],
    ids=str,
)
def test_automodel_gives_the_same_answers(
    tiny: Tiny, tmp_path: Path, grid: Grid, embeddings: Grid | None, task: str
) -> None:
    labels = LABELS if task == "text-classification" else None
    bundle = eight_bit_head(bundle_of(tiny("bert", labels=labels), task, labels), grid, embeddings)
    manifest = stored(bundle, tmp_path / "a")
    assert (manifest.plain, manifest.layout) == (True, "pack-quantized")
    assert "with that package installed `AutoModel` loads the folder" in what(manifest)
    answer = loaded_by_transformers(bundle, tmp_path / "a", tmp_path)
    np.testing.assert_allclose(answer, ours(bundle), atol=1e-6, rtol=0)
    assert not hasattr(bundle.model.config, "quantization_config")


@pytest.mark.parametrize("family", ["distilbert", "roberta", "electra", "mpnet"])
def test_other_encoders(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = quantize(bundle_of(tiny(family), "embedding"), Grid(8), "none")
    assert stored(bundle, tmp_path / "a").layout == "pack-quantized"
    answer = loaded_by_transformers(bundle, tmp_path / "a", tmp_path)
    np.testing.assert_allclose(answer, ours(bundle), atol=1e-6, rtol=0)


@pytest.mark.parametrize("bits", range(2, 9))
def test_k_bits_come_back_and_take_k_bits(tiny: Tiny, tmp_path: Path, bits: int) -> None:
    """Also where rows end within a word, and with the package's own unpacking beside ours."""
    odd = {"hidden_size": 44, "intermediate_size": 71}
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS, **odd)), Grid(bits), "none", Grid(bits))
    assert stored(bundle, tmp_path).layout == "pack-quantized"
    again, tensors = restore(tmp_path), load_file(tmp_path / WEIGHTS)
    np.testing.assert_array_equal(ours(again), ours(bundle))
    for name, codes in bundle.quantized.items():
        assert torch.equal(again.quantized[name].codes, codes.codes)
        assert torch.equal(again.quantized[name].scale, codes.scale)
        assert again.quantized[name].info == codes.info
        rows, columns = codes.info.shape
        assert tensors[f"{name}_packed"].shape == (rows, -(-columns * bits // 32))
        assert tensors[f"{name}_scale"].numel() == rows
        assert name not in tensors
    helpers = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    for name, codes in bundle.quantized.items():
        theirs = helpers.unpack_from_int32(tensors[f"{name}_packed"], bits, tensors[f"{name}_shape"])
        assert torch.equal(theirs.to(torch.int16), codes.codes.to(torch.int16) - 2 ** (bits - 1))
        assert torch.equal(helpers.pack_to_int32(theirs, bits), tensors[f"{name}_packed"])


def test_config_names_layers_by_patterns(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(4), "none", None, skip="*layer.1.output*")
    stored(bundle, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    (group,) = config["config_groups"].values()
    assert r"re:^(bert\.)?encoder\.layer\.\d+\.attention\.self\.query$" in group["targets"]
    assert r"re:^(bert\.)?encoder\.layer\.0\.output\.dense$" in group["targets"]
    assert not any(r"layer\.1\.output" in target for target in group["targets"])


UNFIT: dict[str, tuple[Callable[[Bundle], Bundle], str]] = {
    "rounded inputs": (lambda b: quantize(b, Grid(8), "dynamic"), "inputs of linears are rounded (dynamic)"),
    "asymmetric": (lambda b: quantize(b, Grid(4, "asymmetric"), "none", None), "a grid that is asymmetric"),
    "binary": (lambda b: quantize(b, Grid(1, "binary"), "none", None), "a grid that is binary"),
    "tensor": (lambda b: quantize(b, Grid(4, "symmetric", "tensor"), "none", None), "has one scale in all"),
    "tables": (lambda b: quantize(b, Grid(4), "none", Grid(8)), "tables and linears have different bits"),
    "pruned": (lambda b: quantize(b, Grid(4), "none", None, prune=0.5), "is pruned, smoothed or has outliers"),
    "smoothed": (lambda b: smoothed(quantize(b, Grid(4), "none", None)), "is pruned, smoothed or has outliers"),
}


def smoothed(bundle: Bundle) -> Bundle:
    name, codes = next(iter(bundle.quantized.items()))
    codes = described(replace(codes, smooth=torch.full((codes.info.shape[1],), 2.0)))
    bundle.model.get_parameter(name).data.copy_(parameter_value(codes))
    return replace(bundle, quantized={**bundle.quantized, name: codes})


@pytest.mark.parametrize("case", UNFIT)
def test_what_does_not_fit_has_our_own_layout_and_says_so(tiny: Tiny, tmp_path: Path, case: str) -> None:
    make, reason = UNFIT[case]
    bundle = make(bundle_of(tiny("bert", labels=LABELS)))
    assert reason in str(pack_quantized.misfit(bundle))
    manifest = stored(bundle, tmp_path)
    assert (manifest.plain, manifest.layout) == (False, "flyweight")
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert "`AutoModel` does not" in what(manifest)
    np.testing.assert_array_equal(ours(restore(tmp_path)), ours(bundle))


def test_conv1d_and_tied_weights_do_not_fit(tiny: Tiny) -> None:
    gpt = bundle_of(tiny("gpt2", labels=LABELS))
    weight = gpt.model.transformer.h[0].attn.c_attn.weight
    codes = quantize_weight(weight.detach().t(), Grid(8), transposed=True)
    gpt.quantized["transformer.h.0.attn.c_attn.weight"] = codes
    assert "belongs to a Conv1D" in str(pack_quantized.misfit(gpt))
    t5 = bundle_of(tiny("t5", labels=LABELS))
    name, table = next((n, p) for n, p in t5.model.named_parameters() if "shared" in n)
    t5.quantized[name] = quantize_weight(table.detach(), Grid(8))
    assert "belongs to several modules" in str(pack_quantized.misfit(t5))
