from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="distillation needs the extra `compress`")

import training_cases as cases  # noqa: E402
from distill_cases import SETTINGS, School, small_school  # noqa: E402
from flyweight.data import join, pack  # noqa: E402
from flyweight.errors import Interrupted, StepError  # noqa: E402
from flyweight.methods.distill import distill, student  # noqa: E402
from flyweight.models.surgery import blocks  # noqa: E402
from flyweight.training import distillation, loop, losses, pair, predict  # noqa: E402
from flyweight.training.teacher import answers, identity, tap  # noqa: E402

# losses by hand: numbers from the math module alone


def softmax(row: list[float], temperature: float) -> list[float]:
    shares = [math.exp(value / temperature) for value in row]
    return [share / sum(shares) for share in shares]


def kl_by_hand(teacher: list[list[float]], mine: list[list[float]], temperature: float) -> float:
    total = 0.0
    for wanted, given in zip(teacher, mine, strict=True):
        p, q = softmax(wanted, temperature), softmax(given, temperature)
        total += sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    return temperature**2 * total / len(teacher)


def ce_by_hand(mine: list[list[float]], labels: list[int]) -> float:
    return sum(-math.log(softmax(row, 1.0)[label]) for row, label in zip(mine, labels, strict=True)) / len(mine)


TEACHER = [[2.0, -1.0], [0.5, 0.25], [-3.0, 1.0]]
STUDENT = [[0.3, 0.1], [-1.0, 2.0], [0.0, 0.7]]
LABELS = [0, 1, 1]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 7.5])
def test_soft_targets_by_hand(temperature: float) -> None:
    found = losses.soft_targets(torch.tensor(STUDENT), torch.tensor(TEACHER), temperature)
    assert float(found) == pytest.approx(kl_by_hand(TEACHER, STUDENT, temperature), rel=1e-5)


def test_soft_targets_of_one_pair_to_the_last_digit() -> None:
    """T = 1, teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln(3/2) + 1/4 ln(1/2) = 0.1308120."""
    found = losses.soft_targets(torch.zeros(1, 2), torch.tensor([[math.log(3.0), 0.0]]), 1.0)
    assert float(found) == pytest.approx(0.1308120, abs=1e-6)
    assert float(losses.soft_targets(torch.tensor(TEACHER), torch.tensor(TEACHER), 3.0)) == pytest.approx(0, abs=1e-6)


def test_gradient_keeps_its_size_when_the_temperature_changes() -> None:
    """What T^2 is for: for T to infinity it tends to that of MSE on centred logits / classes (Hinton et al., eq. 4)."""
    for temperature in (20.0, 200.0):
        given = torch.tensor(STUDENT, requires_grad=True)
        losses.soft_targets(given, torch.tensor(TEACHER), temperature).backward()
        centred = (
            [[v - sum(row) / 2 for v in row] for row in STUDENT],
            [[v - sum(row) / 2 for v in row] for row in TEACHER],
        )
        limit = [[(a - b) / 2 / 3 for a, b in zip(*rows, strict=True)] for rows in zip(*centred, strict=True)]
        np.testing.assert_allclose(given.grad.numpy(), limit, rtol=0.1, atol=0.01)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_objective_by_hand(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, alpha: float, temperature: float
) -> None:
    bundle = cases.open_bundle(tiny("bert", labels=("negative", "positive")))
    settings = SETTINGS.model_copy(update={"alpha": alpha, "temperature": temperature})
    monkeypatch.setattr(distillation, "answer", lambda *_: torch.tensor(STUDENT))
    targets = np.array([[9.0, 9.0], *TEACHER], np.float32)  # by example: row 0 is not in the batch
    for labelled in ([True] * 4, [False, True, False, True], [False] * 4):
        made = distillation.Distillation(bundle, settings, (targets,), np.array(labelled), None, "")
        batch = {
            "labels": torch.tensor([label if has else -100 for label, has in zip(LABELS, labelled[1:], strict=True)])
        }
        kept = [i for i in range(3) if labelled[i + 1]]
        hard = ce_by_hand([STUDENT[i] for i in kept], [LABELS[i] for i in kept]) * len(kept) / 3 if kept else 0.0
        expected = (1 - alpha) * hard + alpha * kl_by_hand(TEACHER, STUDENT, temperature)
        assert float(made.loss(batch, np.array([1, 2, 3]))) == pytest.approx(expected, rel=1e-5)


def test_hidden_states_by_hand_leave_padding_out() -> None:
    mine = [torch.tensor([[[1.0, 2.0], [3.0, 4.0]]]), torch.tensor([[[0.0, 0.0], [9.0, 9.0]]])]
    theirs = [torch.tensor([[[1.5, 2.0], [77.0, 77.0]]]), torch.tensor([[[1.0, 2.0], [77.0, 77.0]]])]
    maps = losses.projections(2, 2, 2)
    found = losses.hidden_states(mine, theirs, list(maps), torch.tensor([[1, 0]]))
    assert float(found) == pytest.approx(((0.25 + 0) / 2 + (1 + 4) / 2) / 2)
    assert not list(maps.parameters())
    other = losses.projections(2, 2, 3)
    assert [tuple(p.shape) for p in other.parameters()] == [(3, 2), (3, 2)]


def test_cosine_by_hand() -> None:
    found = losses.cosine(torch.tensor([[1.0, 0.0], [3.0, 4.0]]), torch.tensor([[0.0, 2.0], [3.0, 4.0]]))
    assert float(found) == pytest.approx(0.5)


# who learns and from which layer


def test_layers_to_keep() -> None:
    assert student.kept_layers("all", 3) == [0, 1, 2]
    assert student.kept_layers("every-other", 6) == [0, 2, 4]
    assert student.kept_layers("every-other", 5) == [0, 2, 4]
    assert student.kept_layers((1, 4), 6) == [1, 4]
    for wrong, text in (((0, 6), "from 0 to 5, got layer 6"), ((-1,), "layer -1"), ((), "an empty list")):
        with pytest.raises(StepError, match=text):
            student.kept_layers(wrong, 6)
    for wrong in ((2, 1), (1, 1)):
        with pytest.raises(StepError, match="rising order, each once"):
            student.kept_layers(wrong, 6)


def test_layer_map() -> None:
    assert pair.layer_map(None, 3, 6) == [1, 3, 5]
    assert pair.layer_map(None, 4, 12) == [2, 5, 8, 11]
    assert pair.layer_map(None, 2, 5) == [2, 4]
    assert pair.layer_map(None, 6, 6) == [0, 1, 2, 3, 4, 5]
    assert pair.layer_map(None, 6, 3) == [0, 0, 1, 1, 2, 2]
    assert pair.layer_map((0, 0, 5), 3, 6) == [0, 0, 5]
    with pytest.raises(StepError, match="3 numbers in layer_map, one a student layer, got 2"):
        pair.layer_map((0, 1), 3, 6)
    with pytest.raises(StepError, match="teacher layers from 0 to 5 in layer_map, got 6"):
        pair.layer_map((0, 1, 6), 3, 6)


# the step


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("bert", labels=("negative", "positive"))


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "roberta", "electra", "mpnet"])
def test_student_comes_nearer_to_its_teacher(tiny: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    school = School(tiny(model_type, labels=("negative", "positive")), tmp_path, validation=None)
    settings = SETTINGS.model_copy(update={"alpha": 1.0, "hidden_weight": 0.1, "epochs": 4.0})
    data, bundle = school.context.train, school.bundle()
    wanted = np.diff(predict(bundle, data))  # shares depend on differences of logits alone
    first = copy.deepcopy(bundle)
    student.keep_layers_of(first, {"encoder": [0, 2]})
    before = np.square(np.diff(predict(first, data)) - wanted).mean()
    found = distill(bundle, settings, school.context)
    assert [len(stack) for stack in blocks(found.model, found.family).values()] == [2]
    assert np.square(np.diff(predict(found, data)) - wanted).mean() < 0.7 * before
    json.dumps(school.context.notes, allow_nan=False)


def test_teacher_answers_are_kept_and_a_second_run_never_asks(folder: Path, tmp_path: Path) -> None:
    hashes = []
    for number in range(2):
        school = School(folder, tmp_path)
        school.context.work = tmp_path / f"work{number}"
        hashes.append(cases.weights_hash(distill(school.bundle(), SETTINGS, school.context).model))
        assert (school.calls > 0) == (number == 0)
        assert school.context.notes["teacher_metric"] is not None
    assert hashes[0] == hashes[1]
    files = sorted((tmp_path / "cache").iterdir())
    assert [path.suffix for path in files] == [".npy", ".npy"]  # training and validation examples
    relabelled = School(folder, tmp_path, train=replace(cases.examples(64), labels=np.zeros(64, np.int64)))
    relabelled.context.work = tmp_path / "work3"
    distill(relabelled.bundle(), SETTINGS, relabelled.context)
    assert relabelled.calls == 0  # the teacher does not see labels
    files[0].write_bytes(files[0].read_bytes()[:100])
    again = School(folder, tmp_path)
    again.context.work = tmp_path / "work4"
    again.context.progress = notes = cases.Notes()
    assert cases.weights_hash(distill(again.bundle(), SETTINGS, again.context).model) == hashes[0]
    assert again.calls > 0
    assert any("damaged" in line for line in notes.lines)


def test_another_teacher_is_another_cache_entry(folder: Path, tmp_path: Path) -> None:
    bundle, data = cases.open_bundle(folder), cases.examples(5)
    key = identity(bundle)
    first = answers(bundle, key, data, tmp_path, cases.Notes(), "cpu")
    with torch.no_grad():
        bundle.model.classifier.bias[0] += 1.0
    assert identity(bundle) != key
    assert identity(replace(bundle, activations="dynamic")) != identity(bundle)
    second = answers(bundle, identity(bundle), data, tmp_path, cases.Notes(), "cpu")
    np.testing.assert_allclose(second - first, [[1.0, 0.0]] * 5, atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 2


def test_control_is_the_same_student_without_the_teacher(folder: Path, tmp_path: Path) -> None:
    school = School(folder, tmp_path / "a")
    settings = SETTINGS.model_copy(update={"control": True, "alpha": 1.0})
    plain = distill(school.bundle(), settings, school.context)
    notes = school.context.notes
    assert notes["control"]["steps"] == notes["steps"] == 16
    assert notes["control"]["best_metric"] is not None
    assert notes["control"]["history"] != notes["history"]
    # the control by another way: no teacher in the loss at all
    alone = School(folder, tmp_path / "b")
    distill(alone.bundle(), SETTINGS.model_copy(update={"alpha": 0.0}), alone.context)
    assert alone.context.notes["history"] == notes["control"]["history"]
    # and it is the distilled one that is given back
    without = School(folder, tmp_path / "c")
    expected = distill(without.bundle(), SETTINGS.model_copy(update={"alpha": 1.0}), without.context)
    assert cases.weights_hash(plain.model) == cases.weights_hash(expected.model)


def test_control_with_unlabelled_texts_takes_as_many_steps(folder: Path, tmp_path: Path) -> None:
    school = School(folder, tmp_path, unlabelled=cases.examples(30, seed=5, labels=False))
    distill(school.bundle(), SETTINGS.model_copy(update={"control": True}), school.context)
    notes = school.context.notes
    assert notes["steps"] == notes["control"]["steps"] == 2 * math.ceil(94 / 8)


def test_interrupted_distillation_goes_on_bit_for_bit(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the distilled run, then in the control; with learned projections and hidden states."""
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    settings = SETTINGS.model_copy(update={"control": True, "hidden_weight": 1.0, "student": "small", "layers": "all"})

    ends = []
    for stops in ((), ("distilling", "control without teacher")):
        work = tmp_path / str(len(stops))
        for what in (*stops, "never"):
            school = small_school(folder, work)
            school.context.progress = cases.Stop(what, 5)
            if what == "never":
                found = distill(school.bundle(), settings, school.context)
                ends.append((cases.weights_hash(found.model), school.context.notes))
            else:
                with pytest.raises(Interrupted, match=f"{what} stopped; its state at step 5 of 16"):
                    distill(school.bundle(), settings, school.context)
    assert ends[0] == ends[1]


def test_student_of_its_own_width_learns_hidden_states_through_a_map(folder: Path, tmp_path: Path) -> None:
    school = small_school(folder, tmp_path)
    settings = SETTINGS.model_copy(
        update={"student": "small", "layers": "all", "alpha": 0.0, "hidden_weight": 1.0, "epochs": 6.0}
    )
    settings = settings.model_copy(update={"layer_map": (0, 3), "learning_rate": 5e-3})
    found = distill(school.bundle(), settings, school.context)
    assert found.model.config.hidden_size == 16
    history = school.context.notes["history"]
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]


def test_taps_see_what_transformers_calls_hidden_states(folder: Path) -> None:
    bundle = cases.open_bundle(folder)
    ids = torch.tensor([[2, 10, 11, 3]])
    with tap(bundle, [0, 3, 1]) as found:
        bundle.model(input_ids=ids)
    expected = bundle.model(input_ids=ids, output_hidden_states=True).hidden_states
    assert sorted(found) == [0, 1, 3]
    for number, state in found.items():
        torch.testing.assert_close(state, expected[number + 1])
    found.clear()
    bundle.model(input_ids=ids)
    assert not found


def test_unlabelled_texts_alone_and_beside_labelled_ones(folder: Path, tmp_path: Path) -> None:
    extra = cases.examples(20, seed=5, labels=False)
    alone = School(folder, tmp_path / "a", train=None, validation=None, unlabelled=extra)
    distill(alone.bundle(), SETTINGS.model_copy(update={"alpha": 1.0}), alone.context)
    assert alone.context.notes["steps"] == 2 * 3
    both = School(folder, tmp_path / "b", unlabelled=extra)
    distill(both.bundle(), SETTINGS.model_copy(update={"alpha": 0.5}), both.context)
    assert both.context.notes["steps"] == 2 * math.ceil(84 / 8)
    for changes in ({"alpha": 0.5}, {"alpha": 1.0, "control": True}):
        with pytest.raises(StepError, match="labelled examples for (alpha 0.5|control), got none"):
            distill(alone.bundle(), SETTINGS.model_copy(update=changes), alone.context)
    none = School(folder, tmp_path / "c", train=None)
    with pytest.raises(StepError, match="texts to learn from"):
        distill(none.bundle(), SETTINGS, none.context)


def test_join_keeps_every_example() -> None:
    paired = pack([([1, 2, 3], [0, 0, 1])], [1])
    single = pack([([4, 5], None), ([6], None)], None)
    found = join(paired, single)
    assert len(found) == 3
    assert found.labels.tolist() == [1, -100, -100]
    assert [found.take([i]).ids.tolist() for i in range(3)] == [[1, 2, 3], [4, 5], [6]]
    assert found.types.tolist() == [0, 0, 1, 0, 0, 0]
    assert join(single, single).labels is None


@pytest.mark.parametrize("hidden_weight", [0.0, 0.5])
def test_headless_model_learns_its_teachers_vectors(
    tiny: Callable[..., Path], tmp_path: Path, hidden_weight: float
) -> None:
    data = {"train": cases.examples(64, labels=False), "validation": cases.examples(24, seed=1, labels=False)}
    school = School(tiny("bert"), tmp_path, "embedding", **data)
    held, bundle = data["validation"], school.bundle()
    wanted = predict(bundle, held)
    first = copy.deepcopy(bundle)
    student.keep_layers_of(first, {"encoder": [0, 2]})
    before = (predict(first, held) * wanted).sum(-1).mean()
    settings = SETTINGS.model_copy(update={"hidden_weight": hidden_weight, "epochs": 4.0})
    found = distill(bundle, settings, school.context)
    after = (predict(found, held) * wanted).sum(-1).mean()
    assert 1 - after < 0.7 * (1 - before)
    assert school.context.notes["best_metric"] == pytest.approx(after, abs=1e-5)
    assert school.context.notes["teacher_metric"] == pytest.approx(1.0, abs=1e-5)
    with pytest.raises(StepError, match="a task with labels for a control run"):
        distill(bundle, settings.model_copy(update={"control": True}), school.context)


def test_zeros_survive_and_follow_their_layer(folder: Path, tmp_path: Path) -> None:
    school = School(folder, tmp_path)
    bundle, name = school.bundle(), "bert.encoder.layer.{}.output.dense.weight"
    for layer in (1, 2):
        with torch.no_grad():
            bundle.model.get_parameter(name.format(layer))[::2] = 0.0
    bundle.sparse = {name.format(1): "unstructured", name.format(2): "unstructured"}
    found = distill(bundle, SETTINGS, school.context)
    assert found.sparse == {name.format(1): "unstructured"}  # layer 2 is now layer 1; layer 1 is gone
    weight = found.model.get_parameter(name.format(1))
    assert bool((weight[::2] == 0).all())
    assert not bool((weight[1::2] == 0).any())


def test_teacher_stays_whole_when_it_is_the_model_at_hand(folder: Path, tmp_path: Path) -> None:
    school = School(folder, tmp_path)
    bundle = school.bundle()
    bundle.model.train()
    before = cases.weights_hash(bundle.model)
    school.context.reference = lambda: bundle
    found = distill(bundle, SETTINGS, school.context)
    assert found.model is not bundle.model
    assert cases.weights_hash(bundle.model) == before
    assert bundle.model.training
    assert all(parameter.grad is None for parameter in bundle.model.parameters())


def test_teacher_from_a_folder(folder: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(folder, tmp_path)
    other = tiny("bert", labels=("negative", "positive"), seed=7)
    settings = SETTINGS.model_copy(update={"teacher": str(other)})
    distill(school.bundle(), settings, school.context)
    assert school.loads == [str(other)]
    assert school.calls == 0


def test_what_does_not_fit_is_refused_before_anything_runs(
    folder: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    school = School(folder, tmp_path)
    three = str(tiny("bert", labels=("bad", "fair", "good")))
    swapped = str(tiny("bert", labels=("positive", "negative")))
    roberta = str(tiny("roberta", labels=("negative", "positive")))
    size = len(school.bundle().encoder.tokenizer.get_vocab())
    theirs = len(cases.open_bundle(Path(roberta)).encoder.tokenizer.get_vocab())
    assert size != theirs
    for changes, text in (
        ({"teacher": three}, r"student's 2 labels in the student's order, got one with 3 labels \(teacher \['bad'"),
        ({"teacher": swapped}, r"2 labels .* got one with 2 labels \(teacher \['positive', 'negative'\]"),
        ({"teacher": roberta}, rf"same tokens as the model at hand \({size} of them\), got a vocabulary of {theirs}"),
        ({"student": roberta}, rf"same tokens as the model at hand \({size} of them\), got a vocabulary of {theirs}"),
        ({"layers": (0, 4)}, "layers from 0 to 3, got layer 4"),
        ({"layer_map": (0, 1)}, "hidden_weight above 0"),
        ({"layer_map": (0, 1, 2), "hidden_weight": 1.0}, "2 numbers in layer_map"),
    ):
        with pytest.raises(StepError, match=text):
            distill(school.bundle(), SETTINGS.model_copy(update=changes), school.context)
    packed = replace(school.bundle(), quantized={"classifier.weight": object()})  # type: ignore[dict-item]
    with pytest.raises(StepError, match="student with float weights, got 1 quantized"):
        distill(packed, SETTINGS, school.context)
    long = School(folder, tmp_path, train=cases.examples(8, low=70, high=80))
    with pytest.raises(StepError, match=r"at most 64 tokens, the limit of student and teacher, got one of 7\d"):
        distill(long.bundle(), SETTINGS, long.context)
    assert not (tmp_path / "work").exists()
    assert school.calls == 0


def test_same_size_but_other_words_is_no_common_vocabulary(folder: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer

    school = School(folder, tmp_path)
    teacher = school.bundle()
    content = json.loads(teacher.encoder.tokenizer.to_str())
    content["model"]["vocab"] = {
        token[::-1] if token.isalpha() else token: i for token, i in content["model"]["vocab"].items()
    }
    teacher.encoder = teacher.encoder._replace(tokenizer=Tokenizer.from_str(json.dumps(content)))
    school.context.reference = lambda: teacher
    with pytest.raises(StepError, match=r"vocabulary of \d+, \d+ of which agree"):
        distill(school.bundle(), SETTINGS, school.context)


def test_vectors_of_another_width_are_refused(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("bert"), tmp_path, "embedding")
    narrow = str(tiny("bert", hidden_size=16))
    with pytest.raises(StepError, match="teacher's width 32, got 16"):
        distill(school.bundle(), SETTINGS.model_copy(update={"student": narrow}), school.context)
