"""What the teacher says: its answers, kept on disk by content, and its hidden states, taken as they pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flyweight.context import Progress
from flyweight.data import Examples
from flyweight.models.activations import simulate
from flyweight.models.bundle import Bundle
from flyweight.models.surgery import blocks, hidden_states
from flyweight.training.checkpoint import content_hash, write_atomically
from flyweight.training.device import find_device, placed, weights
from flyweight.training.predict import predict

__all__ = ["answers", "hidden", "identity", "kept", "tap"]


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


@contextlib.contextmanager
def tap(bundle: Bundle, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Hidden states after the given blocks of the model's one stack, by number, filled by its next forward pass."""
    found: dict[int, Tensor] = {}

    def keep(number: int) -> Any:
        def hook(_: Any, __: Any, output: Any) -> None:
            found[number] = hidden_states(output)

        return hook

    hooks = []
    if layers:
        (stack,) = blocks(bundle.model, bundle.family).values()
        hooks = [stack[number].register_forward_hook(keep(number)) for number in sorted(set(layers))]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def hidden(found: dict[int, Tensor], layers: Sequence[int]) -> list[Tensor]:
    return [found[number] for number in layers]
