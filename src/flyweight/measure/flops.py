"""Multiply-adds of one item, worked out from the shapes: every linear, and the two products of attention."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flyweight.artifact import Measurement

if TYPE_CHECKING:
    from torch import nn

    from flyweight.models.bundle import Bundle
    from flyweight.models.family import Attention, Family, Stack

__all__ = ["LENGTH", "flops", "flops_figure"]

LENGTH = 128


def flops(bundle: Bundle, length: int = LENGTH) -> int:
    """2 x multiply-adds of one item of `length` tokens, all of them attended to.

    A linear costs 2 x in x out a token, attention 4 x length^2 x width of the queries that are left. Linears of blocks
    and after the embeddings see every token; head and pooler see one, except where the only stack is a decoder, whose
    head scores every position. An encoder-decoder is taken with as many tokens out as in. Norms, activations, softmax
    and lookups are left out, as is usual: they are no matrix products.
    """
    family, model = bundle.family, bundle.model
    base = getattr(model, family.base, model)
    total, seen = 0, set()
    for stack in family.stacks:
        blocks = base.get_submodule(stack.blocks)
        for block in blocks:  # type: ignore[union-attr]
            total += _block(block, stack, length)
        seen |= {id(module) for module in blocks.modules()}
    for module in model.modules():
        if id(module) not in seen:
            total += _size(module) * 2 * (length if _per_token(module, base, family) else 1)
    return total


def flops_figure(bundle: Bundle, length: int = LENGTH) -> dict[str, Measurement]:
    """`flops`, with the length it was taken at in its method."""
    how = f"2 x multiply-adds of one item of {length} tokens, attention included, from the shapes"
    return {"flops": Measurement(value=flops(bundle, length), unit="FLOP", method=how)}


def _block(block: nn.Module, stack: Stack, length: int) -> int:
    linears = sum(_size(module) for module in block.modules())
    attention = sum(_width(block, one) for one in stack.attention)
    return 2 * linears * length + 4 * attention * length**2


def _width(block: nn.Module, attention: Attention) -> int:
    """Heads x head size of the queries."""
    outputs = _shape(block.get_submodule(attention.q))[0]
    return outputs // 3 if attention.fused else outputs


def _per_token(module: nn.Module, base: nn.Module, family: Family) -> bool:
    if all(stack.name == "decoder" for stack in family.stacks):
        return True
    path = family.embedding_projection
    return path is not None and hasattr(base, path.partition(".")[0]) and module is base.get_submodule(path)


def _size(module: nn.Module) -> int:
    outputs, inputs = _shape(module)
    return outputs * inputs


def _shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear, (0, 0) of anything else."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return module.weight.shape[0], module.weight.shape[1]
    if type(module).__name__ == "Conv1D":  # GPT-2's, which keeps [in, out]
        weight: nn.Parameter = module.weight  # type: ignore[assignment]
        return weight.shape[1], weight.shape[0]
    return 0, 0
