"""The disk contract: what a Flyweight folder holds, how it is written without ever being half there, how it is checked.

A folder is an *artifact* when it has a `flyweight.json`. Entries of the recipe cache are artifacts too, without engines
and measurements.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from flyweight.errors import ArtifactError, StorageError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "BlockShape",
    "Engine",
    "FileEntry",
    "KernelReport",
    "KernelRun",
    "KernelTotal",
    "Manifest",
    "Measurement",
    "QuantizedTensor",
    "StepRecord",
    "Verdict",
    "engine_entry",
    "file_hash",
    "is_artifact",
    "known_hash",
    "read_manifest",
    "verify",
    "write_folder",
]

FORMAT = 1
MANIFEST = "flyweight.json"
STORAGE_ERRNO = {
    errno.ENOSPC,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    getattr(errno, "EDQUOT", -1),
}
FORBIDDEN = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".py"}


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class FileEntry(_Part):
    """One file of the folder."""

    sha256: str
    bytes: int


class BlockShape(_Part):
    """What is left of one block.

    heads:    for each attention of the block the original numbers of the heads kept (groups of query heads where keys
              and values are shared by several)
    neurons:  width of the MLP
    """

    heads: tuple[tuple[int, ...], ...]
    neurons: int


class QuantizedTensor(_Part):
    """How one weight is packed; `name` in model.safetensors becomes `name.codes`, `.scale` and perhaps others.

    shape:      [out, in], also where the module keeps its weight as [in, out]
    transposed: the module does that (Conv1D); grids always run over [out, in]
    smooth:     the codes hold weight x `name.smooth` [in], and the linear's input is divided by it
    outliers:   so many input channels are multiplied in float (`name.outliers`, `name.outlier_values`)
    static:     the linear's input is rounded to a fixed uint8 grid (`name.input_scale`, `name.input_zero_point`)
    shifted:    before that, `name.input_shift` [in] is taken off it; its product with the weight is added to the output
    """

    shape: tuple[int, ...]
    bits: int
    scheme: Literal["symmetric", "asymmetric", "binary"]
    granularity: Literal["tensor", "channel", "group"]
    group_size: int | None = None
    transposed: bool = False
    smooth: bool = False
    outliers: int = 0
    static: bool = False
    shifted: bool = False


class Measurement(_Part):
    """One figure. low, high: 95 % interval or spread as `method` says; n: how many samples it rests on."""

    value: float
    unit: str
    low: float | None = None
    high: float | None = None
    n: int | None = None
    method: str


class StepRecord(_Part):
    """One step that was run: its settings, how long it took, and what it noted (losses, control run, what was removed)."""

    name: str
    settings: dict[str, Any]
    seconds: float
    notes: dict[str, Any] = {}


class Verdict(_Part):
    """Whether the acceptance rule was met, and the sentence that says so."""

    accepted: bool
    text: str


class Engine(_Part):
    """One exported form. Shapes and names are those of the file itself.

    file:       path inside the artifact
    inputs:     names, each [batch, length] int64
    outputs:    names, in order
    precision:  "fp32" | "int8-dynamic" | "int8-token" | "int8-static" | "weights-only" | "weights-only-int8-compute" (the
                kernel rounds a linear's float input to int8, with a scale for every row and block of inputs)
    parity:     largest relative difference to torch that the export check saw
    """

    file: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    precision: str
    parity: float


class KernelRun(_Part):
    """What one linear ran in: the engine's names (several where a part of the channels is multiplied apart), the type of the
    arithmetic ("int8", "fp32", "int8 + fp32"), and its share of the time of one run."""

    kernel: str
    precision: str
    share: float


class KernelTotal(_Part):
    """All nodes that ran in one kernel, and their share of the time."""

    kernel: str
    precision: str
    nodes: int
    share: float


class KernelReport(_Part):
    """What an engine really ran, from its own profile of one text of the length that latency is told for.

    linears: by the name of the weight; totals: most time first; text: sentences that say what it comes to
    """

    linears: dict[str, KernelRun]
    totals: tuple[KernelTotal, ...]
    text: tuple[str, ...]


class Manifest(_Part):
    """flyweight.json.

    measurements: {"result" | "reference_torch" | "reference_onnxruntime" | "result_openvino" | ...: {key: Measurement}};
    keys with a point are parts, as in `latency_ms.p50@1x128` (batch x length) and `quality.accuracy`.
    """

    format: int = FORMAT
    flyweight: str
    created: str
    task: str
    labels: tuple[str, ...] | None = None
    family: str
    inputs: tuple[str, ...]
    pad_token_id: int
    max_length: int
    blocks: dict[str, tuple[BlockShape, ...]] = {}
    plain: bool = True
    """True where AutoModel loads the folder without Flyweight."""
    layout: Literal["flyweight", "pack-quantized"] = "flyweight"
    """How model.safetensors holds packed weights: see `flyweight.models.storage`; the second is that of compressed-tensors."""
    origin: str
    """sha256 of the model that everything began with."""
    seed: int = 0
    steps: tuple[StepRecord, ...] = ()
    versions: dict[str, str] = {}
    quantized: dict[str, QuantizedTensor] = {}
    activations: Literal["none", "dynamic", "token", "static"] = "none"
    sparse: dict[str, str] = {}
    """Weights stored as bitmask + values, with their pattern."""
    engines: dict[str, Engine] = {}
    kernels: dict[str, KernelReport] = {}
    """By engine."""
    environment: dict[str, Any] = {}
    measurements: dict[str, dict[str, Measurement]] = {}
    verdict: Verdict | None = None
    files: dict[str, FileEntry] = Field(default={})


SHARED_FILE = {"openvino": "onnxruntime"}
"""Engines that read the file of another one."""


def engine_entry(manifest: Manifest, engine: str) -> Engine | None:
    """The engine's own entry, or that of the engine whose file it reads as well."""
    return manifest.engines.get(engine) or manifest.engines.get(SHARED_FILE.get(engine, ""))


def is_artifact(path: Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: Path) -> Manifest:
    """Read flyweight.json without checking the files. Raises ArtifactError."""
    path = Path(folder) / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"an artifact at {folder}", f"no {MANIFEST} there", "name a folder written by `flyweight compress`"
        ) from None
    except (ValueError, OSError) as error:
        raise ArtifactError(f"a readable {path}", f"'{error}'", "fetch or make the artifact again") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else "no object"
        raise ArtifactError(f"format {FORMAT} in {path}", f"{found}", "use the Flyweight version that wrote it")
    try:
        return Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ArtifactError(
            f"a valid {path}", f"'{place}: {first['msg']}'", "fetch or make the artifact again"
        ) from None


def verify(folder: Path) -> Manifest:
    """Read the manifest and check size and sha256 of every file. Raises ArtifactError naming the first bad file."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    root = folder.resolve()
    for name, entry in manifest.files.items():
        path = folder / name
        if path.is_symlink() or not path.resolve().is_relative_to(root):
            raise ArtifactError(f"{name} inside {folder}", "a path that leaves it", "do not use this artifact")
        if not path.is_file():
            raise ArtifactError(f"{name} in {folder}", "no such file", "fetch or make the artifact again")
        size = path.stat().st_size
        if size != entry.bytes:
            raise ArtifactError(f"{entry.bytes} bytes in {path}", f"{size}", "fetch or make the artifact again")
        if file_hash(path) != entry.sha256:
            raise ArtifactError(
                f"{path} as it was written", "other content (sha256 differs)", "fetch or make the artifact again"
            )
    return manifest


def file_hash(path: Path) -> str:
    """sha256 of what the file holds, read from disk."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_hash(path: Path) -> str:
    """`file_hash`, read once in this process as long as the file's size, number and times stay what they were.

    A file that was changed a moment ago may be changed again within the same tick of its clock, and is read anew.
    """
    about = path.stat()
    same = (about.st_dev, about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)
    if same not in _known:
        found = file_hash(path)
        if time.time_ns() - max(about.st_mtime_ns, about.st_ctime_ns) < SETTLED_NS:
            return found
        _known[same] = found
    return _known[same]


SETTLED_NS = 2_000_000_000  # two seconds, the coarsest that file systems keep
_known: dict[tuple[int, ...], str] = {}


def file_entries(folder: Path) -> dict[str, FileEntry]:
    """Every file below `folder` except the manifest itself. Raises ArtifactError for pickles and code."""
    entries = {}
    for path in sorted(Path(folder).rglob("*")):
        if path.is_dir() or path.name == MANIFEST:
            continue
        if path.suffix in FORBIDDEN:
            raise ArtifactError("only safetensors, ONNX, JSON and text in an artifact", f"{path.name}", "remove it")
        entries[path.relative_to(folder).as_posix()] = FileEntry(sha256=known_hash(path), bytes=path.stat().st_size)
    return entries


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the folder's files into the manifest and write it. Returns what was written."""
    written = manifest.model_copy(update={"files": file_entries(folder)})
    (Path(folder) / MANIFEST).write_text(
        written.model_dump_json(indent=1, exclude_defaults=False) + "\n", encoding="utf-8"
    )
    return written


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Called before long work, so that it is not lost at the end. Raises ArtifactError, StorageError."""
    _recover(out)
    if not out.exists():
        place = next(path for path in out.absolute().parents if path.exists())
        try:
            Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=place)).rmdir()
        except OSError as error:
            raise _storage(out, error) from None
        return
    if out.is_file() or (any(out.iterdir()) and not overwrite):
        kind = "a file" if out.is_file() else "a folder with files in it"
        raise ArtifactError(f"a new folder at {out}", kind, "choose another --out, or pass --overwrite")
    if any(out.iterdir()) and not is_artifact(out):
        raise ArtifactError(
            f"an artifact to overwrite at {out}", "a folder that Flyweight did not write", "choose another --out"
        )


@contextlib.contextmanager
def write_folder(out: Path, overwrite: bool = False) -> Iterator[Path]:
    """Fill a temporary sibling; on success fsync it and rename it to `out`; on any failure remove it.

    The old `out` stays whole until the new one is complete. Raises ArtifactError when `out` is in the way and
    StorageError when the disk is full or read-only.
    """
    out = Path(out).absolute()
    refuse_existing(out, overwrite)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".tmp", dir=out.parent))
    except OSError as error:
        raise _storage(out, error) from None
    try:
        try:
            yield temporary
            umask = os.umask(0)
            os.umask(umask)
            for path in [*temporary.rglob("*"), temporary]:
                path.chmod((0o777 if path.is_dir() else 0o666) & ~umask)  # some libraries write for the owner alone
                _sync(path)
            _swap(temporary, out)
        except OSError as error:
            if error.errno in STORAGE_ERRNO:
                raise _storage(out, error) from error
            raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _recover(out: Path) -> None:
    """Put back what a process killed between the two renames of `_swap` left aside, and remove what was never finished."""
    name = glob.escape(out.name)
    for aside in out.parent.glob(f".{name}.*.old"):
        if not out.exists() and (aside / out.name).exists():
            (aside / out.name).rename(out)
            aside.rmdir()
    for rest in out.parent.glob(f".{name}.*.tmp"):
        with contextlib.suppress(OSError):  # a day old: no process is writing it any more
            if time.time() - rest.stat().st_mtime > 86_400:
                shutil.rmtree(rest)


def _swap(new: Path, out: Path) -> None:
    if not out.exists():
        try:
            new.rename(out)
            return
        except OSError:
            if not out.exists():  # else another process wrote it meanwhile: it is replaced
                raise
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.", suffix=".old", dir=out.parent))
    out.rename(old / out.name)
    try:
        new.rename(out)
    except OSError:
        (old / out.name).rename(out)  # should this fail too, the old one stays under its .old name
        old.rmdir()
        raise
    shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # a folder cannot be fsynced there
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)  # Windows flushes only what is open for writing
    try:
        with contextlib.suppress(PermissionError):
            os.fsync(handle)
    finally:
        os.close(handle)


def _storage(out: Path, error: OSError) -> StorageError:
    return StorageError(
        f"room and permission to write {out}",
        f"'{error.strerror or error}'",
        "free space or choose another --out; nothing was changed",
    )
