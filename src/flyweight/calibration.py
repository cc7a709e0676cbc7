"""The one walk over a model's blocks, for every method that looks at what flows through them and needs no gradient loop.

Blocks are visited in order of execution. At each stop a method sees one block, what flows into it from the blocks already
changed and, if it asks, what the float block would have answered; it changes the block's weights as it likes, and the walk
goes on with the changed ones. Only one block's inputs (and wanted outputs) are held, [texts, tokens, width], plus what the
method keeps. Two models of like blocks can be walked side by side, as `zip` does: a cut one beside the one it was cut from.

Texts of equal length share a batch, so that no padding is ever looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.models import surgery
from flyweight.models.bundle import Bundle

__all__ = ["Block", "Site", "Solver", "calibrate", "walk"]

BATCH = 16


@dataclass(frozen=True)
class Site:
    """Linears of a block that read one and the same tensor: q, k and v; gate and up; o; down.

    linears: {full name of the module: module}, in order of execution; weights by `surgery.weight_2d`
    """

    linears: dict[str, nn.Module]

    @property
    def name(self) -> str:
        """The first linear's."""
        return next(iter(self.linears))

    @property
    def width(self) -> int:
        return surgery.weight_2d(next(iter(self.linears.values()))).shape[1]


class Solver(Protocol):
    """One method, linear by linear: Hessians and the like are made, fed and used up before the next site begins."""

    def make(self, site: Site) -> Any:
        """State for one site, empty."""

    def accumulate(self, state: Any, inputs: Tensor) -> None:
        """inputs: [tokens, in] float32, what the site's linears read for one batch."""

    def solve(self, site: Site, state: Any) -> None:
        """Put new weights into the site's linears."""


class _Enough(Exception):
    """Ends a forward pass whose rest is of no use."""


@dataclass
class Block:
    """One stop of the walk.

    name:   path of the block in the model
    stack:  name of its stack; `number`: its place in it
    module: the block itself
    inputs: hidden states [texts, tokens, width] that flow in now, one tensor a batch
    sites:  its linears by what they read, in order of execution
    float_outputs: what the float block answers to float inputs, one tensor a batch; None unless the walk was asked for it
    outputs: what the block answers as it stands when the visit is over, set by a visitor who knows it and spares a pass
    """

    name: str
    stack: str
    number: int
    module: nn.Module
    inputs: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    sites: tuple[Site, ...] = ()
    float_outputs: list[Tensor] | None = None
    outputs: list[Tensor] | None = None

    @property
    def wanted(self) -> list[Tensor]:
        """`float_outputs`. Raises RuntimeError where the walk was not asked for them."""
        if self.float_outputs is None:
            raise RuntimeError("expected walk(wanted=True)")
        return self.float_outputs

    def run(self, batch: int, hidden: Tensor | None = None) -> Tensor:
        """The block's output for `hidden` (by default its input) with what else belongs to that batch: masks, positions."""
        rest, named = self.calls[batch]
        return surgery.hidden_states(self.module(self.inputs[batch] if hidden is None else hidden, *rest, **named))

    def stream(self, site: Site) -> Iterator[Tensor]:
        """What the site's linears read, [tokens, in] float32, batch after batch, by the block as it stands now."""
        for batch in range(len(self.inputs)):
            with _catching(next(iter(site.linears.values()))) as found, torch.no_grad():
                self.run(batch)
            yield found[0].reshape(-1, found[0].shape[-1]).float()


def calibrate(bundle: Bundle, examples: Examples, solver: Solver, progress: Progress | None = None) -> None:
    """Take the solver to every linear of every block; a site sees the errors of the sites before it."""
    for block in walk(bundle, examples, progress):
        for site in block.sites:
            state = solver.make(site)
            for inputs in block.stream(site):
                solver.accumulate(state, inputs)
            solver.solve(site, state)


def walk(
    bundle: Bundle,
    examples: Examples,
    progress: Progress | None = None,
    what: str = "calibrating",
    wanted: bool = False,
) -> Iterator[Block]:
    """Visit all blocks, in eval mode; the model's mode is put back at the end.

    wanted: also take what the float blocks answer, at one more pass over each

    In an encoder-decoder the decoder's `wanted` is for what the changed encoder says. Raises StepError without texts, and
    where a block answers with NaN or inf (named).
    """
    if not len(examples):
        raise StepError("texts to calibrate on", "none", "give --calibrate F or --train F")
    model, training = bundle.model, bundle.model.training
    stacks = surgery.blocks(model, bundle.family)
    names = {id(module): name for name, module in model.named_modules()}
    every = [(name, number, block) for name, modules in stacks.items() for number, block in enumerate(modules)]
    model.train(False)
    try:
        inputs: list[Tensor] = []
        answers: list[Tensor] | None = None
        calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []
        for stack, number, module in (progress or NoProgress()).track(every, what, total=len(every)):
            if number == 0:
                inputs, calls = _enter(bundle, examples, list(stacks[stack]))
                answers = inputs if wanted else None
            block = Block(names[id(module)], stack, number, module, inputs, [call[number] for call in calls])
            if answers is not None:
                with torch.no_grad():
                    answers = [block.run(batch, hidden) for batch, hidden in enumerate(answers)]
                _finite(block, answers)
                block.float_outputs = answers
            block.sites = _sites(block, names)
            yield block
            with torch.no_grad():
                inputs = block.outputs or [block.run(batch) for batch in range(len(inputs))]
            _finite(block, inputs)
    finally:
        model.train(training)


def _enter(
    bundle: Bundle, examples: Examples, blocks: Sequence[nn.Module]
) -> tuple[list[Tensor], list[list[tuple[tuple[Any, ...], dict[str, Any]]]]]:
    """Run the model up to its blocks: (hidden states into the first one, [batch][block] what else each block is called with).

    The other blocks are called with what the model makes for them, but answer as the first one did: what they are called with
    depends on the texts and on what the first hands on (T5's position bias), not on the hidden states.
    """
    hidden: list[Tensor] = []
    calls: list[list[tuple[tuple[Any, ...], dict[str, Any]]]] = []

    def keep(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        named = dict(named)
        rest = given[1:] if given else ()
        state = given[0] if given else named.pop("hidden_states")
        if module is blocks[0]:
            hidden.append(state)
            calls.append([])
        calls[-1].append((rest, named))
        if module is blocks[-1]:
            raise _Enough

    hooks = [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks]
    try:
        with torch.no_grad(), _answering_alike(blocks):
            for arrays in _batches(bundle, examples):
                with suppress(_Enough):
                    _forward(bundle, arrays)
    finally:
        for hook in hooks:
            hook.remove()
    return hidden, calls


@contextmanager
def _answering_alike(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, only the first of the blocks computes; the others answer what it answered last."""
    last: list[Any] = [None]
    hook = blocks[0].register_forward_hook(lambda _, __, output: last.__setitem__(0, output))
    for block in blocks[1:]:
        block.forward = lambda *_, **__: last[0]
    try:
        yield
    finally:
        hook.remove()
        for block in blocks[1:]:
            del block.forward


def _batches(bundle: Bundle, examples: Examples) -> Iterator[dict[str, Tensor]]:
    order = np.argsort(examples.lengths, kind="stable")
    edges = np.flatnonzero(np.diff(examples.lengths[order])) + 1
    for same in np.split(order, edges):
        for start in range(0, len(same), BATCH):
            arrays = examples.batch(same[start : start + BATCH], bundle.encoder.pad)
            yield {name: torch.from_numpy(array).to(bundle.device) for name, array in arrays.items()}


def _forward(bundle: Bundle, arrays: dict[str, Tensor]) -> Any:
    wanted: dict[str, Any] = {name: arrays[name] for name in bundle.family.inputs if name in arrays}
    if "decoder_input_ids" in bundle.family.inputs or bundle.model.config.is_encoder_decoder:
        wanted["decoder_input_ids"] = arrays["input_ids"]
    if hasattr(bundle.model.config, "use_cache"):
        wanted["use_cache"] = False
    return bundle.model(**wanted)


@contextmanager
def _catching(module: nn.Module) -> Iterator[list[Tensor]]:
    """Ends the forward pass inside at `module` and keeps what it was to read, before any other hook changes it."""
    found: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Any, ...]) -> None:
        found.append(given[0].detach())
        raise _Enough

    hook = module.register_forward_pre_hook(keep, prepend=True)
    try:
        yield found
    except _Enough:
        pass
    finally:
        hook.remove()


def _sites(block: Block, names: dict[int, str]) -> tuple[Site, ...]:
    """Linears that are handed the same tensor, found by looking."""
    seen: list[tuple[Tensor, dict[str, nn.Module]]] = []

    def note(module: nn.Module, given: tuple[Any, ...]) -> None:
        for tensor, linears in seen:
            if tensor is given[0]:
                linears[names[id(module)]] = module
                return
        seen.append((given[0], {names[id(module)]: module}))

    linears = [module for module in block.module.modules() if isinstance(module, surgery.LINEARS)]
    linears = [module for module in linears if surgery.weight_2d(module).numel()]  # of parts that are gone
    hooks = [module.register_forward_pre_hook(note, prepend=True) for module in linears]
    try:
        with torch.no_grad():
            block.run(0)
    finally:
        for hook in hooks:
            hook.remove()
    return tuple(Site(linears) for _, linears in seen)


def _finite(block: Block, outputs: Sequence[Tensor]) -> None:
    if not all(bool(torch.isfinite(output).all()) for output in outputs):
        raise StepError(f"finite activations after {block.name}", "NaN or inf", "check the model and the texts")
