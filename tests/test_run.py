"""A whole run on tiny models: cached prefixes, resumption, lineage, refusals, privacy."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

import flyweight
from flyweight import api, artifact
from flyweight.cache import Cache
from flyweight.errors import ArtifactError, FlyweightError, ModelError, SettingsError, StorageError
from flyweight.finish import finish
from flyweight.job import prepare
from flyweight.plan import Plan, PlanRow, make_plan, refuse_what_cannot_fit
from flyweight.recipe import Recipe, StepSpec
from flyweight.run import run_steps
from flyweight.steps import STEPS

QUICK = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3}
MEASURE = {"batches": [1, 2], "lengths": [8], "rounds": 3, "leave_out": ["memory", "energy"]}


class Notes:
    """Keeps what would be shown."""

    def __init__(self):
        self.lines = []

    def track(self, items, what, total=None, done=0):
        self.lines.append(what)
        yield from items

    def note(self, text):
        self.lines.append(text)

    def reused(self):
        return sum("taken from the cache" in line for line in self.lines)


def words(generator, label):
    some = ["river", "train", "garden", "letter"] if label else ["stone", "winter", "table", "cloud"]
    return " ".join(generator.choice(some, generator.integers(2, 7)))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = np.random.default_rng(0)
    for name, count in (("train", 150), ("eval", 60)):
        rows = [{"text": f"{words(generator, i % 2)} zz{name}{i}", "label": ["no", "yes"][i % 2]} for i in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"train": folder / "train.jsonl", "eval": folder / "eval.jsonl"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    return Cache()


def recipe(model, files, *steps, **given):
    made = tuple(StepSpec(name, STEPS[name].settings.read(values, name)) for name, values in steps)
    given = {"measure": Recipe().measure.read(MEASURE, "measure"), "task": "text-classification", **files, **given}
    return api.make_recipe(Recipe(model=str(model), steps=made), **given)


ALL = (
    ("finetune", QUICK),
    ("distill", {**QUICK, "layers": [0, 2]}),
    ("prune", {"target": "heads", "amount": 0.25, "criterion": "taylor", "samples": 32}),
    ("prune", {"target": "neurons", "amount": 0.25}),
    ("prune", {"target": "weights", "amount": 0.5}),
    ("quantize", {"bits": 8}),
)


def test_all_four_techniques_in_one_run(tiny, files, tmp_path):
    notes = Notes()
    out = tmp_path / "out"
    manifest = api.run_recipe(recipe(tiny("bert"), files, *ALL, max_drop=0.9, leave_out=()), out, progress=notes)
    assert artifact.verify(out) == manifest
    assert [step.name for step in manifest.steps] == [name for name, _ in ALL]
    assert all("parameters" in step.notes["after"] and "quality" in step.notes["after"] for step in manifest.steps)
    assert len(manifest.blocks["encoder"]) == 2
    assert [len(block.heads[0]) for block in manifest.blocks["encoder"]] == [3, 3]
    assert manifest.labels == ("no", "yes")
    assert manifest.quantized
    assert manifest.sparse
    assert manifest.verdict.accepted
    assert {p.name for p in out.iterdir()} >= {
        "flyweight.json",
        "recipe.yaml",
        "README.md",
        "report.html",
        "onnx",
        "model.safetensors",
    }
    figures = manifest.measurements
    assert set(figures) == {"reference_torch", "reference_onnxruntime", "result"}
    for key in [
        "parameters",
        "nonzero_parameters",
        "flops",
        "bytes",
        "artifact_bytes",
        "peak_memory_bytes",
        "latency_ms.p50@1x8",
        "latency_ms.p90@1x8",
        "latency_ms.p99@2x8",
        "throughput_per_s@2x8",
        "energy_j_per_item",
        "co2e_g_per_item",
        "cost_per_million",
        "quality.accuracy",
        "quality.macro_f1",
    ]:
        assert all(key in row and row[key].value > 0 and row[key].method for row in figures.values()), key
    assert "quality.accuracy.difference" in figures["result"]
    result = figures["result"]
    assert result["artifact_bytes"].value == sum(p.stat().st_size for p in out.rglob("*") if p.is_file())
    assert result["parameters"].value < figures["reference_torch"]["parameters"].value
    assert result["nonzero_parameters"].value < result["parameters"].value
    assert result["flops"].value < figures["reference_torch"]["flops"].value


def test_no_row_of_the_data_leaves_it(tiny, files, tmp_path):
    out = tmp_path / "out"
    notes = Notes()
    api.run_recipe(recipe(tiny("bert"), files, *ALL[:1]), out, progress=notes)
    for path in out.rglob("*"):
        if path.is_file() and path.name != "tokenizer.json":
            content = path.read_bytes()
            assert b"zztrain" not in content, path
            assert b"zzeval" not in content, path
    assert not any("zz" in line for line in notes.lines)


def test_rows_appear_only_where_they_were_asked_for(tiny, files, tmp_path):
    coarse = ("quantize", {"bits": 2, "activations": "none", "embeddings": 2})
    asked = recipe(tiny("bert"), files, *ALL[:1], coarse, include_samples=True)
    manifest = api.run_recipe(asked, tmp_path / "out")
    page = (tmp_path / "out/report.html").read_text()
    assert "Rows of the evaluation data are in this page" in page
    assert ("zzeval" in page) == ("None among the first" not in page)
    assert "zztrain" not in page
    assert "zz" not in (tmp_path / "out/README.md").read_text()
    assert "zz" not in manifest.model_dump_json()


def test_only_the_changed_step_runs_again(tiny, files, cache):
    first = recipe(tiny("bert"), files, *ALL[:2], ("quantize", {"bits": 8}))
    run_steps(prepare(first))
    notes = Notes()
    run_steps(prepare(first, notes))
    assert notes.reused() == 3
    notes = Notes()
    changed = recipe(tiny("bert"), files, *ALL[:2], ("quantize", {"bits": 4}))
    bundle = run_steps(prepare(changed, notes))
    assert notes.reused() == 2
    assert {codes.info.bits for codes in bundle.quantized.values()} == {4, 8}
    assert len(bundle.steps) == 3


@pytest.mark.parametrize("change", ["data", "seed", "settings", "length"])
def test_whatever_the_result_depends_on_changes_the_key(tiny, files, tmp_path, change):
    base = recipe(tiny("bert"), files, *ALL[:1])
    other = {
        "data": recipe(tiny("bert"), {**files, "train": files["eval"]}, *ALL[:1]),
        "seed": recipe(tiny("bert"), files, *ALL[:1], seed=1),
        "settings": recipe(tiny("bert"), files, ("finetune", {**QUICK, "learning_rate": 2e-3})),
        "length": recipe(tiny("bert"), files, *ALL[:1], max_length=4, truncate=True),
    }[change]
    assert prepare(base).keys[1] == prepare(base).keys[1]
    assert prepare(base).keys[1] != prepare(other).keys[1]


def test_the_evaluation_file_is_not_in_the_key(tiny, files):
    """Nothing is tuned on it, so another one must not cause training again."""
    base, other = recipe(tiny("bert"), files, *ALL[:1]), recipe(tiny("bert"), {"train": files["train"]}, *ALL[:1])
    assert prepare(base).keys == prepare(other).keys


def test_a_reopened_prefix_gives_the_same_result_as_one_run(tiny, files, tmp_path, monkeypatch):
    steps = (*ALL[:3], ("quantize", {"bits": 8}))
    whole = run_steps(prepare(recipe(tiny("bert"), files, *steps)))
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "other"))
    run_steps(prepare(recipe(tiny("bert"), files, *steps[:2])))
    split = run_steps(prepare(recipe(tiny("bert"), files, *steps)))
    for (name, one), (_, two) in zip(whole.model.named_parameters(), split.model.named_parameters(), strict=True):
        assert (one == two).all(), name


def test_a_run_is_repeated_by_the_recipe_in_its_artifact(tiny, files, tmp_path, monkeypatch):
    first = api.run_recipe(recipe(tiny("bert"), files, *ALL[:2], seed=3), tmp_path / "one")
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "fresh"))
    again = flyweight.compress(recipe=tmp_path / "one/recipe.yaml", out=tmp_path / "two")
    assert again.files["model.safetensors"] == first.files["model.safetensors"]
    assert again.files["onnx/model.onnx"] == first.files["onnx/model.onnx"]


def test_an_artifact_is_a_model_to_go_on_from(tiny, files, tmp_path):
    api.run_recipe(recipe(tiny("bert"), files, *ALL[:1]), tmp_path / "one")
    second = api.run_step(
        "quantize", tmp_path / "one", {"bits": 8}, out=tmp_path / "two", **files, measure=recipe("x", {}).measure
    )
    assert [step.name for step in second.steps] == ["finetune", "quantize"]
    with pytest.raises(FlyweightError, match="packed"):
        api.run_step("finetune", tmp_path / "two", QUICK, out=tmp_path / "three", **files)


def test_a_headless_model_needs_no_data_to_be_quantized(tiny, tmp_path):
    manifest = api.run_step("quantize", tiny("bert"), out=tmp_path / "out", measure=recipe("x", {}).measure)
    assert manifest.task == "embedding"
    assert manifest.verdict.accepted
    assert "quality.cosine" not in manifest.measurements["result"]


def test_a_headless_model_is_judged_by_its_reference(tiny, files, tmp_path):
    manifest = api.run_step(
        "quantize",
        tiny("bert"),
        out=tmp_path / "out",
        eval=files["eval"],
        max_drop=0.5,
        measure=recipe("x", {}).measure,
    )
    assert 0.9 < manifest.measurements["result"]["quality.cosine"].value < 1
    assert manifest.measurements["reference_torch"]["quality.cosine"].value == pytest.approx(1, abs=1e-5)


def test_an_unmet_rule_is_marked_and_the_artifact_written(tiny, files, tmp_path):
    job = prepare(
        recipe(tiny("bert"), files, ("finetune", QUICK), ("quantize", {"bits": 2, "activations": "none"}), quality=1.0)
    )
    bundle = run_steps(job)
    manifest = finish(job, bundle, tmp_path / "out")
    low = manifest.measurements["result"]["quality.accuracy.difference"].low
    assert manifest.verdict.accepted == (low >= 0)
    assert "asked for" in manifest.verdict.text
    assert artifact.verify(tmp_path / "out")


def test_refused_before_anything_runs(tiny, files, tmp_path):
    def refused(kind, match, *steps, model=None, **given):
        data = given.pop("data", files)
        with pytest.raises(kind, match=match):
            prepare(recipe(model or tiny("bert"), data, *steps, **given))

    refused(SettingsError, "training data for steps.0. finetune", ("finetune", QUICK), data={})
    refused(
        SettingsError, "held-out data for the acceptance rule", ALL[0], data={"train": files["train"]}, max_drop=0.1
    )
    refused(ModelError, "begin the recipe with finetune", ("quantize", {}))
    refused(SettingsError, "a task, got 'text-clasification' .did you mean", ALL[0], task="text-clasification")
    refused(ModelError, "config.json", ALL[0], model=tmp_path)


def test_out_in_the_way_is_found_before_the_work(tiny, files, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    notes = Notes()
    with pytest.raises(ArtifactError, match="pass --overwrite"):
        api.run_recipe(recipe(tiny("bert"), files, *ALL[:1]), tmp_path / "out", progress=notes)
    assert notes.lines == []


def test_the_plan_names_every_step_and_knows_what_is_cached(tiny, files):
    whole = recipe(tiny("bert"), files, *ALL)
    before = make_plan(prepare(whole))
    assert [row.step for row in before.rows] == [*(name for name, _ in ALL), "export, measure, report"]
    assert all(row.seconds > 0 and row.memory_bytes > 0 for row in before.rows)
    run_steps(prepare(recipe(tiny("bert"), files, *ALL[:2])))
    after = make_plan(prepare(whole))
    assert [row.cached for row in after.rows] == [True, True, False, False, False, False, False]
    assert after.seconds < before.seconds


def test_others_and_layers_are_checked_before_training(tiny, files):
    def refused(match, **settings):
        notes = Notes()
        with pytest.raises(FlyweightError, match=match):
            prepare(recipe(tiny("bert"), files, ("finetune", QUICK), ("distill", {**QUICK, **settings})), notes)
        assert "reading the data" not in notes.lines

    refused("layers from 0 to 3, got layer 9", layers=[0, 9])
    refused("vocabular.*set hidden_weight to 0", hidden_weight=1.0, teacher=str(tiny("roberta", labels=("no", "yes"))))
    refused("relation_heads that divide the student's 32 .* got 7", relation_weight=1.0, relation_heads=7)
    refused("the student's 16 and the teacher's 32, got 32", relation_weight=1.0, width=16)
    refused(
        "2 numbers in layer_map, one a student layer, got 4", hidden_weight=1.0, layers=[0, 2], layer_map=[0, 1, 2, 3]
    )
    refused("teacher layers from 0 to 3 in layer_map, got 9", hidden_weight=1.0, layers=[0], layer_map=[9])
    refused("hidden_weight above 0", layer_map="last")
    wide = tiny("bert", labels=("no", "yes"), hidden_size=48, num_attention_heads=6)
    refused("the teacher's 6 heads for attention_weight, got 4", attention_weight=1.0, teacher=str(wide))
    refused("a teacher with a head for text-classification, got one without", teacher=str(tiny("bert")))
    refused("label", teacher=str(tiny("bert", labels=("no", "so so", "yes"))))


def test_what_cannot_fit_is_refused(tiny, files):
    job = prepare(recipe(tiny("bert"), files, *ALL[:1]))
    for row, match in (
        (PlanRow("finetune", "", 1.0, 1, 10**18, False), "free disk"),
        (PlanRow("finetune", "", 1.0, 10**18, 1, False), "of memory"),
    ):
        with pytest.raises(StorageError, match=match):
            refuse_what_cannot_fit(Plan((row,)), job)


@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
def test_a_killed_run_goes_on_and_ends_the_same(tiny, files, tmp_path, monkeypatch):
    """Killed in the second step: the first comes from the cache, and the weights are those of a run never stopped."""
    steps = (("finetune", QUICK), ("distill", {**QUICK, "epochs": 12}))
    whole = recipe(tiny("bert"), files, *steps)
    path = tmp_path / "recipe.yaml"
    path.write_text(whole.to_yaml())
    code = f"""
        from flyweight.recipe import read_recipe
        from flyweight.job import prepare
        from flyweight.run import run_steps
        run_steps(prepare(read_recipe({str(path)!r})))
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)])
    cache = Cache()
    deadline = time.monotonic() + 120
    job = prepare(whole)
    while not (job.cached(1) and any(cache.work(job.keys[2]).glob("*"))):
        assert time.monotonic() < deadline
        assert child.poll() is None, "the child ended before it could be killed"
        time.sleep(0.02)
    child.send_signal(signal.SIGKILL)
    child.wait()
    notes = Notes()
    resumed = run_steps(prepare(whole, notes))
    assert notes.reused() == 1
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "other"))
    never = run_steps(prepare(whole))
    for (name, one), (_, two) in zip(resumed.model.named_parameters(), never.model.named_parameters(), strict=True):
        assert (one == two).all(), name
    assert not Path(cache.work(job.keys[2])).exists()
    assert ["resumed" in step.notes for step in resumed.steps] == [False, True]
    assert not any("resumed" in step.notes for step in never.steps)


def test_the_cache_keeps_to_its_cap_and_to_what_is_in_use(tiny, files, cache, monkeypatch):
    run_steps(prepare(recipe(tiny("bert"), files, *ALL[:2])))
    assert {entry.kind for entry in cache.entries()} >= {"prefixes"}
    monkeypatch.setenv("FLYWEIGHT_CACHE_GB", "0")
    keep = frozenset(entry.key for entry in cache.entries())
    assert cache.trim(keep) == 0
    monkeypatch.setenv("FLYWEIGHT_CACHE_GB", "0.0001")
    cache.trim()
    assert sum(entry.bytes for entry in cache.entries()) <= 100_000
    cache.clear()
    assert list(cache.entries()) == []
    monkeypatch.setenv("FLYWEIGHT_CACHE_GB", "much")
    with pytest.raises(SettingsError, match="a number of gigabytes"):
        cache.trim()
