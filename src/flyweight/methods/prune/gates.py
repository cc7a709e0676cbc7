"""Gates that are zero with a probability that is learned: the hard concrete distribution (Louizos et al. 2018, section 2)."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.methods.prune.scores import Group, readers
from flyweight.models import stream, surgery
from flyweight.models.bundle import Bundle

__all__ = [
    "BETA",
    "GAMMA",
    "WIDTH",
    "ZETA",
    "Gates",
    "gated",
    "is_layers",
    "is_part",
    "likely",
    "open_share",
    "part_of",
    "sample",
]

BETA, GAMMA, ZETA = 2 / 3, -0.1, 1.1
"""Temperature, and the ends that the interval is stretched to before it is cut to [0, 1]."""
START = 3.0  # log alpha at the beginning: open with .99
EDGE = 1e-6
WIDTH = Group("width")
"""The gates of the residual stream, one a dimension, which all layers share (z_hidn)."""
FEED_FORWARD = -1  # stands where the number of an attention would


def part_of(group: Group) -> Group:
    """The gates, one a block, of whether the part that these heads or neurons make is there at all (z_MHA, z_FFN)."""
    return Group(group.stack, None, FEED_FORWARD if group.attention is None else group.attention)


def is_part(group: Group) -> bool:
    return group.block is None and group.attention is not None


def is_layers(group: Group) -> bool:
    return group.block is None and group.attention is None and group != WIDTH


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """A gate each, [units] in [0, 1], zero or one with some probability (eq. 10-12). uniform: [units] in (0, 1)."""
    noise = uniform.clamp(EDGE, 1 - EDGE)
    soft = torch.sigmoid((noise.log() - (1 - noise).log() + log_alpha) / BETA)
    return (soft * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def open_share(log_alpha: Tensor) -> Tensor:
    """Probability that a gate is not zero, [units] (eq. 12)."""
    return torch.sigmoid(log_alpha - BETA * math.log(-GAMMA / ZETA))


def likely(log_alpha: Tensor) -> Tensor:
    """The gate without chance, [units] (eq. 13)."""
    return (torch.sigmoid(log_alpha) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


class Gates(nn.Module):
    """One gate a head, neuron and layer of a model, one a part of a block, and one a dimension of the residual stream.

    sizes: {group: units}, as `scores.groups` tells them, of parts (`part_of`) {group: blocks}, of WIDTH dimensions. Drawn anew in
    every training pass; without chance in eval mode. Once `fix` was called they stay what it was given.
    """

    def __init__(self, sizes: Mapping[Group, int]) -> None:
        super().__init__()
        self.groups = tuple(sizes)
        self.log_alpha = nn.ParameterList(torch.full((size,), START) for size in sizes.values())
        self.fixed: dict[Group, Tensor] | None = None

    def alpha(self, group: Group) -> Tensor:
        found: Tensor = self.log_alpha[self.groups.index(group)]
        return found

    def open(self) -> dict[Group, Tensor]:
        """Probabilities, differentiable."""
        return {group: open_share(self.alpha(group)) for group in self.groups}

    def draw(self, chance: bool) -> dict[Group, Tensor]:
        """A value for every gate."""
        if self.fixed is not None:
            device = self.log_alpha[0].device
            return {group: value.to(device) for group, value in self.fixed.items()}
        if not chance:
            return {group: likely(self.alpha(group)) for group in self.groups}
        return {group: sample(self.alpha(group), torch.rand_like(self.alpha(group))) for group in self.groups}

    def fix(self, values: Mapping[Group, Tensor]) -> None:
        self.fixed = {group: value.detach().clone() for group, value in values.items()}


@contextlib.contextmanager
def gated(bundle: Bundle, gates: Gates) -> Iterator[None]:
    """While inside, every pass of the model multiplies its units by gates, drawn once a pass.

    A head's or neuron's gate multiplies what it gives to the linear that reads it, and so does that of its part: at zero the
    bias of that linear is left. A layer's goes between what its block answers and what it was given, x + z (block(x) - x):
    at zero the layer is not there. Dimensions of the stream are taken out where norms give it: these see the open ones only.
    """
    drawn: dict[Group, Tensor] = {}
    hooks = [bundle.model.register_forward_pre_hook(_drawing(bundle.model, gates, drawn))]
    lists = surgery.blocks(bundle.model, bundle.family)
    for group in gates.groups:
        if is_part(group):
            continue
        if group == WIDTH:
            hooks += _on_stream(bundle, drawn)
            continue
        if group.block is None:
            for number, block in enumerate(lists[group.stack]):
                hooks.append(block.register_forward_hook(_passing(drawn, group, number), with_kwargs=True))
            continue
        for reader, size in readers(bundle, group):
            hooks.append(reader.register_forward_pre_hook(_scaling(drawn, group, size)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _drawing(model: nn.Module, gates: Gates, drawn: dict[Group, Tensor]) -> Callable[..., None]:
    def draw(*_: Any) -> None:
        drawn.clear()
        drawn.update(gates.draw(model.training))

    return draw


def _scaling(drawn: Mapping[Group, Tensor], group: Group, size: int) -> Callable[..., Any]:
    def scale(_: nn.Module, given: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        gate = drawn[group].repeat_interleave(size)
        if (part := part_of(group)) in drawn:
            gate = gate * drawn[part][group.block]
        return (given[0] * gate.to(given[0].dtype), *given[1:])

    return scale


def _passing(drawn: Mapping[Group, Tensor], group: Group, number: int) -> Callable[..., Any]:
    def mix(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        before = given[0] if given else named["hidden_states"]
        after = surgery.hidden_states(output)
        mixed = torch.lerp(before, after, drawn[group][number].to(after.dtype))
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    return mix


def _on_stream(bundle: Bundle, drawn: Mapping[Group, Tensor]) -> list[Any]:
    """Wherever the stream is read a norm gave it, or at the entry of some models a projection."""

    def narrow(norm: nn.LayerNorm, given: tuple[Tensor, ...], _: Tensor) -> Tensor:
        gate = drawn[WIDTH].to(given[0].dtype)
        there = (gate != 0).to(given[0].dtype)
        count = there.sum().clamp(min=1)
        centred = (given[0] - (given[0] * there).sum(-1, keepdim=True) / count) * there
        size = (centred.square().sum(-1, keepdim=True) / count + norm.eps).rsqrt()
        return (centred * size * norm.weight + norm.bias) * gate

    def enter(_: nn.Module, given: Any, output: Tensor) -> Tensor:
        return output * drawn[WIDTH].to(output.dtype)

    hooks: list[Any] = [one.register_forward_hook(narrow) for one in stream.norms(bundle.model, bundle.family)]
    entry = stream.projection(bundle.model, bundle.family)
    return hooks if entry is None else [*hooks, entry.register_forward_hook(enter)]
