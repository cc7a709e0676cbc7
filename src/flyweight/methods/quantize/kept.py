"""What long work on blocks has found so far, on disk: a killed run goes on after the last block that was done."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flyweight.artifact import QuantizedTensor
from flyweight.methods.quantize.work import widest
from flyweight.models.bundle import OPTIONAL, Codes
from flyweight.training import checkpoint

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from flyweight.calibration import Block
    from flyweight.methods.quantize.work import Work

__all__ = ["Kept", "codes_of", "parts_of"]

PARTS = ("codes", "scale", "mask", *OPTIONAL)


class Kept:
    """What was kept of one block, or will be, below `Context.work`.

    stage: what is worked out; others may keep their own beside it
    state: tensors and plain values, or None. What belongs to other settings, weights or inputs, or is damaged, is said to be and
           worked out anew
    """

    def __init__(self, work: Work, stage: str, block: Block) -> None:
        self.folder = work.context.work / stage / block.name
        inside = f"{block.name}."
        grids = {name: target.grid for name, target in work.targets.items() if name.startswith(inside)}
        sparse = sorted(name for name in work.bundle.sparse if name.startswith(inside))
        about = (work.settings.model_dump(), widest(work.settings), work.context.seed, grids, sparse)
        seen = (block.module.state_dict(), block.inputs, block.float_outputs, block.calls)
        self.key = checkpoint.content_hash(stage, *about, *seen)
        self.state = checkpoint.load(self.folder, self.key, work.context.progress.note)
        if self.state is not None:
            work.context.progress.note(f"{block.name}: {stage} was done before this run")

    def keep(self, state: Mapping[str, Any]) -> None:
        """Raises StorageError."""
        checkpoint.save(self.folder, {"key": self.key, **state})


def parts_of(codes: Codes) -> dict[str, Any]:
    """Codes as tensors and plain values."""
    parts = {part: value.cpu() for part in PARTS if (value := getattr(codes, part)) is not None}
    return {"info": codes.info.model_dump_json(), **parts}


def codes_of(parts: Mapping[str, Any], device: torch.device) -> Codes:
    found: dict[str, Any] = {part: parts[part].to(device) if part in parts else None for part in PARTS}
    return Codes(info=QuantizedTensor.model_validate_json(parts["info"]), **found)
