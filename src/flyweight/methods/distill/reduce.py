"""Linear algebra of a narrower stream: pure functions over float64 tensors, no model in sight.

The stream x [D] of an encoder with norms after the residual sum becomes z = Q^T x [N]. Q spans the N directions that hold most
of the stream (truncated SVD of the centred hidden states, the all-ones direction always among them), and of all bases of that
space it is the one nearest to N of the old coordinates. So

- Q maps ones to ones, and taking the mean out commutes with it: Q^T (x - mean x) = Q^T x - mean(Q^T x), exactly;
- a norm's scale, which is diagonal in the old coordinates, is nearly diagonal in the new ones, and exactly so at N = D, where
  Q is the identity. A rotation could not be exact there: the scale comes before the residual sum and cannot be moved on.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Moments", "Reader", "basis", "fit_norm", "kept_units", "low_rank_scores", "low_rank_values", "reader"]

RIDGE = 1e-3  # of the mean variance, where the part of x outside the basis is told from the part inside
JITTER = 1e-8  # of the mean diagonal, so that a Cholesky factor exists


class Moments(NamedTuple):
    """mean [width] and covariance [width, width] of what one place of a model reads."""

    mean: Tensor
    covariance: Tensor


class Reader(NamedTuple):
    """x is read off z as `gain` z + `shift`: [D, N] and [D]."""

    gain: Tensor
    shift: Tensor


def basis(places: list[Moments], width: int) -> Tensor:
    """Q [D, N] with orthonormal columns for N = width, 2 <= N <= D, see the top of this file. Each place counts the same."""
    total = torch.stack([one.covariance / one.covariance.trace().clamp(min=1e-300) for one in places]).sum(0)
    across = _complement(len(total))
    _, vectors = torch.linalg.eigh(across.T @ total @ across)
    major = across @ vectors.flip(1)[:, : width - 1]
    ones = torch.full((len(total), 1), len(total) ** -0.5, dtype=total.dtype)
    chosen = _pivots(torch.cat([ones, major], 1))
    inner = _complement(width)
    left, _, right = torch.linalg.svd(major[chosen].T @ inner)
    found: Tensor = ones @ torch.full((1, width), width**-0.5, dtype=total.dtype) + major @ (left @ right) @ inner.T
    return found


def reader(q: Tensor, place: Moments) -> Reader:
    """The least-squares guess of x from z = Q^T x: what is outside the basis is told from what is inside.

    q: [D, N]. gain = Q + (1 - Q Q^T) S Q (Q^T S Q + ridge)^-1, so that at N = D nothing is guessed.
    """
    inside = q.T @ place.covariance @ q
    ridge = RIDGE * inside.diagonal().mean().clamp(min=1e-12) * torch.eye(len(inside), dtype=q.dtype)
    crossed = place.covariance @ q
    outside = crossed - q @ (q.T @ crossed)
    gain = q + torch.linalg.solve(inside + ridge, outside.T).T
    return Reader(gain, place.mean - gain @ (q.T @ place.mean))


def low_rank_scores(query: Tensor, key: Tensor, place: Moments, size: int) -> tuple[Tensor, Tensor]:
    """Queries and keys of `size` dimensions whose products are nearest to those of one head, over what the head reads.

    query, key: [head size, N + 1], the weights with the bias as last column; place: moments of z. The truncated SVD of
    query^T key in the metric of E[(z, 1) (z, 1)^T], and the factor for sqrt(size) that scores are divided by. Returns two
    [size, N + 1].
    """
    root = _root(place.covariance)
    one, other = (torch.linalg.qr(_with_one(part, root, place.mean).T) for part in (query, key))
    left, values, right = torch.linalg.svd(one.R @ other.R.T)
    scale = values[:size].sqrt() * (size / len(query)) ** 0.25
    return (
        _without_one((one.Q @ left[:, :size] * scale).T, root, place.mean),
        _without_one((other.Q @ right[:size].T * scale).T, root, place.mean),
    )


def low_rank_values(value: Tensor, output: Tensor, covariance: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Values [size, N] and output weights [N, size] of one head whose product is nearest to output @ value over what it reads.

    value: [head size, N]; output: [N, head size]; covariance: of z [N, N]
    """
    root = _root(covariance)
    before, after = torch.linalg.qr((value @ root).T), torch.linalg.qr(output)
    left, values, right = torch.linalg.svd(after.R @ before.R.T)
    scale = values[:size].sqrt()
    return _unroot((before.Q @ right[:size].T * scale).T, root), after.Q @ left[:, :size] * scale


def fit_norm(given: Moments, wanted: Tensor, together: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and shift [N] by least squares, channel by channel.

    given: mean [N] and variance [N] of the normalized stream; wanted: mean [N] of what the norm is to give; together: their
    covariance [N]. A channel that does not vary keeps scale 1.
    """
    varies = given.covariance > 1e-12
    scale = torch.where(varies, together / given.covariance.clamp(min=1e-12), torch.ones_like(together))
    return scale, wanted - scale * given.mean


def kept_units(weight: Tensor, bias: Tensor, units: Moments, count: int) -> tuple[list[int], Tensor, Tensor]:
    """Which `count` of the units to keep that a linear reads, and its weight and bias over those.

    weight: [out, units]; units: moments of the units' values. One after another that one stays whose value times weight
    varies most beside what the ones before it tell; the others are guessed from them by least squares. At count = units
    nothing changes.
    """
    size = weight.norm(dim=0)
    keep = _telling(size[:, None] * units.covariance * size, count)
    gone = sorted(set(range(weight.shape[1])) - set(keep))
    inside = units.covariance[keep][:, keep]
    ridge = RIDGE * inside.diagonal().mean().clamp(min=1e-12) * torch.eye(count, dtype=weight.dtype)
    guess = torch.linalg.solve(inside + ridge, units.covariance[keep][:, gone]).T
    shift = units.mean[gone] - guess @ units.mean[keep]
    return keep, weight[:, keep] + weight[:, gone] @ guess, bias + weight[:, gone] @ shift


def _complement(size: int) -> Tensor:
    """[size, size - 1]: an orthonormal basis of all that is orthogonal to the ones."""
    start = torch.eye(size, dtype=torch.float64)
    start[:, 0] = 1.0
    found: Tensor = torch.linalg.qr(start).Q[:, 1:]
    return found


def _pivots(vectors: Tensor) -> list[int]:
    """The rows of [D, N] that span it best, N of them, by pivoted Gram-Schmidt, in rising order."""
    left, found = vectors.clone(), list[int]()
    for _ in range(vectors.shape[1]):
        sizes = left.square().sum(1)
        sizes[found] = -1.0
        found.append(int(sizes.argmax()))
        row = left[found[-1]] / sizes[found[-1]].sqrt()
        left = left - (left @ row)[:, None] * row
    return sorted(found)


def _telling(covariance: Tensor, count: int) -> list[int]:
    """`count` variables that leave least to be told about the others, greedily (pivoted Cholesky), in rising order."""
    left, found = covariance.clone(), list[int]()
    for _ in range(count):
        varies = left.diagonal().clone()
        varies[found] = -1.0
        found.append(int(varies.argmax()))
        row = left[found[-1]] / varies[found[-1]].clamp(min=1e-300).sqrt()
        left = left - torch.outer(row, row)
    return sorted(found)


def _root(moment: Tensor) -> Tensor:
    """L with L L^T = the moment, its diagonal raised a little."""
    raised = moment + JITTER * moment.diagonal().mean().clamp(min=1e-12) * torch.eye(len(moment), dtype=moment.dtype)
    found: Tensor = torch.linalg.cholesky(raised)
    return found


def _with_one(rows: Tensor, root: Tensor, mean: Tensor) -> Tensor:
    """rows [n, N + 1] times F = [[L, mean], [0, 1]], where F F^T = E[(z, 1) (z, 1)^T]; stable where the mean is large."""
    return torch.cat([rows[:, :-1] @ root, (rows[:, :-1] @ mean + rows[:, -1])[:, None]], 1)


def _without_one(rows: Tensor, root: Tensor, mean: Tensor) -> Tensor:
    """rows [n, N + 1] times the inverse of that."""
    weights = _unroot(rows[:, :-1], root)
    return torch.cat([weights, (rows[:, -1] - weights @ mean)[:, None]], 1)


def _unroot(rows: Tensor, root: Tensor) -> Tensor:
    found: Tensor = torch.linalg.solve_triangular(root, rows, upper=False, left=False)
    return found
