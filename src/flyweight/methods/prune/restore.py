"""Making up for heads and neurons that went, without training: block after block, on texts without labels.

A cut model and the dense one that it was cut from are walked side by side. In each block the linears that read heads or neurons,
in order of execution, are fitted so that the sum which each adds to, its output plus the residual stream, is nearest to the
dense model's: `refit` has the formulas. Inputs are those that the changed blocks before give, so that each block also makes up
for what these have lost. A block that answers worse for it than without is left as it was.

Two passes over each dense block and, with heads and neurons, three over each cut one; held are both models, of one block the
inputs, the outputs and the sums of the dense model, [texts, tokens, width] each, and one linear's gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from flyweight.calibration import Block, walk
from flyweight.errors import StepError
from flyweight.methods.prune.rebuild import block_error, rebuild
from flyweight.methods.prune.refit import Lack, factors, refitted
from flyweight.methods.prune.scores import Group, groups, readers, sample
from flyweight.models import surgery

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.data import Examples
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["Seen", "restore", "texts", "watched"]


def texts(settings: PruneSettings, context: Context) -> Examples:
    """At most `settings.samples`: those to calibrate on, or training examples. Raises StepError for none."""
    some = context.train if context.calibration is None else context.calibration
    if some is None or not len(some):
        raise StepError("texts to calibrate on", "none", "give --calibrate F or --train F")
    return sample(some, settings.samples, context.seed)


def restore(bundle: Bundle, dense: Bundle, settings: PruneSettings, context: Context) -> dict[str, dict[str, float]]:
    """Change what is left of `bundle` so that it answers as `dense`, of which it was cut; see `settings.restore`.

    Returns {block: {"without": ..., "linear" or "masks": ..., "block": ...}}, the relative error of the block's output against
    the dense model's: the root of the squared error over the squared output. Raises StepError without texts or for activations
    that are no numbers, StorageError.
    """
    some = texts(settings, context)
    told = {}
    cut = walk(bundle, some, context.progress, "restoring")
    for block, whole in zip(cut, walk(dense, some), strict=True):
        told[block.name] = _restored(block, whole, bundle, dense, settings, context)
    return told


def _restored(
    block: Block, whole: Block, bundle: Bundle, dense: Bundle, settings: PruneSettings, context: Context
) -> dict[str, float]:
    """Errors of one block's output before and after."""
    wanted, sums = _answers(whole, _readers(dense, whole, settings.target), dense)
    whole.outputs = wanted
    linears = _readers(bundle, block, settings.target)
    before = {group: _values(linear) for group, (linear, _) in linears.items()}
    way = "masks" if settings.restore == "masks" else "linear"
    errors: dict[str, float] = {}
    for group, (linear, size) in linears.items():
        lack, error = _lack(block, bundle, linears, group, sums.pop(group), wanted)
        errors.setdefault("without", error)
        name = f"{block.name}: {group}"
        if way == "masks":
            _scale(linear, factors(lack, surgery.weight_2d(linear).detach(), size, settings.damping, name), size)
        else:
            _shift(linear, refitted(lack, settings.damping, name))
    block.outputs, errors[way] = _outputs(block, wanted)
    if errors[way] > errors["without"]:
        for group, (linear, _) in linears.items():
            _put(linear, before[group])
        block.outputs, errors[way] = _outputs(block, wanted)
    if settings.restore == "block":
        rebuild(block, wanted, settings, context)
        block.outputs, errors["block"] = _outputs(block, wanted)
    power = sum(float(one.double().square().sum()) for one in wanted) / sum(one.numel() for one in wanted)
    return {name: round((error / max(power, 1e-30)) ** 0.5, 6) for name, error in errors.items()}


def _readers(bundle: Bundle, block: Block, target: str) -> dict[Group, tuple[nn.Module, int]]:
    """{group of the block: (linear that reads it, columns a unit)}, in order of execution."""
    here = [group for group in groups(bundle, target) if (group.stack, group.block) == (block.stack, block.number)]
    return {group: readers(bundle, group)[0] for group in here}


class Seen(NamedTuple):
    """Of one batch. output: [texts, tokens, width]; reads: {group: [tokens, in]}; sums: {group: [tokens, out]}"""

    output: Tensor
    reads: dict[Group, Tensor]
    sums: dict[Group, Tensor]


@contextmanager
def watched(
    block: Block, linears: Mapping[Group, tuple[nn.Module, int]], bundle: Bundle
) -> Iterator[Callable[[int], Seen]]:
    """Gives a function that runs the block on a batch and tells what its linears read and the sums that they add to.

    The sum of a linear's output and the residual stream is what the next norm of the block reads or, where none follows, what
    the block answers: so it is in blocks with norms before and with norms after their parts.
    """
    reads: dict[Group, Tensor] = {}
    sums: dict[Group, Tensor] = {}
    open_: list[Group] = []

    def read(group: Group) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            reads[group] = given[0].detach().flatten(0, -2)
            open_.append(group)

        return hook

    def norm(_: nn.Module, given: tuple[Any, ...]) -> None:
        if open_:
            sums[open_.pop()] = given[0].detach().flatten(0, -2)

    def run(batch: int) -> Seen:
        reads.clear()
        sums.clear()
        with torch.no_grad():
            output = block.run(batch)
        if open_:
            sums[open_.pop()] = output.flatten(0, -2)
        return Seen(output, dict(reads), dict(sums))

    row = surgery.stacks(bundle.model, bundle.family)[block.stack]
    hooks = [block.module.get_submodule(path).register_forward_pre_hook(norm) for path in row.norms]
    hooks += [linear.register_forward_hook(read(group)) for group, (linear, _) in linears.items()]
    try:
        yield run
    finally:
        for hook in hooks:
            hook.remove()


def _answers(
    whole: Block, linears: Mapping[Group, tuple[nn.Module, int]], dense: Bundle
) -> tuple[list[Tensor], dict[Group, list[Tensor]]]:
    """(what the dense block answers, {group: its sums}), one tensor a batch."""
    outputs: list[Tensor] = []
    sums: dict[Group, list[Tensor]] = {group: [] for group in linears}
    with watched(whole, linears, dense) as run:
        for batch in range(len(whole.inputs)):
            seen = run(batch)
            outputs.append(seen.output)
            for group in linears:
                sums[group].append(seen.sums[group])
    return outputs, sums


def _lack(
    block: Block,
    bundle: Bundle,
    linears: Mapping[Group, tuple[nn.Module, int]],
    group: Group,
    sums: list[Tensor],
    wanted: list[Tensor],
) -> tuple[Lack, float]:
    """(what one linear's sum lacks, mean squared error of the block's output), by the block as it stands now."""
    linear = linears[group][0]
    lack = Lack.none(surgery.weight_2d(linear), linear.bias is not None)
    total = 0.0
    with watched(block, linears, bundle) as run:
        for batch, dense in enumerate(sums):
            seen = run(batch)
            lack.add(seen.reads[group].float(), (dense - seen.sums[group]).float())
            total += float((seen.output - wanted[batch]).double().square().sum())
    return lack, total / sum(one.numel() for one in wanted)


def _outputs(block: Block, wanted: list[Tensor]) -> tuple[list[Tensor], float]:
    with torch.no_grad():
        found = [block.run(batch) for batch in range(len(block.inputs))]
    return found, block_error(found, wanted)


@torch.no_grad()
def _scale(linear: nn.Module, by: Tensor, size: int) -> None:
    weight = surgery.weight_2d(linear)
    weight.mul_(by.to(weight.dtype).repeat_interleave(size))


@torch.no_grad()
def _shift(linear: nn.Module, change: Tensor) -> None:
    weight, bias = surgery.weight_2d(linear), linear.bias
    weight.add_(change[:, : weight.shape[1]].to(weight.dtype))
    if isinstance(bias, Tensor):
        bias.add_(change[:, -1].to(bias.dtype))


def _values(linear: nn.Module) -> list[Tensor]:
    return [parameter.detach().clone() for parameter in linear.parameters(recurse=False)]


@torch.no_grad()
def _put(linear: nn.Module, values: list[Tensor]) -> None:
    for parameter, value in zip(linear.parameters(recurse=False), values, strict=True):
        parameter.copy_(value)
