"""A student of fewer hidden channels out of its teacher: the stream in a basis of its own (see `reduce.py`).

Everything that writes the stream (tables, o, down) is projected, everything that reads it (q, k, v, up, head) reads it through
the basis, with a least-squares guess of what lies outside. Heads keep their number and lose dimensions: queries and keys by the
truncated SVD of their product, values and output weights of theirs. Norms are fitted channel by channel. All of it needs the
moments of what passes on some texts and no gradient. Neurons stay as they are: `prune` cuts them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from copy import deepcopy
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from flyweight.context import Context
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.methods.distill.reduce import (
    Moments,
    Reader,
    basis,
    fit_norm,
    kept_units,
    low_rank_scores,
    low_rank_values,
    reader,
)
from flyweight.models import stream
from flyweight.models.build import empty_model
from flyweight.models.bundle import Bundle
from flyweight.models.surgery import KEPT_WIDTH, layout, mlp_linears, reshape, shapes, weight_2d
from flyweight.training.device import find_device, placed
from flyweight.training.objective import answer
from flyweight.training.predict import outputs
from flyweight.training.watch import one_stack

__all__ = ["check_narrower", "narrowed"]

TEXTS = 256
"""Texts that moments are taken on."""


def check_narrower(bundle: Bundle, width: int) -> None:
    """Raises StepError for a width that the model cannot be cut to."""
    stream.check(bundle.model, bundle.family, "width")
    if hasattr(bundle.model.config, KEPT_WIDTH):
        raise StepError("a model as wide as it was built for width", "one whose width was pruned", "prune afterwards")
    gone = [n for n, one in enumerate(shapes(bundle.model, bundle.family)["encoder"]) if not one.heads[0]]
    if gone:
        raise StepError("an attention in every block for width", f"none in block {gone[0]}", "prune after distillation")
    if bundle.sparse:
        raise StepError("dense weights for width", f"{len(bundle.sparse)} pruned ones", "prune after distillation")
    now = bundle.model.config.hidden_size
    heads = getattr(bundle.model.config, bundle.family.stacks[0].heads_key)
    if width > now:
        raise StepError(f"a width of at most the model's {now}", f"{width}", "lower it or leave it out")
    if width % heads or width < 2:
        fits = max(width // heads, 1) * heads
        raise StepError(f"a width that is a multiple of the model's {heads} heads", f"{width}", f"set it to {fits}")
    if stream.projection(bundle.model, bundle.family) is not None and width == bundle.model.config.embedding_size:
        raise StepError(
            f"a width other than that of the tables, {width}, which the model projects from", f"{width}", "change it"
        )


def narrowed(bundle: Bundle, width: int, texts: Examples, context: Context, auto: str) -> tuple[Bundle, Tensor]:
    """A new model of hidden width `width` that answers nearly as the bundle's does, and the basis [old width, width].

    texts: what it will read; the first 256 are looked at. auto: the task's transformers class. The bundle stays as it is.
    At the full width the answers are the same. Raises StepError (see `check_narrower`).
    """
    check_narrower(bundle, width)
    some = texts.take(range(min(len(texts), TEXTS)))
    with placed(bundle.model, find_device(context.device)):
        places = _moments(bundle, some, context)
        q = basis([places[name] for name in _stream_places(bundle)], width)
        norms = _norms(bundle, some, q, context)
    model = _shell(bundle, width, auto)
    values = _values(bundle, model, q, places, norms)
    state = model.state_dict()
    old = bundle.model.state_dict()
    for name, target in state.items():
        found = values.get(name, old.get(name))
        if found is None or found.shape != target.shape:
            raise StepError("a model whose width can be cut", f"'{name}' of {bundle.family.model_type}", "leave it out")
        target.copy_(found)
    return replace(bundle, model=model, quantized={}), q.float()


def _shell(bundle: Bundle, width: int, auto: str) -> Any:
    """A model of the new width with the blocks of the old one, its weights not filled."""
    config = deepcopy(bundle.model.config)
    if getattr(config, "embedding_size", None) == config.hidden_size:
        config.embedding_size = width
    config.hidden_size = width
    model = empty_model(config, auto)
    reshape(model, bundle.family, shapes(bundle.model, bundle.family))
    return model


# where things are


def _names(bundle: Bundle) -> dict[nn.Module, str]:
    return {module: name for name, module in bundle.model.named_modules()}


def _blocks(bundle: Bundle) -> list[tuple[dict[str, nn.Module], list[nn.Module], nn.Module]]:
    """(q, k, v, o), the linears that make neurons, and the one that reads them, block by block."""
    stack, modules = one_stack(bundle)
    found = []
    for block in modules:
        parts = {part: block.get_submodule(getattr(stack.attention[0], part)) for part in ("q", "k", "v", "o")}
        found.append((parts, *mlp_linears(block, stack)))
    return found


def _stream_places(bundle: Bundle) -> list[nn.Module]:
    """One module at each place where the stream is read, whose input is looked at."""
    found = [module for parts, ups, _ in _blocks(bundle) for module in (parts["q"], ups[0])]
    return [*found, *stream.head(bundle.model, bundle.family)[:1]]


# what passes


@dataclass
class _Sums:
    """Of rows [n, width]."""

    count: int = 0
    first: Any = 0.0
    second: Any = 0.0

    def add(self, rows: Tensor) -> None:
        rows = rows.cpu().double()  # means may be large against what varies
        self.count += len(rows)
        self.first = self.first + rows.sum(0)
        self.second = self.second + rows.T @ rows

    def moments(self) -> Moments:
        mean = self.first / self.count
        return Moments(mean, self.second / self.count - torch.outer(mean, mean))


@dataclass
class _Fit:
    """Sums of what a norm of the narrower stream would make of it, and of what it should give, channel by channel."""

    count: int = 0
    sums: list[Any] = field(default_factory=lambda: [0.0] * 4)

    def add(self, given: Tensor, wanted: Tensor) -> None:
        given, wanted = given.cpu().double(), wanted.cpu().double()
        self.count += len(given)
        for number, rows in enumerate((given, given.square(), wanted, given * wanted)):
            self.sums[number] = self.sums[number] + rows.sum(0)

    def solve(self) -> tuple[Tensor, Tensor]:
        given, squares, wanted, both = (one / self.count for one in self.sums)
        return fit_norm(Moments(given, squares - given.square()), wanted, both - given * wanted)


def _moments(bundle: Bundle, texts: Examples, context: Context) -> dict[nn.Module, Moments]:
    """Of what is read at every place of the stream, and of the units that the head's last linear reads."""
    sums = {module: _Sums() for module in (*_stream_places(bundle), *stream.head(bundle.model, bundle.family)[1:])}

    def look(real: Tensor, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        sums[module].add(_tokens(inputs[0], real))

    _pass(bundle, texts, list(sums), look, context, "looking at hidden states")
    return {module: one.moments() for module, one in sums.items()}


def _norms(bundle: Bundle, texts: Examples, q: Tensor, context: Context) -> dict[nn.Module, tuple[Tensor, Tensor]]:
    """Scale and shift of every norm of the stream in the basis q."""
    norms = [m for m in bundle.model.modules() if isinstance(m, nn.LayerNorm) and m.normalized_shape == (len(q),)]
    fits: dict[nn.Module, _Fit] = {norm: _Fit() for norm in norms}
    there = q.float().to(bundle.device)

    def look(real: Tensor, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        narrow = nn.functional.layer_norm(
            _tokens(inputs[0], real) @ there, there.shape[1:], eps=float(getattr(module, "eps", 1e-12))
        )
        fits[module].add(narrow, _tokens(output, real) @ there)

    _pass(bundle, texts, list(fits), look, context, "fitting norms")
    return {norm: fit.solve() for norm, fit in fits.items()}


def _tokens(value: Tensor, real: Tensor) -> Tensor:
    """[rows, width] of real tokens, or of the texts where each has one vector."""
    return value[real] if value.ndim == 3 and value.shape[:2] == real.shape else value.reshape(-1, value.shape[-1])


def _pass(
    bundle: Bundle, texts: Examples, modules: list[nn.Module], look: Callable[..., None], context: Context, what: str
) -> None:
    """The model reads the texts; `look` sees every module's inputs and output, and which tokens are real."""

    def forward(batch: dict[str, Tensor]) -> Tensor:
        with ExitStack() as stack:
            for module in modules:
                hook = module.register_forward_hook(partial(look, batch["attention_mask"].bool()))
                stack.callback(hook.remove)
            return answer(bundle, batch)

    outputs(bundle.model, forward, texts, pad=bundle.encoder.pad, progress=context.progress, what=what)


# the weights


def _values(
    bundle: Bundle,
    model: Any,
    q: Tensor,
    places: dict[nn.Module, Moments],
    norms: dict[nn.Module, tuple[Tensor, Tensor]],
) -> dict[str, Tensor]:
    """{parameter name: value} of everything that the width changes."""
    names = _names(bundle)
    found: dict[str, Tensor] = {}

    def put(module: nn.Module, weight: Tensor, bias: Tensor | None = None) -> None:
        found[f"{names[module]}.weight"] = weight
        if bias is not None:
            found[f"{names[module]}.bias"] = bias

    for table in stream.tables(bundle.model, bundle.family):
        put(table, table.weight.detach().cpu().double() @ q)
    if (projection := stream.projection(bundle.model, bundle.family)) is not None:
        put(projection, *_written(projection, q))
    for norm, (scale, shift) in norms.items():
        put(norm, scale, shift)
    sizes = [
        [layout(b, s.attention[0]).key for b in m] for s, m in map(one_stack, (bundle, replace(bundle, model=model)))
    ]
    for (parts, ups, down), old, new in zip(_blocks(bundle), *sizes, strict=True):
        for part, (weight, bias) in _attention(parts, q, places[parts["q"]], old, new).items():
            put(parts[part], weight, bias)
        for up in ups:
            put(up, *_read(up, reader(q, places[ups[0]])))
        put(down, *_written(down, q))
    _put_head(bundle, q, places, put)
    return found


def _attention(
    parts: dict[str, nn.Module], q: Tensor, place: Moments, old: int, new: int
) -> dict[str, tuple[Tensor, Tensor]]:
    """Weight and bias of q, k, v and o with heads of `new` dimensions instead of `old`.

    Shares of attention sum to 1, so that what a head gives on average goes into the bias of o and values need none.
    """
    through = reader(q, place)
    mean, covariance = q.T @ place.mean, q.T @ place.covariance @ q
    (wq, bq), (wk, bk), (wv, bv) = (_read(parts[part], through) for part in ("q", "k", "v"))
    wo, bias = _written(parts["o"], q)
    query, key = torch.cat([wq, bq[:, None]], 1), torch.cat([wk, bk[:, None]], 1)
    queries, keys, values, outs = list[Tensor](), list[Tensor](), list[Tensor](), list[Tensor]()
    for start in range(0, len(wq), old):
        rows = slice(start, start + old)
        one, other = low_rank_scores(query[rows], key[rows], Moments(mean, covariance), new)
        value, out = low_rank_values(wv[rows], wo[:, rows], covariance, new)
        bias = bias + wo[:, rows] @ (bv[rows] + wv[rows] @ mean) - out @ (value @ mean)
        for found, part in ((queries, one), (keys, other), (values, value), (outs, out)):
            found.append(part)
    query, key, value = torch.cat(queries), torch.cat(keys), torch.cat(values)
    return {
        "q": (query[:, :-1], query[:, -1]),
        "k": (key[:, :-1], key[:, -1]),
        "v": (value, torch.zeros(len(value), dtype=value.dtype)),
        "o": (torch.cat(outs, 1), bias),
    }


def _put_head(bundle: Bundle, q: Tensor, places: dict[nn.Module, Moments], put: Callable[..., None]) -> None:
    """The head reads the stream through the basis; where it makes units first, the N that matter most stay."""
    first, *rest = stream.head(bundle.model, bundle.family)
    weight, bias = _read(first, reader(q, places[first]))
    if not rest:
        put(first, weight, bias)
        return
    (last,) = rest
    keep, *read = kept_units(*_weights(last), places[last], q.shape[1])
    put(first, weight[keep], bias[keep])
    put(last, *read)


def _weights(linear: nn.Module) -> tuple[Tensor, Tensor]:
    """weight [out, in] and bias [out], zero where there is none, in float64."""
    weight = weight_2d(linear).detach().cpu().double()
    bias = getattr(linear, "bias", None)
    return weight, torch.zeros(len(weight), dtype=torch.float64) if bias is None else bias.detach().cpu().double()


def _read(linear: nn.Module, through: Reader) -> tuple[Tensor, Tensor]:
    weight, bias = _weights(linear)
    return weight @ through.gain, bias + weight @ through.shift


def _written(linear: nn.Module, q: Tensor) -> tuple[Tensor, Tensor]:
    weight, bias = _weights(linear)
    return q.T @ weight, q.T @ bias
