"""The user's files -> rows -> examples.

`rows()` streams one row at a time and names file and line of a bad one. `Examples` is what training, calibration and
evaluation use: token ids as flat arrays, 4 bytes a token, without the text.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from flyweight.errors import DataError, nearest
from flyweight.extras import need

__all__ = ["Columns", "Examples", "Row", "hash_share", "join", "pack", "rows"]

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Columns:
    """Names of the columns to read. `label=None`: the file needs none."""

    text: str = "text"
    text_pair: str | None = None
    label: str | None = "label"

    def names(self) -> list[str]:
        return [name for name in (self.text, self.text_pair, self.label) if name is not None]


class Row(NamedTuple):
    """One example as the user wrote it. `where` is `file:line` (or `file, row n`)."""

    where: str
    text: str
    text_pair: str | None
    label: Any


def rows(path: Path, columns: Columns) -> Iterator[Row]:
    """Stream the rows of a .jsonl, .csv or .parquet file, or of a folder written by `datasets`.

    Raises DataError: no such file, unknown format, empty file, missing column (lists the columns), a bad row (file:line).
    """
    path = Path(path)
    if not path.exists():
        raise DataError("a file of examples", f"no such file: {path}", "check the path")
    if path.is_dir():
        source = _arrow_folder(path)
    else:
        readers = {".jsonl": _jsonl, ".ndjson": _jsonl, ".csv": _csv, ".parquet": _parquet}
        reader = readers.get(path.suffix.lower())
        if reader is None:
            raise DataError(
                f"{', '.join(readers)} or a folder written by `datasets`",
                f"'{path.name}'",
                "convert the file or rename it",
            )
        source = reader(path)
    some = False
    for where, record in source:
        some = True
        yield _row(where, record, columns)
    if not some:
        raise DataError(f"at least one example in {path}", "an empty file", "check that the file was written in full")


def _row(where: str, record: dict[str, Any], columns: Columns) -> Row:
    for name in columns.names():
        if name not in record:
            raise DataError(
                f"a column '{name}' at {where}",
                f"the columns {', '.join(map(repr, record))}{nearest(name, record)}",
                "name it with --text, --text-pair or --label",
            )
    texts = [record[name] for name in (columns.text, columns.text_pair) if name is not None]
    for text, name in zip(texts, columns.names(), strict=False):
        if not isinstance(text, str):
            raise DataError(f"text in column '{name}' at {where}", f"{type(text).__name__}", "mend or drop the row")
    if not texts[0].strip():
        raise DataError(f"text in column '{columns.text}' at {where}", "an empty one", "mend or drop the row")
    label = record[columns.label] if columns.label else None
    if columns.label and (label is None or label == ""):
        raise DataError(f"a label in column '{columns.label}' at {where}", "none", "mend or drop the row")
    return Row(where, texts[0], texts[1] if columns.text_pair else None, label)


def _jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{path}:{number}"
            try:
                record = json.loads(line)
            except ValueError as error:  # also UnicodeDecodeError
                raise DataError(f"one JSON object at {where}", f"'{error}'", "mend or drop the line") from None
            if not isinstance(record, dict):
                raise DataError(f"one JSON object at {where}", type(record).__name__, "mend or drop the line")
            yield where, record


def _csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        try:
            for record in reader:
                where = f"{path}:{reader.line_num}"
                if None in record or None in record.values():
                    raise DataError(
                        f"{len(reader.fieldnames or ())} fields at {where}", "another number", "mend the row"
                    )
                yield where, record
        except UnicodeDecodeError as error:
            raise DataError(
                f"UTF-8 text in {path}", f"'{error}' after line {reader.line_num}", "convert the file to UTF-8"
            ) from None
        except csv.Error as error:
            raise DataError(f"a CSV row at {path}:{reader.line_num}", f"'{error}'", "mend the row") from None


def _parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    need("pyarrow", "read parquet files")
    from pyarrow.parquet import ParquetFile

    try:
        file = ParquetFile(path)
    except Exception as error:  # pyarrow raises several unrelated classes for a damaged file
        raise DataError(f"a parquet file at {path}", f"'{error}'", "check that it was written in full") from None
    number = 0
    for batch in file.iter_batches():
        for record in batch.to_pylist():
            number += 1
            yield f"{path}, row {number}", record


def _arrow_folder(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    datasets = need("datasets", "read a folder written by `datasets`")
    try:
        dataset = datasets.load_from_disk(str(path))
    except Exception as error:
        raise DataError(
            f"a folder written by `datasets` at {path}", f"'{error}'", "name a file or such a folder"
        ) from None
    if isinstance(dataset, datasets.DatasetDict):
        raise DataError(f"one split at {path}", f"the splits {', '.join(dataset)}", "name the folder of one split")
    for number, record in enumerate(dataset, 1):
        yield f"{path}, row {number}", record


@dataclass(frozen=True)
class Examples:
    """Tokenized examples.

    ids:     [tokens] int32, all examples one after the other
    types:   [tokens] int32 segment ids, or None for single texts
    starts:  [n + 1] int64; example i is ids[starts[i]:starts[i + 1]]
    labels:  [n] (class numbers or values), or None
    """

    ids: Ints
    types: Ints | None
    starts: NDArray[np.int64]
    labels: NDArray[Any] | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> NDArray[np.int64]:
        return np.diff(self.starts)

    def take(self, indices: Sequence[int] | NDArray[Any]) -> Self:
        """The examples at `indices`, in that order."""
        index = np.asarray(indices, dtype=np.int64)
        spans = [slice(self.starts[i], self.starts[i + 1]) for i in index]
        empty = np.zeros(0, np.int32)
        return replace(
            self,
            ids=np.concatenate([self.ids[s] for s in spans]) if spans else empty,
            types=None if self.types is None else np.concatenate([self.types[s] for s in spans]) if spans else empty,
            starts=np.concatenate([[0], np.cumsum(self.lengths[index])]).astype(np.int64),
            labels=None if self.labels is None else self.labels[index],
        )

    def batch(self, indices: Sequence[int] | NDArray[Any], pad: int) -> dict[str, NDArray[np.int64]]:
        """input_ids, attention_mask, token_type_ids, each [len(indices), longest] int64, padded on the right."""
        lengths = self.lengths[np.asarray(indices, dtype=np.int64)]
        shape = (len(lengths), int(lengths.max()))
        ids = np.full(shape, pad, np.int64)
        types = np.zeros(shape, np.int64)
        for row, (i, length) in enumerate(zip(indices, lengths, strict=True)):
            span = slice(self.starts[i], self.starts[i] + length)
            ids[row, :length] = self.ids[span]
            if self.types is not None:
                types[row, :length] = self.types[span]
        mask = (np.arange(shape[1]) < lengths[:, None]).astype(np.int64)
        return {"input_ids": ids, "attention_mask": mask, "token_type_ids": types}

    def content_hash(self) -> str:
        """sha256 over everything in it; the key of cached teacher outputs."""
        digest = hashlib.sha256()
        for array in (self.ids, self.types, self.starts, self.labels):
            digest.update(b"-" if array is None else str(array.dtype).encode() + np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()


def pack(encoded: Sequence[tuple[Sequence[int], Sequence[int] | None]], labels: Sequence[Any] | None) -> Examples:
    """Build Examples from (ids, types) pairs."""
    lengths = [len(ids) for ids, _ in encoded]
    paired = any(types is not None for _, types in encoded)
    flat = [np.asarray(ids, np.int32) for ids, _ in encoded]
    types = [
        np.zeros(n, np.int32) if t is None else np.asarray(t, np.int32)
        for (_, t), n in zip(encoded, lengths, strict=True)
    ]
    empty = np.zeros(0, np.int32)
    return Examples(
        ids=np.concatenate(flat) if flat else empty,
        types=(np.concatenate(types) if types else empty) if paired else None,
        starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        labels=None if labels is None else np.asarray(labels),
    )


def join(*parts: Examples, missing: int = -100) -> Examples:
    """All examples one part after the other; where only some parts have labels, the others get `missing`."""
    some = any(part.labels is not None for part in parts)
    labels = [np.full(len(part), missing) if part.labels is None else part.labels for part in parts]
    paired = any(part.types is not None for part in parts)
    types = [np.zeros_like(part.ids) if part.types is None else part.types for part in parts]
    return Examples(
        ids=np.concatenate([part.ids for part in parts]),
        types=np.concatenate(types) if paired else None,
        starts=np.concatenate([[0], np.cumsum(np.concatenate([part.lengths for part in parts]))]).astype(np.int64),
        labels=np.concatenate(labels) if some else None,
    )


def hash_share(text: str) -> float:
    """A number in 0..1 that depends on the text alone: the same text always falls on the same side of a split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
