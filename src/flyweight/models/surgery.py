"""Cutting heads, neurons and layers out of a model: weights and attributes together, nothing is only masked.

An attention or feed-forward part may lose all its units: of its last linear the bias is then left, which is what it adds to the
residual stream. Everything works in place on (model, family). Heads are counted in *units*: one head, or with grouped-query
attention one key-value head with the query heads that read it. A unit's number is the one it had in the uncut model.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from flyweight.artifact import BlockShape
from flyweight.errors import ModelError, StepError
from flyweight.models import shared_bias
from flyweight.models.bundle import Bundle
from flyweight.models.family import Attention, Family, Stack
from flyweight.models.linears import LINEARS, keep_columns, keep_rows, weight_2d

__all__ = [
    "KEPT_WIDTH",
    "LINEARS",
    "Layout",
    "base_of",
    "blocks",
    "embeddings",
    "keep_heads",
    "keep_layers",
    "keep_layers_of",
    "keep_neurons",
    "kept_heads",
    "layout",
    "least_units",
    "linears",
    "mlp_linears",
    "reshape",
    "shapes",
    "stacks",
    "sync_config",
    "weight_2d",
]


KEPT_WIDTH = "kept_hidden_size"
"""Entry of a config: dimensions of the residual stream that are left (`flyweight.models.stream`); absent while all are."""


class Layout(NamedTuple):
    """Sizes of one attention: units (none where it is gone), and rows of q and of k, v (columns of o: as q) of one unit."""

    units: int
    query: int
    key: int


def base_of(model: nn.Module, family: Family) -> tuple[str, nn.Module]:
    """(name prefix, the model without its head)."""
    inner = getattr(model, family.base, None)
    return (f"{family.base}.", inner) if isinstance(inner, nn.Module) else ("", model)


def stacks(model: nn.Module, family: Family) -> dict[str, Stack]:
    """The stacks of the family that this model has (T5's encoder can stand alone). Raises ModelError for none."""
    _, base = base_of(model, family)
    present = {stack.name: stack for stack in family.stacks if _has(base, stack.blocks)}
    if not present:
        wanted = " or ".join(stack.blocks for stack in family.stacks)
        raise ModelError(f"blocks at {wanted} in a {family.model_type} model", f"none in {type(model).__name__}")
    return present


def blocks(model: nn.Module, family: Family) -> dict[str, nn.ModuleList]:
    """The list of blocks of every stack, by the stack's name."""
    _, base = base_of(model, family)
    found = {name: base.get_submodule(stack.blocks) for name, stack in stacks(model, family).items()}
    return {name: module for name, module in found.items() if isinstance(module, nn.ModuleList)}


def hidden_states(output: Any) -> Tensor:
    """Of what a block gives back: they come first."""
    found: Tensor = output[0] if isinstance(output, tuple) else output
    return found


def mlp_linears(block: nn.Module, stack: Stack) -> tuple[list[nn.Module], nn.Module]:
    """(the linears whose outputs are the neurons, the linear that reads them)."""
    for paths in stack.mlp.up:
        if all(_has(block, path) for path in paths):
            return [block.get_submodule(path) for path in paths], block.get_submodule(stack.mlp.down)
    raise ModelError(f"one of {stack.mlp.up} in a block", "none", "this variant of the family is not known")


def kept_heads(block: nn.Module, attention: Attention) -> tuple[int, ...]:
    """Original numbers of the units that an attention still has."""
    found = getattr(block.get_submodule(attention.module), shared_bias.HEADS, None)
    return tuple(found) if found is not None else tuple(range(layout(block, attention).units))


def layout(block: nn.Module, attention: Attention) -> Layout:
    module = block.get_submodule(attention.module)
    size = int(getattr(module, attention.head_dim))
    parts = 3 if attention.fused else 1
    query = weight_2d(block.get_submodule(attention.q)).shape[0] // parts
    key = weight_2d(block.get_submodule(attention.k)).shape[0] // parts
    units = key // size
    return Layout(units, query // units if units else size * getattr(module, "num_key_value_groups", 1), size)


def shapes(model: nn.Module, family: Family) -> dict[str, tuple[BlockShape, ...]]:
    """What is left of every block, as the manifest keeps it."""
    present = stacks(model, family)
    return {
        name: tuple(
            BlockShape(
                heads=tuple(kept_heads(block, attention) for attention in present[name].attention),
                neurons=weight_2d(mlp_linears(block, present[name])[1]).shape[1],
            )
            for block in modules
        )
        for name, modules in blocks(model, family).items()
    }


def linears(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """Every linear of every block by its full name, in order, fused ones once; without those that have no weight left."""
    prefix, _ = base_of(model, family)
    found = {}
    present = stacks(model, family)
    for name, modules in blocks(model, family).items():
        stack = present[name]
        paths = [path for one in stack.attention for path in (one.q, one.k, one.v, one.o)]
        paths += [path for up in stack.mlp.up for path in up] + [stack.mlp.down]
        for number, block in enumerate(modules):
            for path in dict.fromkeys(paths):
                if _has(block, path) and weight_2d(block.get_submodule(path)).numel():
                    found[f"{prefix}{stack.blocks}.{number}.{path}"] = block.get_submodule(path)
    return found


def embeddings(model: nn.Module, family: Family) -> dict[str, nn.Module]:
    """The tables of words and, where they are learned, positions by full name."""
    prefix, base = base_of(model, family)
    paths = [path for path in family.embeddings.values() if path is not None and _has(base, path)]
    return {f"{prefix}{path}": base.get_submodule(path) for path in paths}


def keep_heads(model: nn.Module, family: Family, stack: str, block: int, attention: int, keep: Sequence[int]) -> None:
    """Keep the units at the positions `keep` of one attention; rows of q, k, v, columns of o and the shared bias follow.

    Positions count what is there now; without any the attention is gone but for the bias of o. Raises StepError where fewer
    than `least_units` would be left.
    """
    row, modules = stacks(model, family)[stack], blocks(model, family)[stack]
    now = kept_heads(modules[block], row.attention[attention])
    least = least_units(model, family, stack, attention)
    keep = _checked(keep, len(now), "head", f"block {block} of the {stack}", least)
    had = _bias_columns(row, modules)
    _cut_heads(modules[block], row.attention[attention], keep, tuple(now[i] for i in keep))
    for other in modules:
        shared_bias.without_zero_bias(other.get_submodule(row.attention[attention].module), row.attention[attention])
    _fit_bias(model, family, row, modules, had)


def least_units(model: nn.Module, family: Family, stack: str, attention: int | None = None) -> int:
    """Units that an attention, or without one the feed-forward part, has to keep: none, or one where its last linear is a
    Conv1D (GPT-2), which cannot read nothing."""
    row, block = stacks(model, family)[stack], blocks(model, family)[stack][0]
    path = row.mlp.down if attention is None else row.attention[attention].o
    return int(isinstance(block.get_submodule(path), Conv1D))


def keep_neurons(model: nn.Module, family: Family, stack: str, block: int, keep: Sequence[int]) -> None:
    """Keep the neurons at the positions `keep` of one block's MLP; without any it is gone but for the bias of `down`. Raises
    StepError as `keep_heads` does."""
    row, module = stacks(model, family)[stack], blocks(model, family)[stack][block]
    ups, down = mlp_linears(module, row)
    keep = _checked(
        keep, weight_2d(down).shape[1], "neuron", f"block {block} of the {stack}", least_units(model, family, stack)
    )
    for up in ups:
        keep_rows(up, keep)
    keep_columns(down, keep)


def keep_layers(model: nn.Module, family: Family, keep: Mapping[str, Sequence[int]]) -> dict[str, str]:
    """Keep these blocks of these stacks (others stay whole) and renumber them; the config's number of layers follows.

    Returns {old name prefix: new name prefix} of every block that stays, e.g. `encoder.layer.4.` -> `encoder.layer.2.`.
    Raises StepError when nothing would be left.
    """
    prefix, base = base_of(model, family)
    config: Any = getattr(model, "config", None)
    renamed: dict[str, str] = {}
    present, lists = stacks(model, family), blocks(model, family)
    if getattr(config, "scale_attn_by_inverse_layer_idx", False):
        raise StepError("attention that does not depend on the layer's number", "scale_attn_by_inverse_layer_idx")
    if unknown := set(keep) - set(present):
        raise StepError(f"stacks among {', '.join(present)}", f"{', '.join(unknown)}")
    for name, modules in lists.items():
        stack, now = present[name], len(modules)
        stay = _checked(keep.get(name, range(now)), now, "layer", f"the {name}")
        renamed |= {f"{prefix}{stack.blocks}.{o}.": f"{prefix}{stack.blocks}.{n}." for n, o in enumerate(stay)}
        if len(stay) == now:
            continue
        had = _bias_columns(stack, modules)
        if stack.bias is not None and stack.bias.in_block and stay[0] != 0:
            shared_bias.move_table(stack, modules[0], modules[stay[0]])
        for number in sorted(set(range(now)) - set(stay), reverse=True):
            del modules[number]
        for number, block in enumerate(modules):
            for module in block.modules():
                if hasattr(module, "layer_idx"):
                    module.layer_idx = number  # type: ignore[assignment]
        _fit_bias(model, family, stack, modules, had)
        _write_layers(model, base, stack, len(stay))
    return renamed


def keep_layers_of(bundle: Bundle, keep: Mapping[str, Sequence[int]]) -> None:
    """`keep_layers`, and the bundle's names of sparse and quantized weights follow."""
    renamed = keep_layers(bundle.model, bundle.family, keep)
    prefix, _ = base_of(bundle.model, bundle.family)
    lists = tuple(f"{prefix}{stack.blocks}." for stack in stacks(bundle.model, bundle.family).values())

    def new_name(name: str) -> str | None:
        if not name.startswith(lists):
            return name
        return next((new + name[len(old) :] for old, new in renamed.items() if name.startswith(old)), None)

    bundle.sparse = {new: value for name, value in bundle.sparse.items() if (new := new_name(name))}
    bundle.quantized = {new: codes for name, codes in bundle.quantized.items() if (new := new_name(name))}


def sync_config(model: nn.Module, family: Family) -> bool:
    """Write the numbers of layers, neurons and heads into the config wherever all blocks agree and it can say them.

    Returns True when the config now says all there is: AutoModel then builds the very same shapes without Flyweight.
    """
    config: Any = model.config
    wanted: dict[str, set[Any]] = {}
    heads: dict[str, set[Any]] = {}
    plain = getattr(config, KEPT_WIDTH, None) is None
    lists = blocks(model, family)
    for name, stack in stacks(model, family).items():
        wanted.setdefault(stack.layers_key, set()).add(len(lists[name]))
        for block in lists[name]:
            wanted.setdefault(stack.neurons_key, set()).add(weight_2d(mlp_linears(block, stack)[1]).shape[1])
            for attention in stack.attention:
                units, query, size = layout(block, attention)
                heads.setdefault(stack.heads_key, set()).add(units * (query // size))
                if stack.kv_heads_key:
                    heads.setdefault(stack.kv_heads_key, set()).add(units)
                if stack.head_dim_key:
                    heads.setdefault(stack.head_dim_key, set()).add(size)
                plain &= not shared_bias.is_sliced(block.get_submodule(attention.module))
    if any(_now(config, key) != next(iter(values)) for key, values in heads.items() if len(values) == 1):
        sayable = all(stack.head_dim_key for stack in stacks(model, family).values())
        agreed = all(len(values) == 1 and 0 not in values for values in heads.values())
        if plain and sayable and agreed and _accepts(config, heads):
            wanted |= heads
        else:
            plain = False
    plain &= all(len(values) == 1 for values in (*wanted.values(), *heads.values()))
    plain &= not any(0 in values for values in (*wanted.values(), *heads.values()))  # no config can say "none"
    uniform = {key: next(iter(values)) for key, values in wanted.items() if len(values) == 1 and 0 not in values}
    for key, value in uniform.items():
        setattr(config, key, value)
    return plain


def reshape(model: nn.Module, family: Family, shapes: Mapping[str, Sequence[BlockShape]]) -> None:
    """Cut a freshly built model to the shapes of a manifest; its weights are then loaded over what is left.

    Raises ModelError when the manifest wants more than the config builds.
    """
    lists = blocks(model, family)
    if set(lists) != set(shapes):
        raise ModelError(f"shapes of {', '.join(lists)}", f"{', '.join(shapes)}", "make the artifact again")
    for name, wanted in shapes.items():
        _at_least(len(lists[name]), len(wanted), f"layers in the {name}")
    keep_layers(model, family, {name: range(len(wanted)) for name, wanted in shapes.items()})
    for name, stack in stacks(model, family).items():
        modules = lists[name]
        for block, shape in zip(modules, shapes[name], strict=True):
            for attention, kept in zip(stack.attention, shape.heads, strict=True):
                now = layout(block, attention).units
                _at_least(now, len(kept), f"heads in a block of the {name}")
                _cut_heads(block, attention, range(len(kept)), kept)
                shared_bias.without_zero_bias(block.get_submodule(attention.module), attention)
            ups, down = mlp_linears(block, stack)
            _at_least(weight_2d(down).shape[1], shape.neurons, f"neurons in a block of the {name}")
            for up in ups:
                keep_rows(up, range(shape.neurons))
            keep_columns(down, range(shape.neurons))
        if stack.bias is not None:
            table = shared_bias.table_of(base_of(model, family)[1], stack, modules)
            has = shared_bias.columns([shape.heads[0] for shape in shapes[name]])
            spare = (-1 - i for i in range(table.embedding_dim - len(has)))  # columns that no block needs
            _fit_bias(model, family, stack, modules, [*has, *spare])


def _has(root: nn.Module, path: str) -> bool:
    try:
        root.get_submodule(path)
    except AttributeError:
        return False
    return True


def _checked(keep: Iterable[int], now: int, what: str, where: str, least: int = 1) -> list[int]:
    found = list(keep)
    if not found and not least:
        return found
    if not found:
        raise StepError(f"at least one {what} kept in {where}", "none", "lower the amount")
    if found != sorted(set(found)) or found[0] < 0 or found[-1] >= now:
        raise StepError(f"ascending {what} numbers from 0 to {now - 1} in {where}", f"{found}")
    return found


def _at_least(have: int, want: int, what: str) -> None:
    if have < want:
        raise ModelError(f"at least {want} {what}", f"{have}", "config.json does not fit the manifest")


def _cut_heads(block: nn.Module, attention: Attention, keep: Sequence[int], numbers: Sequence[int]) -> None:
    units, query, key = layout(block, attention)
    rows = _spread(keep, query)
    if attention.fused:
        keep_rows(block.get_submodule(attention.q), [part * units * query + i for part in range(3) for i in rows])
    else:
        keep_rows(block.get_submodule(attention.q), rows)
        for path in (attention.k, attention.v):
            keep_rows(block.get_submodule(path), _spread(keep, key))
    keep_columns(block.get_submodule(attention.o), rows)
    module = block.get_submodule(attention.module)
    setattr(module, shared_bias.HEADS, tuple(numbers))
    for name in attention.counts:
        setattr(module, name, len(rows) // key)
    for name in attention.widths:
        setattr(module, name, len(rows))


def _spread(units: Sequence[int], size: int) -> list[int]:
    return [unit * size + i for unit in units for i in range(size)]


def _bias_columns(stack: Stack, modules: nn.ModuleList) -> list[int]:
    return shared_bias.columns([kept_heads(block, stack.attention[0]) for block in modules])


def _fit_bias(model: nn.Module, family: Family, stack: Stack, modules: nn.ModuleList, had: list[int]) -> None:
    if stack.bias is None:
        return
    table = shared_bias.table_of(base_of(model, family)[1], stack, modules)
    attentions = [block.get_submodule(stack.attention[0].module) for block in modules]
    shared_bias.fit(stack, table, attentions, had, [kept_heads(block, stack.attention[0]) for block in modules])


def _write_layers(model: nn.Module, base: nn.Module, stack: Stack, number: int) -> None:
    setattr(model.config, stack.layers_key, number)
    owner: Any = base.get_submodule(stack.blocks.rpartition(".")[0])
    if getattr(owner, "config", model.config) is not model.config:  # T5 gives each stack a config of its own
        owner.config.num_hidden_layers = number


def _now(config: Any, key: str) -> Any:
    return getattr(config, key, None)


def _accepts(config: Any, changes: Mapping[str, set[Any]]) -> bool:
    """Whether the config class takes these numbers (Llama wants the hidden size to be a multiple of the heads)."""
    values = {**config.to_dict(), **{key: next(iter(value)) for key, value in changes.items()}}
    try:
        type(config).from_dict(values)
    except Exception:  # each config class raises its own
        return False
    return True
