"""Training one block by itself to answer as the dense one: all its weights, without labels and without the rest of the model.

The loss is the mean squared difference to what the dense block answers in the dense model, on the inputs that the blocks before
give now; Adam, the rate falls linearly to 0. Of the start and what is looked at on the way, the weights are kept that are best on
the texts that were held back, so no block ends worse there than it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from flyweight.training import checkpoint

if TYPE_CHECKING:
    from flyweight.calibration import Block
    from flyweight.context import Context
    from flyweight.settings import PruneSettings

__all__ = ["block_error", "error_on", "rebuild"]

STEPS, RATE, TEXTS, LOOKS = 320, 3e-4, 16, 8
"""Steps and the rate at their beginning; texts a step, at least; times that what was held back is looked at."""


def rebuild(
    block: Block, wanted: Sequence[Tensor], held: Sequence[int], settings: PruneSettings, context: Context
) -> None:
    """Train the block in place. What it learned is kept below `context.work`: a killed run goes on after the last block.

    wanted: what the dense block answers, [texts, tokens, width], one tensor a batch; held: batches that are held back (all: what
    is learned from is judged by as well). Raises StorageError.
    """
    tables = {
        id(table.weight) for table in block.module.modules() if isinstance(table, nn.Embedding)
    }  # other blocks' too
    trained = {name: one for name, one in block.module.named_parameters() if id(one) not in tables}
    state = {name: one.detach() for name, one in trained.items()}
    about = (settings.model_dump(mode="json"), context.seed, state, block.inputs, list(wanted), list(held))
    folder, key = context.work / "rebuild" / block.name, checkpoint.content_hash("rebuild", *about)
    kept = checkpoint.load(folder, key, context.progress.note)
    if kept is None:
        best = _trained(block, wanted, held, trained, torch.Generator().manual_seed(context.seed + block.number))
        checkpoint.save(folder, {"key": key, "weights": {name: one.cpu() for name, one in best.items()}})
    else:
        best = kept["weights"]
    with torch.no_grad():
        for name, one in trained.items():
            one.copy_(best[name])


def _trained(
    block: Block,
    wanted: Sequence[Tensor],
    held: Sequence[int],
    trained: dict[str, nn.Parameter],
    chance: torch.Generator,
) -> dict[str, Tensor]:
    used = [batch for batch in range(len(wanted)) if batch not in held] or list(held)
    best, least = _copy(trained), error_on(block, wanted, held)
    required = {name: one.requires_grad for name, one in block.module.named_parameters()}
    for name, one in block.module.named_parameters():
        one.requires_grad_(name in trained)
    adam = torch.optim.Adam(trained.values(), lr=RATE)
    falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda step: 1 - step / STEPS)
    sizes = torch.tensor([float(len(wanted[batch])) for batch in used])
    try:
        for step in range(1, STEPS + 1):
            adam.zero_grad()
            some = [used[place] for place in _draw(sizes, chance)]
            count = sum(wanted[batch].numel() for batch in some)
            for batch in some:
                torch.autograd.backward((block.run(batch) - wanted[batch]).square().sum() / count)
            adam.step()
            falling.step()
            if step % (STEPS // LOOKS) == 0 and (now := error_on(block, wanted, held)) < least:
                best, least = _copy(trained), now
    finally:
        for name, one in block.module.named_parameters():
            one.requires_grad_(required[name])
            one.grad = None
    return best


def _copy(trained: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: one.detach().clone() for name, one in trained.items()}


def block_error(found: Sequence[Tensor], wanted: Sequence[Tensor], batches: Sequence[int]) -> float:
    """Mean squared difference of what a block answers, over these batches."""
    total = sum(float((found[batch] - wanted[batch]).double().square().sum()) for batch in batches)
    return total / sum(wanted[batch].numel() for batch in batches)


@torch.no_grad()
def error_on(block: Block, wanted: Sequence[Tensor], batches: Sequence[int]) -> float:
    """The same of the block as it stands now."""
    total = sum(float((block.run(batch) - wanted[batch]).double().square().sum()) for batch in batches)
    return total / sum(wanted[batch].numel() for batch in batches)


def _draw(sizes: Tensor, chance: torch.Generator) -> list[int]:
    """Places of batches at random, larger ones more often, until there are TEXTS texts."""
    found: list[int] = []
    for batch in torch.multinomial(sizes, len(sizes), generator=chance).tolist():
        found.append(batch)
        if sizes[found].sum() >= TEXTS:
            break
    return found
