"""Work by its kinds, counted, and what each kind takes on this machine, measured: what estimates of time are made of.

A step that looks into matrices is a sum over few kinds of work: passes of the model, products, Cholesky factors, bytes that go
through memory, a hash or a disk. Who counts it (`methods/*/expected.py`) knows no clock, and who measures knows no method.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
import time
from collections.abc import Callable
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import nn

from flyweight.hessian import sweep

__all__ = ["NOTHING", "Rates", "Work", "best_of", "machine_rates"]

WIDEST = 2048  # larger matrices are not timed: a Cholesky factor of this size has nearly the speed of larger ones
FEWEST = 256
TOKENS = 256  # of a product whose result is a Hessian
PIECE = 2**24  # bytes that are hashed, or entries that are updated, to see how fast
FEW = 16
LARGEST = 4096
SWEPT = 384  # columns, three portions of them
CHUNK = 128  # columns that the sweep of `flyweight.hessian` corrects one by one
LIMIT_S, TURNS = 1.0, 3


class Work(NamedTuple):
    """How often everything is done; `a.plus(b)`, `a.times(3)`.

    passes:     forward passes of the whole model, however short the texts
    tokens:     tokens that go through all of it
    back_passes, back_tokens: the same of backward passes to all weights
    gated:      tokens that go through all of it and back to gates alone, the way there included
    products:   floating point operations of matrix products, float32
    wide:       the same in float64
    roots:      of Cholesky factors, float64
    inverses:   of inverses from such
    rank_ones:  of updates by one column after another, float64
    added:      entries of a product that are added to a sum in float64
    ranked:     entries among which one by its rank is looked for
    sorted:     entries that are sorted, row by row
    moved:      bytes that single operations on large tensors read and write
    calls:      operations on tensors so small that only the call counts
    updates:    weights times steps of the optimizer
    hashed:     bytes of which a sha256 is made
    stored:     bytes written to a disk
    seconds:    what is known in seconds
    """

    passes: float = 0.0
    tokens: float = 0.0
    back_passes: float = 0.0
    back_tokens: float = 0.0
    gated: float = 0.0
    products: float = 0.0
    wide: float = 0.0
    roots: float = 0.0
    inverses: float = 0.0
    rank_ones: float = 0.0
    added: float = 0.0
    ranked: float = 0.0
    sorted: float = 0.0
    moved: float = 0.0
    calls: float = 0.0
    updates: float = 0.0
    hashed: float = 0.0
    stored: float = 0.0
    seconds: float = 0.0

    def plus(self, *others: Work) -> Work:
        return Work(*(sum(column) for column in zip(self, *others, strict=True)))

    def times(self, factor: float) -> Work:
        return Work(*(factor * one for one in self))

    def takes(self, rates: Rates) -> float:
        """Seconds."""
        return sum(count * rate for count, rate in zip(self, rates, strict=True))


NOTHING = Work()


class Rates(NamedTuple):
    """Seconds that one of each kind of work takes, in the order of `Work`."""

    passes: float
    tokens: float
    back_passes: float
    back_tokens: float
    gated: float
    products: float
    wide: float
    roots: float
    inverses: float
    rank_ones: float
    added: float
    ranked: float
    sorted: float
    moved: float
    calls: float
    updates: float
    hashed: float
    stored: float
    seconds: float = 1.0

    @classmethod
    def of(cls, **known: float) -> Self:
        """What is not told is free."""
        return cls(**{**dict.fromkeys(Work._fields, 0.0), "seconds": 1.0, **known})


def best_of(run: Callable[[], object], turns: int = TURNS, limit_s: float = LIMIT_S) -> float:
    """Seconds of the fastest of a few runs: another process may be busy for a while. One may be enough where it is long."""
    best, began = float("inf"), time.perf_counter()
    for _ in range(turns):
        started = time.perf_counter()
        run()
        now = time.perf_counter()
        best = min(best, now - started)
        if now - began > limit_s:
            break
    return best


def machine_rates(width: int) -> dict[str, float]:
    """Of everything but passes of the model, in a second or two; width: of the widest matrices that there will be."""
    n = max(FEWEST, min(width, WIDEST))
    chance = torch.Generator().manual_seed(0)
    with torch.no_grad():
        rows = torch.randn(TOKENS, n, generator=chance)
        found = {"products": best_of(lambda: rows.t() @ rows) / (2 * TOKENS * n**2)}
        found["added"] = _added(min(width, LARGEST), found["products"])
        some = torch.randn(n, FEWEST, generator=chance, dtype=torch.float64)
        square = torch.zeros(n, n, dtype=torch.float64)
        found["wide"] = best_of(lambda: square.addmm_(some, some.t())) / (2 * FEWEST * n**2)
        whole = square / square.diagonal().mean() + torch.eye(n, dtype=torch.float64)
        found["roots"] = best_of(lambda: torch.linalg.cholesky_ex(whole)) / (n**3 / 3)
        lower = torch.linalg.cholesky(whole)
        found["inverses"] = best_of(lambda: torch.cholesky_inverse(lower)) / (2 * n**3 / 3)
        # in memory that is new, which has to be cleared, and in memory that is held
        found["moved"] = (best_of(lambda: whole.clone()) + best_of(lambda: lower.copy_(whole))) / (32 * n**2)
        found["rank_ones"] = _swept(n // 2, found["wide"])
        found["ranked"] = best_of(lambda: some.flatten().kthvalue(some.numel() // 2)) / some.numel()
        found["sorted"] = best_of(lambda: rows.double().argsort(dim=1, stable=True)) / rows.numel()
        tiny = np.zeros(8)
        found["calls"] = best_of(lambda: [tiny.argmin() for _ in range(1000)]) / 1000
    return {**found, **_others()}


def _added(n: int, product: float) -> float:
    """A batch's product, made and added: of a size that counts, as what is larger than a heap's pieces is cleared every time."""
    few, total = torch.ones(FEW, n), torch.zeros(n, n, dtype=torch.float64)

    def add() -> None:
        nonlocal total
        total += few.t() @ few

    return max(best_of(add) / n**2 - 2 * FEW * product, 1e-11)


def _swept(out: int, product: float) -> float:
    """Columns one after another, as `sweep` takes them."""
    left = torch.ones(SWEPT, out, dtype=torch.float64)
    upper = torch.eye(SWEPT, dtype=torch.float64)
    seconds = best_of(lambda: sweep(left, upper, lambda j: left[j].clone(), CHUNK))
    return max(seconds - SWEPT**2 * out * product, 1e-9) / (CHUNK * SWEPT * out)


def _others() -> dict[str, float]:
    """AdamW with the clipping before it, a hash, a file."""
    weight = nn.Parameter(torch.zeros(PIECE // 4))
    weight.grad = torch.ones_like(weight)
    adam = torch.optim.AdamW([weight], fused=True)

    def step() -> None:
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        adam.step()

    step()
    data = bytes(PIECE)
    found = {"updates": best_of(step) / weight.numel(), "hashed": best_of(lambda: hashlib.sha256(data)) / PIECE}

    def store() -> None:
        with tempfile.TemporaryFile() as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())

    return {**found, "stored": best_of(store) / PIECE}
