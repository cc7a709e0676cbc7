"""What passes inside a model while it answers: hidden states, queries, keys and values, attention scores.

Taken by hooks on the modules that the family's row names. `output_attentions` would switch to a slower attention and gives
what comes out of the softmax.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

from flyweight.models.bundle import Bundle
from flyweight.models.family import Attention, Stack
from flyweight.models.surgery import blocks, hidden_states, layout, stacks

__all__ = ["Seen", "one_stack", "tap", "watch"]


@dataclass
class Seen:
    """Of the model's last forward pass, by number of the block.

    hidden: states after the block [batch, length, width]
    first:  as its only entry what the first block reads
    parts:  queries `q`, keys `k` and values `v`, each [batch, length, heads x head size]
    biases: the position bias that an attention added [1 or batch, heads, query, key], where there is one
    sizes:  dimensions of one head
    """

    hidden: dict[int, Tensor] = field(default_factory=dict)
    first: list[Tensor] = field(default_factory=list)
    parts: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    biases: dict[int, Tensor] = field(default_factory=dict)
    sizes: dict[int, int] = field(default_factory=dict)

    @property
    def entry(self) -> Tensor:
        """What the first block reads [batch, length, width]."""
        return self.first[-1]

    def states(self, layers: Sequence[int]) -> list[Tensor]:
        return [self.hidden[number] for number in layers]

    def vectors(self, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values of a block."""
        found = self.parts[layer]
        return found["q"], found["k"], found["v"]

    def scores(self, layer: int) -> Tensor:
        """q k^T / sqrt(head size) plus the position bias, [batch, heads, query, key]: what goes into the softmax but for
        the mask of padding."""
        query, key, _ = self.vectors(layer)
        size = self.sizes[layer]
        query, key = (x.view(*x.shape[:2], -1, size).transpose(1, 2) for x in (query, key))
        found: Tensor = query @ key.transpose(-1, -2) / size**0.5
        return found + self.biases[layer] if layer in self.biases else found


def one_stack(bundle: Bundle) -> tuple[Stack, nn.ModuleList]:
    """The row and the blocks of a model that has one stack."""
    ((name, modules),) = blocks(bundle.model, bundle.family).items()
    return stacks(bundle.model, bundle.family)[name], modules


@contextlib.contextmanager
def watch(
    bundle: Bundle, hidden: Sequence[int] = (), attention: Sequence[int] = (), embeddings: bool = False
) -> Iterator[Seen]:
    """Fill a Seen at every forward pass of a model with one stack of blocks; what is not asked for costs nothing.

    hidden, attention: numbers of the blocks whose states, and whose queries, keys, values and biases, are kept
    """
    seen, hooks = Seen(), list[Any]()
    if hidden or attention or embeddings:
        stack, modules = one_stack(bundle)
        hooks += [modules[n].register_forward_hook(partial(_after, seen, n)) for n in sorted(set(hidden))]
        if embeddings:
            hooks.append(modules[0].register_forward_pre_hook(partial(_before, seen), with_kwargs=True))
        for number in sorted(set(attention)):
            hooks += _on_attention(seen, number, modules[number], stack)
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def tap(bundle: Bundle, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """Hidden states after the given blocks of the model's one stack, by number, filled by its next forward pass."""
    with watch(bundle, hidden=layers) as seen:
        yield seen.hidden


def _after(seen: Seen, number: int, module: nn.Module, inputs: Any, output: Any) -> None:
    seen.hidden[number] = hidden_states(output)


def _before(seen: Seen, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    seen.first[:] = [args[0] if args else kwargs["hidden_states"]]


def _on_attention(seen: Seen, number: int, block: nn.Module, stack: Stack) -> list[Any]:
    attention = stack.attention[0]
    seen.sizes[number] = layout(block, attention).key
    seen.parts[number] = {}
    hooks = [
        block.get_submodule(getattr(attention, part)).register_forward_hook(_keeper(seen.parts[number], part))
        for part in ("q", "k", "v")
    ]
    if stack.bias is not None:
        hooks.append(_on_bias(seen, number, block, attention, stack.bias.argument))
    return hooks


def _keeper(found: dict[str, Tensor], part: str) -> Callable[..., None]:
    def keep(module: nn.Module, inputs: Any, output: Tensor) -> None:
        found[part] = output

    return keep


def _on_bias(seen: Seen, number: int, block: nn.Module, attention: Attention, name: str) -> Any:
    """Registered after the hook that takes a pruned block's own columns out, so that it is those that are seen."""
    module = block.get_submodule(attention.module)
    place = list(inspect.signature(module.forward).parameters).index(name)

    def keep(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        bias = kwargs.get(name, args[place] if place < len(args) else None)
        if bias is not None:
            seen.biases[number] = bias

    return module.register_forward_pre_hook(keep, with_kwargs=True)
