"""Bits of every layer: the knapsack against brute force, costs against what is stored, errors against whole blocks."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers.pytorch_utils import Conv1D

import tiny as tiny_models
from flyweight.calibration import Block
from flyweight.context import Context, NoProgress
from flyweight.errors import StepError
from flyweight.methods.quantize import mixed, quantize, smooth
from flyweight.methods.quantize.grid import quantize_weight
from flyweight.methods.quantize.mixed import (
    RESERVED,
    Choice,
    account,
    allocate,
    choose_bits,
    cost,
    layer_errors,
    outlier_bits,
    reserve,
    widths,
)
from flyweight.methods.quantize.sensitivity import moved
from flyweight.methods.quantize.work import Work, stored_bits, targets_of
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.models.storage import save
from flyweight.settings import QuantizeSettings
from flyweight.tasks import task_named
from flyweight.training import predict

TASK = task_named("embedding")
BITS = (2, 3, 4, 8)
Table = Mapping[str, Sequence[Choice]]


def brute(table: Table, budget: int) -> float:
    """The least error among all mixes that fit, by trying every one."""
    mixes = itertools.product(*table.values())
    return min(sum(c.error for c in mix) for mix in mixes if sum(c.cost_bits for c in mix) <= budget)


def told(table: Table, chosen: Mapping[str, int]) -> tuple[int, float]:
    picked = [next(c for c in table[layer] if c.bits == bits) for layer, bits in chosen.items()]
    return sum(c.cost_bits for c in picked), sum(c.error for c in picked)


def test_by_hand() -> None:
    table = {
        "a": [Choice(2, 20, 9.0), Choice(4, 40, 1.0)],
        "b": [Choice(2, 20, 8.0), Choice(4, 40, 3.0)],
        "c": [Choice(2, 2, 5.0), Choice(4, 4, 4.0)],
    }
    assert allocate(table, 42) == {"a": 2, "b": 2, "c": 2}
    assert allocate(table, 61) == {"a": 2, "b": 2, "c": 4}
    assert allocate(table, 62) == {"a": 4, "b": 2, "c": 2}
    assert allocate(table, 64) == {"a": 4, "b": 2, "c": 4}
    assert allocate(table, 83) == {"a": 4, "b": 4, "c": 2}
    assert allocate(table, 10**9) == {"a": 4, "b": 4, "c": 4}
    with pytest.raises(ValueError, match="41 bits are 1 fewer than the cheapest choices take"):
        allocate(table, 41)


@pytest.mark.parametrize("seed", range(40))
def test_random_tables_against_brute_force(seed: int) -> None:
    """Sizes of every kind; errors that need not fall with the bits, so that some choices are dominated."""
    draw = random.Random(seed)
    table = {}
    for number in range(draw.randint(1, 6)):
        size, scales, error = draw.choice([1, 7, 64, 384, 1000]), draw.randint(0, 50), draw.uniform(0.5, 3)
        table[f"l{number}"] = [
            Choice(bits, size * bits + scales, error * draw.uniform(0.3, 1.7) * 4.0**-bits) for bits in BITS
        ]
    least, most = (sum(f(c.cost_bits for c in options) for options in table.values()) for f in (min, max))
    for budget in {least, most, *(draw.randint(least, most) for _ in range(6))}:
        used, error = told(table, allocate(table, budget))
        assert used <= budget
        assert error == pytest.approx(brute(table, budget), rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_a_coarse_table_never_breaks_the_budget(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Costs rounded up to 60 steps: what comes out fits, and no mix that is a step a layer cheaper is better."""
    monkeypatch.setattr(mixed, "CELLS", 60)
    draw = random.Random(seed)
    table = {
        f"l{n}": [Choice(bits, (size := draw.randint(1000, 9999)) * bits + size % 7, draw.random() * 4.0**-bits) for bits in BITS]
        for n in range(5)
    }  # fmt: skip
    least, most = (sum(f(c.cost_bits for c in options) for options in table.values()) for f in (min, max))
    for budget in (least, (least + most) // 2, (3 * least + most) // 4):
        used, error = told(table, allocate(table, budget))
        assert used <= budget
        step = -(-(budget - least) // 60)
        tighter = max(least, budget - step * len(table))
        assert error <= brute(table, tighter) + 1e-15


def opened(tiny: Callable[..., Path], family: str = "bert") -> Bundle:
    return load(tiny(family), TASK)


def context(bundle: Bundle, tmp_path: Path, **changes: Any) -> Context:
    def none(*arguments: Any) -> Bundle:
        raise AssertionError("no other model is needed")

    texts = bundle.encoder.examples(tiny_models.SENTENCES)
    return replace(Context(task=TASK, seed=0, work=tmp_path, reference=none, load=none, calibration=texts), **changes)


def begun(bundle: Bundle, tmp_path: Path, **settings: Any) -> Work:
    chosen = QuantizeSettings(**settings)
    return Work(bundle, chosen, context(bundle, tmp_path), targets_of(bundle, chosen))


@pytest.mark.parametrize("scheme", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group"])
def test_costs_are_what_is_stored(tiny: Any, tmp_path: Path, scheme: str, granularity: str) -> None:
    settings: dict[str, Any] = {"scheme": scheme, "granularity": granularity, "group_size": 16, "activations": "none"}
    work = begun(opened(tiny), tmp_path, **settings)
    for target in work.of("block"):
        for bits in BITS:
            codes = quantize_weight(work.weight(target), target.grid._replace(bits=bits))
            assert cost(work, target, bits) == stored_bits({"one": codes})


def test_channel_scales_count(tiny: Any, tmp_path: Path) -> None:
    plain = begun(opened(tiny), tmp_path, method="nearest", activations="none")
    awq = begun(opened(tiny), tmp_path, method="awq", activations="none")
    for a, b in zip(plain.of("block"), awq.of("block"), strict=True):
        assert cost(awq, b, 4) == cost(plain, a, 4) + 32 * plain.weight(a).shape[1]


@pytest.mark.parametrize("outliers", [0, 3, 32])
@pytest.mark.parametrize("method", ["nearest", "gptq", "awq", "reconstruct"])
def test_static_costs_are_what_is_stored(tiny: Any, tmp_path: Path, method: str, outliers: int) -> None:
    """All parts that a layer can be given; outlier channels, 5 asked for, are those that are reserved."""
    settings: dict[str, Any] = {"activations": "static", "method": method, "outliers": outliers, "smooth": True}
    work = begun(opened(tiny), tmp_path, **settings)
    count = min(outliers, 5) if method in ("nearest", "gptq") else 0
    for target in work.of("block"):
        rows, inputs = work.weight(target).shape
        codes = replace(
            quantize_weight(work.weight(target), target.grid._replace(bits=3)),
            smooth=None if method == "reconstruct" else torch.ones(inputs),
            input_scale=torch.ones(1),
            input_zero_point=torch.zeros(1, dtype=torch.uint8),
            input_shift=torch.zeros(inputs),
            outliers=torch.arange(count) if count else None,
            outlier_values=torch.zeros(rows, count) if count else None,
        )
        assert cost(work, target, 3) + reserve(work, target, 5) == stored_bits({"one": codes})
        assert reserve(work, target, 5) == outlier_bits(target, count, work)
    for target in (*work.of("table"), *work.of("head")):  # they have none of that
        assert cost(work, target, 8) == stored_bits({"one": work.rounded(target, target.grid._replace(bits=8))})


def test_no_room_is_kept_for_more_than_there_can_be(tiny: Any, tmp_path: Path) -> None:
    """A layer of 12 inputs has at most three outlier channels; weights only and binary layers have none."""
    work = begun(opened(tiny), tmp_path, activations="static")
    target = work.of("block")[0]
    assert reserve(work, target._replace(owner=torch.nn.Linear(12, 5)), 8) == 3 * (64 + 32 * 5)
    assert reserve(work, target._replace(grid=target.grid._replace(bits=1, scheme="binary")), 8) == 0
    plain = begun(opened(tiny), tmp_path, activations="token")
    assert reserve(plain, plain.of("block")[0], 8) == 0


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_errors_are_those_of_the_block(tiny: Any, tmp_path: Path, family: str) -> None:
    """A layer of the last block: the model's own hidden states with and without it rounded. The model is left as it was."""
    bundle = opened(tiny, family)
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    work = begun(bundle, tmp_path, activations="none")
    errors = layer_errors(work)
    for name, tensor in bundle.model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert set(errors) == {target.module for target in work.of("block")}
    last = work.of("block")[-1]
    module = dict(bundle.model.named_modules())
    block = module[".".join(last.module.split(".")[: last.module.split(".").index("3") + 1])]  # of four

    def states() -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = block.register_forward_hook(lambda _, given, out: kept.append(out[0] if isinstance(out, tuple) else out))
        for i in range(len(tiny_models.SENTENCES)):  # one by one: no padding
            predict(bundle, work.context.calibration.take([i]))  # type: ignore[union-attr]
        hook.remove()
        return torch.cat([one.flatten(0, -2) for one in kept])

    whole = states()
    for bits in BITS:
        weight = work.weight(last).clone()
        codes = quantize_weight(weight, last.grid._replace(bits=bits), None, isinstance(last.owner, Conv1D))
        work.put(last, codes)
        expected = float(((states() - whole) ** 2).sum() / (whole**2).sum())
        work.take_back(last)
        assert errors[last.module][bits] == pytest.approx(expected, rel=1e-3, abs=1e-9)
    assert errors[last.module][2] > errors[last.module][4] > errors[last.module][8] > 0


def test_errors_found_before_a_run_was_killed_are_kept(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = layer_errors(begun(opened(tiny), tmp_path / "whole", activations="none"))
    tried: list[str] = []

    def killed(work: Work, block: Block, codes: Mapping[str, Any]) -> float:
        if block.number == 2:
            raise KeyboardInterrupt
        tried.extend(codes)
        return moved(work, block, codes)

    monkeypatch.setattr(mixed, "moved", killed)
    with pytest.raises(KeyboardInterrupt):
        layer_errors(begun(opened(tiny), tmp_path / "killed", activations="none"))
    assert set(tried) == {name for name in whole if ".layer.0." in name or ".layer.1." in name}
    tried.clear()

    def noted(work: Work, block: Block, codes: Mapping[str, Any]) -> float:
        tried.extend(codes)
        return moved(work, block, codes)

    monkeypatch.setattr(mixed, "moved", noted)
    assert layer_errors(begun(opened(tiny), tmp_path / "killed", activations="none")) == whole
    assert set(tried) == {name for name in whole if ".layer.2." in name or ".layer.3." in name}


@pytest.mark.parametrize("family", ["bert", "electra", "gpt2", "t5"])
def test_a_step_keeps_the_budget(tiny: Any, tmp_path: Path, family: str) -> None:
    bundle = opened(tiny, family)
    settings = QuantizeSettings(bits_per_weight=5.5, activations="none", granularity="tensor")
    here = context(bundle, tmp_path)
    blocks = {target.parameter for target in targets_of(bundle, settings).values() if target.part == "block"}
    made = quantize(bundle, settings, here)
    inside = {name: codes for name, codes in made.quantized.items() if name in blocks}
    mean = stored_bits(inside) / sum(codes.codes.numel() for codes in inside.values())
    note = here.notes["mixed"]
    assert 4.0 < mean <= 5.5
    assert note["bits_per_weight"] == pytest.approx(mean, abs=1e-4)
    assert {row["layer"] + ".weight": row["bits"] for row in note["layers"]} == {
        name: codes.info.bits for name, codes in inside.items()
    }
    assert len({codes.info.bits for codes in inside.values()}) > 1
    assert all(codes.info.bits == 8 for name, codes in made.quantized.items() if name not in blocks)


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_a_step_keeps_a_budget_of_bytes(tiny: Any, tmp_path: Path, family: str) -> None:
    """All that lies on disk is within it, and no more is left than the next width of the smallest layer would take."""
    bundle = opened(tiny, family)
    floats = sum(parameter.numel() for parameter in bundle.model.parameters())
    budget = round(floats * 0.8 / 1e6, 4)  # 8 bits would be 1 byte a weight, scales beside
    settings = QuantizeSettings(max_megabytes=budget, activations="none", granularity="tensor", embeddings=4)
    made = quantize(bundle, settings, context(bundle, tmp_path))
    (tmp_path / "saved").mkdir()
    save(made, tmp_path / "saved")
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "saved" / "model.safetensors").values())
    smallest = min(codes.codes.numel() for codes in made.quantized.values())
    assert budget * 1e6 - smallest / 2 - 200 < stored <= budget * 1e6 + 200  # bytes that are not full
    assert len({codes.info.bits for codes in made.quantized.values()}) > 1


@pytest.mark.parametrize("method", ["nearest", "gptq", "awq"])
@pytest.mark.parametrize(("budget", "given"), [("bits_per_weight", 7.0), ("max_megabytes", 0.051)])
def test_static_activations_keep_the_budget(
    tiny: Any, tmp_path: Path, method: str, budget: str, given: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four channels are so large that more layers want them in float than there is room for."""
    monkeypatch.setattr(smooth, "PASS", 0)  # as in a wide model, where it costs next to nothing
    monkeypatch.setattr(mixed, "RESERVED", 1)
    bundle = opened(tiny)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if name.endswith("LayerNorm.weight"):
                parameter[::9] *= 40.0
    common: dict[str, Any] = {"activations": "static", "method": method, "granularity": "tensor", "outliers": 4}
    settings = QuantizeSettings(**common, reduce_range="off", **{budget: given})
    here = context(bundle, tmp_path)
    made = quantize(bundle, settings, here)
    note = here.notes["mixed"]
    blocks = {row["layer"] + ".weight" for row in note["layers"]}
    inside = {name: codes for name, codes in made.quantized.items() if name in blocks}
    mean = stored_bits(inside) / sum(codes.codes.numel() for codes in inside.values())
    assert note["bits_per_weight"] == pytest.approx(mean, abs=1e-4)
    assert "over_budget" not in note
    assert len({codes.info.bits for codes in inside.values()}) > 1
    assert any(codes.outliers is not None for codes in inside.values()) == (method != "awq")
    (tmp_path / "saved").mkdir()
    save(made, tmp_path / "saved")
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "saved" / "model.safetensors").values())
    if budget == "bits_per_weight":
        assert 0.8 * given < mean <= given
    else:
        assert 0.9 * given * 1e6 < stored <= given * 1e6 + 200  # bytes that are not full


@pytest.mark.parametrize(("budget", "outliers", "reserved"), [(8.0, 1, 1), (8.0, 32, 2), (5.0, 32, 0), (8.0, 0, 0)])
def test_room_is_what_the_mix_leaves(tiny: Any, tmp_path: Path, budget: float, outliers: int, reserved: int) -> None:
    """A channel takes a little more than one bit a weight here: the most that stay within half of what 2 bits leave."""
    work = begun(
        opened(tiny), tmp_path, bits_per_weight=budget, activations="static", granularity="tensor", outliers=outliers
    )
    assert work.room is None
    least = sum(cost(work, target, 2) for target in work.of("block"))
    choose_bits(work)
    blocks, note = work.of("block"), work.notes["mixed"]
    weights = sum(work.weight(target).numel() for target in blocks)
    kept = sum(reserve(work, target) for target in blocks)
    used = sum(cost(work, target, target.grid.bits) for target in blocks) + kept
    assert work.room == budget * weights - used >= 0
    assert note["bits_per_weight"] == pytest.approx(used / weights, abs=1e-4)
    assert note["outliers_reserved"] == reserved
    assert 2 * kept <= budget * weights - least
    if reserved < outliers and reserved < RESERVED:
        assert 2 * sum(reserve(work, target, reserved + 1) for target in blocks) > budget * weights - least


class Said(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def mixed_work(tiny: Any, tmp_path: Path, **settings: Any) -> Work:
    """A step with bits chosen and codes put."""
    work = begun(opened(tiny), tmp_path, activations="none", granularity="tensor", **settings)
    work.context.progress = Said()
    choose_bits(work)
    for target in work.targets.values():
        work.nearest(target)
    return work


def test_layers_that_the_gate_lifts_over_the_budget(tiny: Any, tmp_path: Path) -> None:
    """What the gate does, done by hand: one layer gets 8 bits, one is in float again. The record says what is stored then."""
    work = mixed_work(tiny, tmp_path, bits_per_weight=4.0)
    note, lines = work.notes["mixed"], work.context.progress.lines  # type: ignore[attr-defined]
    before = dict(note)
    account(work)
    assert note == before
    assert lines == []
    blocks = work.of("block")
    first, last = blocks[0], blocks[-1]
    work.nearest(first, first.grid._replace(bits=8))
    work.take_back(last)
    account(work)
    inside = {t.parameter: work.codes[t.parameter] for t in blocks if t.parameter in work.codes}
    weights = sum(work.weight(target).numel() for target in blocks)
    used = stored_bits(inside) + 32 * work.weight(last).numel()
    assert note["bits_per_weight"] == round(used / weights, 4)
    assert note["over_budget"] == -(-(used - 4 * weights) // 8) > 0
    assert lines == [
        f"warning: the linears of the blocks take {used / weights:.4f} bits a weight, more than bits_per_weight 4"
    ]
    work.notes["gate"] = {"layers": [{"layer": "a", "became": "kept"}, {"layer": "b", "became": "8 bits"}]}
    account(work)
    assert lines[-1].endswith("more than bits_per_weight 4: the acceptance rule came first")


def test_tables_that_the_gate_lifts_over_the_budget(tiny: Any, tmp_path: Path) -> None:
    """Linears as they were, a table in float again: bytes of the whole model count."""
    floats = sum(parameter.numel() for parameter in opened(tiny).model.parameters())
    budget = round(floats * 0.8 / 1e6, 4)
    work = mixed_work(tiny, tmp_path, max_megabytes=budget, embeddings=4)
    note, lines = work.notes["mixed"], work.context.progress.lines  # type: ignore[attr-defined]
    before = dict(note)
    account(work)
    assert note == {**before, "megabytes": note["megabytes"], "max_megabytes": budget}
    assert note["megabytes"] <= budget
    work.take_back(max(work.of("table"), key=lambda target: work.weight(target).numel()))
    account(work)
    assert note["bits_per_weight"] == before["bits_per_weight"]
    (tmp_path / "saved").mkdir()
    save(replace(work.bundle, quantized=work.codes), tmp_path / "saved")
    stored = sum(t.numel() * t.element_size() for t in load_file(tmp_path / "saved" / "model.safetensors").values())
    assert note["over_budget"] == pytest.approx(stored - budget * 1e6, abs=200)  # bytes that are not full
    assert lines == [
        f"warning: the weights take {budget + note['over_budget'] / 1e6:.4f} MB, more than max_megabytes {budget:g}"
    ]


def test_bytes_that_cannot_be_kept(tiny: Any, tmp_path: Path) -> None:
    settings = QuantizeSettings(max_megabytes=0.001, activations="none")
    with pytest.raises(StepError, match=r"expected max_megabytes of at least 0\.\d+ \(all layers.*got 0.001; raise it"):
        quantize(opened(tiny), settings, context(opened(tiny), tmp_path))


def test_a_budget_that_cannot_be_kept(tiny: Any, tmp_path: Path) -> None:
    bundle = opened(tiny)
    settings = QuantizeSettings(bits_per_weight=2.5, activations="none")  # rows of 32 and 64 with a scale of 32 bits
    with pytest.raises(
        StepError, match=r"expected bits_per_weight of at least 2\.\d+ \(all layers at 2 bits, .* got 2.5"
    ):
        quantize(bundle, settings, context(bundle, tmp_path))


def test_more_budget_is_never_worse(tiny: Any, tmp_path: Path) -> None:
    sums: list[float] = []
    for budget in (3.5, 4.5, 6.0, 8.0):
        work = begun(opened(tiny), tmp_path, bits_per_weight=budget, activations="none", granularity="tensor")
        choose_bits(work)
        sums.append(sum(row["error"] for row in work.notes["mixed"]["layers"]))
    assert sums == sorted(sums, reverse=True)
    assert np.isfinite(sums).all()


def test_seven_bits_where_sums_saturate() -> None:
    assert widths(QuantizeSettings(reduce_range="on")) == (2, 3, 4, 7)
    assert widths(QuantizeSettings(reduce_range="on", activations="none")) == (2, 3, 4, 8)
    assert widths(QuantizeSettings(reduce_range="off")) == (2, 3, 4, 8)
