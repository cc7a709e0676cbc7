"""The work of the solvers, linear by linear, counted from their formulas.

n: columns of a linear, out: its rows. A Cholesky factor takes n^3 / 3 operations, an inverse from it 2 n^3 / 3, a solution for
`out` right sides 2 n^2 out. The bytes a number of single passes over [n, n] or [out, n] move are counted in the code that they
are in.
"""

from __future__ import annotations

from collections.abc import Sequence

from flyweight.measure.reading import Lengths, Read, walked
from flyweight.measure.work import CHUNK, Work
from flyweight.methods.prune import obs, rebuild
from flyweight.methods.prune.anatomy import Anatomy, Place
from flyweight.methods.prune.masks import n_and_m
from flyweight.methods.prune.restore import HELD_BACK, MORE, TOKENS
from flyweight.methods.prune.sparsegpt import COLUMNS

__all__ = ["made_up", "ordered", "rearranged", "rebuilt", "restored", "sparsegpt", "sums", "wanda"]

MATRIX = 80  # bytes moved for an entry of a Hessian: tested, divided, copied, damped, put in order, factors cleared and tested
WEIGHT = 120  # for a weight that is corrected: to float64 and back, scores, masks, what is lost
CALLS = 2000.0, 9.0  # of an OBS removal: by itself, and for every unit that is left
RANKS = 5.0  # sorts of a row that its ranks are worth
SWAPS = 0.3  # of a rearrangement: for every pair of a unit and one that is gone


def sums(width: int, read: Read) -> Work:
    """The inputs' Hessian, batch after batch."""
    return Work(products=2 * read.tokens * width**2, added=read.batches * width**2, moved=40 * read.tokens * width)


def sparsegpt(place: Place, pattern: str) -> Work:
    """One factor for all linears of the place; each is swept, and what it lost is told twice, with and without correction."""
    n, parts = place.width, n_and_m(pattern)
    found = Work(roots=2 * n**3 / 3, inverses=2 * n**3 / 3, moved=MATRIX * n**2)
    chunk = CHUNK if parts is None else max(parts[1], COLUMNS)
    for out in place.outs:
        entries = out * n
        found = found.plus(
            Work(wide=entries * n, rank_ones=chunk * entries, moved=WEIGHT * entries + 4 * 12 * n**2),
            Work(products=4 * 2 * entries * n),
            Work(ranked=entries) if parts is None else Work(sorted=entries / 2),
        )
    return found


def wanda(place: Place, read: Read, pattern: str) -> Work:
    """Squares of what is read; weights are sorted in groups, or row by row and, for their ranks, once more as whole numbers."""
    times = RANKS if n_and_m(pattern) is None else 1.0
    return Work(moved=40 * read.tokens * place.width + 120 * place.weights, sorted=times * place.weights)


def ordered(place: Place) -> Work:
    """Structured OBS, all units of each linear."""
    n, s, found = place.width, place.size, Work()
    for out in place.outs:
        entries, half = out * n, n * n / 2
        found = found.plus(
            Work(roots=n**3 / 3, inverses=2 * n**3 / 3, moved=MATRIX * n**2 + WEIGHT * entries),
            Work(wide=2 * n**3 / 3 + n * entries + 2 * n * entries + 2 * half * out * (s > 1)),
            Work(moved=8 * half * out / s + 8 * half / s * 3 * obs.COLUMNS / 2 + 32 * n**3 / 3 / obs.COLUMNS),
            Work(calls=n / s * (CALLS[0] + CALLS[1] * n / s / 2)),
        )
    return found


def made_up(place: Place, stay: float) -> Work:
    """The best weights of columns that are chosen already, and what is lost."""
    n, k, found = place.width, place.width * stay, Work()
    for out in place.outs:
        found = found.plus(
            Work(roots=k**3 / 3, wide=2 * out * k**2 + 2 * out * k * n, products=4 * out * n**2),
            Work(moved=MATRIX * n**2 + WEIGHT * out * n),
        )
    return found


def rearranged(units: int, gone: float, samples: int) -> Work:
    """Fisher information of a group, and swaps."""
    return Work(wide=2 * samples * units**2, moved=48 * units**2, calls=SWAPS * units**2 * gone)


def restored(place: Place, stay: float, read: Read, masks: bool) -> Work:
    """Sums over what a linear reads and lacks, then least squares, tried with several dampings."""
    n, found = place.width * stay + 1, Work()
    portions = min(read.batches, read.tokens / TOKENS + 2)
    for out in place.outs:
        found = found.plus(
            Work(products=2 * read.tokens * n * (n + out), added=portions * n * (n + out)),
            Work(moved=100 * read.tokens * (n + out)),
        )
        once = Work(wide=2 * out * n**2, moved=40 * n**2 + 100 * out * n)
        solve = Work(wide=2 * out * n**2) if masks else Work(roots=n**3 / 3, wide=2 * out * n**2, moved=20 * n**2)
        found = found.plus(once.plus(solve).times(MORE))
    return found


def restored_bytes(place: Place, stay: float, masks: bool) -> int:
    """Of one linear while it is solved, its sums aside: the damped matrix and its root, the right sides and the solutions."""
    n, out = place.width * stay + 1, max(place.outs)
    return int(8 * (2 * n**2 + 5 * n * out))


def sums_bytes(places: Sequence[Place], heads: float, neurons: float) -> int:
    """Of the widest linear: what is learned from, and what judges it."""
    widths = [(place.width * (heads if place.what == "heads" else neurons) + 1, max(place.outs)) for place in places]
    return int(max((2 * 8 * n * (n + out) for n, out in widths), default=0))


def rebuilt(lengths: Lengths, weights: int, share: float, anatomy: Anatomy) -> Work:
    """A block that is trained, `share` of the model's work."""
    read = walked(lengths)
    texts, batch = max(len(lengths), 1), read.tokens / max(read.batches, 1)
    each = max(read.tokens / texts * rebuild.TEXTS, batch)  # tokens a step
    step = Read(max(each / max(batch, 1), 1.0), each).backward.times(rebuild.STEPS * share)
    looks = read.forward.times(share * ((rebuild.LOOKS + 1) / HELD_BACK + 1))
    kept = 2 * 4 * read.tokens * anatomy.hidden
    return step.plus(looks, Work(updates=2 * rebuild.STEPS * weights, hashed=4 * weights + kept, stored=4 * weights))
