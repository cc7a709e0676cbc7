"""What tests of surgery ask of models."""

from __future__ import annotations

import copy

import torch

from flyweight.artifact import BlockShape
from flyweight.models import surgery


def outputs(model):
    ids = torch.tensor([[3, 9, 10, 11, 12, 40], [5, 41, 7, 8, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]])
    decoder = {"decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, **decoder).last_hidden_state
    return found if decoder else found[mask.bool()]


def close(a, b):
    assert torch.isfinite(a).all()
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


def differs(a, b):
    assert a.shape == b.shape
    assert (a - b).abs().max() > 1e-3


def rebuilt(model, family):
    """What a fresh process does: build from the config, cut to the manifest's shapes, load the weights."""
    shapes = {
        name: tuple(BlockShape.model_validate_json(shape.model_dump_json()) for shape in stack)
        for name, stack in surgery.shapes(model, family).items()
    }
    fresh = type(model)(copy.deepcopy(model.config)).eval()
    surgery.reshape(fresh, family, shapes)
    fresh.load_state_dict(model.state_dict())
    assert surgery.shapes(fresh, family) == surgery.shapes(model, family)
    return fresh
