"""Which tokens go: those that a corpus does not use, or the rarest in it. `models.vocabulary` takes them out.

A text all of whose tokens stay is read, and answered, as before; others fall into more tokens, and how far their answers move
is measured on the validation examples.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from flyweight.context import Context
from flyweight.data import Examples, rows
from flyweight.errors import DataError, StepError
from flyweight.models.bundle import Bundle
from flyweight.models.vocabulary import always, keep_tokens, needs
from flyweight.settings import PruneSettings
from flyweight.training import predict

__all__ = ["Corpus", "kept_tokens", "prune_vocabulary", "used_tokens"]

LOOKED_AT = 512  # validation examples whose answers are compared
UNLIMITED = 1 << 30  # counting asks for no limit on the length of a text


class Corpus(NamedTuple):
    """What texts are made of.

    name:   for the record
    counts: {token id: how often it occurs}, special tokens and unknown words aside
    texts:  how many
    tokens: how many in all, with the special ones
    """

    name: str
    counts: Counter[int]
    texts: int
    tokens: int


def prune_vocabulary(bundle: Bundle, settings: PruneSettings, context: Context) -> tuple[Bundle, dict[str, Any]]:
    """(the bundle without the tokens that the corpus does not use, notes for the record).

    The model is cut in place. With `amount` that share of the vocabulary goes, the rarest first, of equals the later ones.
    Raises StepError: a corpus without a token of the vocabulary, an amount that comes to nothing or to more than can go, a
    text that has become too long, and what `models.vocabulary.keep_tokens` raises.
    """
    corpus = used_tokens(bundle, settings, context)
    tokens = sorted(bundle.encoder.tokenizer.get_vocab(with_added_tokens=True).values())
    keep = kept_tokens(corpus.counts, tokens, always(bundle), needs(bundle), settings.amount)
    held = context.validation
    before = None if held is None or not len(held) else _answers(bundle, held)
    size = _parameters(bundle)
    made, old = keep_tokens(bundle, keep)
    stay = sum(count for number, count in corpus.counts.items() if number in keep)
    notes: dict[str, Any] = {
        "target": "vocabulary",
        "removed": len(set(tokens) - set(old)),
        "tokens_before": len(tokens),
        "tokens_after": len(made.tokenizer),
        "parameters_before": size,
        "parameters_after": _parameters(made),
        "bytes_saved": 4 * (size - _parameters(made)),
        "corpus": {
            "name": corpus.name,
            "texts": corpus.texts,
            "kept_share": round(stay / corpus.counts.total(), 6),
            "tokens_per_text_before": round(corpus.tokens / corpus.texts, 3),
        },
    }
    seen = _seen_by(made, context)
    if settings.corpus is not None or seen is not None:
        again = used_tokens(made, settings, seen or context)
        notes["corpus"]["tokens_per_text_after"] = round(again.tokens / again.texts, 3)
    if seen is not None and before is not None:
        assert held is not None
        assert seen.validation is not None
        notes["validation"] = _change(held, seen.validation, old, before, _answers(made, seen.validation))
    return made, notes


def used_tokens(bundle: Bundle, settings: PruneSettings, context: Context) -> Corpus:
    """The tokens of `settings.corpus`, streamed, or else of the training and calibration examples in `context`.

    Raises StepError for no texts and for texts without any token of the vocabulary, and DataError as `data.rows` does.
    """
    counts: Counter[int] = Counter()
    texts = 0
    if settings.corpus is not None:
        name = settings.corpus.name
        encoder = bundle.encoder._replace(max_length=UNLIMITED, truncate=False)
        source = encoder.stream(rows(settings.corpus, context.columns))
        for _, (ids, _) in context.progress.track(source, "counting tokens"):
            counts.update(ids)
            texts += 1
    else:
        name = "training and calibration texts"
        for part in (context.train, context.calibration):
            if part is not None:
                numbers, times = np.unique(part.ids, return_counts=True)
                counts.update(dict(zip(numbers.tolist(), times.tolist(), strict=True)))
                texts += len(part)
    if not texts:
        raise StepError("texts whose tokens stay", "none", "give --corpus F or --train F")
    total = counts.total()
    for number in bundle.tokenizer.all_special_ids:
        counts.pop(number, None)
    if not counts:
        raise StepError(
            "a corpus with tokens of the vocabulary",
            f"only special tokens and unknown words in {name}",
            "give texts in the language of the model",
        )
    return Corpus(name, counts, texts, total)


def kept_tokens(
    counts: Mapping[int, int],
    tokens: Sequence[int],
    fixed: Collection[int],
    needed: Callable[[int], Sequence[int]],
    amount: float | None,
) -> set[int]:
    """Ids that stay: `fixed` ones, the used ones or as many of the most used as `amount` leaves, and what these need.

    What a token needs counts as used as often as it is. Raises StepError for an amount that removes nothing or too much.
    """
    keep = set(fixed)
    for number in fixed:
        keep.update(needed(number))
    ranked = sorted(tokens, key=lambda number: (-counts.get(number, 0), number))
    if amount is None:
        room, ranked = len(tokens), [number for number in ranked if counts.get(number, 0)]
    else:
        room = _room(len(tokens), len(keep), amount)
    for number in ranked:
        for part in (
            *needed(number),
            number,
        ):  # in the order of its merges: where room ends, no half of a token is left
            if len(keep) < room:
                keep.add(part)
    if len(keep) == len(tokens):
        raise StepError(
            f"a token of {len(tokens)} that the corpus does not use", "none", "set amount: then the rarest ones go"
        )
    return keep


def _room(of: int, fixed: int, amount: float) -> int:
    """How many tokens stay."""
    gone = int(amount * of + 0.5)
    if gone < 1:
        raise StepError(
            f"an amount that removes at least one token of {of}",
            f"{amount}",
            f"raise it to {math.ceil(1e6 * 0.5 / of) / 1e6:g} or more",
        )
    if gone > of - fixed:
        most = math.floor(1000 * (of - fixed) / of) / 1000
        raise StepError(
            f"an amount that leaves the {fixed} special tokens and characters of {of}",
            f"{amount}",
            f"lower it to {most:g} or less: at most {of - fixed} tokens can go",
        )
    return of - gone


def _seen_by(bundle: Bundle, context: Context) -> Context | None:
    """The examples in the new tokens; None where there are no files to read them from. Raises StepError."""
    if context.reread is None:
        return None
    try:
        return context.seen_by(bundle)
    except DataError as error:
        raise StepError(
            f"texts that are short enough without the tokens that went: {error.expected}",
            f"{error.got}",
            "let more tokens stay, raise --max-length, or cut long texts with --truncate",
        ) from None


def _answers(bundle: Bundle, examples: Examples) -> Any:
    return predict(bundle, examples.take(range(min(len(examples), LOOKED_AT))))


def _change(held: Examples, seen: Examples, old: Sequence[int], before: Any, after: Any) -> dict[str, Any]:
    """What became of the validation texts: `held` in the old tokens, `seen` in the new ones; old: id of every new one."""
    back = np.asarray(old)[seen.ids]
    same = np.array(
        [
            np.array_equal(held.ids[held.starts[i] : held.starts[i + 1]], back[seen.starts[i] : seen.starts[i + 1]])
            for i in range(len(held))
        ]
    )
    found: dict[str, Any] = {
        "texts": len(held),
        "unchanged_share": round(float(same.mean()), 6),
        "tokens_per_text_before": round(float(held.lengths.mean()), 3),
        "tokens_per_text_after": round(float(seen.lengths.mean()), 3),
    }
    changed = ~same[: len(before)]
    if changed.any():
        one, other = (answers[changed].astype(np.float64).reshape(changed.sum(), -1) for answers in (before, after))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        size, moved = float(np.linalg.norm(one)), float(np.linalg.norm(other - one))
        found["changed"] = {
            "texts": int(changed.sum()),
            "cosine": round(float(((one * other).sum(1) / np.maximum(lengths, 1e-12)).mean()), 6),
            "relative_error": round(moved / max(size, 1e-12), 6),
        }
    return found


def _parameters(bundle: Bundle) -> int:
    return sum(parameter.numel() for parameter in bundle.model.parameters())
