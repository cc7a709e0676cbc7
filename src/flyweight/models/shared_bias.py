"""A position bias that blocks share, when the blocks no longer have the same heads.

MPNet and T5 compute one bias [batch, heads, query, key] from a table [buckets, heads] and add it in every block. After
surgery the table keeps a column for every head that some block still has; a block with fewer takes its own columns out
by a pair of hooks around its attention. The hooks are plain functions and the numbers plain attributes, so that a deep
copy works and an exporter traces an ordinary gather.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.models.family import Attention, SharedBias, Stack

__all__ = ["HEADS", "columns", "fit", "is_sliced", "move_table", "table_of", "without_zero_bias"]

HEADS = "flyweight_heads"
"""Attribute of an attention module: the original numbers of the heads it still has; absent while it has them all."""
_INDEX = "flyweight_bias_columns"
_FULL = "flyweight_whole_bias"
_HOOKED = "flyweight_hooked"


def columns(kept: list[tuple[int, ...]]) -> list[int]:
    """Original numbers of the heads that the table has a column for: all that some block keeps."""
    return sorted(set().union(*kept))


def table_of(base: nn.Module, stack: Stack, blocks: nn.ModuleList) -> nn.Embedding:
    assert stack.bias is not None
    table = (blocks[0] if stack.bias.in_block else base).get_submodule(stack.bias.table)
    assert isinstance(table, nn.Embedding)
    return table


def move_table(stack: Stack, old: nn.Module, new: nn.Module) -> None:
    """Give the table of a first block that goes to the one that becomes the first."""
    assert stack.bias is not None
    holder, _, name = stack.bias.table.rpartition(".")
    giver, taker = old.get_submodule(holder), new.get_submodule(holder)
    setattr(taker, name, giver.get_submodule(name))
    delattr(giver, name)
    taker.has_relative_attention_bias, giver.has_relative_attention_bias = True, False  # type: ignore[assignment]


def fit(
    stack: Stack, table: nn.Embedding, modules: list[nn.Module], had: list[int], kept: list[tuple[int, ...]]
) -> None:
    """Cut the table, whose columns are the heads `had`, to what `kept` needs, and let every block take its own columns.

    modules: the first attention of every block; kept: the original numbers of the heads of each
    """
    assert stack.bias is not None
    has = columns(kept)
    if has != had:
        index = torch.tensor([had.index(head) for head in has], dtype=torch.long, device=table.weight.device)
        weight = table.weight
        table.weight = nn.Parameter(weight.detach().index_select(1, index), requires_grad=weight.requires_grad)
        table.embedding_dim = len(has)
    for module, heads in zip(modules, kept, strict=True):
        index_of = None if list(heads) == has else tuple(has.index(head) for head in heads)
        setattr(module, _INDEX, index_of)
        if index_of is not None and not hasattr(module, _HOOKED):
            _hook(module, stack.bias)
    if stack.bias.in_block:
        setattr(table, _INDEX, getattr(modules[0], _INDEX))
        if not hasattr(table, _HOOKED):
            setattr(table, _HOOKED, True)
            table.register_forward_hook(_take_from_table)


def is_sliced(module: nn.Module) -> bool:
    """Whether this attention takes its own columns of the shared bias, which only Flyweight can rebuild."""
    return getattr(module, _INDEX, None) is not None


def without_zero_bias(module: nn.Module, attention: Attention) -> None:
    """Let the module make its zeros itself: those of the block before may have another number of heads."""
    if attention.zero_bias is not None and not hasattr(module, _HOOKED):
        setattr(module, _HOOKED, True)
        place = _place(module, attention.zero_bias)
        module.register_forward_pre_hook(partial(_drop, name=attention.zero_bias, place=place), with_kwargs=True)


def _hook(module: nn.Module, bias: SharedBias) -> None:
    setattr(module, _HOOKED, True)
    place = _place(module, bias.argument)
    stash = bias.returned is not None
    module.register_forward_pre_hook(partial(_take, name=bias.argument, place=place, stash=stash), with_kwargs=True)
    if bias.returned is not None:
        module.register_forward_hook(partial(_give_back, table=bias.table.rpartition(".")[2], place=bias.returned))


def _place(module: nn.Module, argument: str) -> int:
    return list(inspect.signature(module.forward).parameters).index(argument)


def _with(args: tuple[Any, ...], kwargs: dict[str, Any], name: str, place: int, value: Any) -> tuple[Any, Any]:
    if name in kwargs or place >= len(args):
        return args, {**kwargs, name: value}
    return (*args[:place], value, *args[place + 1 :]), kwargs


def _select(bias: Tensor, index: tuple[int, ...], dim: int) -> Tensor:
    return bias.index_select(dim, torch.tensor(index, dtype=torch.long, device=bias.device))


def _take(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, place: int, stash: bool
) -> Any:
    """Before the attention: its columns of the bias [batch, heads, query, key]."""
    index = getattr(module, _INDEX)
    bias = kwargs.get(name, args[place] if place < len(args) else None)
    if index is None or bias is None:
        return None
    if stash:
        module.__dict__[_FULL] = bias  # taken away again in `_give_back`
    return _with(args, kwargs, name, place, _select(bias, index, 1))


def _take_from_table(table: nn.Module, args: tuple[Any, ...], values: Tensor) -> Tensor | None:
    """After the table, where the first block makes the bias itself: values [query, key, heads]."""
    index = getattr(table, _INDEX)
    if index is None:
        return None
    table.__dict__[_FULL] = values
    return _select(values, index, 2)


def _give_back(module: nn.Module, args: tuple[Any, ...], outputs: Any, *, table: str, place: int) -> Any:
    """After the attention: hand the whole bias on to the next block, as if nothing had been taken out."""
    whole = module.__dict__.pop(_FULL, None)
    own = module._modules.get(table)
    if whole is None and own is not None and _FULL in own.__dict__:
        whole = own.__dict__.pop(_FULL).permute(2, 0, 1)[None]
    return None if whole is None else (*outputs[:place], whole, *outputs[place + 1 :])


def _drop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, name: str, place: int) -> Any:
    return _with(args, kwargs, name, place, None)
