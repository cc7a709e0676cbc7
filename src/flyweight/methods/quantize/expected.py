"""What a quantize step will take, before it runs: seconds and bytes, from the sizes of the linears and a timed forward pass.

Products are counted in floating point operations and take the speed that the timed forward pass has; passes over all weights
(rounding, comparing) take ELEMENT seconds a weight. Orders of magnitude, held against real runs within a factor of three.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, NamedTuple

from flyweight.methods.quantize.smooth import OUTPUTS, ROWS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flyweight.settings import Accept, QuantizeSettings

__all__ = ["Expected", "Sizes", "expected"]

ELEMENT = 1.5e-8  # seconds a weight to round it and to compare, everything included
COLUMN = 2.5e-4  # seconds that GPTQ takes for a column beside its products
ITERATION = 8e-3  # seconds that a step of reconstruction takes for a linear beside its products
STREAMS = 2.0  # forward passes that looking at all sites of all blocks takes: each runs its block as far as the site
WALK = 1.2  # forward passes of a walk itself: the changed block, the way in
WANTED = 1.0  # forward passes of its float block, where that is asked for
POINTS, SHARES = 40, 11  # of AWQ: factors tried for a site, cuts tried for a linear
ROUNDS = 100  # of HQQ
TRIED = 45  # of the search for static grids
KEPT = 8192  # tokens that it keeps
LOOKED_AT = 64  # texts that errors by bits and by site are taken on
STEP_TEXTS, LOOKS = 16, 10  # of reconstruction
CANDIDATES, RANKED = 16, 512  # of the gate
SINGLE = 3.0  # what a text alone takes beside one in a batch


class Sizes(NamedTuple):
    """forward: seconds an example; training: with gradients and update; length: its tokens
    linears: (out, in) of the linears in the blocks; blocks: their number; weights: all that is quantized, tables included
    model: all weights; texts: to calibrate on; train, validation: examples
    """

    forward: float
    training: float
    length: float
    linears: Sequence[tuple[int, int]]
    blocks: int
    weights: int
    model: int
    texts: int
    train: int
    validation: int

    @property
    def inside(self) -> int:
        return sum(rows * width for rows, width in self.linears)

    @property
    def speed(self) -> float:
        """Floating point operations a second of the timed pass."""
        return 2 * self.inside * self.length / max(self.forward, 1e-9)

    @property
    def hidden(self) -> int:
        return min((width for _, width in self.linears), default=1)


class Expected(NamedTuple):
    """seconds of the step; bytes that it takes at most, beside the model's own"""

    seconds: float
    bytes: int


def expected(settings: QuantizeSettings, rule: Accept, sizes: Sizes) -> Expected:
    """Of a whole quantize step: tables and heads, bits by budget, the method, static grids, biases, the gate."""
    seconds = 0.5 + 2 * ELEMENT * sizes.weights
    memory = 5 * sizes.weights + 24 * max((rows * width for rows, width in sizes.linears), default=0)
    seconds += method_seconds(settings, sizes)
    passes = sizes.texts * sizes.forward
    if settings.mixed:
        seconds += by_layer(sizes, 4 * len(sizes.linears))
    if settings.activations == "static" and settings.method != "train":
        seconds += (WALK + STREAMS) * passes + search_seconds(sizes)
    if settings.bias_correction:
        seconds += (WALK + STREAMS + 2) * passes
    if settings.calibrated:
        memory += int(3 * 4 * sizes.texts * sizes.length * sizes.hidden)
        widest = max((width for _, width in sizes.linears), default=0)
        memory += 4 * KEPT * widest * (settings.activations == "static") + 40 * widest**2
    if settings.method == "reconstruct":
        memory += int(STEP_TEXTS * sizes.length * 60 * sum(sum(one) for one in sizes.linears) / max(sizes.blocks, 1))
        memory += 40 * sizes.inside // max(sizes.blocks, 1)
    if settings.method == "train":
        memory += 20 * sizes.model
    if settings.gate != "off" and (rule.quality is not None or rule.max_drop is not None):
        seconds += gate_seconds(settings, sizes)
        memory += 4 * sizes.model
    return Expected(seconds, memory)


def method_seconds(settings: QuantizeSettings, sizes: Sizes) -> float:
    """Of the linears of the blocks."""
    passes, inside = sizes.texts * sizes.forward, sizes.inside
    looked = (WALK + STREAMS) * passes
    if settings.activations == "static" and settings.method == "gptq":
        looked = 0  # on the walk that finds the grids
    tokens = sizes.texts * sizes.length
    sites = {width: 0 for _, width in sizes.linears}
    grams = 2 * tokens * sum(width**2 for width in sites) * sizes.blocks * 1.5 / sizes.speed
    gptq = sum(3 * width**3 + rows * width**2 for rows, width in sizes.linears) / sizes.speed
    gptq += COLUMN * sum(width for _, width in sizes.linears) + 4 * ELEMENT * inside
    squares = sum(2 * rows * width**2 for rows, width in sizes.linears) / sizes.speed
    if settings.method == "gptq":
        return looked + grams + gptq
    if settings.method == "awq":
        return looked + grams + (POINTS + SHARES) * (squares + 2 * ELEMENT * inside)
    if settings.method == "hqq":
        return ROUNDS * ELEMENT * inside
    if settings.method == "reconstruct":
        step = STEP_TEXTS * 4 * sizes.forward + 3 * ELEMENT * inside + ITERATION * len(sizes.linears)
        return looked + grams + gptq + (WANTED + LOOKS) * passes + settings.iterations * step
    if settings.method == "train":
        updates = math.ceil(sizes.train / settings.batch_size) * settings.epochs
        updates = min(updates, settings.max_steps or updates)
        seen = updates * settings.batch_size * 1.3 * sizes.training + updates * 4 * ELEMENT * sizes.weights
        checks = settings.epochs * settings.evaluations_per_epoch * sizes.validation * sizes.forward
        return seen + sizes.train * sizes.forward + checks
    return 2 * ELEMENT * inside


def search_seconds(sizes: Sizes) -> float:
    """Of static grids: every way tried takes products of ROWS tokens and OUTPUTS outputs, and passes over tokens and weights."""
    tokens = min(ROWS, sizes.texts * sizes.length)
    products = 2 * tokens * sum(min(rows, OUTPUTS) * width for rows, width in sizes.linears) / sizes.speed
    kept = min(KEPT, sizes.texts * sizes.length) * sum({width for _, width in sizes.linears}) * 1.3 * sizes.blocks
    return TRIED * (products + ELEMENT * (sizes.inside + kept / 4))


def by_layer(sizes: Sizes, tries: int) -> float:
    """Of the block outputs that `tries` roundings leave, each in one of the blocks."""
    texts = min(LOOKED_AT, sizes.texts or sizes.validation)
    return texts * sizes.forward * (
        WALK + WANTED + tries / max(sizes.blocks, 1)
    ) + 3 * ELEMENT * sizes.inside * tries / max(len(sizes.linears), 1)


def gate_seconds(settings: QuantizeSettings, sizes: Sizes) -> float:
    """The reference's answers and the result's; below 8 bits, where the rule may well not hold at once, a search."""
    once = sizes.validation * sizes.forward * (SINGLE if settings.activations == "dynamic" else 1.2)
    seconds = 2 * once
    if settings.bits < 8 and settings.method != "train":
        sites = max(1, 4 * sizes.blocks)
        few = min(RANKED, sizes.validation) * sizes.forward
        seconds += by_layer(sizes, sites) + (1 + min(CANDIDATES, sites)) * few
        seconds += (2 * math.log2(sites) + sites / 4 * 2) * once
    return seconds
