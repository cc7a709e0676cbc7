"""Least squares over what is left of a linear, in float64: pure functions of sums over tokens.

z: what the linear reads, with a one at its end where it has a bias; e: what the sum that it adds to lacks, see `Lack`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flyweight.errors import StepError
from flyweight.hessian import ridge, tried

__all__ = ["LARGEST", "Lack", "factors", "refitted"]

LARGEST = 10.0
"""Factors beyond it, either way, are cut off (Kwon et al. 2022, section 5.3)."""


@dataclass
class Lack:
    """Sums over tokens; all that least squares needs, in memory that does not grow with the texts.

    gram:    sum of z z^T, [in, in] float64
    cross:   sum of e z^T, [out, in] float64
    squares: sum of e^2, [out] float64
    biased:  whether the last entry of z is a one
    """

    gram: Tensor
    cross: Tensor
    squares: Tensor
    biased: bool

    @classmethod
    def none(cls, weight: Tensor, biased: bool) -> Lack:
        """weight: [out, in without the one]"""
        out, inputs = weight.shape
        size = inputs + biased
        sums = torch.zeros(size + out, size, dtype=torch.float64, device=weight.device)
        return cls(sums[:size], sums[size:], sums.new_zeros(out), biased)

    def add(self, reads: Tensor, lacks: Tensor, weights: Tensor | None = None) -> None:
        """reads: [tokens, in without the one]; lacks: [tokens, out]; weights: [tokens, 1], roots of how much each token counts.

        Products are float32, their sums float64.
        """
        if self.biased:
            reads = torch.cat([reads, reads.new_ones(len(reads), 1)], dim=1)
        if weights is not None:
            reads, lacks = reads * weights, lacks * weights
        self.gram += reads.t() @ reads
        self.cross += lacks.t() @ reads
        self.squares += lacks.double().square().sum(0)

    def left(self, change: Tensor) -> Tensor:
        """Sum of (e - change z)^2, [out]; change: [out, in]."""
        return self.squares + ((change @ self.gram - 2 * self.cross) * change).sum(1)


def refitted(lack: Lack, damping: float, name: str) -> Tensor:
    """What to add to a linear's weights and bias, [out, in]: D = C (G + l)^-1, which minimizes sum |e - D z|^2 + l |D|^2.

    l is `damping` times the mean diagonal of G, as in `flyweight.hessian`; the bias is not damped. With e the dense model's sum
    less this model's, W + D is the best W' in |W' z + r' - (W_dense z_dense + r_dense)|^2, r the residual streams: what the
    stream has lost before is made up for as well (knowledge-preserving weight-tuning, Park et al. 2024). Where z and r are still
    those of the dense model this is the closed form of structured OBS for a whole set of units (Kurtic et al. 2023, section
    3.1). Raises StepError, naming the layer, for inputs that are NaN or inf.
    """
    root = _root(lack.gram, damping, len(lack.gram) - lack.biased, name)
    return torch.cholesky_solve(lack.cross.t(), root).t()


def factors(lack: Lack, weight: Tensor, size: int, damping: float, name: str) -> Tensor:
    """By what to multiply each unit's columns of a linear, [units]; ones where that would not lower the error.

    weight: [out, in without the one]; size: columns a unit

    With a unit's part of the output a_u = sum over its columns of W_c z_c: m = 1 + d, d the least squares of sum_u d_u a_u
    against e, damped towards ones. (A^T A)_uv is a sum of (W^T W) * G over the columns of u and v, (A^T e)_u one of W * C, so
    that no token is looked at again (Kwon et al. 2022, section 5.3, solved there by LSMR). Raises StepError as `refitted` does.
    """
    wide = weight.double()
    inputs = wide.shape[1]
    units = inputs // size
    products = (wide.t() @ wide) * lack.gram[:inputs, :inputs]
    normal = products.reshape(units, size, units, size).sum((1, 3))
    right = (wide * lack.cross[:, :inputs]).reshape(-1, units, size).sum((0, 2))
    found = torch.cholesky_solve(right[:, None], _root(normal, damping, units, name))[:, 0]
    found = (1 + found).clamp(-LARGEST, LARGEST) - 1
    gain = float(found @ normal @ found - 2 * found @ right)
    return 1 + found if gain < 0 else torch.ones_like(found)


def _root(matrix: Tensor, damping: float, inputs: int, name: str) -> Tensor:
    """Cholesky's root with the first `inputs` diagonal entries damped, ten times more where rounding asks for it."""
    if not torch.isfinite(matrix).all():
        raise StepError(f"finite activations into {name}", "NaN or inf", "check the model and the texts")

    def root(share: float) -> Tensor | None:
        made = matrix.clone()
        made.diagonal()[:inputs] += ridge(matrix[:inputs, :inputs], share)
        lower, failed = torch.linalg.cholesky_ex(made)
        return None if int(failed) else lower

    return tried(damping, name, root)[0]
