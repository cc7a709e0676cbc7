"""Text -> token ids, the same in training and in service: always the `tokenizers` library on tokenizer.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from flyweight.data import Examples, Row, pack
from flyweight.errors import DataError, ModelError

__all__ = ["TOKENIZER_FILES", "Encoder", "open_encoder"]

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
)

Encoded = tuple[Sequence[int], Sequence[int] | None]


class Encoder(NamedTuple):
    """A tokenizer with the model's limits.

    max_length: longest input in tokens, special tokens included
    truncate:   cut longer texts; otherwise they are refused with DataError
    """

    tokenizer: Tokenizer
    pad: int
    max_length: int
    truncate: bool = False

    def encode(self, texts: Sequence[tuple[str, str, str | None]]) -> list[Encoded]:
        """[(where, text, text_pair or None)] -> [(ids, segment ids or None)]. Raises DataError for too long a text."""
        if not texts:
            return []
        self.tokenizer.no_padding()
        if self.truncate:
            self.tokenizer.enable_truncation(self.max_length)
        else:
            self.tokenizer.no_truncation()
        pairs = [text if pair is None else (text, pair) for _, text, pair in texts]
        found: list[Encoded] = []
        for (where, _, pair), encoding in zip(texts, self.tokenizer.encode_batch(pairs), strict=True):
            if len(encoding.ids) > self.max_length:
                raise DataError(
                    f"at most {self.max_length} tokens at {where}",
                    f"{len(encoding.ids)}",
                    "shorten the text, or cut long ones with --truncate",
                )
            found.append((encoding.ids, None if pair is None else encoding.type_ids))
        return found

    def stream(self, rows: Iterable[Row], size: int = 1024) -> Iterator[tuple[Row, Encoded]]:
        """Encode rows as they come, `size` at a time."""
        source = iter(rows)
        while some := list(islice(source, size)):
            yield from zip(some, self.encode([(row.where, row.text, row.text_pair) for row in some]), strict=True)

    def examples(self, texts: Sequence[str]) -> Examples:
        """Unlabelled single texts, named by their number in errors."""
        return pack(self.encode([(f"text {i}", text, None) for i, text in enumerate(texts, 1)]), None)


def open_encoder(folder: Path, pad: int, max_length: int, truncate: bool = False) -> Encoder:
    """Read tokenizer.json of a model folder or artifact. Raises ModelError when it is missing or damaged."""
    path = Path(folder) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ModelError(f"a readable {path}", f"'{error}'", "save the model with its fast tokenizer") from None
    return Encoder(tokenizer, pad, max_length, truncate)
