"""Static int8: what is chosen, and that the model computes what its codes say."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import tiny
from flyweight.context import NoProgress
from flyweight.errors import StepError
from flyweight.methods.quantize import quantize
from flyweight.methods.quantize.smooth import Search, round_weight
from flyweight.models import surgery
from flyweight.models.activations import simulate
from flyweight.models.codes import dequantize
from flyweight.models.load import load
from flyweight.settings import Accept, QuantizeSettings
from flyweight.tasks import task_named
from flyweight.training import predict


def made(tmp_path, family="bert"):
    bundle = load(str(tiny.write(tmp_path / family, family, labels=("bad", "good"))), task_named("text-classification"))
    return bundle, bundle.encoder._replace(truncate=True).examples(tiny.SENTENCES)


def run(bundle, texts, **settings):
    context = SimpleNamespace(
        calibration=texts,
        progress=NoProgress(),
        seed=0,
        notes={},
        accept=Accept(),
        validation=None,
        task=task_named(bundle.task),
    )
    return quantize(bundle, QuantizeSettings(activations="static", **settings), context), context.notes


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


@pytest.mark.parametrize("family", tiny.ENCODERS)
def test_simulated_model_is_nearer_than_dynamic_and_codes_are_whole(tmp_path, family):
    bundle, texts = made(tmp_path, family)
    wanted = predict(bundle, texts)
    found, notes = run(bundle, texts)
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


def test_gptq_and_bias_correction_go_with_it(tmp_path):
    errors = {}
    for name, settings in {"nearest": {}, "gptq": {"method": "gptq"}, "bias": {"bias_correction": True}}.items():
        bundle, texts = made(tmp_path)
        wanted = predict(bundle, texts)
        found, _ = run(bundle, texts, bits=4, **settings)
        with simulate(found):
            errors[name] = float(((predict(found, texts) - wanted) ** 2).mean())
    assert errors["gptq"] < errors["nearest"]
    assert errors["bias"] != errors["nearest"]


@pytest.mark.parametrize("method", ["awq", "reconstruct"])
def test_other_methods_keep_their_weights(tmp_path, method):
    bundle, texts = made(tmp_path)
    found, _ = run(bundle, texts, bits=4, method=method, iterations=5)
    other, texts = made(tmp_path / "again")
    context = SimpleNamespace(
        calibration=texts,
        progress=NoProgress(),
        seed=0,
        notes={},
        accept=Accept(),
        validation=None,
        task=task_named(other.task),
    )
    plain = quantize(other, QuantizeSettings(bits=4, method=method, iterations=5, activations="none"), context)
    for name, codes in plain.quantized.items():
        assert torch.equal(codes.codes, found.quantized[name].codes), name
        if "layer." in name:
            assert found.quantized[name].input_scale is not None


def test_no_texts(tmp_path):
    bundle, _ = made(tmp_path)
    with pytest.raises(StepError, match="texts to calibrate on"):
        run(bundle, None)
