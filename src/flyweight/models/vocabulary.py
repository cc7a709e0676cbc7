"""Cutting tokens out of a model: tokenizer, embedding table, config and special ids together, nothing is only masked."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from flyweight.errors import StepError
from flyweight.golden import TEXTS
from flyweight.models import surgery
from flyweight.models.build import open_tokenizer, quiet
from flyweight.models.bundle import Bundle
from flyweight.models.pieces import fixed, pieces_of, rewrite

__all__ = ["always", "keep_rows", "keep_tokens", "needs", "table_name"]

LISTS = ("bad_words_ids", "suppress_tokens", "begin_suppress_tokens")
OTHER_FILES = ("vocab.txt", "vocab.json", "merges.txt", "added_tokens.json", "spiece.model", "sentencepiece.bpe.model")


def table_name(bundle: Bundle) -> str:
    """Full name of the embedding table's weight."""
    prefix, _ = surgery.base_of(bundle.model, bundle.family)
    return f"{prefix}{bundle.family.embeddings['word']}.weight"


def always(bundle: Bundle) -> set[int]:
    """Ids of the tokens that no cut takes: special and added ones, what unknown words fall back on, and what the config names.

    Where positions are counted from the padding id (roberta, mpnet), that id must stay what it is, and so all below it.
    Raises StepError for a tokenizer that is neither WordPiece nor BPE nor Unigram.
    """
    found = fixed(_content(bundle)) | {bundle.encoder.pad}
    found |= set(range(bundle.encoder.pad + 1)) if bundle.family.position_offset else set()
    found |= _named_ids(bundle.model)
    return found & set(bundle.encoder.tokenizer.get_vocab(with_added_tokens=True).values())


def needs(bundle: Bundle) -> Callable[[int], Sequence[int]]:
    """id -> ids of the tokens that it is merged from, in the order of the merges (BPE; none elsewhere)."""
    pieces = pieces_of(_content(bundle))
    own = set(pieces.ids.values())
    return lambda number: pieces.needs(number) if number in own else ()


def keep_tokens(bundle: Bundle, keep: Collection[int]) -> tuple[Bundle, list[int]]:
    """(the bundle with the tokens `keep`, what they need and what always stays; [old id of every row of its table]).

    The model is cut in place; tokenizer and encoder are new ones, and examples of the old one are of no use any more: read
    the texts again. Rows of the table that belong to no token go as well. See `models.pieces` for what holds of every text.
    Raises StepError: a quantized table, a tokenizer of another kind or one that does not take the new vocabulary.
    """
    name = table_name(bundle)
    if name in bundle.quantized:
        raise StepError("a table of tokens in float", "a quantized one", "put prune before quantize")
    content, rows = rewrite(_content(bundle), set(keep) | always(bundle))
    tokenizer = _reopened(bundle, content)
    _check(tokenizer, content, len(rows))
    count = bundle.model.get_parameter(name).shape[0]
    rows += sorted(number for number in _named_ids(bundle.model) - set(rows) if number < count)
    keep_rows(bundle.model, rows)
    encoder = bundle.encoder._replace(tokenizer=tokenizer.backend_tokenizer, pad=rows.index(bundle.encoder.pad))
    return replace(bundle, tokenizer=tokenizer, encoder=encoder), rows


def keep_rows(model: PreTrainedModel, rows: Sequence[int]) -> None:
    """Row i of the table of tokens becomes its row `rows[i]`, in place; all that counts tokens or names them follows.

    Tied tables stay tied; an output layer of its own loses the same rows. Ids that the configs name follow where their row
    stays. rows: [new vocabulary] old ids
    """
    entered: Any = model.get_input_embeddings()
    table: Tensor = entered.weight
    count = table.shape[0]
    index = torch.tensor(rows, device=table.device)
    new = {old: number for number, old in reversed(list(enumerate(rows)))}
    output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    parts = [table, *((output.weight, output.bias) if output is not None else ())]
    cut: dict[int, nn.Parameter] = {}
    for part in parts:
        if part is not None and part.shape[0] == count:
            chosen = part.detach().index_select(0, index)
            cut.setdefault(id(part), nn.Parameter(chosen, requires_grad=part.requires_grad))
    for module in model.modules():
        _take_over(module, cut, count, new)
    extra = getattr(model, "final_logits_bias", None)  # Marian: [1, vocabulary], a buffer
    if isinstance(extra, Tensor) and extra.shape[-1] == count:
        model.final_logits_bias = extra.index_select(-1, index)
    for config in _configs(model):
        _renumber(config, new)
        for name in ("vocab_size", "decoder_vocab_size"):
            if getattr(config, name, None) == count:
                setattr(config, name, len(rows))


def _take_over(module: nn.Module, cut: dict[int, nn.Parameter], count: int, new: dict[int, int]) -> None:
    """Put the cut tensors in the place of the whole ones, wherever they are shared."""
    for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
        if id(parameter) not in cut:
            continue
        setattr(module, name, cut[id(parameter)])
        for size in ("num_embeddings", "out_features"):
            if getattr(module, size, None) == count:
                setattr(module, size, len(cut[id(parameter)]))
        if name == "weight" and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            module.padding_idx = new.get(module.padding_idx)
    if getattr(module, "vocab_size", None) == count:
        module.vocab_size = len(next(iter(cut.values())))  # type: ignore[assignment]


def _configs(model: PreTrainedModel) -> list[Any]:
    """The model's config, those of its parts (T5 gives each stack its own), and that of generation."""
    found = [getattr(module, "config", None) for module in model.modules()]
    found.append(getattr(model, "generation_config", None))
    return list({id(one): one for one in found if one is not None}.values())


def _fields(config: Any) -> Iterator[tuple[str, Any]]:
    """What names tokens by their ids."""
    for name, value in config.to_dict().items():
        if value is not None and (name.endswith("_token_id") or name in LISTS):
            yield name, value


def _named_ids(model: PreTrainedModel) -> set[int]:
    """Ids that the model's configs name, and rows that are left out of training as padding."""

    def flat(value: Any) -> Iterator[int]:
        if isinstance(value, list | tuple):
            for one in value:
                yield from flat(one)
        else:
            yield int(value)

    found = {number for config in _configs(model) for _, value in _fields(config) for number in flat(value)}
    padding = getattr(model.get_input_embeddings(), "padding_idx", None)
    return {number for number in (*found, *(() if padding is None else (padding,))) if number >= 0}


def _renumber(config: Any, new: dict[int, int]) -> None:
    def changed(value: Any) -> Any:
        return [changed(one) for one in value] if isinstance(value, list | tuple) else new.get(int(value), value)

    for name, value in list(_fields(config)):
        setattr(config, name, changed(value))


def _content(bundle: Bundle) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(bundle.tokenizer.backend_tokenizer.to_str())
    return {**found, "truncation": None, "padding": None}  # of the last call, not the tokenizer's own


def _reopened(bundle: Bundle, content: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The tokenizer as it will be opened from the folder of the finished model."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        with quiet():
            bundle.tokenizer.save_pretrained(folder)
        for file in OTHER_FILES:
            (folder / file).unlink(missing_ok=True)
        (folder / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
        bundle.model.config.to_json_file(folder / "config.json")
        return open_tokenizer(folder)


def _check(tokenizer: PreTrainedTokenizerFast, content: dict[str, Any], tokens: int) -> None:
    """Some classes of transformers build their tokenizer anew, and may add tokens of their own. Raises StepError."""
    made = Tokenizer.from_str(json.dumps(content))
    wanted = made.get_vocab(with_added_tokens=True)
    got = tokenizer.backend_tokenizer.get_vocab(with_added_tokens=True)
    read, again = ([one.ids for one in by.encode_batch(TEXTS)] for by in (made, tokenizer.backend_tokenizer))
    if got != wanted or sorted(wanted.values()) != list(range(tokens)) or read != again:
        raise StepError(
            f"a tokenizer that takes a vocabulary of {tokens} tokens",
            f"{type(tokenizer).__name__}, which makes {len(got)} of it",
            "leave this step out",
        )
