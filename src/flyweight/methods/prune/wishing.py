"""What meeting a wish takes: a table of costs where there is none yet, shapes, and results that race the reference."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from flyweight.measure.blocks import BLOCKS
from flyweight.measure.latency import WARM_UP
from flyweight.measure.probes import DEEPER, ODD, PANEL, grid
from flyweight.measure.work import Work
from flyweight.methods.prune.anatomy import Anatomy, Place

if TYPE_CHECKING:
    from flyweight.settings import PruneSettings

__all__ = ["Wish", "wish"]

TRIES, ROUNDS = 2, 16  # of results and of their races, as a rule
TABLE_ROUNDS = 20  # of a table's times, until they are settled
OPTION = 200.0  # calls for an option of the dynamic program
TRACED, OPENED = 0.12, 0.35  # seconds to trace a block, and to open any model
EXPORTED = 100.0  # bytes moved for a weight that is exported, checked and opened
DRAWN = 60.0  # for one that is drawn at random
FILES = 3.0  # copies of the weights while a model is exported: as arrays, in the file's form, in the engine
INT8 = 0.4  # of the time in float


class Wish(NamedTuple):
    work: Work
    bytes: int


def wish(settings: PruneSettings, anatomy: Anatomy, left: float, tries: int = TRIES) -> Wish:
    """left: share of the blocks' work that stays."""
    chosen = [place for place in anatomy.places if place.what and place.what in settings.target]
    options = sum(place.units for place in chosen) / settings.multiple_of
    one = Work(calls=OPTION * options, moved=8 * anatomy.weights + 24 * anatomy.inside)
    opened = Work(
        hashed=2 * 4 * anatomy.weights
    )  # the reference, verified; the model at hand, for the key of what is kept
    if settings.cost != "latency":
        return Wish(one.plus(opened), 2 * 4 * anatomy.weights)  # the reference and a copy
    weights = int(anatomy.weights - anatomy.inside + left * anatomy.inside)
    blocks = len(anatomy.blocks)
    race = run(settings, 1.0).plus(run(settings, left)).times(ROUNDS + WARM_UP)
    each = one.plus(exported(weights, blocks), race)
    work = each.times(tries).plus(exported(anatomy.weights, blocks), opened)
    whole, part = 4 * anatomy.weights, 4 * weights
    files = max((FILES + 1) * whole, whole + (FILES + 1) * part)  # opening the reference; later it and a result
    return Wish(work.plus(table(settings, anatomy)), int(files))


def run(settings: PruneSettings, share: float) -> Work:
    """One call of the engine with this share of the model's work."""
    batch, length = settings.shape
    shorter = INT8 if settings.precision == "int8" else 1.0
    return Work(passes=share * shorter, tokens=batch * length * share * shorter)


def exported(weights: int, blocks: int) -> Work:
    """Written for the engine, and opened."""
    return Work(moved=EXPORTED * weights, seconds=OPENED + TRACED * blocks)


def table(settings: PruneSettings, anatomy: Anatomy) -> Work:
    """Small models of a few blocks, made, exported and run in turn. Measured once: later runs find it in the cache."""
    block = anatomy.blocks[0]
    kinds = [place for place in block if place.what]
    probes = 1 + sum(_probes(place) for place in kinds) + 3
    weights = sum(place.weights for place in block)
    full = BLOCKS * weights
    anchor = full / 4
    small = Work(moved=DRAWN * full).plus(exported(int(anchor), BLOCKS)).times(probes)
    deep = Work(moved=DRAWN * full * (DEEPER - 1))
    share = BLOCKS / len(anatomy.blocks)
    shares = [share * (1 / 4 + 3 / 4 * part / len(kinds)) for part in (0.25, 0.75)]
    round_ = run(settings, sum(shares) / 2).times(probes + DEEPER)
    return small.plus(deep, round_.times(2 * TABLE_ROUNDS))


def _probes(place: Place) -> int:
    neurons = place.what == "neurons"
    found = len(grid(place.units, neurons)) - 1
    return found + 2 * len(ODD) if neurons and place.units > 4 * PANEL else found
