"""Bad input, as a user gives it: one line on stderr, exit status 1, and nothing written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from flyweight.cli import main
from flyweight.engines import openvino

STEP = ("--max-steps", "1", "--batch-size", "4")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def model(tiny, tmp_path):
    """A copy of a tiny classifier that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(tiny("bert", labels=("no", "yes")), folder)
    return folder


@pytest.fixture
def train(tmp_path):
    return write(
        tmp_path / "train.jsonl", [{"text": f"a warm film {i}", "label": ("no", "yes")[i % 2]} for i in range(60)]
    )


@pytest.fixture
def refused(capsys, tmp_path):
    def call(*arguments, status=1, out="out"):
        before = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
        found = main([*map(str, arguments), *(["--out", out] if out else [])])
        lines = capsys.readouterr().err.strip().splitlines()
        assert found == status, lines
        assert lines[-1].startswith("error: ")
        assert sum(line.startswith("error: ") for line in lines) == 1
        assert "unexpected" not in lines[-1]
        assert "Traceback" not in "\n".join(lines)
        after = {path for path in tmp_path.rglob("*") if "cache" not in path.parts}
        assert after == before, "something was left behind"
        return lines[-1]

    return call


def test_not_a_model_folder(refused, train, tmp_path):
    (tmp_path / "empty").mkdir()
    assert "config.json" in refused("finetune", "empty", "--train", train, *STEP)
    assert "no such folder" in refused("finetune", "./nowhere", "--train", train, *STEP)


def test_pickled_weights_are_refused_with_the_way_to_convert(refused, model, train):
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    line = refused("finetune", model, "--train", train, *STEP)
    assert "pytorch_model.bin, a pickle" in line
    assert "convert it once" in line


def test_truncated_safetensors(refused, model, train):
    path = model / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert "a whole safetensors file" in refused("finetune", model, "--train", train, *STEP)


def test_unknown_family_lists_the_known_ones(refused, model, train):
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "funnel", "architectures": ["FunnelModel"]}))
    line = refused("finetune", model, "--train", train, "--task", "text-classification", *STEP)
    assert "bert" in line
    assert "mpnet" in line
    assert "funnel" in line


def test_a_misspelt_column_lists_the_columns(refused, model, train):
    line = refused("finetune", model, "--train", train, "--text", "txet", *STEP)
    assert "'text', 'label' (did you mean 'text'?)" in line


def test_a_label_in_eval_that_training_never_saw(refused, tiny, train, tmp_path):
    held = write(tmp_path / "eval.jsonl", [{"text": "fine", "label": "yes"}, {"text": "so so", "label": "neutral"}])
    given = ("--task", "text-classification", "--train", train, "--eval", held, *STEP)
    line = refused("finetune", tiny("bert"), *given)
    assert "eval.jsonl:2, got 'neutral'" in line


def test_labels_that_the_model_s_head_does_not_have(refused, model, tmp_path):
    other = write(tmp_path / "other.jsonl", [{"text": f"film {i}", "label": ("good", "bad")[i % 2]} for i in range(60)])
    line = refused("finetune", model, "--train", other, *STEP)
    assert "'no', 'yes'" in line
    assert "'bad', 'good'" in line


def test_an_empty_file_and_a_single_class(refused, tiny, tmp_path):
    (tmp_path / "empty.jsonl").touch()
    given = ("finetune", tiny("bert"), "--task", "text-classification", *STEP)
    assert "an empty file" in refused(*given, "--train", "empty.jsonl")
    write(tmp_path / "one.jsonl", [{"text": f"film {i}", "label": "good"} for i in range(60)])
    assert "at least two classes" in refused(*given, "--train", "one.jsonl")


def test_a_text_longer_than_the_model_s_limit(refused, model, train, tmp_path):
    write(tmp_path / "long.jsonl", [{"text": "a film " * 100, "label": "no"}, {"text": "a film", "label": "yes"}] * 20)
    line = refused("finetune", model, "--train", "long.jsonl", *STEP)
    assert "at most 64 tokens at long.jsonl:1, got" in line
    assert "--truncate" in line


def test_an_unknown_recipe_key_suggests_the_nearest(refused, model, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps:\n- prune: {target: heads, amuont: 0.5}\n")
    line = refused("compress", model, "--recipe", "recipe.yaml")
    assert "steps[0].prune" in line
    assert "did you mean 'amount'?" in line


def test_an_amount_outside_0_1(refused, model, train, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps:\n- prune: {target: heads, amount: 1.5}\n")
    assert "less than 1, got 1.5" in refused("compress", model, "--recipe", "recipe.yaml")
    assert "--amount" in refused("prune", model, "--target", "heads", "--amount", "1.5")


def test_removing_all_heads(refused, model):
    assert "head" in refused("prune", model, "--target", "heads", "--amount", "0.99")


def test_out_exists(refused, model, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/thesis.tex").touch()
    assert "pass --overwrite" in refused("quantize", model)
    assert "a folder that Flyweight did not write" in refused("quantize", model, "--overwrite")


def test_an_illegal_order(refused, model, train, tmp_path):
    (tmp_path / "recipe.yaml").write_text("steps:\n- quantize\n- prune: {target: heads, amount: 0.5}\n")
    assert "make quantize the last step" in refused("compress", model, "--recipe", "recipe.yaml")


def test_one_changed_byte_in_an_artifact(refused, small, tmp_path):
    shutil.copytree(small, tmp_path / "bad")
    path = tmp_path / "bad/onnx/model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for verb in (("predict", "bad", "a film"), ("report", "bad"), ("inspect", "bad"), ("compare", "bad", str(small))):
        assert "sha256 differs" in refused(*verb, out=None), verb


def test_teacher_and_student_that_do_not_fit(refused, tiny, model, train):
    other = tiny("roberta", labels=("no", "yes"))
    assert "vocabular" in refused("distill", model, "--train", train, "--teacher", other, "--hidden-weight", "1", *STEP)
    three = tiny("bert", labels=("no", "so so", "yes"))
    line = refused("distill", model, "--train", train, "--teacher", three, *STEP)
    assert "label" in line


@pytest.mark.skipif(os.name == "nt", reason="file size limits are a POSIX thing")
def test_a_full_disk(tiny, train, tmp_path):
    """A real failing write in a process of its own: no file may grow over 20 kB, as on a full disk."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    command = [sys.executable, "-m", "flyweight", "quantize", str(tiny("bert")), "--out", "out"]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: expected room and permission to write")
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_weights_that_are_no_numbers(refused, model, train, monkeypatch):
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = next(name for name in weights if name.endswith("query.weight"))
    weights[name] = np.full_like(weights[name], np.nan)
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    for verb in (("finetune", model, "--train", train, *STEP), ("quantize", model)):
        assert f"NaN or infinity in '{name}'" in refused(*verb)


def test_a_loss_that_is_no_number(refused, model, train):
    line = refused("finetune", model, "--train", train, "--epochs", "50", "--learning-rate", "1e30", "--clip", "1e30")
    assert "learning rate" in line


def texts(path, number):
    return write(path, [{"text": f"a warm film about the sea, number {i}"} for i in range(number)])


def test_bits_outside_1_8(refused, model):
    assert "--bits: input should be greater than or equal to 1, got 0" in refused("quantize", model, "--bits", "0")
    assert "--bits: input should be less than or equal to 8, got 9" in refused("quantize", model, "--bits", "9")
    (model.parent / "recipe.yaml").write_text("steps:\n- quantize: {bits: 9}\n")
    line = refused("compress", model, "--recipe", "recipe.yaml")
    assert "steps[0].quantize.bits" in line
    assert "got 9" in line


def test_a_group_that_does_not_divide(refused, model):
    grouped = ("--granularity", "group", "--activations", "none", "--bits", "4")
    line = refused("quantize", model, *grouped, "--group-size", "24")
    assert (
        "a group_size that divides the 32 inputs of bert.encoder.layer.0.attention.self.query, got 24; such as 16"
        in line
    )
    assert "groups have no integer kernel" in refused("quantize", model, "--granularity", "group", "--bits", "4")


@pytest.mark.parametrize("how", [("--activations", "static"), ("--method", "gptq", "--activations", "none")])
def test_texts_to_calibrate_on_are_missing_none_or_few(refused, tiny, tmp_path, how):
    model = tiny("bert")
    assert "texts to calibrate steps[0] quantize on, got none; give --calibrate F" in refused("quantize", model, *how)
    (tmp_path / "empty.jsonl").touch()
    assert "an empty file" in refused("quantize", model, *how, "--calibrate", "empty.jsonl")
    texts(tmp_path / "few.jsonl", 20)
    line = refused("quantize", model, *how, "--calibrate", "few.jsonl")
    assert "at least 256 different texts to calibrate on in few.jsonl, got 20; " in line
    assert "lower --samples to at most 20" in line
    assert "no such file" in refused("quantize", model, *how, "--calibrate", "nowhere.jsonl")


@pytest.mark.parametrize("how", [("--activations", "static"), ("--method", "gptq", "--activations", "none")])
def test_activations_that_are_no_numbers(refused, model, tmp_path, how):
    """Finite weights so large that the third block's output is not: the block is named."""
    from safetensors.numpy import load_file, save_file

    weights = load_file(model / "model.safetensors")
    name = "bert.encoder.layer.2.intermediate.dense.weight"
    weights[name] = np.where(weights[name] > 0, np.float32(3e38), np.float32(-3e38))
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    texts(tmp_path / "texts.jsonl", 40)
    line = refused("quantize", model, *how, "--calibrate", "texts.jsonl", "--samples", "20")
    assert "finite activations after bert.encoder.layer.2.intermediate.dense, got NaN or inf" in line


def test_a_model_already_packed(refused, tiny, train, tmp_path):
    assert (
        main(["quantize", str(tiny("bert")), "--out", "packed", "--rounds", "3", "--leave-out", "memory,energy"]) == 0
    )
    for again in ((), ("--bits", "4", "--activations", "none")):
        line = refused("quantize", "packed", *again)
        assert "quantize on float weights, got packed ones; quantize once: start from the float model" in line


def test_a_budget_of_bits_below_the_least(refused, tiny, tmp_path):
    texts(tmp_path / "texts.jsonl", 40)
    given = ("--bits-per-weight", "2.1", "--calibrate", "texts.jsonl", "--samples", "20", "--activations", "none")
    line = refused("quantize", tiny("bert"), *given)
    assert "bits_per_weight of at least 2.8" in line
    assert "got 2.1; raise it" in line


def test_a_gate_that_cannot_hold_even_in_float(refused, model, train, tmp_path):
    """Pruned to next to nothing first: no bits bring that back."""
    held = write(
        tmp_path / "held.jsonl", [{"text": f"an old film {i}", "label": ("no", "yes")[i % 2]} for i in range(40)]
    )
    steps = "- prune: {target: weights, amount: 0.98}\n- quantize: {bits: 8, gate: required}\n"
    (tmp_path / "recipe.yaml").write_text(f"steps:\n{steps}accept: {{max_drop: 0.0}}\n")
    line = refused("compress", model, "--recipe", "recipe.yaml", "--train", train, "--eval", held)
    assert "a model that meets the acceptance rule before it is quantized, got accuracy" in line
    assert "set gate to auto" in line


def test_a_gate_without_rule_or_examples(refused, model, tmp_path):
    held = write(
        tmp_path / "held.jsonl", [{"text": f"an old film {i}", "label": ("no", "yes")[i % 2]} for i in range(40)]
    )
    assert "an acceptance rule for gate required, got none" in refused("quantize", model, "--gate", "required")
    given = ("--gate", "required", "--max-drop", "0.1", "--eval", held)
    assert "validation examples for gate required, got none; give --validation F" in refused("quantize", model, *given)


@pytest.mark.parametrize(
    "how",
    [
        ("--bits", "1", "--scheme", "binary"),
        ("--bits", "2"),
        ("--bits", "2", "--granularity", "group", "--group-size", "32"),
        ("--bits-per-weight", "3", "--calibrate", "texts.jsonl"),
    ],
    ids=" ".join,
)
def test_an_engine_that_lacks_the_format(refused, tmp_path, monkeypatch, how):
    """Before anything is read: there is no such model."""
    monkeypatch.setattr(openvino, "available", lambda: None)
    given = ("quantize", "./nowhere", *how, "--activations", "none", "--engines", "openvino")
    for more in ((), ("--dry-run",)):
        line = refused(*given, *more)
        assert "linears of at least 3 bits where inputs stay in float, as OpenVINO unpacks no fewer" in line
        assert "got 2" in line or "got 1" in line
        assert "engine onnxruntime or torch" in line
        assert str(tmp_path) not in line


@pytest.mark.parametrize(
    "how",
    [
        ("--bits", "3", "--activations", "none"),
        ("--bits", "2"),
        ("--bits", "2", "--activations", "none", "--granularity", "group", "--group-size", "8"),  # float once loaded
    ],
    ids=" ".join,
)
def test_an_engine_that_has_the_format(refused, monkeypatch, how):
    monkeypatch.setattr(openvino, "available", lambda: None)
    assert "no such folder" in refused("quantize", "./nowhere", *how, "--engines", "openvino")


def test_a_mix_is_not_promised_to_every_engine(refused, tiny, tmp_path, monkeypatch, capsys):
    """It may have layers of 2 bits, or not; said before, so that nobody is surprised after."""
    monkeypatch.setattr(openvino, "available", lambda: None)
    given = ["--bits-per-weight", "5", "--activations", "none", "--calibrate", "texts.jsonl", "--engines", "openvino"]
    texts(tmp_path / "texts.jsonl", 40)
    assert main(["quantize", str(tiny("bert")), *given, "--samples", "20", "--dry-run"]) == 0
    assert "warning: openvino runs no layers of 2 bits, which the budget may choose" in capsys.readouterr().err


def test_bits_beside_a_budget(refused, tmp_path):
    for budget in ("--bits-per-weight", "--max-megabytes"):
        for bits in ("8", "4"):
            line = refused("quantize", "./nowhere", budget, "4", "--bits", bits, "--activations", "none")
            assert f"{budget[2:].replace('-', '_')} chooses the bits of every layer: leave out bits" in line
