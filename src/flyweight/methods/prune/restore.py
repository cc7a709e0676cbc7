"""Making up for heads and neurons that went, without training: block after block, on texts without labels.

A cut model and the dense one that it was cut from are walked side by side. In each block the linears that read heads or neurons,
in order of execution, are fitted so that the sum which each adds to, its output plus the residual stream, is nearest to the
dense model's: `refit` has the formulas. Inputs are those that the changed blocks before give, so that each block also makes up
for what these have lost. A token's squared error counts by that of the dense model's sum: a norm divides by its size sooner or
later, and a few tokens (the first, separators) have sums many times as large as others.

An eighth of the texts is held back. How much is damped is chosen by them, linear by linear, and a block that answers worse to
them than without is left as it was: a linear has thousands of inputs, and a few hundred texts can be learned by heart.

Two passes over each dense block and, with heads and neurons, three over each cut one; held are both models, of one block the
inputs, the outputs and the sums of the dense model, [texts, tokens, width] each, and one linear's gram matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from flyweight.calibration import Block, walk
from flyweight.errors import StepError
from flyweight.methods.prune.rebuild import block_error, error_on, rebuild
from flyweight.methods.prune.refit import Lack, factors, refitted
from flyweight.methods.prune.scores import Group, readers, sample
from flyweight.models import surgery

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.data import Examples
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["Seen", "held_back", "outputs", "relative", "restore", "texts", "watched"]

FEW, HELD_BACK = 64, 8
"""Fewer texts than this are all learned from; of more, one in so many is held back."""
TOKENS = 1024
MORE, STEP = 4, 4.0
"""So many dampings are tried, each so many times the one before."""


def texts(settings: PruneSettings, context: Context) -> Examples:
    """At most `settings.samples`: those to calibrate on, or training examples. Raises StepError for none."""
    some = context.train if context.calibration is None else context.calibration
    if some is None or not len(some):
        raise StepError("texts to calibrate on", "none", "give --calibrate F or --train F")
    return sample(some, settings.samples, context.seed)


def restore(bundle: Bundle, dense: Bundle, settings: PruneSettings, context: Context) -> dict[str, dict[str, float]]:
    """Change what is left of `bundle` so that it answers as `dense`, of which it was cut; see `settings.restore`.

    Returns {block: {"without": ..., "linear" or "masks": ..., "block": ...}}, the relative error of the block's output against
    the dense model's, on the texts that were held back: the root of the squared error over the squared output. Raises StepError
    without texts or for activations that are no numbers, StorageError.
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
    held = held_back(wanted, context.seed)
    linears = _readers(bundle, block, settings.target)
    if settings.restore == "masks":  # which leave biases as they are
        linears = {group: one for group, one in linears.items() if surgery.weight_2d(one[0]).numel()}
    before = {group: _values(linear) for group, (linear, _) in linears.items()}
    way = "masks" if settings.restore == "masks" else "linear"
    errors = {"without": error_on(block, wanted, held)}
    for group, (linear, size) in linears.items():
        used, judge = _lack(block, bundle, linears, group, sums.pop(group), held)
        together = way == "masks"
        solve = _masks(linear, size) if together else refitted
        _add(linear, _best(solve, used, judge, settings.damping, f"{block.name}: {group}", together))
    block.outputs = outputs(block)
    errors[way] = block_error(block.outputs, wanted, held)
    if errors[way] > errors["without"]:
        for group, (linear, _) in linears.items():
            _put(linear, before[group])
        block.outputs, errors[way] = outputs(block), errors["without"]
    if settings.restore == "block":
        rebuild(block, wanted, held, settings, context)
        block.outputs = outputs(block)
        errors["block"] = block_error(block.outputs, wanted, held)
    return relative(errors, wanted, held)


def relative(errors: Mapping[str, float], wanted: Sequence[Tensor], held: Sequence[int]) -> dict[str, float]:
    """Roots of mean squared errors over that of the dense block's output itself."""
    power = block_error([torch.zeros_like(one) for one in wanted], wanted, held)
    return {name: round((error / max(power, 1e-30)) ** 0.5, 6) for name, error in errors.items()}


def held_back(batches: Sequence[Tensor], seed: int) -> list[int]:
    """Batches of an eighth of the texts, by the seed; all of them where there are few texts.

    batches: anything of these batches, [texts, ...] each
    """
    texts = sum(len(one) for one in batches)
    if texts < FEW or len(batches) < 2:
        return list(range(len(batches)))
    found: list[int] = []
    for batch in torch.randperm(len(batches), generator=torch.Generator().manual_seed(seed)).tolist()[:-1]:
        found.append(batch)
        if sum(len(batches[one]) for one in found) >= texts / HELD_BACK:
            break
    return sorted(found)


Solve = Callable[[Lack, float, str], Tensor]
"""(what a linear's sum lacks, damping, the linear's name) -> what to add to its weights and bias, [out, in]"""


def _best(solve: Solve, used: Lack, judge: Lack, damping: float, name: str, together: bool = False) -> Tensor:
    """With the damping, or several times as much, or nothing at all, whichever leaves least to the texts that were held back.

    Each output of a linear has its own least squares and may have its own damping; together: one for all
    """
    best, least = torch.zeros_like(judge.cross), judge.squares.clone()
    for number in range(MORE):
        change = solve(used, damping * STEP**number, name)
        left = judge.left(change)
        better = left < least
        if together:
            better = (left.sum() < least.sum()).expand_as(better)
        best[better], least[better] = change[better], left[better]
    return best


def _masks(linear: nn.Module, size: int) -> Solve:
    weight = surgery.weight_2d(linear).detach().double()

    def solve(lack: Lack, damping: float, name: str) -> Tensor:
        by = factors(lack, weight, size, damping, name).repeat_interleave(size)
        change = torch.zeros_like(lack.cross)
        change[:, : len(by)] = weight * (by - 1)
        return change

    return solve


def _readers(bundle: Bundle, block: Block, target: str) -> dict[Group, tuple[nn.Module, int]]:
    """{group of the block: (linear that reads it, columns a unit)}, in order of execution; of parts that are gone those whose
    bias is left."""
    attentions = len(surgery.stacks(bundle.model, bundle.family)[block.stack].attention) if "heads" in target else 0
    parts = [*range(attentions), *([None] if "neurons" in target else [])]
    found = {one: readers(bundle, one)[0] for one in (Group(block.stack, block.number, part) for part in parts)}
    return {one: (linear, size) for one, (linear, size) in found.items() if _fits(linear)}


def _fits(linear: nn.Module) -> bool:
    return surgery.weight_2d(linear).numel() > 0 or linear.bias is not None


class Seen(NamedTuple):
    """Of one batch. output: [texts, tokens, width], None where the block was left before its end; reads: {group: [tokens, in]};
    sums: {group: [tokens, out]}"""

    output: Tensor | None
    reads: dict[Group, Tensor]
    sums: dict[Group, Tensor]


class _Enough(Exception):
    """Ends a block's run whose rest is of no use."""


@contextmanager
def watched(
    block: Block, linears: Mapping[Group, tuple[nn.Module, int]], bundle: Bundle
) -> Iterator[Callable[..., Seen]]:
    """Gives a function that runs the block on a batch and tells what its linears read and the sums that they add to. With a group
    as `until` it leaves the block as soon as that one's are known.

    The sum of a linear's output and the residual stream is what the next norm of the block reads or, where none follows, what
    the block answers: so it is in blocks with norms before and with norms after their parts.
    """
    reads: dict[Group, Tensor] = {}
    sums: dict[Group, Tensor] = {}
    open_: list[Group] = []
    last: list[Group | None] = [None]

    def read(group: Group) -> Callable[..., None]:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Tensor) -> None:
            reads[group] = given[0].detach().flatten(0, -2)
            open_.append(group)

        return hook

    def norm(_: nn.Module, given: tuple[Any, ...]) -> None:
        if open_:
            group = open_.pop()
            sums[group] = given[0].detach().flatten(0, -2)
            if group == last[0]:
                raise _Enough

    def run(batch: int, until: Group | None = None) -> Seen:
        reads.clear()
        sums.clear()
        last[0] = until
        output: Tensor | None = None
        with torch.no_grad(), suppress(_Enough):
            output = block.run(batch)
        if open_ and output is not None:
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
            assert seen.output is not None
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
    held: Sequence[int],
) -> tuple[Lack, Lack]:
    """(what one linear's sum lacks on the texts to learn from, on those held back), by the block as it stands now."""
    linear = linears[group][0]
    used, judge = (Lack.none(surgery.weight_2d(linear), linear.bias is not None) for _ in range(2))
    for lack, batches in ((judge, held), (used, [batch for batch in range(len(sums)) if batch not in held])):
        with watched(block, linears, bundle) as run:
            for some in _together(batches, [len(one) for one in sums]):
                seen = [run(batch, group) for batch in some]
                dense = torch.cat([sums[batch] for batch in some])
                lacks = dense - torch.cat([one.sums[group] for one in seen])
                weights = dense.float().square().mean(1, keepdim=True).clamp(min=1e-12).rsqrt()
                lack.add(torch.cat([one.reads[group] for one in seen]).float(), lacks.float(), weights)
    return (judge if len(held) == len(sums) else used), judge


def _together(batches: Sequence[int], tokens: Sequence[int]) -> Iterator[list[int]]:
    """Batches of about as many tokens as make a large product worth it; tokens: of every batch."""
    some: list[int] = []
    for batch in batches:
        some.append(batch)
        if sum(tokens[one] for one in some) >= TOKENS:
            yield some
            some = []
    if some:
        yield some


def outputs(block: Block) -> list[Tensor]:
    """What it answers as it stands now, one tensor a batch."""
    with torch.no_grad():
        return [block.run(batch) for batch in range(len(block.inputs))]


@torch.no_grad()
def _add(linear: nn.Module, change: Tensor) -> None:
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
