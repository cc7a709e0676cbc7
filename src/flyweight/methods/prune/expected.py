"""What a prune step will take, before it runs: its work by kinds, and the bytes that it takes beside the model.

Passes are counted by the batches that there will be, products and factors by their sizes; `flyweight.measure.work` knows how long
each takes here. How many tries a wish takes is not known before: two are counted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from flyweight import hessian
from flyweight.measure.reading import Lengths, Read, in_order, predicted, walked
from flyweight.measure.work import NOTHING, Work
from flyweight.methods.prune import solving
from flyweight.methods.prune.anatomy import Anatomy, Place
from flyweight.methods.prune.parts import LOOKED_AT
from flyweight.methods.prune.vocabulary import LOOKED_AT as ANSWERS
from flyweight.methods.prune.wishing import wish

if TYPE_CHECKING:
    from flyweight.settings import PruneSettings

__all__ = ["Before", "Expected", "Texts", "expected", "left_of"]

READ = 1e-4  # seconds a text to read, to tokenize and to count it


class Texts(NamedTuple):
    """Lengths of what there is; labelled: whether the training texts have labels that the task takes."""

    train: Lengths | None = None
    validation: Lengths | None = None
    calibration: Lengths | None = None
    labelled: bool = False

    def few(self, part: Lengths | None, samples: int) -> Lengths:
        """As many as `samples` of them, short and long alike, in order of length."""
        if part is None or not len(part):
            return np.zeros(0, np.int64)
        some = np.sort(part)
        return some if len(some) <= samples else some[np.linspace(0, len(some) - 1, samples).round().astype(int)]

    def walked(self, samples: int) -> Lengths:
        return self.few(self.train if self.calibration is None else self.calibration, samples)

    def scored(self, samples: int) -> Lengths:
        return self.few(self.train, samples) if self.labelled else self.walked(samples)

    def judged(self) -> tuple[Lengths, bool]:
        """(what the loss is looked at on, whether by labels)."""
        if self.labelled:
            some = self.validation if self.validation is not None else self.train
            return self.few(some, LOOKED_AT), True
        return self.few(self.train if self.calibration is None else self.calibration, LOOKED_AT), False


class Before(NamedTuple):
    """anatomy: of the model that is pruned; texts: there are; gate_bytes: kept a token for the way back to gates alone"""

    anatomy: Anatomy
    texts: Texts
    gate_bytes: float = 0.0


class Expected(NamedTuple):
    """work of the step, training aside; bytes that it takes at most beside the model at hand"""

    work: Work
    bytes: int


class Left(NamedTuple):
    """Shares of heads and neurons that stay, and of the blocks' work that is left then."""

    heads: float
    neurons: float
    work: float


def left_of(settings: PruneSettings, anatomy: Anatomy) -> Left:
    """By the amount, or what a wish comes to if all blocks lose alike and everything costs by its multiply-adds."""
    heads, neurons = anatomy.part("heads"), anatomy.part("neurons")
    if settings.target == "layers":
        return Left(1.0, 1.0, 1 - (settings.amount or 0.0))
    if settings.gradual == "l0":
        stay = 1 / settings.speedup if settings.speedup is not None else 1 - (settings.amount or 0.0)
        return Left(stay, stay, stay)
    if "heads" not in settings.target and "neurons" not in settings.target:
        return Left(1.0, 1.0, 1.0)
    touched = heads * ("heads" in settings.target) + neurons * ("neurons" in settings.target)
    gone = settings.amount or 0.0
    if settings.speedup is not None:
        gone = min((1 - 1 / settings.speedup) / max(touched, 1e-9), 0.99)
    less = {what: 1 - gone * (what in settings.target) for what in ("heads", "neurons")}
    return Left(less["heads"], less["neurons"], 1 - touched * gone)


def expected(settings: PruneSettings, before: Before) -> Expected:
    """Of everything but training (`gradual`)."""
    if settings.target == "vocabulary":
        return _vocabulary(before)
    if settings.target in ("layers", "weights"):
        found = (_layers if settings.target == "layers" else _weights)(settings, before)
        return found if settings.restore == "none" else _blockwise(found, settings, before)
    if settings.gradual != "one-shot":
        return _gradual(settings, before)
    return _parts(settings, before)


def _vocabulary(before: Before) -> Expected:
    """Texts are counted and read again, a few answers compared; the tables are copied."""
    texts = before.texts
    few = predicted(texts.few(texts.validation, ANSWERS))
    number = sum(len(part) for part in (texts.train, texts.validation, texts.calibration) if part is not None)
    work = few.forward.times(2).plus(Work(seconds=0.5 + 3 * READ * number))
    anatomy = before.anatomy
    return Expected(work, 4 * (anatomy.weights - anatomy.inside) + inside_bytes(anatomy, few.largest))


def _layers(settings: PruneSettings, before: Before) -> Expected:
    anatomy, texts = before.anatomy, before.texts
    count = len(anatomy.blocks)
    if settings.criterion == "cosine":
        some = texts.walked(settings.samples)
        read = walked(some)
        work = walk_work(read, anatomy, 1.0).plus(Work(moved=100 * read.tokens * anatomy.hidden * count))
        return Expected(work, streamed_bytes(some, anatomy, 2) + inside_bytes(anatomy, read.largest))
    if settings.criterion == "loss":
        judged = texts.validation is not None and len(texts.validation) > 0
        some = texts.few(texts.validation, settings.samples) if judged else texts.scored(settings.samples)
        read = predicted(some)
        gone = int((settings.amount or 0.0) * count + 0.5)
        tries = sum(count - number for number in range(gone))
        work = read.forward.times(1 + tries)  # those that are left out run as well, and their outputs are passed over
        return Expected(work, inside_bytes(anatomy, read.largest))
    if settings.criterion == "taylor":
        return _gates(texts.few(texts.train, settings.samples), before)
    return Expected(Work(moved=12 * anatomy.inside, seconds=0.1), 4 * _widest(anatomy.places))


def _weights(settings: PruneSettings, before: Before) -> Expected:
    anatomy, places = before.anatomy, before.anatomy.places
    some = before.texts.walked(settings.samples)
    read = walked(some)
    looked = Work(moved=20 * anatomy.inside)  # finite, zeros before, zeros after
    linears = [(out, place.width) for place in places for out in place.outs]
    if settings.criterion not in ("hessian", "wanda"):
        every = 60 if settings.scope == "layer" else 90
        ranked = Work(ranked=anatomy.inside, moved=every * anatomy.inside)
        if settings.pattern != "unstructured":
            ranked = ranked.plus(Work(sorted=anatomy.inside))
        times = 1.0 if settings.gradual == "one-shot" else 101.0
        held = 5 * anatomy.inside if settings.scope == "layer" else 13 * anatomy.inside
        return Expected(looked.plus(ranked.times(times)), held + 24 * max(out * width for out, width in linears))
    streamed = sum(place.before for place in places) / max(len(anatomy.blocks), 1)
    work = looked.plus(walk_work(read, anatomy, 1 + streamed))
    way: hessian.Way = "squares" if settings.criterion == "wanda" else "factor"
    for place in places:
        if way == "squares":
            work = work.plus(solving.wanda(place, read, settings.pattern))
        else:
            work = work.plus(solving.sums(place.width, read), solving.sparsegpt(place, settings.pattern))
    return Expected(work, hessian.bytes_needed(linears, int(read.tokens), anatomy.hidden, way, read.largest))


def _parts(settings: PruneSettings, before: Before) -> Expected:
    """Ranking, wish, cut and restoring, one after the other."""
    anatomy, texts = before.anatomy, before.texts
    left = left_of(settings, anatomy)
    work, memory = _ranking(settings, before)
    copies = 4 * anatomy.weights if settings.restore != "none" else 0
    some, labelled = texts.judged()
    if (settings.speedup is not None or settings.restore != "none") and len(some):
        stages = 1 + left.work * (1 + (settings.restore != "none")) + (0 if labelled else 1)
        work = work.plus(predicted(some).forward.times(stages))
    if settings.speedup is not None:
        found = wish(settings, anatomy, left.work)
        work, memory = work.plus(found.work), max(memory, found.bytes)
    chosen = [place for place in anatomy.places if place.what and place.what in settings.target]
    gradients = 0
    if settings.criterion == "fisher":
        gradients = 4 * len(texts.scored(settings.samples)) * sum(place.units for place in chosen)
        if settings.rearrange:
            gone = {"heads": 1 - left.heads, "neurons": 1 - left.neurons}
            samples = len(texts.scored(settings.samples))
            work = work.plus(*(solving.rearranged(place.units, gone[place.what], samples) for place in chosen))
            memory = max(memory, 24 * max(place.units for place in chosen) ** 2)
    work = work.plus(Work(moved=24 * anatomy.inside))  # cut
    if settings.criterion == "hessian" and settings.restore in ("none", "masks"):
        made, held = _made_up(settings, before, chosen, left)
        work, memory = work.plus(made), max(memory, held)
    if settings.restore != "none":
        made, held = _restored(settings, before, chosen, left)
        work, memory = work.plus(made, Work(moved=8 * anatomy.weights)), max(memory, held)
    return Expected(work, gradients + copies + memory)


def _ranking(settings: PruneSettings, before: Before) -> tuple[Work, int]:
    anatomy, texts = before.anatomy, before.texts
    if settings.criterion in ("fisher", "taylor"):
        fisher = settings.criterion == "fisher"
        some = texts.scored(settings.samples) if fisher else texts.few(texts.train, settings.samples)
        found = _gates(some, before)
        work = found.work
        if fisher:
            chosen = [place for place in anatomy.places if place.what and place.what in settings.target]
            entries = len(some) * sum(place.units for place in chosen)
            work = work.plus(Work(hashed=4 * anatomy.weights, stored=4 * entries, moved=40 * entries))
        return work, found.bytes
    if settings.criterion == "hessian":
        some = texts.walked(settings.samples)
        read = walked(some)
        chosen = [place for place in anatomy.places if place.what and place.what in settings.target]
        passes = 1 + sum(place.before for place in chosen) / max(len(anatomy.blocks), 1)
        work = walk_work(read, anatomy, passes).plus(Work(hashed=4 * anatomy.weights))
        for place in chosen:
            work = work.plus(solving.sums(place.width, read), solving.ordered(place))
        return work, _bytes(chosen, read, anatomy, "inverse")
    return Work(moved=12 * anatomy.inside, seconds=0.1), 4 * _widest(anatomy.places)


def _gates(lengths: Lengths, before: Before) -> Expected:
    """There and back to gates."""
    read = in_order(lengths)
    return Expected(read.gated, int(before.gate_bytes * read.largest))


def _made_up(settings: PruneSettings, before: Before, chosen: list[Place], left: Left) -> tuple[Work, int]:
    """OBS for units that are chosen already: the others make up for them."""
    read = walked(before.texts.walked(settings.samples))
    passes = 1 + sum(place.before for place in chosen) / max(len(before.anatomy.blocks), 1)
    work = walk_work(read, before.anatomy, passes)
    for place in chosen:
        stay = left.heads if place.what == "heads" else left.neurons
        work = work.plus(solving.sums(place.width, read), solving.made_up(place, stay))
    return work, _bytes(chosen, read, before.anatomy, "factor")


def _restored(settings: PruneSettings, before: Before, chosen: list[Place], left: Left) -> tuple[Work, int]:
    """Both models are walked; of the cut one a share is left."""
    anatomy = before.anatomy
    some = before.texts.walked(settings.samples)
    read, blocks = walked(some), max(len(anatomy.blocks), 1)
    enter = 1 / blocks
    seen = sum(place.after for place in chosen) / blocks  # until the sum that a linear adds to is there
    work = read.forward.times(1 + enter)
    work = work.plus(read.forward.times(left.work * (1 + 1 / 8 + seen) + enter))
    worst = 0
    for place in chosen:
        stay = left.heads if place.what == "heads" else left.neurons
        work = work.plus(solving.restored(place, stay, read, settings.restore == "masks"))
        worst = max(worst, solving.restored_bytes(place, stay, settings.restore == "masks"))
    held = (5 + sum(1 for place in anatomy.blocks[0] if place in chosen)) * 4 * int(read.tokens) * anatomy.hidden
    worst = max(worst + solving.sums_bytes(chosen, left.heads, left.neurons), inside_bytes(anatomy, read.largest))
    if settings.restore == "block":
        weights = int(anatomy.inside * left.work / blocks)
        work = work.plus(solving.rebuilt(some, weights, left.work / blocks, anatomy).times(blocks))
        worst = max(worst, 4 * 5 * weights + int(before.gate_bytes * left.work / blocks * read.largest * 2))
    return work, held + worst


def _blockwise(found: Expected, settings: PruneSettings, before: Before) -> Expected:
    """And every block of it trained to answer as the dense one, beside which it is walked."""
    anatomy, some = before.anatomy, before.texts.walked(settings.samples)
    read, blocks = walked(some), max(len(anatomy.blocks), 1)
    share = left_of(settings, anatomy).work
    work = read.forward.times(1 + 2 * share + 2 / blocks).plus(Work(moved=8 * anatomy.weights))
    weights = anatomy.inside // blocks
    work = work.plus(solving.rebuilt(some, weights, 1 / blocks, anatomy).times(round(blocks * share)))
    held = streamed_bytes(some, anatomy, 5) + 4 * 5 * weights
    held += max(int(before.gate_bytes / blocks * read.largest * 2), inside_bytes(anatomy, read.largest))
    return Expected(found.work.plus(work), 4 * anatomy.weights + max(found.bytes, held))


def _gradual(settings: PruneSettings, before: Before) -> Expected:
    """Beside the training: what is gone is chosen again and again (`cubic`), or costs are looked up (`l0`)."""
    anatomy = before.anatomy
    if settings.gradual == "l0":
        if settings.speedup is None or settings.cost != "latency":
            return Expected(Work(seconds=0.5), 0)
        raced = wish(settings, anatomy, 1 / settings.speedup, tries=1)
        return Expected(raced.work, raced.bytes + 4 * anatomy.weights)
    if settings.criterion == "taylor":
        found = _gates(before.texts.few(before.texts.train, settings.samples), before)
        return Expected(found.work.times(11), found.bytes)
    return Expected(Work(moved=101 * 12 * anatomy.inside), 4 * _widest(anatomy.places))


def walk_work(read: Read, anatomy: Anatomy, passes: float) -> Work:
    """Of a walk: so many passes over every block, the way in, and a look at where things are, on the first batch."""
    share = passes + 1 / max(len(anatomy.blocks), 1)
    return read.forward.times(share).plus(Work(passes=1.0)) if read.batches else NOTHING


def streamed_bytes(lengths: Lengths, anatomy: Anatomy, states: int) -> int:
    """So many hidden states of all texts."""
    return states * 4 * int(lengths.sum()) * anatomy.hidden


def inside_bytes(anatomy: Anatomy, tokens: int) -> int:
    """What a batch makes inside of a block that is not trained."""
    widest = max((max(place.width, *place.outs) for place in anatomy.places), default=1)
    return 6 * 4 * tokens * widest


def _bytes(chosen: list[Place], read: Read, anatomy: Anatomy, way: hessian.Way) -> int:
    linears = [(out, place.width) for place in chosen for out in place.outs]
    return hessian.bytes_needed(linears, int(read.tokens), anatomy.hidden, way, read.largest)


def _widest(places: list[Place]) -> int:
    return max((max(place.outs) * place.width for place in places), default=0)
