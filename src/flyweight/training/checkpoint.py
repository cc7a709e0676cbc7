"""Resumable state on disk: one file, written so that the old one stays whole until the new one is."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from flyweight.artifact import STORAGE_ERRNO
from flyweight.errors import StorageError

__all__ = ["FILE", "content_hash", "load", "require_room", "save", "write_atomically"]

FILE = "checkpoint.pt"


def content_hash(*values: Any) -> str:
    """sha256 over nested dicts, lists, tensors and plain values; the same content gives the same hash."""
    digest = hashlib.sha256()
    for value in values:
        _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous()
        digest.update(f"{data.dtype}{tuple(data.shape)}".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, Mapping):
        for key, part in value.items():
            digest.update(f"{key}:".encode())
            _feed(digest, part)
    elif isinstance(value, list | tuple):
        digest.update(f"[{len(value)}".encode())
        for part in value:
            _feed(digest, part)
    else:
        digest.update(f"{value!r};".encode())


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """`write` into a temporary sibling, fsync, rename over `path`. On failure `path` is as before.

    Raises StorageError when the disk is full or cannot be written.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
        temporary = Path(name)
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _sync_folder(path.parent)
    except (OSError, RuntimeError) as error:
        cause = _storage_cause(error)
        if cause is None:
            raise
        raise StorageError(
            f"room and permission to write {path}",
            f"'{cause.strerror or cause}'",
            "free space and run the same command again; what was there before is untouched",
        ) from error
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _storage_cause(error: BaseException | None) -> OSError | None:
    """torch wraps the disk's error in a RuntimeError of its own: look below it."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in STORAGE_ERRNO:
            return error
        error = error.__cause__ or error.__context__
    return None


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # a folder cannot be opened there
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(PermissionError):
            os.fsync(handle)
    finally:
        os.close(handle)


def require_room(folder: Path, bytes_needed: int) -> None:
    """Refuse before the work rather than in it. Raises StorageError."""
    place = folder
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < bytes_needed:
        raise StorageError(
            f"{bytes_needed / 1e6:.0f} MB for checkpoints at {folder}", f"{free / 1e6:.0f} MB", "free space there"
        )


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write `state` (tensors and plain values) as the folder's checkpoint. Raises StorageError."""
    write_atomically(folder / FILE, lambda file: torch.save(state, file))


def load(folder: Path, key: str, note: Callable[[str], None]) -> dict[str, Any] | None:
    """The folder's checkpoint if there is one and it belongs to `key`; else None, and `note` is told why.

    A damaged file is not an error: it is an interrupted disk's, the work starts over and replaces it. Its checksums are
    verified, for torch reads flipped bytes without a word. Nothing but tensors and plain values is unpickled.
    """
    path = folder / FILE
    if not path.exists():
        return None
    try:
        with zipfile.ZipFile(path) as file:
            if file.testzip() is not None:
                raise ValueError("a checksum differs")
        state = torch.load(path, map_location="cpu", weights_only=True)
        found = state["key"]
    except Exception as error:  # zipfile, pickle and torch raise a dozen unrelated classes for a damaged file
        note(
            f"{path} is damaged ({str(error).splitlines()[0][:80] if str(error) else type(error).__name__}): starting over"
        )
        return None
    if found != key:
        note(f"{path} belongs to other settings, data or weights: starting over")
        return None
    return dict(state)
