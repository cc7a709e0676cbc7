"""What the teacher says: its answers, whole or the likeliest of them, kept on disk by content."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flyweight.context import Progress
from flyweight.data import Examples
from flyweight.models.activations import simulate
from flyweight.models.bundle import Bundle
from flyweight.training.checkpoint import content_hash, write_atomically
from flyweight.training.device import find_device, placed, weights
from flyweight.training.objective import answer
from flyweight.training.predict import outputs, predict
from flyweight.training.watch import tap

__all__ = ["Top", "answers", "identity", "kept", "tap", "top", "top_answers"]


@dataclass(frozen=True)
class Top:
    """Of softmax(logits / T) the k likeliest classes, and what is left.

    values: [n, k] float32, log-probabilities, falling; indices: [n, k] int32, their classes; rest: [n] float32, log of the mass
    of all other classes (-inf where there are none)
    """

    values: NDArray[np.float32]
    indices: NDArray[np.int32]
    rest: NDArray[np.float32]

    def __len__(self) -> int:
        return len(self.rest)

    def take(self, indices: NDArray[np.int64]) -> Self:
        return replace(self, values=self.values[indices], indices=self.indices[indices], rest=self.rest[indices])

    def tensors(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """values, indices (int64), rest."""
        parts = (self.values, self.indices.astype(np.int64), self.rest)
        values, indices, rest = (torch.from_numpy(part).to(device) for part in parts)
        return values, indices, rest

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(*(np.concatenate([getattr(part, n) for part in parts]) for n in ("values", "indices", "rest")))


def top(logits: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """values [batch, k], indices [batch, k] int64 and rest [batch] of logits [batch, classes], see `Top`."""
    shares = torch.log_softmax(logits.float() / temperature, -1)
    values, indices = shares.topk(k, -1)
    rest = torch.logsumexp(shares.scatter(-1, indices, -torch.inf), -1)
    return values, indices, rest


def identity(teacher: Bundle) -> str:
    """sha256 of everything the teacher's answers depend on beside the examples."""
    how = teacher.task, teacher.family.model_type, teacher.activations
    return content_hash(*how, teacher.model.config.to_dict(), weights(teacher.model))


def answers(
    teacher: Bundle, key: str, data: Examples, cache: Path, progress: Progress, device: str | None
) -> NDArray[np.float32]:
    """The teacher's answers to every example, [n, ...] float32, computed once: the next call with them reads the file.

    key: `identity(teacher)`. The file is named by teacher, examples without their labels, and what is kept. A damaged one
    is made again. Raises StorageError when it cannot be written.
    """
    name = content_hash(key, replace(data, labels=None).content_hash(), "answers")[:32]

    def ask() -> NDArray[np.float32]:
        with placed(teacher.model, find_device(device)), simulate(teacher):
            return predict(teacher, data, progress=progress, what="asking the teacher")

    return kept(cache / f"{name}.npy", len(data), ask, progress)


def kept(path: Path, count: int, ask: Callable[[], NDArray[np.float32]], progress: Progress) -> NDArray[np.float32]:
    """Answers to `count` examples, [count, ...] float32, from the file or else asked for and written there.

    A damaged file is made again. Raises StorageError when it cannot be written.
    """
    found = _read(path, count, progress)
    if found is None:
        found = made = ask()
        write_atomically(path, lambda file: np.save(file, made, allow_pickle=False))
    return found


def top_answers(
    teacher: Bundle,
    key: str,
    data: Examples,
    cache: Path,
    progress: Progress,
    device: str | None,
    *,
    k: int,
    temperature: float,
) -> Top:
    """`answers`, of which only the k likeliest classes at this temperature are held, in memory and on disk.

    8 k + 4 bytes an example instead of 4 a class. The file carries checksums: a damaged one is made again.
    """
    name = content_hash(key, replace(data, labels=None).content_hash(), "top", k, temperature)[:32]
    path = cache / f"{name}.npz"
    found = _read_top(path, (len(data), k), progress)
    if found is not None:
        return found

    def packed(batch: dict[str, Tensor]) -> Tensor:
        values, indices, rest = top(answer(teacher, batch), k, temperature)
        return torch.cat([values, indices.float(), rest[:, None]], -1)  # float32 has all numbers up to 2^24

    with placed(teacher.model, find_device(device)), simulate(teacher):
        made = outputs(
            teacher.model, packed, data, pad=teacher.encoder.pad, progress=progress, what="asking the teacher"
        )
    held = Top(made[:, :k].copy(), made[:, k : 2 * k].astype(np.int32), made[:, 2 * k].copy())
    parts: dict[str, Any] = {"values": held.values, "indices": held.indices, "rest": held.rest}
    write_atomically(path, lambda file: np.savez(file, **parts))
    return held


def _read_top(path: Path, shape: tuple[int, int], progress: Progress) -> Top | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            found = Top(file["values"], file["indices"], file["rest"])
    except (OSError, ValueError, EOFError, KeyError, BadZipFile, zlib.error) as error:
        progress.note(f"{path} is damaged ({error}): asking the teacher again")
        return None
    if found.values.shape != shape or found.indices.shape != shape or found.rest.shape != shape[:1]:
        progress.note(f"{path} holds something else: asking the teacher again")
        return None
    return found


def _read(path: Path, count: int, progress: Progress) -> NDArray[np.float32] | None:
    if not path.exists():
        return None
    try:
        found: NDArray[np.float32] = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        progress.note(f"{path} is damaged ({error}): making it again")
        return None
    if found.dtype != np.float32 or found.shape[:1] != (count,):
        progress.note(f"{path} holds something else: making it again")
        return None
    return found
