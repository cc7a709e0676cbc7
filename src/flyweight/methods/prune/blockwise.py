"""Making up for single weights or whole layers that went: each block trained by itself to answer as the dense model does there.

Both models are walked side by side. A block that stays in front of layers that went learns to answer as the last of those did, so
that whatever reads it next, a block or the head, meets what it is used to; every other block learns its own dense answers. Zeros
stay zero. See `rebuild` for the training, of a block, and `restore` for texts that are held back and what errors are told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from flyweight.calibration import walk
from flyweight.methods.prune.rebuild import block_error, rebuild
from flyweight.methods.prune.restore import held_back, outputs, relative, texts
from flyweight.models import surgery
from flyweight.training.objective import keep_zeros

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["restore_blocks", "stand_ins"]


def stand_ins(kept: Sequence[int], depth: int) -> list[int]:
    """For each layer that stays, the layer of the dense model whose answers it learns; kept: ascending, of `depth`.

    The one before the next that stays; for the last, the last.
    """
    return [after - 1 for after in (*kept[1:], depth)]


def restore_blocks(
    bundle: Bundle,
    dense: Bundle,
    settings: PruneSettings,
    context: Context,
    kept: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, dict[str, float]]:
    """Train the blocks of `bundle` in place, in turn; `bundle.sparse` names the weights whose zeros stay.

    kept: {stack: layers of `dense` that are left}; by default all

    Returns {block: {"without": ..., "block": ...}} as `restore` does. Raises StepError without texts or for activations that are
    no numbers, StorageError.
    """
    some, told = texts(settings, context), {}
    depths = {name: len(blocks) for name, blocks in surgery.blocks(dense.model, dense.family).items()}
    wants = {
        (name, number): (name, place)
        for name, depth in depths.items()
        for number, place in enumerate(stand_ins(range(depth) if kept is None else kept[name], depth))
    }
    whole = walk(dense, some)
    with keep_zeros(bundle.model, bundle.sparse):
        for block in walk(bundle, some, context.progress, "restoring"):
            for other in whole:
                other.outputs = wanted = outputs(other)
                if (other.stack, other.number) == wants[block.stack, block.number]:
                    break
            held = held_back(wanted, context.seed)
            errors = {"without": block_error(outputs(block), wanted, held)}
            rebuild(block, wanted, held, settings, context)
            block.outputs = outputs(block)
            errors["block"] = block_error(block.outputs, wanted, held)
            told[block.name] = relative(errors, wanted, held)
        for _ in whole:  # to its end, which puts the model's mode back
            pass
    return told
