"""The gate: which layers fall back, to what, that the rule then holds, and what is said where it cannot."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny as tiny_models
from flyweight.artifact import Measurement, Verdict
from flyweight.context import Context, NoProgress
from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.measure.quality import resamples
from flyweight.measure.verdict import accept
from flyweight.methods import quantize as package
from flyweight.methods.quantize import quantize
from flyweight.methods.quantize.biases import correct_biases
from flyweight.methods.quantize.gate import Judged, _fewest
from flyweight.methods.quantize.grid import Grid
from flyweight.methods.quantize.ladder import climb, units_of, widened
from flyweight.methods.quantize.sensitivity import site_errors
from flyweight.methods.quantize.work import Work, targets_of
from flyweight.models import surgery
from flyweight.models.activations import simulate
from flyweight.models.bundle import Bundle, Codes
from flyweight.models.codes import dequantize, described
from flyweight.models.load import load
from flyweight.settings import Accept, QuantizeSettings
from flyweight.tasks import task_named
from flyweight.training import predict

CLASSES = task_named("text-classification")
VECTORS = task_named("embedding")
Tiny = Callable[..., Path]


class Said(NoProgress):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def note(self, text: str) -> None:
        self.lines.append(text)


def opened(tiny: Tiny, labels: tuple[str, ...] | None = ("no", "yes"), family: str = "bert", seed: int = 0) -> Bundle:
    return load(tiny(family, labels, seed=seed), CLASSES if labels else VECTORS)


def texts(bundle: Bundle, number: int = 80) -> Examples:
    """Random sentences; where the task has labels they are the model's own answers, so that float is never wrong."""
    words, draw = " ".join(tiny_models.SENTENCES).split(), random.Random(0)
    some = bundle.encoder.examples([" ".join(draw.choices(words, k=draw.randint(3, 12))) for _ in range(number)])
    return replace(some, labels=predict(bundle, some).argmax(-1)) if bundle.labels else some


def context(bundle: Bundle, tmp_path: Path, rule: dict[str, float], number: int = 80, **changes: Any) -> Context:
    reference = bundle.copy()
    task = task_named(bundle.task)
    made = Context(
        task=task,
        seed=0,
        work=tmp_path,
        reference=lambda: reference,
        load=lambda name: reference,
        validation=texts(bundle, number),
        accept=Accept(**rule),
        progress=Said(),
    )
    return replace(made, **changes)


def outlier(bundle: Bundle, name: str) -> None:
    """One weight so large that a grid for the whole tensor rounds all others away."""
    with torch.no_grad():
        surgery.weight_2d(bundle.model.get_submodule(name))[0, 0] = 60.0


def lower_bound(made: Bundle, here: Context) -> float:
    """The paired bound, taken once more from the step's result alone."""
    examples = here.validation
    assert examples is not None
    answers = predict(here.reference(), examples)
    if not here.task.labelled:
        examples = replace(examples, labels=answers)
    batch = 1 if made.activations == "dynamic" else 32
    with simulate(made):
        outputs = predict(made, examples, batch_size=batch)
    of, to = (resamples(here.task, one, examples, 0)[here.task.metric] for one in (outputs, answers))
    return float(np.percentile(of - to, 2.5))


def test_a_rule_that_holds_changes_nothing(tiny: Tiny, tmp_path: Path) -> None:
    gated, plain = opened(tiny), opened(tiny)
    here = context(gated, tmp_path, {"max_drop": 0.1})
    made = quantize(gated, QuantizeSettings(), here)
    free = quantize(plain, QuantizeSettings(gate="off"), context(plain, tmp_path, {"max_drop": 0.1}))
    assert all(torch.equal(made.quantized[name].codes, codes.codes) for name, codes in free.quantized.items())
    note = here.notes["gate"]
    assert note["held"]
    assert note["layers"] == []
    assert note["told"] == "The rule held at once: no layer fell back."
    assert note["before"]["low"] == pytest.approx(lower_bound(made, here))


def test_a_killed_gate_asks_only_what_it_has_not_asked(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []

    def falls_back(folder: str, most: int = 1000) -> tuple[Bundle, dict[str, Any]]:
        """A run that is killed when it would ask for the answers of `most` + 1 models."""
        asked.clear()

        def count(view: Bundle, examples: Examples, **how: Any) -> Any:
            if "what" not in how:  # not those of the reference and of float
                if len(asked) == most:
                    raise RuntimeError("killed")
                asked.append(len(examples))
            return predict(view, examples, **how)

        monkeypatch.setattr("flyweight.methods.quantize.gate.predict", count)
        bundle = opened(tiny)
        outlier(bundle, "bert.encoder.layer.1.output.dense")
        here = context(bundle, tmp_path / folder, {"max_drop": 0.02})
        settings = QuantizeSettings(bits=4, activations="none", granularity="tensor")
        return quantize(bundle, settings, here), here.notes["gate"]

    whole, note = falls_back("whole")
    total = len(asked)
    assert note["evaluations"] >= total > 8
    with pytest.raises(RuntimeError, match="killed"):
        falls_back("killed", 6)
    again, same = falls_back("killed")
    assert len(asked) == total - 6
    assert same == note
    assert all(torch.equal(again.quantized[name].codes, codes.codes) for name, codes in whole.quantized.items())


def test_no_rule_no_gate(tiny: Tiny, tmp_path: Path) -> None:
    here = context(opened(tiny), tmp_path, {})
    quantize(opened(tiny), QuantizeSettings(bits=2), here)
    assert "gate" not in here.notes


@pytest.mark.parametrize(
    ("activations", "labels"), [("none", ("no", "yes")), ("token", ("no", "yes")), ("none", None), ("dynamic", None)]
)
def test_the_one_bad_layer_falls_back(
    tiny: Tiny, tmp_path: Path, activations: str, labels: tuple[str, ...] | None
) -> None:
    bundle = opened(tiny, labels)
    names = [name for name in surgery.linears(bundle.model, bundle.family) if name.endswith("layer.2.output.dense")]
    outlier(bundle, names[0])
    before = surgery.weight_2d(bundle.model.get_submodule(names[0])).detach().clone()
    drop = 0.15 if labels else 0.04
    here = context(bundle, tmp_path, {"max_drop": drop}, number=80 if labels else 30)
    settings = QuantizeSettings(granularity="tensor", activations=activations)  # type: ignore[arg-type]
    made = quantize(bundle, settings, here)
    note = here.notes["gate"]
    assert note["before"]["low"] < -drop
    assert note["held"]
    assert note["after"]["low"] == pytest.approx(lower_bound(made, here), abs=1e-6)
    assert note["after"]["low"] >= -drop
    became = {row["layer"]: row["became"] for row in note["layers"]}
    assert [name for name, what in became.items() if what != "kept"] == names
    assert became[names[0]] == "float"
    assert f"{names[0]}.weight" not in made.quantized
    assert torch.equal(surgery.weight_2d(made.model.get_submodule(names[0])), before)
    worst = max(note["layers"], key=lambda row: row["output_error"] or 0)
    assert worst["layer"] == names[0]
    assert worst["metric_change"] > 0
    lines = here.progress.lines  # type: ignore[attr-defined]
    assert f"gate: {names[0]} falls back to float" in lines


@pytest.mark.parametrize("labels", [("no", "yes"), None])
def test_few_bits_climb_as_far_as_needed(tiny: Tiny, tmp_path: Path, labels: tuple[str, ...] | None) -> None:
    bundle = opened(tiny, labels)
    here = context(bundle, tmp_path, {"quality": 0.95})
    made = quantize(bundle, QuantizeSettings(bits=2, activations="none"), here)
    note = here.notes["gate"]
    assert not accept(here.accept, _figure(1.0), _figure(note["before"]["change"], note["before"]["low"])).accepted
    assert note["held"]
    assert lower_bound(made, here) >= -0.05
    fallen = [row for row in note["layers"] if row["became"] != "kept"]
    assert 0 < len(fallen) < len(note["layers"])
    bits = {name.removesuffix(".weight"): codes.info.bits for name, codes in made.quantized.items()}
    for row in note["layers"]:
        for linear in row["linears"]:
            where = {"kept": row["was"], "float": None}.get(row["became"], row["became"])
            assert (f"{bits[linear]} bits" if linear in bits else None) == where
    q = next(row for row in note["layers"] if row["layer"].endswith("0.attention.self.query"))
    assert [name.rpartition(".")[2] for name in q["linears"]] == ["query", "key", "value"]


def _figure(value: float, low: float | None = None) -> Measurement:
    return Measurement(value=value, unit="share", low=low, method="test")


def test_the_last_way_out_is_the_float_model(tiny: Tiny, tmp_path: Path) -> None:
    """A rule that bears no loss at all with weights that lose something everywhere."""
    bundle = opened(tiny, None)
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    here = context(bundle, tmp_path, {"quality": 1.0}, number=20)
    made = quantize(bundle, QuantizeSettings(bits=2, embeddings=2, activations="token"), here)
    assert here.notes["gate"]["held"]
    assert set(made.quantized) <= {"pooler.dense.weight"}  # no answer passes through it
    for name, tensor in made.model.state_dict().items():
        assert torch.equal(tensor, before[name]) or name in made.quantized, name


def test_nothing_left_in_few_bits(tiny: Tiny, tmp_path: Path) -> None:
    """As above, and the one layer that would have kept its bits is left out: the record counts no weight."""
    bundle = opened(tiny, None)
    here = context(bundle, tmp_path, {"quality": 1.0}, number=20)
    settings = QuantizeSettings(bits=2, embeddings=2, activations="token", skip=("pooler*",), gate="required")
    made = quantize(bundle, settings, here)
    assert here.notes["gate"]["held"]
    assert made.quantized == {}
    assert made.activations == "none"
    assert (here.notes["weights"], here.notes["tensors"], here.notes["bits_per_weight"]) == (0, 0, None)


def test_a_rule_that_float_misses_in_the_end(tiny: Tiny, tmp_path: Path) -> None:
    """Nothing was done to the model before, so that float is not tried first; yet it misses the rule."""
    other = opened(tiny, seed=1)
    given = {"validation": texts(other), "reference": lambda: other}
    here = context(opened(tiny), tmp_path, {"max_drop": 0.01}, **given)
    with pytest.raises(StepError, match=r"expected a model that .*, got accuracy.* even with all layers in float; "):
        quantize(opened(tiny), QuantizeSettings(bits=2, gate="required"), here)
    made = quantize(opened(tiny), QuantizeSettings(bits=2), here)
    note, lines = here.notes["gate"], here.progress.lines  # type: ignore[attr-defined]
    assert not note["held"]
    assert made.quantized == {}
    assert note["evaluations"] <= 30  # one of all codes, two to rank and one a layer, six that fall back
    warned = [
        line for line in lines if line.startswith("warning: the rule does not hold even with all layers in float")
    ]
    assert len(warned) == 1


def figures(accepted: bool) -> Judged:
    return Judged(Verdict(accepted=accepted, text="test"), 0.0, 0.0, 0.0)


@pytest.mark.parametrize("needed", [1, 2, 3, 5, 11, 12, 20, 21])
def test_the_fewest_that_fall_back(needed: int) -> None:
    """Of 20; 21 do not exist: there is nothing to halve then."""
    tried: list[int] = []

    def judged(number: int) -> Judged:
        tried.append(number)
        return figures(number >= needed)

    count, found = _fewest(judged, 20, NoProgress())
    assert count == min(needed, 20)
    assert tried[-1] == count
    assert found.verdict.accepted == (needed <= 20)
    if needed == 21:
        assert tried == [1, 2, 4, 8, 16, 20]


def test_float_that_misses_the_rule(tiny: Tiny, tmp_path: Path) -> None:
    """The reference is another model than the one at hand, as after pruning."""
    other = opened(tiny, seed=1)
    given = {"validation": texts(other), "reference": lambda: other}

    def pruned() -> Bundle:
        from flyweight.artifact import StepRecord

        return replace(opened(tiny), steps=(StepRecord(name="prune", settings={}, seconds=1.0, notes={}),))

    here = context(opened(tiny), tmp_path, {"max_drop": 0.01}, **given)
    made = quantize(pruned(), QuantizeSettings(bits=2), here)
    note, lines = here.notes["gate"], here.progress.lines  # type: ignore[attr-defined]
    assert not note["held"]
    assert note["layers"] == []
    assert note["told"] == "The float model itself misses the rule: no layer fell back."
    assert (
        sum(line.startswith("warning: the gate cannot hold: the float model itself misses the rule") for line in lines)
        == 1
    )
    assert all(codes.info.bits in (2, 8) for codes in made.quantized.values())
    bundle = pruned()
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    with pytest.raises(
        StepError, match="expected a model that meets the acceptance rule before it is quantized, got acc"
    ):
        quantize(bundle, QuantizeSettings(bits=2, gate="required"), replace(here, notes={}))
    assert all(torch.equal(tensor, before[name]) for name, tensor in bundle.model.state_dict().items())


def test_no_validation_examples(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny)
    for validation in (None, replace(texts(bundle), labels=None)):
        here = context(bundle, tmp_path, {"max_drop": 0.01}, validation=validation)
        quantize(opened(tiny), QuantizeSettings(bits=2), here)
        assert here.notes["gate"]["told"] == "Left out: there were no validation examples."
        assert here.progress.lines[0].startswith("warning: the gate was left out")  # type: ignore[attr-defined]
        with pytest.raises(
            StepError, match="expected validation examples for gate required, got none; give --validation"
        ):
            quantize(opened(tiny), QuantizeSettings(gate="required"), here)
    with pytest.raises(StepError, match="expected an acceptance rule for gate required, got none"):
        quantize(opened(tiny), QuantizeSettings(gate="required"), context(bundle, tmp_path, {}))


def test_what_was_trained_is_not_taken_back(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(package.METHODS, "train", package.METHODS["nearest"])
    here = context(opened(tiny), tmp_path, {"max_drop": 0.001})
    made = quantize(opened(tiny), QuantizeSettings(bits=2, method="train"), here)
    note = here.notes["gate"]
    assert not note["held"]
    assert "not taken back layer by layer" in note["told"]
    assert {codes.info.bits for codes in made.quantized.values()} == {2, 8}
    with pytest.raises(StepError, match="expected a trained model that meets the acceptance rule, got accuracy"):
        quantize(opened(tiny), QuantizeSettings(bits=2, method="train", gate="required"), here)


def begun(tiny: Tiny, tmp_path: Path, **settings: Any) -> Work:
    bundle = opened(tiny)
    chosen = QuantizeSettings(**settings)
    work = Work(bundle, chosen, context(bundle, tmp_path, {}), targets_of(bundle, chosen))
    for target in work.targets.values():
        work.nearest(target)
    return work


def test_rungs(tiny: Tiny, tmp_path: Path) -> None:
    names = {}
    for settings in (
        {"bits": 8},
        {"bits": 4},
        {"bits": 3},
        {"bits": 2, "scheme": "ternary"},
        {"bits": 1, "scheme": "binary"},
        {"bits": 2, "scheme": "asymmetric"},
        {"bits": 5, "reduce_range": "on"},
    ):
        work = begun(tiny, tmp_path, **settings)
        target = work.of("block")[0]
        unit = units_of(work, {(target.module,): 0.5})[0]
        names[(settings["bits"], settings.get("scheme"))] = [rung.name for rung in unit.rungs]
        for rung in unit.rungs[1:-1]:
            codes = rung.codes[target.module]
            assert codes is not None
            assert f"{codes.info.bits} bits" == rung.name
            assert codes.info.scheme == ("asymmetric" if settings.get("scheme") == "asymmetric" else "symmetric")
    assert names == {
        (8, None): ["8 bits", "float"],
        (4, None): ["4 bits", "8 bits", "float"],
        (3, None): ["3 bits", "4 bits", "8 bits", "float"],
        (2, "ternary"): ["2 bits", "4 bits", "8 bits", "float"],
        (1, "binary"): ["1 bit", "4 bits", "8 bits", "float"],
        (5, None): ["5 bits", "7 bits", "float"],
        (2, "asymmetric"): ["2 bits", "4 bits", "8 bits", "float"],
    }


def with_parts(work: Work, name: str) -> Codes:
    """Codes as static activations leave them: smoothing, outlier channels, a grid of the inputs."""
    target = work.targets[name]
    codes, weight = work.codes[target.parameter], work.weight(target)
    smooth = torch.linspace(0.5, 2, weight.shape[1])
    parts = replace(
        codes,
        smooth=smooth,
        outliers=torch.tensor([1, 5]),
        outlier_values=weight[:, [1, 5]].clone(),
        input_scale=torch.tensor([0.02]),
        input_zero_point=torch.tensor([100], dtype=torch.uint8),
        input_shift=torch.linspace(-1, 1, weight.shape[1]).index_fill(0, torch.tensor([1, 5]), 0),
    )
    return widened(work, target, parts, codes.info.bits)


def test_a_static_layer_drops_its_grid_before_its_integers(tiny: Tiny, tmp_path: Path) -> None:
    work = begun(tiny, tmp_path, bits=4, activations="static", samples=1)
    target = work.of("block")[3]
    bias = target.owner.get_parameter("bias")
    work.keep_biases()
    before = bias.detach().clone()
    work.put(target, with_parts(work, target.module))
    with torch.no_grad():
        bias.add_(0.25)  # as bias correction does
    unit = units_of(work, {(target.module,): None})[0]
    assert [rung.name for rung in unit.rungs] == ["4 bits", "8 bits", "8 bits, inputs in float", "float"]
    first, eight, free = (rung.codes[target.module] for rung in unit.rungs[:3])
    assert first is not None
    assert eight is not None
    assert free is not None
    weight = work.weight(target)
    for codes in (eight, free):
        assert torch.equal(dequantize(codes)[:, [1, 5]], weight[:, [1, 5]])
        inner = (weight * codes.smooth).index_fill(1, torch.tensor([1, 5]), 0)
        step = inner.abs().amax(1, keepdim=True) / 127
        assert torch.allclose(codes.scale, step)
        rest = [i for i in range(weight.shape[1]) if i not in (1, 5)]
        wrong = (dequantize(codes) * codes.smooth - weight * codes.smooth)[:, rest].abs()
        assert (wrong <= step * 0.5001).all()
    assert eight.input_scale is not None
    assert free.input_scale is None
    assert free.input_zero_point is None
    assert eight.input_shift is not None
    assert free.input_shift is None
    assert [codes.info.shifted for codes in map(described, (eight, free))] == [True, False]
    climb(work, unit, unit.top)
    assert target.parameter not in work.codes
    assert torch.equal(surgery.weight_2d(target.owner), weight)
    assert torch.equal(bias, before)
    climb(work, unit, 0)
    assert torch.equal(work.codes[target.parameter].codes, first.codes)
    assert torch.equal(bias, before + 0.25)


def test_layers_of_mixed_bits_rise_together(tiny: Tiny, tmp_path: Path) -> None:
    work = begun(tiny, tmp_path, activations="none")
    q, k, v = work.of("block")[:3]
    for target, bits in ((q, 2), (k, 4), (v, 8)):
        work.nearest(target, Grid(bits))
    unit = units_of(work, {(q.module, k.module, v.module): 0.1})[0]
    assert [rung.name for rung in unit.rungs] == ["2 and 4 and 8 bits", "at least 4 bits", "8 bits", "float"]
    found = [[codes.info.bits if codes else 32 for codes in rung.codes.values()] for rung in unit.rungs]
    assert found == [[2, 4, 8], [4, 4, 8], [8, 8, 8], [32, 32, 32]]


@pytest.mark.parametrize("family", ["bert", "gpt2"])
@pytest.mark.parametrize(
    ("activations", "corrected"), [("none", False), ("token", False), ("none", True), ("token", True)]
)
def test_output_errors_are_those_of_the_block(
    tiny: Tiny, tmp_path: Path, family: str, activations: str, corrected: bool
) -> None:
    """The last block's MLP against the model run text by text, with that one layer rounded and without.

    Where biases were corrected, float has those it had, and the layer the one made for its rounding.
    """
    bundle = opened(tiny, family=family)
    settings = QuantizeSettings(bits=2 if corrected else 3, activations=activations)  # type: ignore[arg-type]
    some = bundle.encoder.examples(tiny_models.SENTENCES)
    here = context(bundle, tmp_path, {}, validation=None, calibration=some)
    work = Work(bundle, settings, here, targets_of(bundle, settings))
    for target in work.of("block"):
        work.nearest(target)
    biases = {target.module: target.owner.get_parameter("bias") for target in work.of("block")}
    before = {name: bias.detach().clone() for name, bias in biases.items()}
    if corrected:
        work.keep_biases()
        correct_biases(work)
    after = {name: bias.detach().clone() for name, bias in biases.items()}
    errors = site_errors(work, some)
    assert all(torch.equal(bias, after[name]) for name, bias in biases.items())
    assert any(not torch.equal(before[name], bias) for name, bias in after.items()) == corrected
    assert sorted(name for names in errors for name in names) == sorted(
        work.targets[t.module].module for t in work.of("block")
    )
    put = dict(work.codes)
    names = list(errors)[-1]
    for target in work.of("block"):
        work.take_back(target)
        biases[target.module].data.copy_(before[target.module])
    stack = list(surgery.blocks(bundle.model, bundle.family).values())[-1]

    def states() -> torch.Tensor:
        kept: list[torch.Tensor] = []
        hook = stack[-1].register_forward_hook(
            lambda _, given, out: kept.append(out[0] if isinstance(out, tuple) else out)
        )
        view = replace(bundle, quantized=dict(work.codes), activations=settings.activations)
        for i in range(len(some)):
            with simulate(view):
                predict(view, some.take([i]))
        hook.remove()
        return torch.cat([one.flatten(0, -2) for one in kept])

    whole = states()
    for name in names:
        work.put(work.targets[name], put[work.targets[name].parameter])
        biases[name].data.copy_(after[name])
    expected = float(((states() - whole) ** 2).sum() / (whole**2).sum())
    assert errors[names] == pytest.approx(expected, rel=1e-3)
    assert expected > 0


def test_corrected_biases_go_with_the_layer(tiny: Tiny, tmp_path: Path) -> None:
    """A layer in float has the bias it had; one that was kept has the corrected one."""
    bundle = opened(tiny, None)
    names = [name for name in surgery.linears(bundle.model, bundle.family) if name.endswith("layer.2.output.dense")]
    outlier(bundle, names[0])
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}
    here = context(bundle, tmp_path, {"max_drop": 0.005}, number=30)
    here.calibration = bundle.encoder.examples(tiny_models.SENTENCES)
    settings = QuantizeSettings(granularity="tensor", activations="none", bias_correction=True)
    made = quantize(bundle, settings, here)
    fallen = [row["layer"] for row in here.notes["gate"]["layers"] if row["became"] != "kept"]
    assert fallen == names
    now = made.model.state_dict()
    assert torch.equal(now[f"{names[0]}.bias"], before[f"{names[0]}.bias"])
    other = names[0].replace("layer.2", "layer.1")
    assert not torch.equal(now[f"{other}.bias"], before[f"{other}.bias"])


@pytest.mark.parametrize(("method", "scheme"), [("gptq", "symmetric"), ("awq", "symmetric"), ("hqq", "asymmetric")])
def test_any_method(tiny: Tiny, tmp_path: Path, method: Any, scheme: Any) -> None:
    """Two bits by every solver: some layers climb, and the rule then holds on the step's result."""
    bundle = opened(tiny, None, "llama")  # where AWQ folds its factors
    here = context(bundle, tmp_path, {"max_drop": 0.03}, number=30)
    here.calibration = bundle.encoder.examples(tiny_models.SENTENCES)
    made = quantize(bundle, QuantizeSettings(bits=2, method=method, scheme=scheme, activations="none"), here)
    note = here.notes["gate"]
    assert note["before"]["low"] < -0.03
    assert note["held"]
    assert lower_bound(made, here) >= -0.03
    assert {row["became"] for row in note["layers"]} > {"kept"}


def test_static_activations(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny, None)
    here = context(bundle, tmp_path, {"max_drop": 0.001}, number=30)
    here.calibration = bundle.encoder.examples(tiny_models.SENTENCES)
    made = quantize(bundle, QuantizeSettings(activations="static", smooth=False, outliers=0, bits=4), here)
    note = here.notes["gate"]
    assert note["held"]
    assert lower_bound(made, here) >= -0.001
    free = [row for row in note["layers"] if row["became"].endswith("inputs in float")]
    for row in free:
        for name in row["linears"]:
            assert made.quantized[f"{name}.weight"].input_scale is None
    kept = [row for row in note["layers"] if row["became"] in ("kept", "8 bits") and row["output_error"] is not None]
    for row in kept:
        assert all(made.quantized[f"{name}.weight"].input_scale is not None for name in row["linears"])
    assert kept
