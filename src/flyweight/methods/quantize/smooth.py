"""How the inputs of linears that read one tensor are made int8: smoothing, outlier channels and the grid, by output error.

A linear computes Y = X W^T. With s above 0 for every input channel, Y = (X / s) (W s)^T; what X / s loses on a grid shared by
all channels depends on its largest ones, and s moves size from them to the weights (SmoothQuant, Xiao et al. 2023, eq. 3 and 4):

    s = max|X|^a / max|W|^(1 - a), a in ALPHAS

A few channels may stay in float (LLM.int8, Dettmers et al. 2022, section 3.2). Every choice is held against
|Q(X / s) Q(W s)^T + float part - X W^T|^2 on a sample of real inputs: nothing is taken that does harm there.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flyweight.methods.quantize.ranges import RANGES, grid_of
from flyweight.models.activations import round_static

__all__ = ["Input", "Search", "round_weight"]

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COUNTS = (4, 8, 16, 24)
WORTH = 0.7  # outlier channels cost a small float product and a sum: the error has to fall at least to this share
CLOSE = 1.25  # and the fewest channels within this factor of the least error are taken
ROWS = 512
TINY = 1e-5


@dataclass(frozen=True)
class Input:
    """How X becomes int8.

    smooth:   [in] float32, or None; outliers: [n] int64 ascending, or None
    scale, zero_point: [1] float32 and [1] uint8
    range:    the name of the rule the grid came from; alpha: None without smoothing
    error:    relative output error on the sample, sqrt(|Y' - Y|^2 / |Y|^2)
    """

    smooth: Tensor | None
    outliers: Tensor | None
    scale: Tensor
    zero_point: Tensor
    range: str
    alpha: float | None
    error: float

    def apply(self, inputs: Tensor) -> Tensor:
        """[tokens, in] as the integer product sees it, dequantized: x / smooth, 0 at outliers, rounded."""
        inner = inputs if self.smooth is None else inputs / self.smooth
        if self.outliers is not None:
            inner = inner.index_fill(-1, self.outliers, 0)
        return round_static(inner, self.scale, self.zero_point)

    def weight(self, weight: Tensor) -> Tensor:
        """[out, in] as it goes on the grid: times smooth, 0 at outliers."""
        inner = weight if self.smooth is None else weight * self.smooth
        return inner if self.outliers is None else inner.index_fill(-1, self.outliers, 0)


def round_weight(weight: Tensor, bits: int) -> Tensor:
    """[out, in] on a symmetric grid a row: what a search assumes, whatever rounds in the end."""
    top = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    rounded: Tensor = (weight / scale).round().clamp(-top, top) * scale
    return rounded


class Search:
    """One site: `inputs` [tokens, in] that all its linears read, `weight` [out, in] of all of them, one below the other.

    bits: of the grid that the weight is assumed to be rounded to; None: it is already

    The extremes of min-max and of smoothing are those of all tokens; errors are taken on at most ROWS of them, chosen by `seed`.
    """

    def __init__(self, inputs: Tensor, weight: Tensor, bits: int | None = 8, seed: int = 0) -> None:
        self.weight, self.bits = weight, bits
        self.low, self.high = inputs.amin(0), inputs.amax(0)
        self.size = inputs.abs().amax(0).clamp(min=TINY)
        self.weights = weight.abs().amax(0).clamp(min=TINY)
        if len(inputs) > ROWS:
            chosen = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed))[:ROWS]
            inputs = inputs[chosen.to(inputs.device)]
        self.rows = inputs
        self.wanted = inputs @ weight.t()
        self.norm = self.wanted.square().sum().clamp(min=1e-30)

    def smoothing(self, alpha: float) -> Tensor:
        """[in] float32: max|X|^a / max|W|^(1-a), over tokens and over outputs."""
        return (self.size**alpha / self.weights ** (1 - alpha)).clamp(min=TINY)

    def tried(self, alpha: float | None, count: int, rule: str) -> Input:
        """The input with this smoothing, the `count` channels that are largest after it left out, and a grid by `rule`."""
        smooth = None if alpha is None else self.smoothing(alpha)
        divisor = torch.ones_like(self.size) if smooth is None else smooth
        outliers = (self.size / divisor).topk(count).indices.sort().values if count else None
        inner = torch.stack([self.low, self.high]) if rule == "minmax" else self.rows
        inner = inner / divisor
        scale, zero = grid_of(RANGES[rule](inner if outliers is None else inner.index_fill(-1, outliers, 0)))
        device = self.size.device
        how = Input(smooth, outliers, scale.to(device), zero.to(device), rule, alpha, 0.0)
        return replace(how, error=self.error(how))

    def error(self, how: Input) -> float:
        """sqrt(|Y' - Y|^2 / |Y|^2) with inputs and weight rounded."""
        weight = how.weight(self.weight)
        given = how.apply(self.rows) @ (weight if self.bits is None else round_weight(weight, self.bits)).t()
        if how.outliers is not None:
            given += self.rows[:, how.outliers] @ self.weight[:, how.outliers].t()
        return float(((given - self.wanted).square().sum() / self.norm).sqrt())

    def best(self, ranges: str = "best", smooth: bool = True, outliers: int = 32) -> Input:
        """The way with the least error. ranges: a name in RANGES, or "best"; outliers: at most so many channels in float.

        Alphas are compared on min-max grids, then numbers of outliers, then the rules. Channels are left out only where that is
        WORTH it, and then the fewest that come CLOSE to the least error.
        """
        names = tuple(RANGES) if ranges == "best" else (ranges,)
        alphas: tuple[float | None, ...] = (None, *ALPHAS) if smooth else (None,)
        most = min(outliers, len(self.size) // 4)
        found = min((self.tried(alpha, 0, names[0]) for alpha in alphas), key=_by_error)
        if most:
            least = min((self.tried(alpha, most, names[0]) for alpha in alphas), key=_by_error)
            if least.error <= WORTH * found.error:
                fewer = (self.tried(least.alpha, count, names[0]) for count in COUNTS if count < most)
                found = next((how for how in fewer if how.error <= CLOSE * least.error), least)
        count = 0 if found.outliers is None else len(found.outliers)
        return min((found, *(self.tried(found.alpha, count, rule) for rule in names[1:])), key=_by_error)


def _by_error(how: Input) -> float:
    return how.error
