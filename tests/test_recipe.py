"""Recipes: what is accepted, what is refused and with which words, and that a written one reads back the same."""

from pathlib import Path

import pytest

from flyweight.errors import SettingsError, StepError
from flyweight.recipe import check_order, read_recipe, shipped

WRONG = {
    "stepz: []": r"'stepz' \(did you mean 'steps'\?\)",
    "data: {trian: x}": r"data.*'trian' \(did you mean 'train'\?\)",
    "steps: {finetune: {}}": "a list of steps",
    "steps: [[finetune]]": r"steps\[0\] as `- name",
    "steps: [{finetune: 3}]": r"settings of steps\[0\].finetune as a mapping",
    "steps: [{prine: {}}]": r"'prine' \(did you mean 'prune'\?\)",
    "steps: [finetune, {prune: {target: heads, amuont: .3}}]": r"steps\[1\].prune, got 'amuont' \(did you mean 'amount'\?\)",
    "steps: [{prune: {target: heads, amount: 1.3}}]": r"steps\[0\].prune.amount: .*less than 1, got 1.3",
    "steps: [{prune: {target: heads, amount: 0}}]": r"steps\[0\].prune.amount: .*greater than 0, got 0",
    "steps: [{prune: {target: heads}}]": "needs an amount",
    "steps: [{prune: {amount: .5, threshold: .1}}]": "either an amount or a threshold",
    "steps: [{prune: {target: heads, amount: .5, pattern: '2:4'}}]": "goes with target weights only",
    "steps: [{quantize: {bits: 9}}]": "less than or equal to 8, got 9",
    "steps: [{quantize: {bits: 0}}]": "greater than or equal to 1, got 0",
    "steps: [{quantize: {bits: 4, scheme: binary}}]": "exactly 1 bit",
    "steps: [{quantize: {bits: 1}}]": "single point",
    "steps: [{quantize: {bits: 8, bits_per_weight: 4}}]": "bits_per_weight chooses the bits of every layer: leave out bits",
    "steps: [{quantize: {bits: 3, max_megabytes: 4}}]": "max_megabytes chooses the bits of every layer: leave out bits",
    "steps: [{distill: {alpha: 2}}]": "less than or equal to 1, got 2",
    "seed: -1": "greater than or equal to 0",
    "flyweight: 7": "1",
    "- a\n- b": "a mapping",
    "a: [": "YAML in",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_named(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(SettingsError, match=WRONG[text]) as caught:
        read_recipe(path)
    assert "\n" not in str(caught.value)


def test_unknown_recipes(tmp_path):
    with pytest.raises(SettingsError, match=r"'balancd' \(did you mean 'balanced'\?\); shipped: balanced, fast, tiny"):
        read_recipe("balancd")
    with pytest.raises(SettingsError, match="No such file"):
        read_recipe(tmp_path / "none.yaml")


ILLEGAL = {
    "[quantize, finetune]": "make quantize the last step",
    "[quantize, {prune: {target: heads, amount: .5}}]": "make quantize the last step",
    "[quantize, distill]": "make quantize the last step",
    "[{prune: {pattern: '2:4'}}, {prune: {target: neurons, amount: .5}}]": "break the groups of four",
    "[{prune: {pattern: '1:8'}}, {prune: {target: heads, amount: .5}}]": "break the groups of 1:8",
    "[{prune: {amount: .5}}, {prune: {target: neurons, amount: .5, restore: linear}}]": "would fill the zeros: swap",
    "[{prune: {amount: .5}}, {prune: {target: heads, speedup: 2}}]": r"prune \(restore linear\) before pruning weights",
    "[{prune: {amount: .5}}, {prune: {target: heads, amount: .5, criterion: hessian}}]": "would fill the zeros",
}


@pytest.mark.parametrize("steps", ILLEGAL)
def test_an_illegal_order_is_refused_with_its_reason(tmp_path, steps):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"steps: {steps}")
    with pytest.raises(StepError, match=ILLEGAL[steps]):
        check_order(read_recipe(path).steps)


def test_heads_may_go_after_weights_where_zeros_stay(tmp_path):
    path = tmp_path / "recipe.yaml"
    for more in ("criterion: fisher, restore: masks", "criterion: taylor"):
        path.write_text(f"steps: [{{prune: {{amount: .5}}}}, {{prune: {{target: heads, amount: .5, {more}}}}}]")
        check_order(read_recipe(path).steps)


def test_steps_after_a_packed_model_are_refused(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: [finetune]")
    with pytest.raises(StepError, match="packed weights can be neither trained nor cut"):
        check_order(read_recipe(path).steps, packed=True)


@pytest.mark.parametrize("name", shipped())
def test_shipped_recipes_are_sound_and_round_trip(tmp_path, name):
    recipe = read_recipe(name)
    check_order(recipe.steps)
    assert recipe.summary
    path = tmp_path / "again.yaml"
    path.write_text(recipe.to_yaml())
    assert read_recipe(path) == recipe.model_copy(update={"summary": ""})


def test_a_budget_is_written_without_the_bits_that_it_chooses(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("steps: [{quantize: {bits_per_weight: 4.5}}, quantize]")
    recipe = read_recipe(path)
    mixed, plain = (step.as_data()["quantize"] for step in recipe.steps)
    assert "bits" not in mixed
    assert plain["bits"] == 8
    path.write_text(recipe.to_yaml())
    assert read_recipe(path).steps[0].settings == recipe.steps[0].settings


def test_paths_are_taken_from_the_recipe_s_own_folder_and_written_absolute(tmp_path, monkeypatch):
    (tmp_path / "sub/model").mkdir(parents=True)
    (tmp_path / "sub/recipe.yaml").write_text("model: model\ndata: {train: train.jsonl}\nsteps: [distill]\n")
    monkeypatch.chdir(tmp_path)
    recipe = read_recipe(Path("sub/recipe.yaml"))
    assert recipe.data.train == tmp_path / "sub/train.jsonl"
    assert recipe.model == str(tmp_path / "sub/model")
    assert recipe.steps[0].settings.teacher == "reference"
    assert str(tmp_path / "sub/train.jsonl") in recipe.to_yaml()


def test_a_hub_id_stays_a_hub_id(tmp_path):
    (tmp_path / "recipe.yaml").write_text("model: someone/some-model\nrevision: v1\n")
    assert read_recipe(tmp_path / "recipe.yaml").model == "someone/some-model"
