"""When a cached prefix may be taken, and when it may not; what is refused before long work."""

import json

import pytest

pytest.importorskip("torch", reason="runs need the extra `compress`")

from flyweight import api, artifact
from flyweight.cache import Cache
from flyweight.cli import main
from flyweight.compare import compare, evaluate
from flyweight.errors import ModelError, SettingsError, StepError
from flyweight.job import prepare
from flyweight.plan import make_plan
from flyweight.recipe import Recipe, StepSpec, check_order, read_recipe
from flyweight.run import run_steps
from flyweight.steps import STEPS

QUICK = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
LEARN = ("distill", {**QUICK, "alpha": 1.0})


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    return Cache()


def write(path, label, count=60, column="text"):
    lines = [
        {column: f"{'abcdefghij'[i % 10]} good film {i}", "label": label(i), "other": "a b c"} for i in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def train(tmp_path):
    return write(tmp_path / "train.jsonl", lambda i: ("no", "yes")[i % 2])


def recipe(model, *steps, **given):
    made = tuple(StepSpec(name, STEPS[name].settings.read(values, name)) for name, values in steps)
    return api.make_recipe(Recipe(model=str(model), steps=made), **given)


def test_a_model_in_the_middle_of_finetuning_is_no_reference(tiny, train):
    """Its entry has no engine's file; as the reference of a shorter recipe it has to have one."""
    twice = (("finetune", QUICK), ("finetune", QUICK))
    run_steps(prepare(recipe(tiny("bert"), *twice, train=train, task="text-classification")))
    job = prepare(recipe(tiny("bert"), twice[0], ("quantize", {}), train=train, task="text-classification"))
    assert make_plan(job).rows[0].cached is False
    run_steps(job)
    assert "onnxruntime" in artifact.verify(job.reference_folder).engines


def test_a_damaged_entry_is_made_again(tiny, train):
    whole = recipe(tiny("bert"), ("finetune", QUICK), ("quantize", {}), train=train, task="text-classification")
    job = prepare(whole)
    before = run_steps(job)
    for number in (1, 2):
        path = job.cache.prefix(job.keys[number]) / "model.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 64
        path.write_bytes(content)
        after = run_steps(prepare(whole))
        assert artifact.verify(path.parent)
        assert all((a == b).all() for a, b in zip(before.model.parameters(), after.model.parameters(), strict=True))


def test_further_texts_are_in_the_key_by_what_is_read_of_them(tiny, tmp_path):
    datasets = pytest.importorskip("datasets")
    folder = tmp_path / "texts"

    def keys(texts, **given):
        datasets.Dataset.from_dict({"text": texts, "other": ["b"] * len(texts)}).save_to_disk(str(folder))
        settings = ("distill", {**LEARN[1], "unlabelled": folder})
        return prepare(recipe(tiny("bert", labels=("no", "yes")), settings, **given)).keys

    first = keys(["a film", "a plot"])
    assert keys(["a film", "a plot"]) == first
    assert keys(["a film", "a sea"])[1] != first[1]
    assert keys(["a film", "a plot"], text="other")[1] != first[1]


def test_further_texts_are_in_the_estimate(tiny, train, tmp_path):
    more = write(tmp_path / "more.jsonl", str, count=3000)
    model = tiny("bert", labels=("no", "yes"))
    job = prepare(recipe(model, ("distill", {**LEARN[1], "unlabelled": more}), train=train))
    alone = prepare(recipe(model, LEARN, train=train))
    assert make_plan(job).rows[0].seconds > 5 * make_plan(alone).rows[0].seconds


def test_steps_that_need_labels_are_refused_before_the_others_run(tiny, train):
    for step in (("prune", {"target": "heads", "amount": 0.5, "criterion": "taylor"}), ("finetune", QUICK)):
        with pytest.raises(SettingsError, match=rf"a task with labels for steps\[1\] {step[0]}, got 'embedding'"):
            prepare(recipe(tiny("bert"), LEARN, step, train=train))


def test_groups_that_do_not_divide_are_refused_before_anything_runs(tiny, train):
    """Unless heads or neurons go first: what is left of them may fit."""
    model = tiny("bert", labels=("no", "yes"))
    grouped = {"activations": "none", "granularity": "group", "group_size": 24}
    with pytest.raises(StepError, match="a group_size that divides the 32 inputs of bert"):
        prepare(recipe(model, ("finetune", QUICK), ("quantize", grouped), train=train))
    narrower = ("prune", {"target": "neurons", "amount": 0.25})
    prepare(recipe(model, narrower, ("quantize", grouped), train=train))


def test_packing_twice_is_refused_before_anything_runs():
    twice = [StepSpec(name, STEPS[name].settings()) for name in ("finetune", "quantize", "quantize")]
    with pytest.raises(StepError, match=r"steps\[2\] quantize on float weights, got packed ones"):
        check_order(twice)
    with pytest.raises(StepError, match="quantize once"):
        check_order(twice[1:2], packed=True)


def test_classes_that_a_model_only_numbers_are_found_by_number(tiny, tmp_path):
    data = write(tmp_path / "eval.jsonl", lambda i: i % 2)
    model = tiny("bert", labels=("LABEL_0", "LABEL_1"))
    quick = {"batches": [1], "lengths": [8], "rounds": 3, "leave_out": ["memory", "energy"]}
    api.run_step("quantize", model, out=tmp_path / "small", measure=quick)
    for path in (model, tmp_path / "small"):
        assert 0 <= evaluate(path, data)["quality.accuracy"].value <= 1


def test_paths_of_steps_are_written_absolute_and_the_reference_is_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "reference"):
        (tmp_path / name).mkdir()
    (tmp_path / "more.txt").touch()
    made = recipe("m", ("distill", {"teacher": "teacher", "unlabelled": "more.txt"}), ("distill", {}))
    (tmp_path / "far").mkdir()
    (tmp_path / "far/recipe.yaml").write_text(made.to_yaml())
    (tmp_path / "recipe.yaml").write_text(made.to_yaml())
    for path in ("far/recipe.yaml", "recipe.yaml"):
        first, second = (step.settings for step in read_recipe(path).steps)
        assert first.teacher == str(tmp_path / "teacher")
        assert first.unlabelled == tmp_path / "more.txt"
        assert second.teacher == "reference"


def test_parts_of_a_recipe_are_given_whole_by_name_or_both():
    threads = {"threads": 2}
    for given in ({"measure": threads}, threads, {"measure": Recipe().measure.read(threads, "measure")}):
        made = api.make_recipe(Recipe(), **given, rounds=5, data={"text": "body"})
        assert (made.measure.threads, made.measure.rounds, made.data.text) == (2, 5, "body")
    with pytest.raises(SettingsError, match=r"keys of measure, got 'thread' \(did you mean 'threads'"):
        api.make_recipe(Recipe(), measure={"thread": 2})


@pytest.mark.parametrize("wrong", [{"batches": ()}, {"batches": (0,)}, {"lengths": ()}, {"lengths": (-1, 8)}])
def test_points_that_cannot_be_measured_are_refused_at_once(wrong):
    with pytest.raises(SettingsError, match=f"measure.{next(iter(wrong))}"):
        api.make_recipe(Recipe(), **wrong)


def test_flops_of_different_lengths_are_not_compared(tiny, tmp_path):
    quick = {"batches": [1], "rounds": 3, "leave_out": ["memory", "energy"]}
    model, found = tiny("bert", labels=("no", "yes")), {}
    for length in (8, 16):
        api.run_step("quantize", model, out=tmp_path / f"{length}", measure={**quick, "lengths": [length]})
    measured = Recipe().measure.read({**quick, "lengths": [8]}, "measure")
    for name, other in (("same", 8), ("different", 16)):
        found[name] = compare([tmp_path / "8", tmp_path / f"{other}"], measured=measured)
    assert all("flops" in figures for figures in found["same"].values())
    assert not any("flops" in figures for figures in found["different"].values())


def test_a_packed_model_is_no_reference(tiny, tmp_path):
    quick = {"batches": [1], "lengths": [8], "rounds": 3, "leave_out": ["memory", "energy"]}
    api.run_step("quantize", tiny("bert"), out=tmp_path / "small", measure=quick)
    with pytest.raises(ModelError, match="float weights in .*small, got packed ones"):
        prepare(recipe(tmp_path / "small"))


def test_folders_of_the_maker_are_not_in_the_pages(tiny, train, tmp_path):
    quick = {"batches": [1], "lengths": [8], "rounds": 3, "leave_out": ["memory", "energy"], "include_samples": True}
    made = recipe(tiny("bert"), ("finetune", QUICK), train=train, eval=train, task="text-classification", measure=quick)
    api.run_recipe(made, tmp_path / "out")
    page, card = ((tmp_path / "out" / name).read_text() for name in ("report.html", "README.md"))
    assert str(tmp_path) not in page + card
    assert "train: train.jsonl" in page
    assert str(train) in (tmp_path / "out/recipe.yaml").read_text()
    assert "No row of the data" not in card
    assert main(["report", str(tmp_path / "out"), "--out", str(tmp_path / "again.html")]) == 0
    assert str(tmp_path) not in (tmp_path / "again.html").read_text()


@pytest.mark.parametrize("family", ["llama", "gpt2", "t5"])
def test_models_with_a_decoder_are_refused_before_they_are_trained(tiny, train, family):
    with pytest.raises(ModelError, match=f"families bert, .*mpnet, got '{family}'; .* not compressed yet"):
        prepare(recipe(tiny(family, labels=("no", "yes")), ("finetune", QUICK), train=train))
