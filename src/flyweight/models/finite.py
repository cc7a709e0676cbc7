"""Whether a model's activations are numbers, and where they stop to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from flyweight.errors import ModelError
from flyweight.models import surgery

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from flyweight.models.bundle import Bundle

__all__ = ["check_finite"]


def check_finite(bundle: Bundle, batches: Iterable[Mapping[str, NDArray[Any]]]) -> None:
    """Run the model. Raises ModelError naming the first linear or block, in order of execution, that answers NaN or inf."""
    watched = {name: m for name, m in bundle.model.named_modules() if isinstance(m, surgery.LINEARS)}
    ids = {id(block) for stack in surgery.blocks(bundle.model, bundle.family).values() for block in stack}
    watched |= {name: m for name, m in bundle.model.named_modules() if id(m) in ids}
    training = bundle.model.training
    hooks = [module.register_forward_hook(partial(_look, name)) for name, module in watched.items()]
    bundle.model.train(False)
    try:
        with torch.no_grad():
            for arrays in batches:
                known = {name: arrays[name] for name in bundle.family.inputs if name in arrays}
                bundle.model(**{name: torch.from_numpy(array).to(bundle.device) for name, array in known.items()})
    finally:
        bundle.model.train(training)
        for hook in hooks:
            hook.remove()


def _look(name: str, module: Any, given: Any, output: Any) -> None:
    first = output[0] if isinstance(output, tuple) else output
    if isinstance(first, torch.Tensor) and not bool(torch.isfinite(first).all()):
        raise ModelError(
            f"finite activations after {name}", "NaN or inf", "start from a model whose training did not diverge"
        )
