"""How the inputs of linears that read one tensor are made int8: shift, smoothing, outlier channels and the grid, by output error.

A linear computes Y = X W^T. With z and s above 0 for every input channel, Y = ((X - z) / s) (W s)^T + z W^T, the last of which
goes into the bias; what (X - z) / s loses on a grid shared by all channels depends on its largest ones. s moves size from them
to the weights (SmoothQuant, Xiao et al. 2023, eq. 3 and 4), z centres each (Outlier Suppression+, Wei et al. 2023, eq. 3):

    s = max|X - z|^a / max|W|^(1 - a), a in ALPHAS        z = (max X + min X) / 2, or the mean of X, or 0

A few channels may stay in float (LLM.int8, Dettmers et al. 2022, section 3.2). Every choice is held against
|Q((X - z) / s) Q(W s)^T + z W^T + float part - X W^T|^2 on a sample of real inputs, and against what it costs at run time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from flyweight.errors import StepError
from flyweight.methods.quantize.ranges import RANGES, grid_of
from flyweight.models.activations import round_static

__all__ = ["Input", "Search", "round_weight", "some"]

Centre = Literal["zero", "middle", "mean"]

ALPHAS = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
COUNTS = (4, 8, 16, 24)
PASS = 60  # a pass over floats takes as long for one number as so many products of an int8 kernel
PICK = 16  # channels that one pass over the input picks
CLOSE = 1.03  # of two ways as good as each other the plainer one is taken
WORTH = 2.0  # what makes a linear a tenth slower has to take a fifth off its error
ROWS = 256  # tokens that errors are taken on
OUTPUTS = 512  # and outputs
TINY = 1e-5


@dataclass(frozen=True)
class Input:
    """How X becomes int8.

    shift:    [in] float32, 0 at outliers, or None; smooth: [in] float32, or None; outliers: [n] int64 ascending, or None
    scale, zero_point: [1] float32 and [1] uint8
    range:    the name of the rule the grid came from; alpha: None without smoothing; centre: what the shift is
    error:    relative output error on the sample, sqrt(|Y' - Y|^2 / |Y|^2)
    slowdown: share of the integer products' time that shift, smoothing and outliers take
    """

    shift: Tensor | None
    smooth: Tensor | None
    outliers: Tensor | None
    scale: Tensor
    zero_point: Tensor
    range: str
    alpha: float | None
    centre: Centre
    error: float
    slowdown: float

    def apply(self, inputs: Tensor) -> Tensor:
        """[tokens, in] as the integer product sees it, dequantized: (x - shift) / smooth, 0 at outliers, rounded."""
        inner = inputs if self.shift is None else inputs - self.shift
        inner = inner if self.smooth is None else inner / self.smooth
        if self.outliers is not None:
            inner = inner.index_fill(-1, self.outliers, 0)
        return round_static(inner, self.scale, self.zero_point)

    def folded(self) -> Input:
        """The same where whatever makes the inputs divides them by `smooth` already."""
        if self.smooth is None:
            return self
        return replace(self, smooth=None, shift=None if self.shift is None else self.shift / self.smooth)

    def ordered(self, order: Tensor) -> Input:
        """The same for channels in another order, that begins with the outliers."""
        parts = {part: value[order] for part in ("shift", "smooth") if (value := getattr(self, part)) is not None}
        if self.outliers is not None:
            parts["outliers"] = torch.arange(len(self.outliers), device=order.device)
        return replace(self, **parts)

    def worth(self) -> float:
        """The less the better: the error, and more for what it costs."""
        return self.error * math.exp(WORTH * self.slowdown)

    def weight(self, weight: Tensor) -> Tensor:
        """[out, in] as it goes on the grid: times smooth, 0 at outliers."""
        inner = weight if self.smooth is None else weight * self.smooth
        return inner if self.outliers is None else inner.index_fill(-1, self.outliers, 0)


def some(whole: Tensor, most: int, seed: int) -> Tensor:
    """[rows, ...], or `most` of the rows chosen at random."""
    if len(whole) <= most:
        return whole
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:most]
    return whole[chosen.to(whole.device)]


def round_weight(weight: Tensor, bits: int = 8) -> Tensor:
    """[out, in] on a symmetric grid a row."""
    top = 2 ** (bits - 1) - 1
    scale = (weight.abs().amax(1, keepdim=True) / top).clamp(min=torch.finfo(torch.float32).tiny)
    rounded: Tensor = (weight / scale).round().clamp(-top, top) * scale
    return rounded


class Search:
    """One site: `inputs` [tokens, in] that all its linears read, `weight` [out, in] of all of them, one below the other.

    rounds: how a search assumes that the weight is rounded, whatever does in the end; None: it is already
    free:   smoothing costs nothing, as what makes the inputs takes it
    name:   of the site, for errors

    The extremes of min-max and of smoothing are those of all tokens; errors are taken on at most ROWS of
    them and at most OUTPUTS of the outputs, chosen by `seed`.
    """

    def __init__(
        self,
        inputs: Tensor,
        weight: Tensor,
        rounds: Callable[[Tensor], Tensor] | None = round_weight,
        seed: int = 0,
        free: bool = False,
        name: str = "a layer",
    ) -> None:
        self.weight, self.rounds, self.free, self.name = weight, rounds, free, name
        self.low, self.high, self.mean = inputs.amin(0), inputs.amax(0), inputs.mean(0)
        self.weights = weight.abs().amax(0).clamp(min=TINY)
        self.rows = some(inputs, ROWS, seed)
        self.some = some(torch.arange(len(weight), device=weight.device), OUTPUTS, seed)
        self.judged = weight[self.some]
        self.wanted = self.rows @ self.judged.t()
        self.norm = self.wanted.square().sum().clamp(min=1e-30)

    def centre(self, name: Centre) -> Tensor | None:
        """[in] float32, what every channel is centred by."""
        if name == "zero":
            return None
        return (self.low + self.high) / 2 if name == "middle" else self.mean

    def size(self, shift: Tensor | None) -> Tensor:
        """[in] float32: max|X - shift| over tokens."""
        moved = 0 if shift is None else shift
        return torch.maximum(self.high - moved, moved - self.low).clamp(min=TINY)

    def smoothing(self, alpha: float, shift: Tensor | None = None) -> Tensor:
        """[in] float32: max|X - shift|^a / max|W|^(1-a), over tokens and over outputs."""
        return (self.size(shift) ** alpha / self.weights ** (1 - alpha)).clamp(min=TINY)

    def tried(self, alpha: float | None, count: int, rule: str, centre: Centre = "zero") -> Input:
        """The input so shifted and smoothed, the `count` channels that are largest after it left out, and a grid by `rule`."""
        shift = self.centre(centre)
        smooth = None if alpha is None else self.smoothing(alpha, shift)
        divisor = torch.ones_like(self.low) if smooth is None else smooth
        outliers = (self.size(shift) / divisor).topk(count).indices.sort().values if count else None
        if shift is not None and outliers is not None:
            shift = shift.index_fill(-1, outliers, 0)
        inner = torch.stack([self.low, self.high]) if rule == "minmax" else self.rows
        inner = (inner if shift is None else inner - shift) / divisor
        scale, zero = grid_of(RANGES[rule](inner if outliers is None else inner.index_fill(-1, outliers, 0)))
        device, slower = self.low.device, self.slowdown(shift is not None, smooth is not None, count)
        how = Input(shift, smooth, outliers, scale.to(device), zero.to(device), rule, alpha, centre, 0.0, slower)
        return replace(how, error=self.error(how))

    def slowdown(self, shift: bool, smooth: bool, count: int) -> float:
        """Passes over inputs and, for the sum with the float part, outputs: as a share of the integer products' time."""
        out, width = self.weight.shape
        passes = (shift + (smooth and not self.free) + math.ceil(count / PICK)) * width + (2 * out if count else 0)
        return PASS * passes / (out * width)

    def error(self, how: Input) -> float:
        """sqrt(|Y' - Y|^2 / |Y|^2) with inputs and weight rounded."""
        weight = how.weight(self.weight)
        rounded = (weight if self.rounds is None else self.rounds(weight))[self.some]
        given = how.apply(self.rows) @ rounded.t()
        if how.shift is not None:
            given += self.judged @ how.shift
        if how.outliers is not None:
            given += self.rows[:, how.outliers] @ self.judged[:, how.outliers].t()
        return float(((given - self.wanted).square().sum() / self.norm).sqrt())

    def best(self, ranges: str = "best", smooth: bool = True, outliers: int = 32, shift: bool = True) -> Input:
        """The way with the least error for what it costs (`WORTH`). Raises StepError where every error is NaN or inf.

        ranges: a name in RANGES, or "best"; outliers: at most so many channels in float; shift: whether channels may be centred

        Shifts and alphas are compared on min-max grids, then numbers of outliers, then the rules.
        """
        names = tuple(RANGES) if ranges == "best" else (ranges,)
        alphas: tuple[float | None, ...] = (None, *ALPHAS) if smooth else (None,)
        centres: tuple[Centre, ...] = ("zero", "middle") if shift else ("zero",)
        most = min(outliers, len(self.low) // 4)
        found = self._first(names[0], ((alpha, 0, centre) for alpha in alphas for centre in centres))
        if shift:
            found = min(found, self.tried(found.alpha, 0, names[0], "mean"), key=Input.worth)
        if most:
            alpha = self._first(names[0], ((alpha, most, "zero") for alpha in alphas)).alpha
            counts = (*(count for count in COUNTS if count < most), most)
            some = self._first(names[0], ((alpha, count, centre) for count in counts for centre in centres))
            found = min(found, some, key=Input.worth)
        count = 0 if found.outliers is None else len(found.outliers)
        return min((found, *(self.tried(found.alpha, count, rule, found.centre) for rule in names[1:])), key=_by_error)

    def _first(self, rule: str, ways: Iterable[tuple[float | None, int, Centre]]) -> Input:
        """Of (alpha, number of outliers, centre) in order of cost, the first that comes CLOSE to the best."""
        tried = [self.tried(alpha, count, rule, centre) for alpha, count, centre in ways]
        worths = [worth for how in tried if math.isfinite(worth := how.worth())]
        if not worths:
            expected = f"a finite error of what rounding does in {self.name}"
            raise StepError(expected, "NaN or inf", "check the model and the texts, or skip this layer")
        return next(how for how in tried if how.worth() <= CLOSE * min(worths))


def _by_error(how: Input) -> float:
    return how.error
