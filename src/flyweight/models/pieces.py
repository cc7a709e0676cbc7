"""What a tokenizer can lose: tokens out of the content of tokenizer.json, by the rules of WordPiece, BPE and Unigram.

What holds of every cut, whatever the text (K: the tokens that stay):

- A text all of whose tokens are in K falls into the same tokens. WordPiece takes the longest piece that fits, and that is
  still there. BPE does the same merges in the same order: none of them is missing, see `needs`, and of fewer merges the first
  one is the same. Unigram's best path is still there, and no other one became better.
- No text gets more unknown tokens: a word whose tokens went falls apart, at worst into characters.

A vocabulary may know a character only inside longer pieces, and cutting those would make it unknown. Such characters become
pieces of their own (`missing`); words that were unknown may become known by them. Vocabularies of trainers have none.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

from flyweight.errors import StepError

__all__ = ["Pieces", "fixed", "pieces_of", "rewrite"]

Content = dict[str, Any]
BYTE = re.compile(r"<0x[0-9A-F]{2}>")
UNKNOWN_PENALTY = 10.0  # tokenizers' K_UNK_PENALTY: an unknown character scores the lowest score less this


class Pieces(NamedTuple):
    """A tokenizer's model.

    ids:     {token: id}
    always:  ids of tokens that no cut may take: unknown, characters, bytes
    missing: {character piece that a cut adds: id of the shortest token it is in, whose row it gets}
    needs:   id -> ids of the tokens that this one is merged from, every one after those that it is merged from itself
    write:   ({id: new id} of the tokens that stay, {added piece: id}) -> the model's new content
    """

    ids: dict[str, int]
    always: set[int]
    missing: dict[str, int]
    needs: Callable[[int], Sequence[int]]
    write: Callable[[Mapping[int, int], Mapping[str, int]], Content]


def pieces_of(content: Content) -> Pieces:
    """content: of tokenizer.json. Raises StepError for a model that is none of the three."""
    model, special = content["model"], {token["content"] for token in content["added_tokens"]}
    kind = model.get("type")
    if kind not in KINDS:
        raise StepError(
            f"a tokenizer of the kind {', '.join(KINDS)} to prune the vocabulary of", f"{kind}", "leave this step out"
        )
    return KINDS[kind](model, special)


def fixed(content: Content) -> set[int]:
    """Ids that stay whatever a corpus says: what unknown words fall back on, added tokens, and what the post-processor writes."""
    found = pieces_of(content).always | {token["id"] for token in content["added_tokens"]}

    def seen(number: int) -> int:
        found.add(number)
        return number

    _renumbered(content.get("post_processor"), seen)
    return found


def rewrite(content: Content, keep: Collection[int]) -> tuple[Content, list[int]]:
    """(tokenizer.json with the tokens `keep`, what they need and what always stays; [old id of every new id]).

    Ids are dense and in the old order: the model's tokens, pieces that were added, then added tokens outside the model, where
    the library wants them. Ids in post-processor and padding follow. Raises StepError, see `pieces_of`.
    """
    pieces = pieces_of(content)
    added = {token["id"] for token in content["added_tokens"]}
    own = set(pieces.ids.values())
    stay = (set(keep) | fixed(content)) & own
    for number in tuple(stay):
        stay.update(pieces.needs(number))
    rows = [*sorted(stay), *pieces.missing.values(), *sorted(added - own)]
    new = {old: number for number, old in enumerate(sorted(stay))}
    extra = {piece: len(stay) + place for place, piece in enumerate(pieces.missing)}
    new |= {old: len(stay) + len(extra) + place for place, old in enumerate(sorted(added - own))}
    made = {**content, "model": pieces.write(new, extra)}
    made["added_tokens"] = [{**token, "id": new[token["id"]]} for token in content["added_tokens"]]
    made["post_processor"] = _renumbered(content.get("post_processor"), new.__getitem__)
    if content.get("padding"):
        made["padding"] = {**content["padding"], "pad_id": new[content["padding"]["pad_id"]]}
    return made, rows


def _renumbered(processor: Any, new: Callable[[int], int]) -> Any:
    """Special tokens stand in post-processors with their ids."""
    if not isinstance(processor, dict):
        return processor
    made = dict(processor)
    if "processors" in made:
        made["processors"] = [_renumbered(one, new) for one in made["processors"]]
    for name in ("sep", "cls"):
        if name in made:
            made[name] = [made[name][0], new(made[name][1])]
    if "special_tokens" in made:
        made["special_tokens"] = {
            name: {**one, "ids": [new(number) for number in one["ids"]]} for name, one in made["special_tokens"].items()
        }
    return made


def _wordpiece(model: Content, special: set[str]) -> Pieces:
    """Greedy longest match from the left (Devlin et al. 2019; Song et al. 2021, section 2).

    A word is unknown where at some place no piece fits. Once every character that a piece has anywhere is a piece by itself,
    at the beginning of a word and after it as needed, that means: where a character is in no piece. So no cut changes it.
    """
    ids, prefix = model["vocab"], model["continuing_subword_prefix"]

    def characters(token: str) -> list[str]:
        later = token.startswith(prefix) and len(token) > len(prefix)
        body = token[len(prefix) :] if later else token
        return [prefix + one if later or place else one for place, one in enumerate(body)]

    ordinary = {token: characters(token) for token in ids if token not in special and token != model["unk_token"]}
    always = {ids[token] for token, parts in ordinary.items() if len(parts) == 1}
    always |= {ids[model["unk_token"]]} if model["unk_token"] in ids else set()

    def write(new: Mapping[int, int], extra: Mapping[str, int]) -> Content:
        return {**model, "vocab": {**_numbered(ids, new), **extra}}

    return Pieces(ids, always, _missing(ordinary, ids.keys() | special, ids), lambda _: (), write)


def _bpe(model: Content, special: set[str]) -> Pieces:
    """Merges in the order of their rank (Sennrich et al. 2016, section 3.2).

    No merge crosses the edge of a token that stands in the end, so it is merged from within as it is by itself: what a token
    needs are the steps from its characters to itself. Of the merges, all stay whose three tokens do.
    """
    ids = model["vocab"]
    prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
    merges = [tuple(pair.split(" ", 1) if isinstance(pair, str) else pair) for pair in model["merges"]]
    ranks = {pair: rank for rank, pair in enumerate(merges)}
    names = {number: token for token, number in ids.items()}
    always = {ids[token] for token in ids if any(len(symbols) == 1 for symbols in _symbols(token, prefix, suffix))}
    if model.get("unk_token") in ids:
        always.add(ids[model["unk_token"]])
    if model.get("byte_fallback"):
        always |= {number for token, number in ids.items() if BYTE.fullmatch(token)}
    if model.get("ignore_merges"):  # whole words are looked up first, also those with characters that are no tokens
        always |= {number for token, number in ids.items() if not set(token) <= ids.keys()}

    def needs(number: int) -> list[int]:
        token = names[number]
        found: dict[int, None] = {}
        for symbols in _symbols(token, prefix, suffix):
            if ids.keys() >= set(symbols):
                result, steps = _merge(symbols, ranks, len(prefix))
                found |= dict.fromkeys(ids[step] for step in steps) if result == [token] else {}
        return list(found)

    def write(new: Mapping[int, int], extra: Mapping[str, int]) -> Content:
        kept = _numbered(ids, new)
        left = [pair for pair in model["merges"] if _parts(pair, len(prefix)) <= kept.keys()]
        return {**model, "vocab": {**kept, **extra}, "merges": left}

    def _parts(pair: Any, cut: int) -> set[str]:
        one, other = pair.split(" ", 1) if isinstance(pair, str) else pair
        return {one, other, one + other[cut:]}

    return Pieces(ids, always, {}, needs, write)


def _symbols(token: str, prefix: str, suffix: str) -> Iterator[list[str]]:
    """The symbols a token may be merged from: with the prefix also as a later part of a word, with the suffix as its end."""
    for later in {False, bool(prefix) and token.startswith(prefix)}:
        for last in {False, bool(suffix) and token.endswith(suffix)}:
            body = token[len(prefix) * later : len(token) - len(suffix) * last]
            if body:
                found = [prefix + one if later or place else one for place, one in enumerate(body)]
                found[-1] += suffix * last
                yield found


def _merge(symbols: list[str], ranks: Mapping[tuple[str, ...], int], cut: int) -> tuple[list[str], list[str]]:
    """(what is left, what was made on the way): the merge of the lowest rank first, of equals the leftmost."""
    left, made = list(symbols), []
    while len(left) > 1:
        rank, place = min((ranks.get(pair, len(ranks)), i) for i, pair in enumerate(pairwise(left)))
        if rank == len(ranks):
            break
        made.append(left[place] + left[place + 1][cut:])
        left[place : place + 2] = made[-1:]
    return left, made


def _unigram(model: Content, special: set[str]) -> Pieces:
    """The path of the highest sum of scores (Kudo 2018, section 3.2).

    An unknown character scores the lowest of all scores less 10, so the piece with the lowest stays. A character piece that is
    added gets just that: then no path becomes better than it was.
    """
    vocab, unknown = model["vocab"], model["unk_id"]
    ids = {piece: number for number, (piece, _) in enumerate(vocab)}
    lowest = min(range(len(vocab)), key=lambda number: vocab[number][1])
    always = {number for number, (piece, _) in enumerate(vocab) if len(piece) == 1} | {lowest}
    always |= set() if unknown is None else {unknown}
    ordinary = {piece: list(piece) for piece in ids if piece not in special and ids[piece] != unknown}
    if model.get("byte_fallback"):
        bytes_ = {ids[piece] for piece in ids if BYTE.fullmatch(piece)}
        always |= bytes_
        ordinary = (
            {} if len(bytes_) == 256 else {piece: ordinary[piece] for piece in ordinary if ids[piece] not in bytes_}
        )

    def write(new: Mapping[int, int], extra: Mapping[str, int]) -> Content:
        kept = [vocab[old] for old in sorted(new) if old < len(vocab)]
        score = vocab[lowest][1] - UNKNOWN_PENALTY
        kept += [[piece, score] for piece in extra]
        return {**model, "vocab": kept, "unk_id": None if unknown is None else new[unknown]}

    return Pieces(ids, always, _missing(ordinary, ids.keys() | special, ids), lambda _: (), write)


KINDS: dict[str, Callable[[Content, set[str]], Pieces]] = {"WordPiece": _wordpiece, "BPE": _bpe, "Unigram": _unigram}


def _missing(ordinary: Mapping[str, list[str]], there: Collection[str], ids: Mapping[str, int]) -> dict[str, int]:
    """{character piece that is not there: id of the shortest token that has it inside}, in the order of the tokens."""
    found: dict[str, str] = {}
    for token, characters in ordinary.items():
        for one in characters:
            if one not in there and (one not in found or len(token) < len(found[one])):
                found[one] = token
    return {one: ids[token] for one, token in found.items()}


def _numbered(ids: Mapping[str, int], new: Mapping[int, int]) -> dict[str, int]:
    return {token: new[old] for token, old in sorted(ids.items(), key=lambda item: item[1]) if old in new}
