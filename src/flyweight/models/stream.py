"""The residual stream of an encoder: what writes and reads it, and dimensions out of it.

An attention keeps the size of its heads, which configs derive from the hidden size. So the config goes on telling what the model
was built with, and `surgery.KEPT_WIDTH` in it how many dimensions are left; `fit_width` cuts a model to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from flyweight.errors import StepError
from flyweight.models.bundle import Bundle
from flyweight.models.family import Family
from flyweight.models.linears import LINEARS, keep_columns, keep_rows, select, weight_2d
from flyweight.models.surgery import KEPT_WIDTH, base_of, blocks, mlp_linears, stacks

__all__ = ["check", "fit_width", "head", "keep_dimensions", "norms", "projection", "tables", "width", "width_of"]


def check(model: nn.Module, family: Family, what: str) -> None:
    """Raises StepError, naming the setting `what`, for a model whose stream cannot be cut: decoders, which norm otherwise and
    read their tables again at the end, and heads of another make."""
    if [stack.name for stack in family.stacks] != ["encoder"] or family.stacks[0].attention[0].fused:
        raise StepError(f"an encoder for {what}", f"'{family.model_type}'", f"leave out {what}")
    if len(head(model, family)) not in (1, 2):
        raise StepError(f"a head of one or two linears for {what}", f"{len(head(model, family))}", f"leave out {what}")


def projection(model: nn.Module, family: Family) -> nn.Module | None:
    """The linear after narrower tables (ELECTRA)."""
    path = family.embedding_projection
    return None if path is None else getattr(base_of(model, family)[1], path, None)


def tables(model: nn.Module, family: Family) -> list[nn.Embedding]:
    """Those that write the stream: words, positions and segments, unless a projection follows them."""
    if projection(model, family) is not None:
        return []
    parent = str(family.embeddings["word"]).rpartition(".")[0]
    return [one for one in base_of(model, family)[1].get_submodule(parent).modules() if isinstance(one, nn.Embedding)]


def head(model: nn.Module, family: Family) -> list[nn.Module]:
    """Linears outside the blocks, in order: one that makes units of a text's state, if there is one, and one that reads them."""
    inside = {id(module) for module in _blocks(model, family).modules()}
    inside.add(id(projection(model, family)))
    return [m for m in model.modules() if isinstance(m, LINEARS) and id(m) not in inside]


def norms(model: nn.Module, family: Family) -> list[nn.LayerNorm]:
    """Those over the stream."""
    size = width(model, family)
    return [m for m in model.modules() if isinstance(m, nn.LayerNorm) and m.normalized_shape == (size,)]


def width(model: nn.Module, family: Family) -> int:
    """Dimensions of the stream, of any family."""
    stack = next(iter(stacks(model, family).values()))
    return int(weight_2d(mlp_linears(blocks(model, family)[stack.name][0], stack)[1]).shape[0])


def width_of(bundle: Bundle) -> int:
    return width(bundle.model, bundle.family)


def keep_dimensions(model: nn.Module, family: Family, keep: Sequence[int]) -> None:
    """Keep these dimensions of the stream; the answers are those of a model whose norms see no others.

    Whatever writes the stream loses rows, whatever reads it columns. Raises StepError as `check` does, and for dimensions that
    are not there.
    """
    check(model, family, "width")
    now, keep = width(model, family), list(keep)
    if not keep or keep != sorted(set(keep)) or keep[0] < 0 or keep[-1] >= now:
        raise StepError(f"ascending dimensions from 0 to {now - 1} to keep", f"{keep[:8]}")
    entry = projection(model, family)
    for table in tables(model, family):
        select(table, "weight", 1, keep)
        table.embedding_dim = len(keep)
    for norm in norms(model, family):
        for name in ("weight", "bias"):
            select(norm, name, 0, keep)
        norm.normalized_shape = (len(keep),)
    paths = family.stacks[0].attention[0]
    for block in _blocks(model, family):
        ups, down = mlp_linears(block, family.stacks[0])
        for linear in (*(block.get_submodule(path) for path in (paths.q, paths.k, paths.v)), *ups):
            keep_columns(linear, keep)
        for linear in (block.get_submodule(paths.o), down):
            keep_rows(linear, keep)
    if entry is not None:
        keep_rows(entry, keep)
    keep_columns(head(model, family)[0], keep)
    config: Any = model.config
    setattr(config, KEPT_WIDTH, len(keep))


def fit_width(model: nn.Module, family: Family) -> None:
    """Cut the stream of a freshly built model to what its config says is left."""
    if (kept := getattr(model.config, KEPT_WIDTH, None)) is not None:
        keep_dimensions(model, family, range(int(kept)))


def _blocks(model: nn.Module, family: Family) -> nn.ModuleList:
    return blocks(model, family)[family.stacks[0].name]
