"""Torch as an engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from engine_cases import LABELS, arrays_of, bundle_of, quantize, torch_answers
from flyweight.artifact import write_manifest
from flyweight.engines import torch as engine
from flyweight.errors import EngineError
from flyweight.methods.quantize.grid import Grid
from flyweight.models.activations import simulate
from flyweight.models.storage import save

Tiny = Callable[..., Path]


def test_it_answers_as_the_model_and_leaves_no_trace(tiny: Tiny) -> None:
    bundle = bundle_of(tiny("roberta", labels=LABELS))
    threads, arrays = torch.get_num_threads(), arrays_of(bundle)[0]
    expected = torch_answers(bundle, arrays)
    bundle.model.train()
    predictor = engine.predictor(bundle, threads=threads + 1)
    seen = []
    bundle.model.register_forward_pre_hook(lambda *_: seen.append((torch.get_num_threads(), bundle.model.training)))
    np.testing.assert_allclose(predictor.run(arrays), expected, rtol=1e-4, atol=1e-6)
    assert seen == [(threads + 1, False)]
    assert torch.get_num_threads() == threads
    assert bundle.model.training
    with pytest.raises(EngineError, match="none called input_ids"):
        predictor.run({"attention_mask": arrays["attention_mask"]})
    predictor.close()
    with pytest.raises(EngineError, match="a closed one"):
        predictor.run(arrays)


def test_dynamic_activations_are_simulated(tiny: Tiny) -> None:
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(8), "dynamic")
    arrays = arrays_of(bundle)[0]
    found = engine.predictor(bundle).run(arrays)
    assert np.abs(found - torch_answers(bundle, arrays)).max() > 1e-3  # rounding does something, and is gone afterwards
    with simulate(bundle):
        np.testing.assert_allclose(found, torch_answers(bundle, arrays), rtol=1e-4, atol=1e-5)


def test_an_artifact_is_rebuilt(tiny: Tiny, tmp_path: Path) -> None:
    bundle = quantize(bundle_of(tiny("distilbert", labels=LABELS)), Grid(4, "asymmetric"), "dynamic")
    write_manifest(tmp_path, save(bundle, tmp_path))
    arrays = arrays_of(bundle)[0]
    np.testing.assert_array_equal(engine.open(tmp_path).run(arrays), engine.predictor(bundle).run(arrays))
