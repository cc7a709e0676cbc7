"""Static int8: what is chosen, and that the model computes what its codes say."""

from __future__ import annotations

import pytest
import torch

import tiny as models
from flyweight.artifact import write_folder, write_manifest
from flyweight.calibration import walk
from flyweight.errors import StepError
from flyweight.methods.quantize import quantize, smooth
from flyweight.methods.quantize.folding import neurons, put_first
from flyweight.methods.quantize.ladder import climb, units_of
from flyweight.methods.quantize.smooth import Search, round_weight
from flyweight.methods.quantize.static import smooth_and_round
from flyweight.methods.quantize.work import Work, stored_bits, targets_of
from flyweight.models import surgery
from flyweight.models.activations import simulate
from flyweight.models.codes import dequantize
from flyweight.models.load import load
from flyweight.models.storage import restore, save
from flyweight.settings import QuantizeSettings
from flyweight.tasks import task_named
from flyweight.training import predict
from solver_cases import LAYOUTS, block_outputs, context, opened
from solver_cases import texts as texts_of

NEURONS = 64


def made(tmp_path, family="bert"):
    bundle = load(
        str(models.write(tmp_path / family, family, labels=("bad", "good"))), task_named("text-classification")
    )
    return bundle, bundle.encoder._replace(truncate=True).examples(models.SENTENCES)


def run(tmp_path, bundle, texts, **settings):
    made = context(tmp_path, texts, task_named(bundle.task))
    return quantize(bundle, QuantizeSettings(**{"activations": "static", **settings}), made), made.notes


def spiky(rows=600, width=384, out=400):
    """Inputs with two channels that are 60 times larger than the others, wide enough for what they need to cost little."""
    inputs = torch.randn(rows, width, generator=torch.Generator().manual_seed(1))
    inputs[:, [3, 17]] *= 60
    return inputs, torch.randn(out, width, generator=torch.Generator().manual_seed(2))


class TestSearch:
    def test_smoothing_by_hand(self):
        search = Search(torch.tensor([[1.0, -8.0], [0.5, 4.0]]), torch.tensor([[2.0, 1.0], [-4.0, 0.5]]))
        assert search.smoothing(0.5).tolist() == pytest.approx([(1 / 4) ** 0.5, (8 / 1) ** 0.5])
        assert search.smoothing(1.0).tolist() == [1.0, 8.0]

    def test_error_is_that_of_the_linear_computed_slowly(self):
        inputs, weight = spiky(rows=40, width=20, out=24)
        how = Search(inputs, weight).tried(0.7, 2, "minmax")
        wanted, total, norm = inputs.double() @ weight.double().t(), 0.0, 0.0
        rounded = round_weight(how.weight(weight), 8)
        for row in range(len(inputs)):
            for out in range(len(weight)):
                value = 0.0
                for j in range(inputs.shape[1]):
                    if j in how.outliers.tolist():
                        value += float(inputs[row, j] * weight[out, j])
                        continue
                    code = torch.clamp((inputs[row, j] / how.smooth[j] / how.scale).round() + how.zero_point, 0, 255)
                    value += float((code - how.zero_point) * how.scale * rounded[out, j])
                total += (value - float(wanted[row, out])) ** 2
                norm += float(wanted[row, out]) ** 2
        assert how.error == pytest.approx((total / norm) ** 0.5, rel=1e-3)

    def test_a_shift_by_hand(self):
        search = Search(torch.tensor([[1.0, -8.0], [0.5, 4.0]]), torch.tensor([[2.0, 1.0], [-4.0, 0.5]]))
        assert search.centre("middle").tolist() == [0.75, -2.0]
        assert search.centre("mean").tolist() == [0.75, -2.0]
        assert search.size(search.centre("middle")).tolist() == [0.25, 6.0]
        assert search.smoothing(1.0, search.centre("middle")).tolist() == [0.25, 6.0]
        how = search.tried(1.0, 0, "minmax", "middle")  # what is rounded is +1 and -1
        assert float(how.scale) == pytest.approx(2 / 255)
        assert torch.allclose(how.apply(torch.tensor([[1.0, -8.0]])), torch.tensor([[1.0, -1.0]]), atol=5e-3)

    def test_channels_that_lie_off_centre_are_shifted(self):
        inputs = torch.randn(600, 384, generator=torch.Generator().manual_seed(1))
        inputs[:, ::7] += 12
        weight = torch.randn(1152, 384, generator=torch.Generator().manual_seed(2))
        shifted, fixed = (Search(inputs, weight).best(outliers=0, shift=shift) for shift in (True, False))
        assert shifted.centre != "zero"
        assert shifted.error < 0.6 * fixed.error
        assert fixed.shift is None

    def test_what_costs_more_than_it_gains_is_left(self):
        inputs, weight = spiky(out=24)  # so few outputs that a pass over the inputs takes as long as their products
        assert Search(inputs, weight).best(outliers=8).slowdown == 0
        assert Search(inputs, weight, free=True).best(outliers=8, shift=False).smooth is not None

    def test_folded_and_ordered(self):
        inputs, weight = spiky()
        how = Search(inputs, weight).tried(0.7, 2, "minmax", "middle")
        order = torch.tensor([3, 17, *(i for i in range(inputs.shape[1]) if i not in (3, 17))])
        other = how.ordered(order)
        assert other.outliers.tolist() == [0, 1]
        assert torch.equal(other.apply(inputs[:, order]), how.apply(inputs)[:, order])
        assert torch.equal(other.weight(weight[:, order]), how.weight(weight)[:, order])
        plain = how.folded()
        assert plain.smooth is None
        steps = (plain.apply(inputs / how.smooth) - how.apply(inputs)) / how.scale
        assert steps.abs().max() < 1.01  # one step where a sum falls on the other side of an edge
        assert (steps.abs() > 0.5).float().mean() < 1e-3

    def test_the_best_is_no_worse_than_any_single_choice(self):
        inputs, weight = spiky()
        search = Search(inputs, weight)
        best = search.best(outliers=0)
        assert (
            best.error
            <= min(search.tried(a, 0, r).error for a in (None, 0.5, 0.7, 0.9, 1.0) for r in ("minmax",)) + 1e-9
        )
        assert best.error < 0.5 * search.tried(None, 0, "minmax").error

    def test_outlier_channels_are_found_where_smoothing_is_off(self):
        inputs, weight = spiky()
        best = Search(inputs, weight).best(smooth=False, outliers=8)
        assert {3, 17} <= set(best.outliers.tolist())
        assert len(best.outliers) <= 8
        even = torch.randn(600, 384, generator=torch.Generator().manual_seed(3))
        assert Search(even, weight).best().outliers is None  # nothing is taken that is not worth it

    def test_one_rule_where_one_is_asked_for(self):
        inputs, weight = spiky()
        for rule in ("minmax", "percentile", "mse", "entropy"):
            assert Search(inputs, weight).best(rule).range == rule


@pytest.mark.parametrize("family", models.ENCODERS)
def test_simulated_model_is_nearer_than_dynamic_and_codes_are_whole(tmp_path, family):
    bundle, texts = made(tmp_path, family)
    wanted = predict(bundle, texts)
    found, notes = run(tmp_path, bundle, texts)
    assert found.activations == "static"
    blocks = list(surgery.linears(found.model, found.family))
    for name in blocks:
        codes = found.quantized[f"{name}.weight"]
        assert codes.info.static
        assert codes.input_scale is not None
        assert torch.equal(dequantize(codes), surgery.weight_2d(found.model.get_submodule(name)).detach())
    assert len(notes["inputs"]) == len({row["site"] for row in notes["inputs"]}) > 0
    with simulate(found):
        rounded = predict(found, texts)
    assert abs(rounded - predict(found, texts)).max() > 0  # rounding happens
    assert abs(rounded - wanted).max() < 0.12 * abs(wanted).max()


@pytest.mark.parametrize("family", LAYOUTS)
def test_neurons_take_another_order_and_nothing_else_changes(tiny, tmp_path, family):
    bundle = opened(tiny, family)
    texts = texts_of(bundle)
    wanted = block_outputs(bundle, texts)
    settings = QuantizeSettings(activations="static")
    work = Work(bundle, settings, context(tmp_path, texts), targets_of(bundle, settings))
    work.keep_biases()
    for block in walk(bundle, texts):
        for site in block.sites:
            ups = neurons(work, block, site)
            assert bool(ups) == (site.width == NEURONS)
            if not ups:
                continue
            work.nearest(work.targets[ups[0]])
            before, codes = block.run(0), work.codes[work.targets[ups[0]].parameter]
            order = put_first(work, site, ups, torch.tensor([5, 11]))
            assert order.tolist()[:3] == [5, 11, 0]
            torch.testing.assert_close(block.run(0), before, rtol=1e-3, atol=1e-4)
            after = work.codes[work.targets[ups[0]].parameter]
            assert torch.equal(after.codes, codes.codes[order])
            assert torch.equal(after.scale, codes.scale[order])
            work.take_back(work.targets[ups[0]])
            bias = work.bundle.model.get_submodule(ups[0]).bias
            assert bias is None or torch.equal(bias, work.biases[ups[0]])
    for one, other in zip(block_outputs(bundle, texts), wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


def test_a_shift_keeps_the_mean_and_survives_the_disk(tmp_path):
    """Inputs that lie far off centre: with the shift the answers stay, and a saved model gives the same ones."""
    bundle, texts = made(tmp_path)
    with torch.no_grad():
        for name, module in bundle.model.named_modules():
            if name.endswith("LayerNorm"):
                module.bias += 4
    wanted = predict(bundle, texts)
    smooth.PASS, kept = 0, smooth.PASS  # as in a wide model, where it costs next to nothing
    try:
        found, notes = run(tmp_path, bundle, texts, outliers=0)
    finally:
        smooth.PASS = kept
    shifted = [name for name, codes in found.quantized.items() if codes.input_shift is not None]
    assert shifted
    assert {row["centre"] for row in notes["inputs"]} != {"zero"}
    assert all(found.quantized[name].info.shifted for name in shifted)
    with simulate(found):
        rounded = predict(found, texts)
    assert abs(rounded - wanted).max() < 0.1 * abs(wanted).max()
    with write_folder(tmp_path / "saved") as folder:
        write_manifest(folder, save(found, folder))
    again = restore(tmp_path / "saved")
    for name in shifted:
        assert torch.equal(again.quantized[name].input_shift, found.quantized[name].input_shift)
    with simulate(again):
        assert abs(predict(again, texts) - rounded).max() < 1e-5


def test_gptq_and_bias_correction_go_with_it(tmp_path):
    errors = {}
    for name, settings in {"nearest": {}, "gptq": {"method": "gptq"}, "bias": {"bias_correction": True}}.items():
        bundle, texts = made(tmp_path)
        wanted = predict(bundle, texts)
        found, _ = run(tmp_path, bundle, texts, bits=4, **settings)
        with simulate(found):
            errors[name] = float(((predict(found, texts) - wanted) ** 2).mean())
    assert errors["gptq"] < errors["nearest"]
    assert errors["bias"] != errors["nearest"]


@pytest.mark.parametrize("method", ["awq", "reconstruct"])
def test_other_methods_keep_their_weights(tmp_path, method):
    bundle, texts = made(tmp_path)
    found, _ = run(tmp_path, bundle, texts, bits=4, method=method, iterations=5)
    other, texts = made(tmp_path / "again")
    plain, _ = run(tmp_path, other, texts, bits=4, method=method, iterations=5, activations="none")
    for name, codes in plain.quantized.items():
        assert torch.equal(codes.codes, found.quantized[name].codes), name
        if "layer." in name:
            assert found.quantized[name].input_scale is not None


def test_no_texts(tmp_path):
    bundle, _ = made(tmp_path)
    with pytest.raises(StepError, match="texts to calibrate on"):
        run(tmp_path, bundle, None)


@pytest.mark.parametrize(
    "grid", [{"bits": 1, "scheme": "binary"}, {"bits": 2, "scheme": "ternary"}, {"bits": 3, "scheme": "asymmetric"},
             {"bits": 8, "granularity": "tensor"}, {"bits": 1, "scheme": "asymmetric"}], ids=str
)  # fmt: skip
def test_every_grid_of_weights_takes_static_inputs(tmp_path, grid):
    bundle, texts = made(tmp_path)
    found, notes = run(tmp_path, bundle, texts, **grid)
    assert all(row["error"] >= 0 for row in notes["inputs"])
    for name in surgery.linears(found.model, found.family):
        codes = found.quantized[f"{name}.weight"]
        assert codes.info.bits == grid["bits"]
        assert codes.input_scale is not None


def test_a_search_without_a_finite_error_names_the_layer():
    inputs = torch.full((20, 16), 1e30)
    with pytest.raises(StepError, match=r"rounding does in encoder\.q, got NaN or inf"):
        Search(inputs, torch.full((8, 16), 1e30), name="encoder.q").best()


@pytest.mark.parametrize("budget", [{"bits_per_weight": 8}, {"bits_per_weight": 7}, {"max_megabytes": 0.045}], ids=str)
def test_outlier_channels_stay_within_a_budget(tmp_path, budget, monkeypatch):
    monkeypatch.setattr(smooth, "WORTH", 0.0)  # what they cost in time is no matter
    bundle, texts = made(tmp_path)
    with torch.no_grad():
        for name, module in bundle.model.named_modules():
            if name.endswith("output.dense") and "attention" in name:
                module.weight[3] *= 40
    found, notes = run(tmp_path, bundle, texts, **budget)
    assert sum(row["outliers"] for row in notes["inputs"]) > 0
    blocks = {
        f"{name}.weight": found.quantized[f"{name}.weight"] for name in surgery.linears(found.model, found.family)
    }
    mean = stored_bits(blocks) / sum(codes.codes.numel() for codes in blocks.values())
    floats = sum(32 * p.numel() for name, p in found.model.named_parameters() if name not in found.quantized)
    assert notes["mixed"]["bits_per_weight"] == pytest.approx(mean, abs=1e-3)
    assert mean <= budget.get("bits_per_weight", 32)
    assert (stored_bits(found.quantized) + floats) / 8e6 <= budget.get("max_megabytes", 1)


def test_on_wider_rungs_the_bias_takes_what_the_shift_loses_there(tmp_path, monkeypatch):
    monkeypatch.setattr(smooth, "PASS", 0)
    bundle, texts = made(tmp_path)
    with torch.no_grad():
        for name, module in bundle.model.named_modules():
            if name.endswith("LayerNorm"):
                module.bias += 4
    settings = QuantizeSettings(activations="static", bits=2, scheme="asymmetric", outliers=0)
    work = Work(bundle, settings, context(tmp_path, texts), targets_of(bundle, settings))
    smooth_and_round(work)
    units = units_of(work, {(target.module,): None for target in work.of("block")})
    shifted = [unit for unit in units if work.codes[unit.targets[0].parameter].input_shift is not None]
    assert shifted
    for unit in shifted:
        (target,), before = unit.targets, target_bias(unit).clone()
        shift = work.codes[target.parameter].input_shift
        for rung in range(unit.top + 1):
            climb(work, unit, rung)
            now = surgery.weight_2d(target.owner).detach()
            whole = shift @ work.weight(target).t() + work.biases[target.module]
            if unit.rungs[rung].codes[target.module] is None or "float" in unit.became:
                assert torch.equal(target_bias(unit), work.biases[target.module])
            else:
                torch.testing.assert_close(shift @ now.t() + target_bias(unit), whole, rtol=1e-4, atol=1e-4)
        climb(work, unit, 0)
        assert torch.equal(target_bias(unit), before)


def target_bias(unit):
    return unit.targets[0].owner.bias.detach()
