"""The cache of recipe prefixes: one artifact folder a content hash, a size cap, the least recently used go first.

    <cache>/prefixes/<key>/   a finished step's model (an artifact without engines)
    <cache>/work/<key>/       checkpoints of a step that is not finished yet
    <cache>/teachers/         teacher outputs by content hash
    <cache>/tables/           what blocks cost in time on this machine

Where it is: FLYWEIGHT_CACHE, else the system's cache folder. Its cap: FLYWEIGHT_CACHE_GB, else 20.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import platformdirs

from flyweight.artifact import MANIFEST, read_manifest, verify
from flyweight.errors import ArtifactError, SettingsError, StorageError

__all__ = ["Cache", "Entry"]


@dataclass(frozen=True)
class Entry:
    """One thing in the cache. kind: one of `Cache.KINDS`; used: seconds since the epoch of its last use."""

    kind: str
    key: str
    path: Path
    bytes: int
    used: float


class Cache:
    """A folder; several processes may use it at once, since entries appear by rename only."""

    KINDS = ("prefixes", "work", "teachers", "tables")

    def __init__(self, root: Path | None = None) -> None:
        named = root or os.environ.get("FLYWEIGHT_CACHE")
        self.root = Path(named) if named else Path(platformdirs.user_cache_dir("flyweight", appauthor=False))

    @staticmethod
    def cap() -> int:
        """Bytes. Raises SettingsError when FLYWEIGHT_CACHE_GB is not a number."""
        text = os.environ.get("FLYWEIGHT_CACHE_GB", "20")
        try:
            return int(float(text) * 1e9)
        except (ValueError, OverflowError):
            raise SettingsError(
                "a number of gigabytes in FLYWEIGHT_CACHE_GB", repr(text), "set it to e.g. 20"
            ) from None

    def prefix(self, key: str) -> Path:
        return self.root / "prefixes" / key

    def work(self, key: str) -> Path:
        return self.root / "work" / key

    @property
    def teachers(self) -> Path:
        return self.root / "teachers"

    @property
    def tables(self) -> Path:
        return self.root / "tables"

    def found(self, key: str) -> bool:
        """Whether the prefix is there; marks it as used."""
        path = self.prefix(key)
        if not (path / MANIFEST).is_file():
            return False
        with contextlib.suppress(OSError):  # gone since, or not ours to touch
            os.utime(path)
        return True

    def has_engine(self, key: str) -> bool:
        """Whether the prefix holds an engine's file, as the reference of a run does."""
        try:
            return bool(read_manifest(self.prefix(key)).engines)
        except ArtifactError:
            return False

    def whole(self, key: str) -> bool:
        """Whether every file of the prefix is as it was written."""
        try:
            verify(self.prefix(key))
        except ArtifactError:
            return False
        return True

    def drop(self, key: str) -> None:
        """Remove a prefix. Raises StorageError when that cannot be done."""
        path = self.prefix(key)
        remove(Entry("prefixes", key, path, 0, 0.0))
        if path.exists():
            raise StorageError(f"to remove the damaged {path}", "a folder that stays", "remove it yourself")

    def entries(self) -> Iterator[Entry]:
        for kind in self.KINDS:
            folder = self.root / kind
            for path in sorted(folder.iterdir()) if folder.is_dir() else ():
                with contextlib.suppress(FileNotFoundError):  # another process was quicker
                    yield Entry(kind, path.name, path, size_of(path), path.stat().st_mtime)

    def trim(self, keep: frozenset[str] = frozenset()) -> int:
        """Remove the least recently used entries until the cap holds; returns the bytes freed. `keep`: keys in use."""
        found = sorted(self.entries(), key=lambda entry: entry.used)
        over = sum(entry.bytes for entry in found) - self.cap()
        freed = 0
        for entry in found:
            if freed >= over:
                break
            begun = entry.kind == "work" or entry.key.startswith(".")  # may belong to a run in progress
            recent = begun and time.time() - entry.used < 86_400
            if entry.key not in keep and not recent:
                freed += remove(entry)
        return freed

    def clear(self) -> int:
        """Remove everything; returns the bytes freed."""
        return sum(remove(entry) for entry in list(self.entries()))


def size_of(path: Path) -> int:
    """Bytes of a file or of all below a folder; what vanishes meanwhile counts nothing."""
    if not path.is_dir():
        return path.stat().st_size
    total = 0
    for folder, _, names in os.walk(path):
        for name in names:
            with contextlib.suppress(OSError):
                total += Path(folder, name).stat().st_size
    return total


def remove(entry: Entry) -> int:
    """Renamed first: a removal that is cut short must not leave half an entry in the place of a whole one."""
    gone = entry.path.with_name(f".{entry.key[:32]}.{os.getpid()}.gone")
    try:
        entry.path.rename(gone)
    except OSError:  # in use, or another process was quicker
        return 0
    if gone.is_dir():
        shutil.rmtree(gone, ignore_errors=True)
    else:
        gone.unlink(missing_ok=True)
    return entry.bytes
