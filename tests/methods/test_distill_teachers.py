"""Who is asked, about what, and what is kept of the answers: several teachers, the likeliest classes, changed texts."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="distillation needs the extra `compress`")

import training_cases as cases  # noqa: E402
from distill_cases import SETTINGS, School  # noqa: E402
from flyweight.errors import Interrupted, SettingsError, StepError  # noqa: E402
from flyweight.methods.distill import distill  # noqa: E402
from flyweight.settings import DistillSettings  # noqa: E402
from flyweight.training import distillation, loop, losses, predict  # noqa: E402
from flyweight.training.augment import Changes  # noqa: E402
from flyweight.training.teacher import Top, identity, top, top_answers  # noqa: E402

LABELS = ("negative", "positive")


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("bert", labels=LABELS)


def changed(**changes: Any) -> DistillSettings:
    return DistillSettings(**{**SETTINGS.model_dump(), **changes})


# the objective by hand


GIVEN = torch.tensor([[0.3, 0.1, -0.5], [-1.0, 2.0, 0.2], [0.0, 0.7, 0.4]])
FIRST = np.array([[2.0, -1.0, 0.0], [0.5, 0.25, 1.0], [-3.0, 1.0, 0.5]], np.float32)
SECOND = np.array([[0.0, 1.0, 2.0], [1.5, 0.0, -1.0], [0.1, 0.2, 0.3]], np.float32)
LABEL = torch.tensor([0, 1, 1])


def objective(folder: Path, monkeypatch: pytest.MonkeyPatch, targets: Any, **more: Any) -> float:
    """The loss of a student whose logits are GIVEN, at these settings."""
    shares, bundle = more.pop("shares", None), cases.open_bundle(folder)
    monkeypatch.setattr(distillation, "answer", lambda *_: GIVEN)
    made = distillation.Distillation(bundle, changed(**more), targets, np.ones(3, bool), None, "", shares=shares)
    return float(made.loss({"labels": LABEL}, np.arange(3)))


def test_answers_are_compared_in_every_way_that_has_a_weight(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted, hard = torch.from_numpy(FIRST), float(torch.nn.functional.cross_entropy(GIVEN, LABEL))
    kl = {kind: float(losses.soft_targets(GIVEN, wanted, 3.0, kind)) for kind in ("forward", "reverse", "skew")}
    dist, mse = float(losses.dist(GIVEN, wanted, 3.0)), float(losses.logits(GIVEN, wanted))
    assert len({round(value, 6) for value in kl.values()}) == 3
    base: dict[str, Any] = {"alpha": 0.6, "temperature": 3.0}
    for more, answers in (
        ({}, kl["forward"]),
        ({"kl": "reverse"}, kl["reverse"]),
        ({"kl": "skew", "mse_weight": 0.5}, kl["skew"] + 0.5 * mse),
        ({"kl": "none", "dist_weight": 2.0}, 2 * dist),
        ({"dist_weight": 2.0, "mse_weight": 0.5}, kl["forward"] + 2 * dist + 0.5 * mse),
    ):
        found = objective(folder, monkeypatch, [FIRST], **base, **more)
        assert found == pytest.approx(0.4 * hard + 0.6 * answers, rel=1e-5)
    assert objective(folder, monkeypatch, [], **base, kl="none") == pytest.approx(0.4 * hard, rel=1e-5)


def test_teachers_count_by_their_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = (float(losses.soft_targets(GIVEN, torch.from_numpy(x), 2.0)) for x in (FIRST, SECOND))
    base = {"alpha": 1.0, "temperature": 2.0}
    found = objective(folder, monkeypatch, [FIRST, SECOND], **base)
    assert found == pytest.approx((one + two) / 2, rel=1e-5)
    found = objective(folder, monkeypatch, [FIRST, SECOND], **base, shares=[0.2, 0.8])
    assert found == pytest.approx(0.2 * one + 0.8 * two, rel=1e-5)
    values, indices, rest = top(torch.from_numpy(SECOND), 1, 2.0)
    kept = Top(values.numpy(), indices.numpy().astype(np.int32), rest.numpy())
    less = float(losses.top_targets(GIVEN, values, indices, rest, 2.0))
    assert less < two
    assert objective(folder, monkeypatch, [FIRST, kept], **base) == pytest.approx((one + less) / 2, rel=1e-5)


# several teachers


def test_several_teachers_are_each_asked_once_and_weighed(
    folder: Path, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    other = str(tiny("bert", labels=LABELS, seed=7))
    hashes = {}
    for name, more in {
        "alone": {},
        "both": {"more_teachers": (other,)},
        "again": {"more_teachers": (other,), "teacher_weights": (2.0, 2.0)},
        "mostly": {"more_teachers": (other,), "teacher_weights": (3.0, 1.0)},
        "swapped": {"teacher": other, "more_teachers": ("reference",), "teacher_weights": (1.0, 3.0)},
    }.items():
        school = School(folder, tmp_path)
        school.context.work = tmp_path / name
        hashes[name] = cases.weights_hash(distill(school.bundle(), changed(**more), school.context).model)
        assert (school.calls > 0) == (name == "alone")  # what was kept is found again
    assert hashes["both"] == hashes["again"]
    assert len({hashes[name] for name in ("alone", "both", "mostly")}) == 3
    files = sorted((tmp_path / "cache").iterdir())
    assert len(files) == 4  # training examples twice, and validation examples of whoever stands first


def test_every_teacher_has_to_fit(folder: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(folder, tmp_path)
    three = str(tiny("bert", labels=("bad", "fair", "good")))
    with pytest.raises(StepError, match="student's 2 labels in the student's order, got one with 3 labels"):
        distill(school.bundle(), changed(more_teachers=(three,)), school.context)
    assert school.calls == 0


# the likeliest classes


def test_top_classes_are_kept_with_the_rest(tiny: Callable[..., Path], tmp_path: Path) -> None:
    labels = tuple(f"label {i}" for i in range(7))
    bundle, data = cases.open_bundle(tiny("bert", labels=labels)), cases.examples(11)
    logits = torch.from_numpy(predict(bundle, data))
    for k in (1, 3, 7):
        found = top_answers(bundle, identity(bundle), data, tmp_path, cases.Notes(), "cpu", k=k, temperature=2.0)
        shares = torch.softmax(logits.double() / 2, -1)
        values, order = shares.topk(k)
        np.testing.assert_array_equal(found.indices, order.numpy())
        np.testing.assert_allclose(np.exp(found.values), values.numpy(), rtol=1e-4)
        np.testing.assert_allclose(np.exp(found.rest), 1 - values.sum(-1).numpy(), atol=1e-6)
    assert len(list(tmp_path.iterdir())) == 3
    top_answers(bundle, identity(bundle), data, tmp_path, cases.Notes(), "cpu", k=3, temperature=4.0)
    assert len(list(tmp_path.iterdir())) == 4  # the mass of the rest is one at a temperature


@pytest.mark.parametrize("harm", ["cut", "flipped", "emptied"])
def test_a_damaged_cache_of_top_classes_is_made_again(folder: Path, tmp_path: Path, harm: str) -> None:
    bundle, data = cases.open_bundle(folder), cases.examples(40)

    def ask(notes: cases.Notes) -> Top:
        return top_answers(bundle, identity(bundle), data, tmp_path, notes, "cpu", k=1, temperature=2.0)

    first, quiet = ask(cases.Notes()), cases.Notes()
    ask(quiet)
    assert not quiet.lines
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[200] ^= 4  # in the first array's data: read without checksums it would be another number
    path.write_bytes({"cut": whole[:300], "flipped": bytes(flipped), "emptied": b""}[harm])
    notes = cases.Notes()
    again = ask(notes)
    assert any("damaged" in line for line in notes.lines)
    assert any("asking the teacher" in line for line in notes.lines)
    np.testing.assert_array_equal(again.values, first.values)
    assert path.read_bytes() == whole


def test_all_classes_kept_teach_as_whole_answers_do(folder: Path, tmp_path: Path) -> None:
    histories = []
    for k in (None, 2, 1):
        school = School(folder, tmp_path / str(k))
        distill(school.bundle(), changed(top_k=k, alpha=1.0), school.context)
        histories.append([entry["loss"] for entry in school.context.notes["history"]])
        suffixes = {path.suffix for path in (tmp_path / str(k) / "cache").iterdir()}
        assert suffixes == ({".npy"} if k is None else {".npy", ".npz"})  # whole ones of the validation examples
    np.testing.assert_allclose(histories[1], histories[0], rtol=1e-3)
    np.testing.assert_allclose(histories[2], histories[0], rtol=1e-3)  # of two classes the rest is the other one
    school = School(folder, tmp_path / "many")
    with pytest.raises(StepError, match="top_k of at most the teacher's 2 classes, got 3"):
        distill(school.bundle(), changed(top_k=3), school.context)


# changed texts


def changes_of(folder: Path, rate: float, seed: int = 0) -> tuple[Changes, Any, Any]:
    bundle, data = cases.open_bundle(folder), cases.examples(200, low=15, high=30)
    return Changes.of(rate, seed, data, bundle), bundle, data


def test_changes_are_as_many_and_of_the_kind_that_is_said(folder: Path) -> None:
    changes, bundle, data = changes_of(folder, 0.3)
    mask = bundle.tokenizer.mask_token_id
    total = masked = other = 0
    for index in range(len(data)):
        ids = data.ids[data.starts[index] : data.starts[index + 1]].astype(np.int64)
        found = changes.change(ids, index, 0)
        total += len(ids)
        masked += int((found == mask).sum())
        other += int(((found != ids) & (found != mask)).sum())
    assert masked / total == pytest.approx(0.15, abs=0.02)
    assert other / total == pytest.approx(0.15, abs=0.02)  # a drawn token is seldom the old one
    assert set(changes.pool.tolist()) <= set(data.ids.tolist())
    assert mask not in changes.pool


def test_special_tokens_and_padding_stay(folder: Path) -> None:
    changes, bundle, _ = changes_of(folder, 0.9)
    special = sorted(bundle.tokenizer.all_special_ids)
    ids = np.array([special[2], *range(20, 40), special[3], special[0]])
    for epoch in range(20):
        found = changes.change(ids, 0, epoch)
        assert found[[0, -2, -1]].tolist() == ids[[0, -2, -1]].tolist()
        assert (found[1:-2] != ids[1:-2]).any()
        assert not set(found[1:-2].tolist()) & (set(special) - {bundle.tokenizer.mask_token_id})


def test_a_text_changes_by_its_number_and_epoch_alone(folder: Path) -> None:
    changes, bundle, data = changes_of(folder, 0.4)
    alone = {}
    for index in (3, 50, 7):
        batch = {name: torch.from_numpy(x) for name, x in data.batch([index], bundle.encoder.pad).items()}
        alone[index] = changes.apply(batch, np.array([index]), 2)["input_ids"][0]
    together = {name: torch.from_numpy(x) for name, x in data.batch([50, 7, 3], bundle.encoder.pad).items()}
    found = changes.apply(together, np.array([50, 7, 3]), 2)
    for row, index in enumerate((50, 7, 3)):
        length = int(together["attention_mask"][row].sum())
        assert found["input_ids"][row, :length].tolist() == alone[index].tolist()
        assert (found["input_ids"][row, length:] == bundle.encoder.pad).all()
    other = changes.apply(together, np.array([50, 7, 3]), 3)["input_ids"]
    assert not torch.equal(other, found["input_ids"])
    assert not torch.equal(changes.apply(together, np.array([51, 7, 3]), 2)["input_ids"][0], found["input_ids"][0])
    assert torch.equal(found["attention_mask"], together["attention_mask"])
    without = Changes(changes.rate, changes.seed, changes.pool, changes.special, None)
    ids = data.ids[: data.starts[1]].astype(np.int64)
    assert set(without.change(ids, 0, 0).tolist()) <= set(changes.pool.tolist()) | set(ids.tolist())


def test_the_teacher_is_asked_about_what_the_student_sees(folder: Path, tmp_path: Path) -> None:
    """Teacher's half: changed texts for both, anew in every epoch; label's half: the texts of the data."""
    school = School(folder, tmp_path, validation=None)
    data, asked, seen = school.context.train, list[Any](), list[Any]()
    teacher, student = school.reference(), school.bundle()
    teacher.model.register_forward_pre_hook(lambda _, __, given: asked.append(given["input_ids"]), with_kwargs=True)
    student.model.register_forward_pre_hook(lambda _, __, given: seen.append(given["input_ids"]), with_kwargs=True)
    school.context.reference = lambda: teacher
    distill(student, changed(augment=0.3, layers="all", alpha=0.5, hidden_weight=0.1), school.context)
    assert len(asked) == 2 * 8  # one pass a step, answers and hidden states together
    assert not (tmp_path / "cache").exists()
    halves = seen[0::2], seen[1::2]
    assert all(torch.equal(a, b) for a, b in zip(asked, halves[0], strict=True))
    texts = [data.take([i]).ids.tolist() for i in range(len(data))]

    def unchanged(batches: list[Any]) -> int:
        found = [[x for x in row if x != 0] for batch in batches for row in batch.tolist()]
        return sum(row in texts for row in found)

    assert unchanged(halves[1]) == 2 * 64
    assert unchanged(halves[0]) < 64
    ordered = [sorted(map(tuple, (row for batch in part for row in batch.tolist()))) for part in (asked[:8], asked[8:])]
    assert ordered[0] != ordered[1]


def test_without_labels_in_the_loss_one_pass_is_enough(folder: Path, tmp_path: Path) -> None:
    school = School(folder, tmp_path, validation=None)
    student, seen = school.bundle(), list[Any]()
    student.model.register_forward_pre_hook(lambda *_: seen.append(1))
    distill(student, changed(augment=0.2, alpha=1.0, layers="all"), school.context)
    assert (len(seen), school.calls) == (16, 16)


def test_several_teachers_answer_changed_texts(folder: Path, tiny: Callable[..., Path], tmp_path: Path) -> None:
    other = str(tiny("bert", labels=LABELS, seed=7))
    school = School(folder, tmp_path)
    distill(school.bundle(), changed(augment=0.2, more_teachers=(other,), teacher_weights=(1.0, 3.0)), school.context)
    alone = School(folder, tmp_path / "alone")
    distill(alone.bundle(), changed(augment=0.2), alone.context)
    assert school.context.notes["history"] != alone.context.notes["history"]


def test_changes_go_on_where_a_stopped_run_was(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    settings = changed(augment=0.3, hidden_weight=0.5)
    ends = []
    for stops in ((), (5, 11)):
        for step in (*stops, 0):
            school = School(folder, tmp_path / str(len(stops)))
            school.context.progress = cases.Stop("distilling", step)
            if step:
                with pytest.raises(Interrupted, match=f"state at step {step} of 16"):
                    distill(school.bundle(), settings, school.context)
            else:
                found = distill(school.bundle(), settings, school.context)
                ends.append((cases.weights_hash(found.model), school.context.notes))
    assert ends[0] == ends[1]


# the control, and what costs nothing


EVERYTHING = {
    "augment": {"augment": 0.3},
    "inside": {"embedding_weight": 1.0, "attention_weight": 0.1, "relation_weight": 1.0, "relation_heads": 4},
    "answers": {"kl": "skew", "dist_weight": 0.5, "mse_weight": 0.1},
    "top": {"top_k": 1},
    "map": {"layer_map": "last", "hidden_weight": 0.5},
}


@pytest.mark.parametrize("what", EVERYTHING)
def test_the_control_is_the_same_whatever_the_teacher_is_used_for(folder: Path, tmp_path: Path, what: str) -> None:
    """Same start, seed, steps and texts as they are: the history of a training on labels alone."""
    school = School(folder, tmp_path / "a")
    distill(school.bundle(), changed(control=True, **EVERYTHING[what]), school.context)
    alone = School(folder, tmp_path / "b")
    distill(alone.bundle(), changed(alpha=0.0), alone.context)
    assert school.context.notes["control"]["history"] == alone.context.notes["history"]
    assert school.context.notes["history"] != alone.context.notes["history"]
    json.dumps(school.context.notes, allow_nan=False)


def test_the_teacher_answers_only_what_has_a_weight(folder: Path, tmp_path: Path) -> None:
    def calls(**more: Any) -> int:
        school = School(folder, tmp_path, validation=None)
        school.context.work = tmp_path / f"work{len(list(tmp_path.iterdir()))}"
        school.context.work.mkdir()
        distill(school.bundle(), changed(**more), school.context)
        return school.calls

    assert calls(alpha=0.0) == 0
    assert calls(kl="none") == 0
    assert calls() == 1  # 64 texts in one batch
    for more in ({"kl": "reverse"}, {"dist_weight": 1.0}, {"mse_weight": 1.0}, {"temperature": 5.0}):
        assert calls(**more) == 0
    for name in ("hidden", "embedding", "attention", "relation"):
        assert calls(**{f"{name}_weight": 1.0, "relation_heads": 4}) == 16


def test_losses_that_need_labels_or_belong_to_others(tiny: Callable[..., Path], folder: Path, tmp_path: Path) -> None:
    for more, text in (
        ({"alpha": 1.0, "kl": "none"}, "nothing to learn"),
        ({"alpha": 0.0, "augment": 0.1}, "teacher's half"),
        ({"top_k": 1, "augment": 0.1}, "leave out one"),
        ({"top_k": 1, "mse_weight": 0.1}, "leave out top_k"),
        ({"teacher_weights": (1.0, 2.0)}, "one weight a teacher, 1 in all"),
    ):
        with pytest.raises(SettingsError, match=text):
            DistillSettings.read(more, "distill")
    DistillSettings(alpha=1.0, kl="none", hidden_weight=1.0)
    data = {"train": cases.examples(8, labels=False), "validation": None}
    vectors = School(tiny("bert"), tmp_path, "embedding", **data)
    for more in ({"kl": "reverse"}, {"dist_weight": 1.0}, {"mse_weight": 1.0}):
        with pytest.raises(StepError, match="a task with labels for kl, dist_weight and mse_weight, got 'embedding'"):
            distill(vectors.bundle(), changed(**more), vectors.context)
    with pytest.raises(StepError, match="a task with labels for top_k, got 'embedding'"):
        distill(vectors.bundle(), changed(top_k=1), vectors.context)
    distill(vectors.bundle(), changed(augment=0.3), vectors.context)  # by the cosine, and on changed texts
    assert vectors.context.notes["steps"] == 2
    assert vectors.calls == 2
