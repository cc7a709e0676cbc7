"""What a linear's output loses when its weights change, for every method that rounds or removes weights by it.

With G = mean of x x^T over all tokens, a change D of the weight [out, in] makes a mean squared error of tr(D G D^T) in the
output, exactly, in memory that does not grow with the tokens. G is the Hessian of that error but for a factor, which no method
here notices. It is damped by a share of its mean diagonal, or inputs that hardly vary would carry weights of any size; inputs
that are always zero ("dead") have no say and get the mean diagonal itself.

Two ways of paying for a change at the least cost stand on it (Hassibi and Stork 1993, eq. 5):
- `factor` and `sweep`: columns one after another, those to come make up (GPTQ, Frantar et al. 2022; SparseGPT, Frantar and
  Alistarh 2023);
- `inverse`: any columns, all others make up (structured pruning, Kurtic et al. 2023).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from flyweight.errors import StepError

if TYPE_CHECKING:
    from flyweight.calibration import Block, Site

__all__ = [
    "Factor",
    "Inverse",
    "Moments",
    "best_of",
    "bytes_needed",
    "damped",
    "factor",
    "inverse",
    "lost",
    "relative",
    "ridge",
    "sweep",
    "tried",
]

TRIES = 4
"""Times that a damping which is too small is made ten times larger."""


@dataclass
class Moments:
    """Of what a site's linears read.

    total: sum of x x^T [in, in] float64; sizes: sum of |x| [in] float64; tokens: how many; sums: sum of x [in] float64
    """

    total: Tensor
    sizes: Tensor
    tokens: int = 0
    sums: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.sums = torch.zeros_like(self.sizes)

    @classmethod
    def of(cls, site: Site, device: torch.device) -> Moments:
        width = site.width
        return cls(
            torch.zeros(width, width, dtype=torch.float64, device=device),
            torch.zeros(width, dtype=torch.float64, device=device),
        )

    def add(self, inputs: Tensor) -> None:  # [tokens, in]
        self.total += inputs.t() @ inputs
        self.sizes += inputs.abs().sum(0)
        self.sums += inputs.sum(0)
        self.tokens += len(inputs)

    @classmethod
    def seen(cls, block: Block, site: Site, device: torch.device) -> Moments:
        """Of all texts, by the block as it stands now."""
        made = cls.of(site, device)
        for inputs in block.stream(site):
            made.add(inputs)
        return made

    @property
    def mean_size(self) -> Tensor:
        """Mean of |x|, [in] float32."""
        return (self.sizes / max(self.tokens, 1)).float()

    @property
    def mean(self) -> Tensor:
        """Mean of x, [in] float64."""
        return self.sums / max(self.tokens, 1)

    def gram(self, name: str) -> Tensor:
        """Mean of x x^T. Raises StepError, naming the layer, where an input was NaN or inf or too large to be squared."""
        if not torch.isfinite(self.total).all():
            raise StepError(f"finite activations into {name}", "NaN or inf", "check the model and the texts")
        return self.total / max(self.tokens, 1)

    def centred(self, name: str) -> Tensor:
        """Mean of (x - mean)(x - mean)^T: what counts where a bias takes the mean error. Raises StepError as `gram`.

        An input that never changes is dead in it, whatever is left of its variance by rounding.
        """
        gram, mean = self.gram(name), self.mean
        diagonal = gram.diagonal().clone()
        gram.addr_(mean, mean, alpha=-1)
        steady = gram.diagonal() <= 1e-6 * diagonal  # sums are taken in float32
        gram[steady] = 0
        gram[:, steady] = 0
        return gram


def lost(difference: Tensor, gram: Tensor) -> float:
    """Mean over tokens of the squared error of a linear's output: tr(D G D^T); difference: [out, in]."""
    gram = gram.to(difference.dtype)
    return float(((difference @ gram) * difference).sum())


def relative(difference: Tensor, weight: Tensor, gram: Tensor) -> float:
    """Relative error of a linear's output: the root of what is lost over what there is; both [out, in]."""
    return float((max(lost(difference, gram), 0) / max(lost(weight, gram), 1e-30)) ** 0.5)


def damped(gram: Tensor, damping: float) -> Tensor:
    """[in, in] float64: `damping` times the mean diagonal of the live inputs is added to theirs, and the mean to dead ones; tied
    to no other input, their weights neither move nor make others move."""
    made = gram.clone()
    made.diagonal().add_(ridge(gram, damping))
    return made


def ridge(gram: Tensor, damping: float) -> Tensor:
    """[in]: what `damped` adds to the diagonal."""
    diagonal = gram.diagonal()
    dead = diagonal == 0
    mean = diagonal[~dead].mean() if not dead.all() else torch.ones((), dtype=gram.dtype, device=gram.device)
    return torch.where(dead, mean, mean * damping)


class Factor(NamedTuple):
    """order: [in], columns in the order in which they are settled; upper: [in, in], U of the ordered and damped Hessian;
    damping: the share it took"""

    order: Tensor
    upper: Tensor
    damping: float


def factor(gram: Tensor, damping: float, name: str, sort: bool = True) -> Factor:
    """U with H^-1 = U^T U of [in, in] float64, damped by a share of its mean diagonal; a scale of H changes nothing but U's.

    sort: columns by falling H_jj; otherwise as they stand. U_jj^2 is then the j-th diagonal of the inverse of what is left of
    H from column j on. Raises StepError naming the layer where H stays indefinite.
    """
    order = torch.arange(len(gram), device=gram.device)
    if sort:
        order = torch.argsort(gram.diagonal(), descending=True, stable=True)

    def upper(share: float) -> Tensor | None:
        whole = _inverse(damped(gram, share)[order][:, order])
        if whole is None:
            return None
        found, failed = torch.linalg.cholesky_ex(whole, upper=True)
        return None if failed or not _finite(found) else found

    return Factor(order, *tried(damping, name, upper))


class Inverse(NamedTuple):
    """matrix: [in, in], H^-1 of the damped Hessian; ridge: [in], what was added to the diagonal; damping: the share it took"""

    matrix: Tensor
    ridge: Tensor
    damping: float


def inverse(gram: Tensor, damping: float, name: str) -> Inverse:
    """Of [in, in] float64, damped by a share of its mean diagonal. Raises StepError naming the layer as `factor`."""

    matrix, share = tried(damping, name, lambda share: _inverse(damped(gram, share)))
    return Inverse(matrix, ridge(gram, share), share)


def best_of(weight: Tensor, gram: Tensor, columns: Sequence[int], damping: float, name: str) -> Tensor:
    """[out, kept]: the weights of these columns that answer most like all of them did, W H_:K (H_KK)^-1; of the same type.

    weight: [out, in]; gram: [in, in] float64, damped by a share of its mean diagonal, which draws the weights to those that they
    were. Raises StepError naming the layer as `factor`.
    """
    stay = torch.as_tensor(columns, dtype=torch.long, device=gram.device)

    def solved(share: float) -> Tensor | None:
        rows = damped(gram, share)[stay]
        lower, failed = torch.linalg.cholesky_ex(rows[:, stay])
        found = None if failed else torch.cholesky_solve(rows @ weight.t().to(rows.dtype), lower).t()
        return None if found is None or not _finite(found) else found

    return tried(damping, name, solved)[0].to(weight.dtype)


def _inverse(hessian: Tensor) -> Tensor | None:
    """None where it is not positive definite."""
    lower, failed = torch.linalg.cholesky_ex(hessian)
    found = None if failed else torch.cholesky_inverse(lower)
    return None if found is None or not _finite(found) else found


def _finite(tensor: Tensor) -> bool:
    """By its sum, which takes no memory."""
    return bool(torch.isfinite(tensor.sum()))


def tried(damping: float, name: str, attempt: Callable[[float], Tensor | None]) -> tuple[Tensor, float]:
    """What the attempt makes of the Hessian, at the first share of damping that lets it."""
    for number in range(TRIES):
        share = damping * 10**number
        found = attempt(share)
        if found is not None:
            return found, share
    raise StepError(
        f"a positive definite Hessian of the inputs of {name}",
        f"none up to damping {damping * 10 ** (TRIES - 1):g}",
        "give more or other texts, or a larger damping",
    )


def sweep(left: Tensor, upper: Tensor, settle: Callable[[int], Tensor], columns: int) -> None:
    """Settle one column of the weight after another; those to come make up for what it lost (Frantar et al. 2022, alg. 1).

        e = (w_j - settled_j) / U_jj          w_k -= e U_jk  for all k > j

    left:    [in, out] in the factor's order, changed in place: row j ends as it stood when its turn came
    settle:  (j) -> [out], the value that column j takes; called in order, once row j has made up for all before it
    columns: taken one by one before the rest is corrected at once, which changes nothing but the speed. At the first of them
             all rows have made up for what came before.
    """
    shares = upper / upper.diagonal()[:, None]
    for start in range(0, len(left), columns):
        end = min(start + columns, len(left))
        errors = torch.empty_like(left[start:end])
        for j in range(start, end):
            errors[j - start] = left[j] - settle(j)
            left[j + 1 : end].addr_(shares[j, j + 1 : end], errors[j - start], alpha=-1)
        left[end:].addmm_(shares[start:end, end:].t(), errors, alpha=-1)


Way = Literal["factor", "inverse", "squares"]
"""What a method makes of the inputs: a factor (SparseGPT, GPTQ), an inverse (structured OBS), one number each (Wanda)."""

_MATRICES: dict[Way, tuple[tuple[float, float], ...]] = {
    "factor": ((5.7, 0.0), (4.1, 2.2)),  # while it is made; while the weight is corrected and its error taken
    "inverse": ((5.6, 3.1),),
    "squares": ((0.0, 4.2),),
}
"""Float64 numbers that are held at once, (for every entry of the Hessian, for every weight): counted, and measured to be so."""


def bytes_needed(linears: Iterable[tuple[int, int]], tokens: int, hidden: int, way: Way, batch: int = 0) -> int:
    """Bytes that a walk with one of the methods takes at most, beside the model itself.

    One block's inputs and outputs, [tokens, hidden] each, and what is larger: the worst linear's matrices while it is solved, or
    its sums together with what a batch makes inside the block.

    linears: [out, in] of those that are solved; tokens: of all texts; hidden: width of hidden states; batch: tokens of the
    largest batch (`calibration.BATCH` texts of the longest length)
    """
    shapes = list(linears)
    solving = [8 * (entries * n * n + weights * n * out) for out, n in shapes for entries, weights in _MATRICES[way]]
    summing = [16 * batch * n if way == "squares" else 20 * n * n for _, n in shapes]  # a batch's product, then added
    inside = 6 * 4 * batch * max((max(shape) for shape in shapes), default=hidden)
    return int(2 * 4 * tokens * hidden + max(max(solving, default=0), inside + max(summing, default=0)))
