"""The answers of a model with part of one block silenced, at the price of the blocks from there on.

Blocks before the one looked at say what they said before to the same batch, and so does a whole encoder while its decoder is
looked at. What a model does around its blocks (masks, position bias, norms, pooling, head) is its own code, run as ever;
embeddings, a look-up, are made anew each time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.models import surgery
from flyweight.models.activations import simulate
from flyweight.models.bundle import Bundle
from flyweight.tasks import task_named
from flyweight.training.batches import tensors

__all__ = ["Entered", "Replay", "silenced"]

NOTHING: Mapping[nn.Module, Sequence[Any]] = MappingProxyType({})


class _Enough(Exception):
    """Ends a forward pass whose rest is of no use."""


@dataclass
class Entered:
    """A block as the whole model runs it, one entry a batch.

    outputs: what it answers, hidden states [batch, tokens, width] first
    skipped: the same with the hidden states that came in, as if the block were not there
    squares: [neurons] float64, mean over the real tokens of the squared activation
    """

    outputs: list[Any]
    skipped: list[Any]
    squares: Tensor


class Replay:
    """One model on one set of examples, in their order, `size` a batch. Use it inside `ready`.

    given: {block: what it answers, one entry a batch} for blocks that need not run again
    """

    def __init__(self, bundle: Bundle, examples: Examples, size: int) -> None:
        self.bundle, self.task = bundle, task_named(bundle.task)
        spans = [np.arange(i, min(i + size, len(examples))) for i in range(0, len(examples), size)]
        self.batches = [tensors(examples, span, bundle.encoder.pad, bundle.device) for span in spans]
        self.given: dict[nn.Module, list[Any]] = {}

    @contextmanager
    def ready(self) -> Iterator[None]:
        """In evaluation mode, inputs rounded as the engine would; all is put back at the end."""
        training = self.bundle.model.training
        self.bundle.model.train(False)
        try:
            with torch.inference_mode(), simulate(self.bundle):
                yield
        finally:
            self.bundle.model.train(training)

    def warm(self) -> None:
        """Run the last batch, so that the next pass tells the time of all that follow."""
        self._run(len(self.batches) - 1, NOTHING)

    def answers(self, instead: Mapping[nn.Module, Sequence[Any]] = NOTHING) -> NDArray[np.float32]:
        """The task's answers, [n, ...]; blocks in `instead` answer that. Raises StepError for NaN or infinity."""
        parts = [self._run(number, instead) for number in range(len(self.batches))]
        found: NDArray[np.float32] = torch.cat(parts).float().cpu().numpy()
        if not np.isfinite(found).all():
            raise StepError("finite answers of the model", "NaN or infinity", "check the model and the texts")
        return found

    def enter(self, block: nn.Module, down: nn.Module) -> Entered:
        """Run up to the end of `block`, and keep what comes in, what goes out and how large the inputs of `down` are."""
        outputs: list[Any] = []
        incoming: list[Tensor] = []
        sums: list[Tensor] = []
        tokens = 0

        def arrive(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            incoming.append(given[0] if given else named["hidden_states"])

        def leave(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            outputs.append(output)
            raise _Enough

        def weigh(_: nn.Module, given: tuple[Tensor, ...]) -> None:
            real = self.batches[len(incoming) - 1]["attention_mask"].reshape(-1).bool()
            rows = given[0].flatten(0, -2)
            sums.append(rows[real].double().square().sum(0))

        hooks = [
            block.register_forward_pre_hook(arrive, with_kwargs=True),
            block.register_forward_hook(leave),
            down.register_forward_pre_hook(weigh, prepend=True),
        ]
        try:
            for number, batch in enumerate(self.batches):
                with suppress(_Enough):
                    self._run(number, NOTHING)
                tokens += int(batch["attention_mask"].sum())
        finally:
            for hook in hooks:
                hook.remove()
        skipped = [
            (hidden, *output[1:]) if isinstance(output, tuple) else hidden
            for hidden, output in zip(incoming, outputs, strict=True)
        ]
        return Entered(outputs, skipped, torch.stack(sums).sum(0) / tokens)

    def leave(self, blocks: Sequence[nn.Module], entered: Entered) -> None:
        """From here on `blocks`, all of a stack up to the one entered, are not run again."""
        for block in blocks:
            self.given[block] = entered.outputs

    def _run(self, number: int, instead: Mapping[nn.Module, Sequence[Any]]) -> Tensor:
        batch, model = self.batches[number], self.bundle.model
        wanted: dict[str, Any] = {name: batch[name] for name in self.bundle.family.inputs}
        if hasattr(model.config, "use_cache"):
            wanted["use_cache"] = False
        with _answering({block: said[number] for block, said in {**self.given, **instead}.items()}):
            return self.task.answer(model(**wanted), batch)


@contextmanager
def _answering(said: Mapping[nn.Module, Any]) -> Iterator[None]:
    """These blocks answer without running. Their hooks and all that a model reads off them stay."""
    try:
        for block, output in said.items():
            block.forward = partial(_say, output)
        yield
    finally:
        for block in said:
            if "forward" in block.__dict__:
                del block.forward


def _say(output: Any, *_: Any, **__: Any) -> Any:
    return output


@contextmanager
def silenced(reader: nn.Module, columns: Tensor | None) -> Iterator[None]:
    """While inside, a linear reads zeros in these input columns (all for None), as if they were cut off; its bias stays.

    columns: [n] int64
    """

    def zero(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs = given[0]
        quiet = torch.zeros_like(inputs) if columns is None else inputs.index_fill(-1, columns.to(inputs.device), 0)
        return (quiet, *given[1:])

    hook = reader.register_forward_pre_hook(zero, prepend=True)  # before an engine's rounding, as a cut would be
    try:
        yield
    finally:
        hook.remove()


def left_to_run(lists: Mapping[str, Sequence[nn.Module]], stack: str, block: int) -> int:
    """How many blocks run when a replay begins at this one: the rest of its stack and all stacks after it."""
    names = list(lists)
    return len(lists[stack]) - block + sum(len(lists[name]) for name in names[names.index(stack) + 1 :])


def stacks_of(bundle: Bundle) -> Mapping[str, Sequence[nn.Module]]:
    """{stack: its blocks} in order of execution."""
    return {name: list(blocks) for name, blocks in surgery.blocks(bundle.model, bundle.family).items()}
