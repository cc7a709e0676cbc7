"""What can be said of a model without running it. Needs torch; an artifact carries it in its manifest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flyweight.artifact import Measurement
from flyweight.measure.flops import LENGTH, flops_figure
from flyweight.measure.size import part_bytes, weights

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["STATIC", "static_figures"]

STATIC = ("parameters", "nonzero_parameters", "flops", "bytes.")
"""Beginnings of the keys."""


def static_figures(bundle: Bundle, length: int = LENGTH) -> dict[str, Measurement]:
    """Parameters, bytes by part, flops an item at `length` tokens (at most what the model takes)."""
    return weights(bundle) | part_bytes(bundle) | flops_figure(bundle, min(length, bundle.encoder.max_length))
