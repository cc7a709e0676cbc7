"""Where torch computes, and random numbers that leave the caller's alone."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flyweight.errors import SettingsError

__all__ = ["accelerator", "evaluating", "find_device", "get_rng", "kept_rng", "placed", "seeded", "set_rng", "weights"]


def find_device(name: str | None = None) -> torch.device:
    """The device called `name`, by default the fastest there is. Raises SettingsError when this machine lacks it."""
    here = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if name is None:
        return torch.device(next(kind for kind in ("cuda", "mps", "cpu") if here[kind]))
    try:
        device = torch.device(name)
    except RuntimeError:
        raise SettingsError("a device", f"'{name}'", f"known: {', '.join(here)}") from None
    if not here.get(device.type, False):
        raise SettingsError("a device of this machine", f"'{name}'", f"here: {', '.join(k for k in here if here[k])}")
    return device


@contextlib.contextmanager
def accelerator(device: torch.device) -> Iterator[Any]:
    """An `accelerate.Accelerator` whose global state is gone afterwards.

    Its state is a singleton: a second Accelerator of another device or precision in the same process would be refused.
    Mixed precision is off unless `accelerate launch` asks for it. An Accelerator that the caller already has is joined.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    ours = PartialState._shared_state == {}
    try:
        yield Accelerator(cpu=device.type == "cpu")
    finally:
        if ours:
            AcceleratorState._reset_state(reset_partial_state=True)
            GradientState._reset_state()


@contextlib.contextmanager
def placed(model: nn.Module, device: torch.device) -> Iterator[None]:
    """The model on `device` for a while, then back where it was."""
    origin = next(model.parameters()).device
    model.to(device)
    try:
        yield
    finally:
        model.to(origin)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every module's own mode is put back."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def get_rng() -> dict[str, Any]:
    """The state of every generator (torch, CUDA, python, numpy) as tensors and plain values."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": (version, list(words), gauss),
        "numpy": (name, [int(key) for key in keys], int(position), int(has_gauss), float(cached)),
    }


def set_rng(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.asarray(keys, np.uint32), *rest))


@contextlib.contextmanager
def kept_rng() -> Iterator[None]:
    """Whatever happens inside, the generators go on afterwards as if it had not."""
    state = get_rng()
    try:
        yield
    finally:
        set_rng(state)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Every generator seeded with `seed`; afterwards as before."""
    with kept_rng():
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)  # CUDA's generators too
        yield


def weights(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, each once however often the module uses it."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}
