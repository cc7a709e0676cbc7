"""Dimensions cut out of the residual stream: a model whose norms see no others, in memory, on disk and in the ONNX file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import tiny as tiny_models
from engine_cases import LABELS, arrays_of, bundle_of, torch_answers
from flyweight import parity
from flyweight.artifact import write_manifest
from flyweight.engines import onnx_export
from flyweight.errors import StepError
from flyweight.measure.flops import flops
from flyweight.models import stream, surgery
from flyweight.models.storage import restore, save

Tiny = Callable[..., Path]
KEEP = [0, 2, 3, 5, 8, 9, 11, 13, 17, 18, 19, 23, 24, 26, 30]  # 15 of 32, which 4 heads do not divide


def narrow_norms(model: nn.Module, keep: Sequence[int], width: int) -> list[Any]:
    """The slow way: every norm takes its mean and variance over the dimensions kept and gives zeros in all others."""
    index = torch.tensor(keep)

    def norm(module: Any, given: tuple[torch.Tensor, ...], output: torch.Tensor) -> torch.Tensor:
        found = torch.zeros_like(output)
        kept = given[0].index_select(-1, index)
        found[..., index] = nn.functional.layer_norm(
            kept, (len(keep),), module.weight[index], module.bias[index], module.eps
        )
        return found

    def entry(module: Any, given: Any, output: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(width)
        mask[index] = 1
        return output * mask

    hooks = [
        m.register_forward_hook(norm)
        for m in model.modules()
        if isinstance(m, nn.LayerNorm) and m.normalized_shape == (width,)
    ]
    if hasattr(model, "electra"):
        hooks.append(model.electra.embeddings_project.register_forward_hook(entry))
    return hooks


@pytest.mark.parametrize("family", tiny_models.ENCODERS)
def test_a_narrower_stream_is_one_that_norms_do_not_see(tiny: Tiny, tmp_path: Path, family: str) -> None:
    bundle = bundle_of(tiny(family, labels=LABELS))
    model, row = bundle.model, bundle.family
    arrays = arrays_of(bundle)
    whole = [torch_answers(bundle, one) for one in arrays]
    before = flops(bundle, 16), sum(p.numel() for p in model.parameters())
    surgery.keep_heads(model, row, "encoder", 1, 0, [0, 2])
    surgery.keep_heads(model, row, "encoder", 2, 0, [])
    hooks = narrow_norms(model, KEEP, 32)
    wanted = [torch_answers(bundle, one) for one in arrays]
    for hook in hooks:
        hook.remove()
    assert stream.width(model, row) == 32
    stream.keep_dimensions(model, row, KEEP)
    assert stream.width(model, row) == 15
    assert flops(bundle, 16) < 0.6 * before[0]
    assert sum(p.numel() for p in model.parameters()) < 0.6 * before[1]
    for one, answer, old in zip(arrays, wanted, whole, strict=True):
        np.testing.assert_allclose(torch_answers(bundle, one), answer, atol=1e-5, rtol=1e-5)
        assert abs(answer - old).max() > 1e-2
    assert surgery.layout(surgery.blocks(model, row)["encoder"][0], row.stacks[0].attention[0]) == (4, 8, 8)
    assert surgery.sync_config(model, row) is False
    write_manifest(tmp_path / "saved", save(bundle, tmp_path / "saved"))
    again = restore(tmp_path / "saved")
    for one, answer in zip(arrays, wanted, strict=True):
        np.testing.assert_allclose(torch_answers(again, one), answer, atol=1e-5, rtol=1e-5)
    parity.check(again, tmp_path, onnx_export.export(again, tmp_path), arrays)
    stream.keep_dimensions(again.model, row, range(1, 15))  # and once more
    write_manifest(tmp_path / "twice", save(again, tmp_path / "twice"))
    for one in arrays:
        np.testing.assert_array_equal(torch_answers(restore(tmp_path / "twice"), one), torch_answers(again, one))


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_a_stream_that_cannot_be_cut_is_refused(tiny: Tiny, family: str) -> None:
    bundle = bundle_of(tiny(family, labels=LABELS))
    with pytest.raises(StepError, match=f"expected an encoder for width, got '{family}'; leave out width"):
        stream.keep_dimensions(bundle.model, bundle.family, range(16))


def test_dimensions_must_be_there(tiny: Tiny) -> None:
    bundle = bundle_of(tiny("bert", labels=LABELS))
    for wrong in ([], [3, 2], [0, 0], [0, 32], [-1, 4]):
        with pytest.raises(StepError, match="ascending dimensions from 0 to 31 to keep"):
            stream.keep_dimensions(bundle.model, bundle.family, wrong)
    bundle.model.classifier = nn.Sequential(nn.Linear(32, 8), nn.Linear(8, 2))
    with pytest.raises(StepError, match="a head of one or two linears for width, got 3"):
        stream.keep_dimensions(bundle.model, bundle.family, range(16))
