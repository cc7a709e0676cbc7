"""Texts changed at random for the teacher's half of the loss: more inputs to be asked about than there are examples."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flyweight.data import Examples
from flyweight.models.bundle import Bundle

__all__ = ["Changes"]


@dataclass(frozen=True)
class Changes:
    """Each token of a text is changed with probability `rate`: half of these become the mask token, the others a token drawn
    from all texts, likely as it is frequent (after Tang et al. 2019). Special tokens stay, and the lengths.

    What becomes of an example depends on seed, epoch and its number alone: not on its neighbours, on the order of calls, or on
    where a run was taken up again.

    pool:    tokens to draw from, special ones left out
    special: [vocabulary] bool
    mask:    id of the mask token; None where the tokenizer has none, and all changed tokens are drawn
    """

    rate: float
    seed: int
    pool: NDArray[np.int32]
    special: NDArray[np.bool_]
    mask: int | None

    @classmethod
    def of(cls, rate: float, seed: int, examples: Examples, bundle: Bundle) -> Changes:
        """For texts that the bundle's tokenizer made."""
        ids = [number for number in bundle.tokenizer.all_special_ids if number is not None]
        size = 1 + max([int(examples.ids.max(initial=0)), bundle.encoder.pad, *ids])
        special = np.zeros(size, bool)
        special[[bundle.encoder.pad, *ids]] = True
        return cls(rate, seed, examples.ids[~special[examples.ids]], special, bundle.tokenizer.mask_token_id)

    def apply(self, batch: dict[str, Tensor], indices: NDArray[np.int64], epoch: int) -> dict[str, Tensor]:
        """The batch with other `input_ids`; all else is as it was."""
        ids = batch["input_ids"].cpu().numpy().copy()
        lengths = batch["attention_mask"].sum(1).tolist()
        for row, (index, length) in enumerate(zip(indices.tolist(), lengths, strict=True)):
            ids[row, :length] = self.change(ids[row, :length], index, epoch)
        return {**batch, "input_ids": torch.from_numpy(ids).to(batch["input_ids"].device)}

    def change(self, ids: NDArray[np.int64], index: int, epoch: int) -> NDArray[np.int64]:
        """One text's tokens [length], changed."""
        chance = np.random.default_rng([self.seed, epoch, index])
        fate = chance.random(len(ids))
        drawn = self.pool[chance.integers(0, len(self.pool), len(ids))] if len(self.pool) else ids
        masked = self.rate / 2 if self.mask is not None else 0.0
        free = ~self.special[ids]
        found = np.where(free & (fate < self.rate), drawn, ids)
        return np.where(free & (fate < masked), self.mask if self.mask is not None else 0, found).astype(np.int64)
