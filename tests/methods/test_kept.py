"""What was kept of a block is taken up again only where nothing has changed that it came from."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flyweight.calibration import walk
from flyweight.methods.quantize import work as package
from flyweight.methods.quantize.kept import Kept
from flyweight.methods.quantize.work import Work, targets_of
from flyweight.settings import QuantizeSettings
from solver_cases import context, opened, texts

Tiny = Callable[..., Path]
EVERY = {f"{stack}.block.{number}" for stack in ("encoder", "decoder") for number in range(3)}
BASE: dict[str, Any] = {"bits": 8, "activations": "dynamic", "embeddings": None}


def keys(tiny: Tiny, tmp_path: Path, change: str, **settings: Any) -> dict[str, str]:
    """{block: the name of what would be kept of it}, of T5, whose decoder reads what its encoder says."""
    bundle = opened(tiny, "t5")
    asked = QuantizeSettings(**{**BASE, **settings})
    here = context(tmp_path, texts(bundle))
    if change == "the encoder":
        with torch.no_grad():
            bundle.model.get_submodule("encoder.block.0.layer.1.DenseReluDense.wo").weight.mul_(-1.3)
    if change == "sparse":
        bundle.sparse["decoder.block.0.layer.0.SelfAttention.q.weight"] = "unstructured"
    targets = targets_of(bundle, asked)
    if change == "a grid":
        name = next(name for name in targets if name.startswith("decoder.block.0."))
        targets[name] = targets[name]._replace(grid=targets[name].grid._replace(bits=4))
    work = Work(bundle, asked, here, targets)
    found = {}
    for block in walk(bundle, texts(bundle), wanted=True):
        if change == "what is wanted":
            block.float_outputs = [-one for one in block.wanted]
        found[block.name] = Kept(work, "stage", block).key
    return found


@pytest.mark.parametrize(
    ("change", "blocks"),
    [
        ("the encoder", EVERY),
        ("sparse", {"decoder.block.0"}),
        ("a grid", {"decoder.block.0"}),
        ("what is wanted", EVERY),
        ("nothing", set()),
    ],
)
def test_what_it_came_from_is_in_its_name(tiny: Tiny, tmp_path: Path, change: str, blocks: set[str]) -> None:
    before, after = keys(tiny, tmp_path, "nothing"), keys(tiny, tmp_path, change)
    assert {name for name, key in before.items() if after[name] != key} == blocks


def test_bits_that_a_cpu_takes_are_in_its_name(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(package, "saturates", lambda: False)
    before = keys(tiny, tmp_path, "nothing", bits=4)
    monkeypatch.setattr(package, "saturates", lambda: True)
    after = keys(tiny, tmp_path, "nothing", bits=4)
    assert all(after[name] != key for name, key in before.items())
