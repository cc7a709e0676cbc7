"""Training with rounded weights: what is trained is what the bundle then answers, on every grid; stages, resume, refusals."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `compress`")

import training_cases as cases  # noqa: E402
from flyweight import artifact  # noqa: E402
from flyweight.context import Context  # noqa: E402
from flyweight.errors import Interrupted, SettingsError, StepError, TrainingError  # noqa: E402
from flyweight.methods.quantize import quantize  # noqa: E402
from flyweight.methods.quantize import train as module  # noqa: E402
from flyweight.models import surgery  # noqa: E402
from flyweight.models.activations import simulate  # noqa: E402
from flyweight.models.bundle import Bundle  # noqa: E402
from flyweight.models.codes import parameter_value  # noqa: E402
from flyweight.models.storage import restore, save  # noqa: E402
from flyweight.settings import QuantizeSettings  # noqa: E402
from flyweight.tasks import task_named  # noqa: E402
from flyweight.training import distillation, loop, predict  # noqa: E402
from tiny import CLASSIFIERS  # noqa: E402

LABELS = ("negative", "positive")
Tiny = Callable[..., Path]


def settings(**changes: Any) -> QuantizeSettings:
    usual = {
        "method": "train",
        "epochs": 2.0,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "hidden_weight": 0.0,
        "gate": "off",
    }
    return QuantizeSettings(**{**usual, **changes})


class Case:
    """A tiny model, its reference, data, and what the model in training answered at its end."""

    def __init__(self, folder: Path, work: Path, task: str = "text-classification", **changes: Any) -> None:
        self.folder, self.task, self.seen = folder, task, list[np.ndarray]()
        labels = task == "text-classification"
        usual: dict[str, Any] = {
            "train": cases.examples(64, labels=labels),
            "validation": cases.examples(24, seed=1, labels=labels),
            "calibration": cases.examples(32, seed=2, labels=False),
        }
        self.context = Context(
            task_named(task),
            seed=0,
            work=work / "work",
            teacher_cache=work / "cache",
            reference=self.bundle,
            load=lambda path: cases.open_bundle(Path(path), task),
            device="cpu",
            **{**usual, **changes},
        )

    def bundle(self) -> Bundle:
        return cases.open_bundle(self.folder, self.task)

    def run(self, made: QuantizeSettings, bundle: Bundle | None = None) -> Bundle:
        return quantize(self.bundle() if bundle is None else bundle, made, self.context)


HELD = cases.examples(40, seed=3)


@pytest.fixture
def folder(tiny: Tiny) -> Path:
    return tiny("bert", labels=LABELS)


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """What the model in training answers to HELD when a stage has ended."""
    found: list[np.ndarray] = []
    real = module.fake_quantized

    @contextmanager
    def spy(work: Any, fake: Any) -> Iterator[None]:
        with real(work, fake):
            yield
            found.append(predict(work.bundle, HELD))

    monkeypatch.setattr(module, "fake_quantized", spy)
    return found


def simulated(bundle: Bundle) -> np.ndarray:
    with simulate(bundle):
        return predict(bundle, HELD)


GRIDS = [
    {"bits": 8, "activations": "dynamic"},
    {"bits": 4, "activations": "static"},
    {"bits": 3, "activations": "none", "granularity": "tensor"},
    {"bits": 2, "activations": "token"},
    {"bits": 2, "scheme": "asymmetric", "activations": "dynamic", "embeddings": 4},
    {"bits": 2, "scheme": "ternary", "activations": "static", "embeddings": None},
    {"bits": 1, "scheme": "binary", "activations": "dynamic", "skip": ("*layer.1.*", "classifier")},
    {"bits": 1, "scheme": "binary", "activations": "token", "embeddings": 1},
]


@pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: "-".join(map(str, grid.values())))
def test_what_was_trained_is_what_the_bundle_answers(
    folder: Path, tmp_path: Path, ends: list[np.ndarray], grid: dict[str, Any]
) -> None:
    case = Case(folder, tmp_path)
    before = dict(case.bundle().model.named_parameters())
    made = case.run(settings(**grid))
    np.testing.assert_allclose(simulated(made), ends[0], atol=1e-5)
    for name, parameter in made.model.named_parameters():
        if name in made.quantized:
            assert torch.equal(parameter, parameter_value(made.quantized[name]))
        assert not torch.equal(parameter, before[name]) or "token_type" in name, name  # all of the model has learned
    assert not [m for m in made.model.modules() if "forward" in vars(m) or m._forward_hooks or m._forward_pre_hooks]
    for name in surgery.linears(made.model, made.family):
        if "layer.1." in name and "skip" in grid:
            assert f"{name}.weight" not in made.quantized
        else:
            info = made.quantized[f"{name}.weight"].info
            assert info.bits == grid["bits"]
            assert info.static == (grid["activations"] == "static")
    artifact.write_manifest(tmp_path / "a", save(made, tmp_path / "a"))
    opened = restore(tmp_path / "a")
    np.testing.assert_array_equal(simulated(opened), simulated(made))
    json.dumps(case.context.notes, allow_nan=False)


@pytest.mark.parametrize("model_type", [name for name in CLASSIFIERS if name != "t5"])  # which wants whole sentences
def test_every_family(tiny: Tiny, tmp_path: Path, ends: list[np.ndarray], model_type: str) -> None:
    case = Case(tiny(model_type, labels=LABELS), tmp_path)
    made = case.run(settings(bits=2, scheme="asymmetric", max_steps=3, activations="static"))
    np.testing.assert_allclose(simulated(made), ends[0], atol=1e-5)
    linears = surgery.linears(made.model, made.family)
    assert all(f"{name}.weight" in made.quantized for name in linears)


def test_linears_that_read_one_tensor_share_its_grid(folder: Path, tmp_path: Path) -> None:
    made = Case(folder, tmp_path).run(settings(activations="static"))
    for layer in range(4):
        name = f"bert.encoder.layer.{layer}.attention.self.{{}}.weight"
        q, k, v = (made.quantized[name.format(part)] for part in ("query", "key", "value"))
        assert float(q.input_scale) == float(k.input_scale) == float(v.input_scale)
        assert int(q.input_zero_point) == int(k.input_zero_point) == int(v.input_zero_point)
    assert made.quantized["classifier.weight"].input_scale is None  # heads keep float inputs on static grids
    assert len({float(codes.input_scale) for codes in made.quantized.values() if codes.input_scale is not None}) == 16


@pytest.mark.parametrize(
    "grid",
    [
        {"bits": 2, "scheme": "asymmetric"},
        {"bits": 2, "scheme": "ternary", "hidden_weight": 0.1},
        {"bits": 1, "scheme": "binary"},
    ],
    ids=lambda grid: grid["scheme"],
)
def test_training_comes_nearer_to_the_teacher_than_rounding(folder: Path, tmp_path: Path, grid: dict[str, Any]) -> None:
    wanted = np.diff(predict(Case(folder, tmp_path).bundle(), HELD))

    def distance(made: Bundle) -> float:
        return float(np.square(np.diff(simulated(made)) - wanted).mean())

    rounded = Case(folder, tmp_path).run(settings(method="nearest", **grid))
    data = cases.examples(160)
    trained = Case(folder, tmp_path, train=data, validation=None).run(settings(epochs=5.0, alpha=1.0, **grid))
    assert distance(trained) < 0.5 * distance(rounded)


def test_labels_take_part(folder: Path, tmp_path: Path) -> None:
    """Below alpha 1 the labels matter; at 1 they do not, and are not needed."""
    hashes = {}
    for alpha in (0.5, 1.0):
        for flipped in (False, True):
            data = cases.examples(64)
            data = replace(data, labels=1 - data.labels if flipped else data.labels)
            case = Case(folder, tmp_path / f"{alpha}{flipped}", train=data)
            hashes[alpha, flipped] = cases.weights_hash(case.run(settings(bits=4, alpha=alpha, epochs=1.0)).model)
    assert hashes[0.5, False] != hashes[0.5, True]
    assert hashes[1.0, False] == hashes[1.0, True]
    without = Case(folder, tmp_path / "w", train=cases.examples(64, labels=False), validation=None)
    without.run(settings(bits=4, alpha=1.0, epochs=1.0))
    extra = Case(
        folder, tmp_path / "u", train=None, validation=None, unlabelled=cases.examples(30, seed=7, labels=False)
    )
    extra.run(settings(bits=4, alpha=1.0, epochs=1.0))
    assert extra.context.notes["steps"] == 4


def test_headless_model_keeps_its_vectors(tiny: Tiny, tmp_path: Path) -> None:
    case = Case(tiny("bert"), tmp_path, "embedding")
    wanted = predict(case.bundle(), HELD)
    rounded = case.run(settings(bits=2, scheme="asymmetric", method="nearest"))
    made = case.run(settings(bits=2, scheme="asymmetric", epochs=5.0, hidden_weight=0.1))
    one, two = ((simulated(bundle) * wanted).sum(-1).mean() for bundle in (rounded, made))
    assert 1 - two < 0.5 * (1 - one)
    assert case.context.notes["best_metric"] > one
    assert case.context.notes["teacher_metric"] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize(
    "grid",
    [
        {"bits": 4},
        {"bits": 2, "scheme": "asymmetric"},
        {"bits": 2, "scheme": "ternary"},
        {"bits": 1, "scheme": "binary"},
    ],
    ids=lambda grid: grid.get("scheme", "symmetric"),
)
def test_pruned_weights_stay_zero(folder: Path, tmp_path: Path, grid: dict[str, Any], ends: list[np.ndarray]) -> None:
    case = Case(folder, tmp_path)
    bundle = case.bundle()
    names = [f"{name}.weight" for name in surgery.linears(bundle.model, bundle.family)]
    with torch.no_grad():
        for name in names:
            weight = bundle.model.get_parameter(name)
            weight[weight.abs() < weight.abs().median()] = 0
    zeros = {name: bundle.model.get_parameter(name).detach() == 0 for name in names}
    bundle.sparse = dict.fromkeys(names, "unstructured")
    made = case.run(settings(**grid), bundle)
    for name, zero in zeros.items():
        assert bool((made.model.get_parameter(name)[zero] == 0).all())
        assert torch.equal(made.quantized[name].mask, ~zero)
    np.testing.assert_allclose(simulated(made), ends[0], atol=1e-5)


def test_steps_down_with_the_former_stage_as_second_teacher(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: list[np.ndarray]
) -> None:
    seen: list[Any] = []
    real = module._Aware.__init__

    def spy(self: Any, *arguments: Any) -> None:
        real(self, *arguments)
        seen.append((self.settings.bits, self.settings.scheme, list(self.targets)))

    monkeypatch.setattr(module._Aware, "__init__", spy)
    case = Case(folder, tmp_path, validation=None)
    lines = cases.Notes()
    case.context.progress = lines
    made = case.run(settings(bits=1, scheme="binary", step_down=(8, 4, 2, 1), activations="dynamic"))
    assert [(bits, scheme) for bits, scheme, _ in seen] == [
        (8, "symmetric"),
        (4, "symmetric"),
        (2, "symmetric"),
        (1, "binary"),
    ]
    assert [len(targets) for *_, targets in seen] == [1, 2, 2, 2]
    wanted = predict(case.bundle(), case.context.train)
    for *_, targets in seen:
        np.testing.assert_allclose(targets[0], wanted, atol=1e-5)
    apart = [float(np.abs(targets[1] - wanted).mean()) for *_, targets in seen[1:]]
    assert 0 < apart[0] < apart[2]  # answers of 8 bits are nearer to the reference than those of 2
    notes = case.context.notes
    assert [stage["bits"] for stage in notes["stages"]] == [8, 4, 2]
    assert [stage["steps"] for stage in (*notes["stages"], notes)] == [1, 2, 4, 9]  # as 1/8, 1/4, 1/2, 1
    assert [line for line in lines.lines if line.startswith("track training at")] == [
        "track training at 8 bits 0/1",
        "track training at 4 bits 0/2",
        "track training at 2 bits 0/4",
        "track training at 1 bit 0/9",
    ]
    np.testing.assert_allclose(simulated(made), ends[-1], atol=1e-5)
    assert {codes.info.bits for name, codes in made.quantized.items() if "encoder.layer" in name} == {1}


def test_two_teachers_count_one_half_each(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = cases.open_bundle(folder)
    student, first, second = np.random.default_rng(0).normal(size=(3, 4, 2)).astype(np.float32)
    monkeypatch.setattr(distillation, "answer", lambda *_: torch.from_numpy(student))

    def loss(*targets: np.ndarray) -> float:
        made = distillation.Distillation(bundle, settings(alpha=1.0), targets, np.ones(4, bool), None, "")
        return float(made.loss({}, np.arange(4)))

    assert loss(first, second) == pytest.approx((loss(first) + loss(second)) / 2, rel=1e-6)


def test_interrupted_training_goes_on_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the first stage, then in the second; with hidden states and static grids."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    made = settings(bits=2, scheme="ternary", step_down=(4, 2), activations="static", hidden_weight=0.5, max_steps=12)

    found = []
    for stops in ((), ("training at 4 bits", "training at 2 bits")):
        work = tmp_path / str(len(stops))
        for what in (*stops, "never"):
            case = Case(folder, work)
            case.context.progress = cases.Stop(what, 2)
            if what == "never":
                bundle = case.run(made)
                scales = [float(codes.input_scale) for codes in bundle.quantized.values() if codes.info.static]
                found.append((cases.weights_hash(bundle.model), scales, case.context.notes))
                assert any("going on from step 2" in line for line in case.context.progress.lines) == bool(stops)
            else:
                with pytest.raises(Interrupted, match=f"{what} stopped; its state at step 2 of [48]"):
                    case.run(made)
    assert found[0] == found[1]


def test_teacher_stays_as_it_was_when_it_is_the_model_at_hand(folder: Path, tmp_path: Path) -> None:
    case = Case(folder, tmp_path)
    bundle = case.bundle()
    case.context.reference = lambda: bundle
    made = case.run(settings(bits=2, scheme="asymmetric", hidden_weight=0.1), bundle)
    other = Case(folder, tmp_path / "other")
    expected = other.run(settings(bits=2, scheme="asymmetric", hidden_weight=0.1))
    assert cases.weights_hash(made.model) == cases.weights_hash(expected.model)


def test_a_named_teacher_is_asked(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    other = tiny("bert", labels=LABELS, seed=7)
    case = Case(folder, tmp_path, validation=None)
    made = case.run(settings(teacher=str(other), alpha=1.0, epochs=5.0))
    theirs, own = np.diff(predict(cases.open_bundle(other), HELD)), np.diff(predict(case.bundle(), HELD))
    now = np.diff(simulated(made))
    assert np.square(now - theirs).mean() < np.square(own - theirs).mean()


def test_the_first_scales_alone_where_there_are_no_steps(folder: Path, tmp_path: Path) -> None:
    made = Case(folder, tmp_path).run(settings(bits=4, epochs=0.0))
    nearest = Case(folder, tmp_path).run(settings(bits=4, method="nearest"))
    float_model = Case(folder, tmp_path).bundle().model
    for name in (f"{name}.weight" for name in surgery.linears(made.model, made.family)):
        one, two = (
            (b.model.get_parameter(name) - float_model.get_parameter(name)).norm().item() for b in (made, nearest)
        )
        assert one < two


def test_refusals_leave_the_model_alone(folder: Path, tiny: Tiny, tmp_path: Path) -> None:
    def refusal(made: QuantizeSettings, **changes: Any) -> str:
        case = Case(folder, tmp_path, **changes)
        bundle = case.bundle()
        before = copy.deepcopy(bundle.model.state_dict())
        with pytest.raises(StepError) as caught:
            case.run(made, bundle)
        assert all(torch.equal(value, before[name]) for name, value in bundle.model.state_dict().items())
        return str(caught.value)

    assert "expected texts to learn from, got none" in refusal(settings(), train=None)
    unlabelled = cases.examples(20, labels=False)
    assert "labelled examples for alpha 0.7, got none" in refusal(settings(), train=unlabelled)
    three = str(tiny("bert", labels=("bad", "fair", "good")))
    assert "student's 2 labels in the student's order" in refusal(settings(teacher=three))
    assert "at least 3 steps for step_down, one a stage, got 2" in refusal(
        settings(bits=2, step_down=(8, 4, 2), max_steps=2)
    )
    assert "at most 64 tokens" in refusal(settings(), train=cases.examples(8, low=70, high=80))


def test_settings_say_what_does_not_go_together() -> None:
    for values, text in (
        ({"step_down": (8, 4), "bits": 4}, "step_down goes with method train"),
        ({"method": "train", "step_down": (8, 4), "bits": 2}, "ends at bits, which is 2"),
        ({"method": "train", "step_down": (8, 4), "bits": 8}, "ends at bits, which is 8"),
        ({"method": "train", "step_down": (4, 8), "bits": 8}, "falls from bits to fewer bits"),
        ({"method": "train", "step_down": (9, 8), "bits": 8}, "less than or equal to 8"),
        ({"method": "train", "activations": "binary"}, "'none', 'dynamic', 'token' or 'static'"),
        ({"method": "train", "granularity": "group", "activations": "none"}, "learns a scale per channel"),
    ):
        with pytest.raises(SettingsError, match=text):
            QuantizeSettings.read(values, "quantize")
    assert QuantizeSettings.read({"method": "train", "bits": 2, "step_down": [8, 4, 2]}, "q").step_down == (8, 4, 2)


def test_a_loss_that_is_no_number_stops_clearly(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._Aware.loss
    calls: list[int] = []

    def spoilt(self: Any, batch: Any, indices: Any) -> Any:
        calls.append(1)
        return real(self, batch, indices) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(module._Aware, "loss", spoilt)
    with pytest.raises(TrainingError, match="a finite loss at step 3 of 16"):
        Case(folder, tmp_path).run(settings())
