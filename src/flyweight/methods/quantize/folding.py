"""Where a factor for every input channel of a site can go at no cost: into what makes these channels.

A norm that feeds these linears and nothing else, as before the sum in LLaMA and GPT-2; the rows of v for the inputs of o, as
attention mixes tokens and not channels; the rows of up for those of down, where what is between is linear in them (a gated
MLP) or commutes with a factor above zero (ReLU). After the sum (BERT) a norm also feeds the residual. Whether a pair holds is
tried on the block itself.

And in what order the neurons of an MLP stand, which is free: what is picked from neurons that stand together is a slice.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from flyweight.models import surgery

if TYPE_CHECKING:
    from flyweight.calibration import Block, Site
    from flyweight.methods.quantize.work import Work
    from flyweight.models.bundle import Codes

__all__ = ["Source", "fold", "neurons", "put_first", "source_of"]


class Source(NamedTuple):
    """What makes a site's inputs: a norm, or the rows of a linear. name: of the module in the model"""

    name: str
    module: nn.Module
    rows: slice


def source_of(work: Work, block: Block, site: Site) -> Source | None:
    """What can be divided channel by channel so that the site's inputs are, and nothing else changes; None for nothing."""
    for source in _candidates(work, block, site):
        target = work.targets.get(source.name)
        whole = target is not None and target.grid.granularity == "tensor"  # one scale for rows that would differ
        if not whole and _holds(block, site, source):
            return source
    return None


def fold(work: Work, site: Site, source: Source, factors: Tensor) -> None:
    """Divide the source by `factors` [in] and multiply the columns of all the site's linears, none of them rounded so far."""
    assert not any(target.parameter in work.floats for target in work.at(site))
    target = work.targets.get(source.name)
    codes = work.codes.get(target.parameter) if target is not None else None
    if target is None or codes is None:
        _divide(source, factors)
    else:  # integers stay: what changes is the scale of their rows
        parts = {part: getattr(codes, part) for part in ("scale", "outlier_values")}
        divided = {part: value.clone() for part, value in parts.items() if value is not None}
        for value in (*divided.values(), work.floats[target.parameter]):
            value[source.rows] /= factors[:, None].to(value.device)
        _divide(source, factors, weight=False)
        work.put(target, replace(codes, **divided))
    if source.name in work.biases:
        work.biases[source.name][source.rows] /= factors
    with torch.no_grad():
        for module in site.linears.values():
            surgery.weight_2d(module).mul_(factors)


def neurons(work: Work, block: Block, site: Site) -> list[str]:
    """Full names of the linears whose outputs are the neurons that the site reads; none where it reads something else.

    None either where pruned weights go by groups of neighbours, which another order would tear apart.
    """
    stack = surgery.stacks(work.bundle.model, work.bundle.family)[block.stack]
    ups, down = surgery.mlp_linears(block.module, stack)
    if down not in site.linears.values() or any(
        work.targets[name].parameter in work.bundle.sparse for name in site.linears if name in work.targets
    ):
        return []
    found = [f"{block.name}.{name}" for name, module in block.module.named_modules() if any(module is up for up in ups)]
    return found if len(found) == len(ups) else []


@torch.no_grad()
def put_first(work: Work, site: Site, ups: list[str], first: Tensor) -> Tensor:
    """Give the neurons another order, `first` [n] before all others; the site's linears are not rounded so far.

    Returns the order [neurons]: which one stands where.
    """
    assert not any(target.parameter in work.floats for target in work.at(site))
    width = site.width
    rest = torch.ones(width, dtype=torch.bool, device=first.device)
    rest[first] = False
    order = torch.cat([first, rest.nonzero().flatten()])
    for name in ups:
        module = work.bundle.model.get_submodule(name)
        parts = len(surgery.weight_2d(module)) // width  # gate and up in one matrix
        rows = torch.cat([order + part * width for part in range(parts)])
        weight = surgery.weight_2d(module)
        weight.copy_(weight[rows])
        if isinstance(module.bias, nn.Parameter):
            module.bias.copy_(module.bias[rows])
        if name in work.biases:
            work.biases[name] = work.biases[name][rows]
        target = work.targets.get(name)
        if target is not None and target.parameter in work.codes:
            work.floats[target.parameter] = work.floats[target.parameter][rows.cpu()]
            work.put(target, _rows(work.codes[target.parameter], rows))
    for module in site.linears.values():
        weight = surgery.weight_2d(module)
        weight.copy_(weight[:, order])
    return order


def _rows(codes: Codes, rows: Tensor) -> Codes:
    """The same weight, its rows in another order."""
    parts = {part: getattr(codes, part) for part in ("codes", "scale", "zero_point", "mask", "outlier_values")}
    return replace(
        codes, **{part: value[rows] for part, value in parts.items() if value is not None and len(value) == len(rows)}
    )


def _candidates(work: Work, block: Block, site: Site) -> Iterator[Source]:
    stack = surgery.stacks(work.bundle.model, work.bundle.family)[block.stack]
    modules = dict(block.module.named_modules())
    fed = {name.removeprefix(f"{block.name}.") for name in site.linears}
    found = [
        (norm, slice(None)) for norm, linears in stack.norms.items() if fed == {n for n in linears if n in modules}
    ]
    for attention in stack.attention:
        if fed == {attention.o}:
            rows = len(surgery.weight_2d(modules[attention.v]))
            found.append((attention.v, slice(rows // 3 * 2 if attention.fused else 0, rows)))
    ups, down = surgery.mlp_linears(block.module, stack)
    if down in site.linears.values():
        found += [(name, slice(0, site.width)) for name, module in modules.items() if any(module is up for up in ups)]
    for name, part in found:
        module = modules.get(name)
        weight = getattr(module, "weight", None)
        if module is None or weight is None:
            continue
        made = surgery.weight_2d(module)[part] if isinstance(module, surgery.LINEARS) else weight
        if len(made) == site.width:
            yield Source(f"{block.name}.{name}", module, part)


@torch.no_grad()
def _holds(block: Block, site: Site, source: Source) -> bool:
    """Whether dividing the source and multiplying the columns leaves the block's answer as it is.

    Tried on the longest texts as they are, and with what the source makes brought to a size of one: a Gelu of large numbers
    looks like a ReLU. Within 1e-4 of what dividing alone would do (rounding: 1e-6; a bend of Gelu or SiLU: .1).
    """
    generator = torch.Generator().manual_seed(0)
    batch = len(block.inputs) - 1
    factors = torch.exp(torch.randn(site.width, generator=generator) / 2).to(block.inputs[batch])
    changed = [source.module, *site.linears.values()]
    saved = [(parameter, parameter.clone()) for module in changed for parameter in module.parameters(recurse=False)]
    try:
        return all(
            _commutes(block, batch, site, source, factors, size) for size in (None, _sizes(block, batch, source))
        )
    finally:
        for parameter, value in saved:
            parameter.copy_(value)


@torch.no_grad()
def _commutes(block: Block, batch: int, site: Site, source: Source, factors: Tensor, size: Tensor | None) -> bool:
    if size is not None:
        _divide(source, size)
    before = block.run(batch)
    _divide(source, factors)
    divided = block.run(batch)
    for module in site.linears.values():
        surgery.weight_2d(module).mul_(factors)
    after = block.run(batch)
    for module in site.linears.values():
        surgery.weight_2d(module).div_(factors)
    _divide(source, 1 / factors)
    return float((after - before).norm()) < 1e-4 * float((divided - before).norm())


@torch.no_grad()
def _sizes(block: Block, batch: int, source: Source) -> Tensor:
    """[in] root mean square of every channel that the source makes."""
    found: list[Tensor] = []
    hook = source.module.register_forward_hook(lambda module, given, output: found.append(output))
    try:
        block.run(batch)
    finally:
        hook.remove()
    made = found[0].reshape(-1, found[0].shape[-1])[:, source.rows]
    return made.square().mean(0).sqrt().clamp(min=1e-6)


@torch.no_grad()
def _divide(source: Source, factors: Tensor, weight: bool = True) -> None:
    linear = isinstance(source.module, surgery.LINEARS)
    if weight and linear:
        surgery.weight_2d(source.module)[source.rows] /= factors[:, None]
    elif weight:
        source.module.get_parameter("weight").div_(factors)
    bias = getattr(source.module, "bias", None)
    if bias is not None:
        bias[source.rows] /= factors
