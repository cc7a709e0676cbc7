"""Linears, whichever way they keep their weight, and rows and columns out of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

__all__ = ["LINEARS", "keep_columns", "keep_rows", "select", "weight_2d"]

LINEARS = (nn.Linear, Conv1D)
"""Modules that multiply by a weight; `weight_2d` gives it as [out, in]."""


def weight_2d(module: nn.Module) -> Tensor:
    """The weight as [out, in] (an embedding: [rows, dim]); a view, so that changes in place reach the module."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(module, Conv1D) else weight


def keep_rows(linear: nn.Module, keep: Sequence[int]) -> None:
    """Keep outputs of a linear, with their biases."""
    select(linear, "weight", 1 if isinstance(linear, Conv1D) else 0, keep)
    if linear.bias is not None:
        select(linear, "bias", 0, keep)
    setattr(linear, "nf" if isinstance(linear, Conv1D) else "out_features", len(keep))


def keep_columns(linear: nn.Module, keep: Sequence[int]) -> None:
    """Keep inputs of a linear."""
    select(linear, "weight", 0 if isinstance(linear, Conv1D) else 1, keep)
    setattr(linear, "nx" if isinstance(linear, Conv1D) else "in_features", len(keep))


def select(linear: nn.Module, name: str, dim: int, keep: Sequence[int]) -> None:
    old = getattr(linear, name)
    if len(keep) == old.shape[dim]:
        return
    index = torch.tensor(keep, dtype=torch.long, device=old.device)
    setattr(linear, name, nn.Parameter(old.detach().index_select(dim, index), requires_grad=old.requires_grad))
