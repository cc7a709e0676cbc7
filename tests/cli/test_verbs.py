"""The commands on a real (tiny) artifact: what they print, and what they refuse."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyweight import artifact
from flyweight.artifact import Verdict
from flyweight.cli import main
from flyweight.runtime import open_model

TEXTS = ["a quiet film", "the plot is thin", "loud , long and empty"]


def wanted(path: Path, texts: list[Any]) -> list[Any]:
    with open_model(path) as session:
        return session.predict(texts)


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "test.jsonl"
    rows = [{"text": text, "label": label} for text, label in zip(TEXTS * 2, ["negative", "positive"] * 3, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_predict_prints_text_label_score(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(small), *TEXTS]) == 0
    rows = [line.split("\t") for line in capsys.readouterr().out.splitlines()]
    for row, text, answer in zip(rows, TEXTS, wanted(small, TEXTS), strict=True):
        assert row == [text, answer[0]["label"], f"{answer[0]['score']:.4f}"]


def test_predict_reads_lines(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stdin(monkeypatch, "\r\n".join(TEXTS).encode())
    assert main(["predict", str(small), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["task"] == "text-classification"
    assert [row["input"] for row in found["predictions"]] == TEXTS
    for row, answer in zip(found["predictions"], wanted(small, TEXTS), strict=True):
        assert [a["label"] for a in row["answer"]] == [a["label"] for a in answer]
        assert np.allclose([a["score"] for a in row["answer"]], [a["score"] for a in answer])


def test_predict_pairs(small: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    stdin(monkeypatch, b"a quiet film\tthe plot is thin\n")
    assert main(["predict", str(small), "--pair", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["predictions"]
    (answer,) = wanted(small, [("a quiet film", "the plot is thin")])
    assert np.allclose(row["answer"][0]["score"], answer[0]["score"])


def test_predict_vectors(vectors: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(vectors), "a quiet film"]) == 0
    text, vector = capsys.readouterr().out.split("\t")
    assert text == "a quiet film"
    assert np.isclose(np.linalg.norm(json.loads(vector)), 1.0, atol=1e-4)


@pytest.mark.parametrize(
    ("content", "flags", "words"),
    [
        (b"", [], "at least one text, got empty input"),
        (b"one\n\ntwo\n", [], "a text at stdin:2, got an empty one"),
        (b"\xff\n", [], "UTF-8 text on stdin"),
        (b"one\n", ["--pair"], "a tab between them at stdin:1"),
        (b"film " * 100, [], "at most 64 tokens"),
    ],
)
def test_predict_refuses(
    content: bytes,
    flags: list[str],
    words: str,
    small: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stdin(monkeypatch, content)
    assert main(["predict", str(small), *flags]) == 1
    assert words in capsys.readouterr().err


def test_predict_cuts_on_request(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["predict", str(small), "film " * 100, "--truncate"]) == 0
    assert capsys.readouterr().err == ""


def test_predict_refuses_one_changed_byte(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(small, broken)
    file = broken / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["predict", str(broken), "a film"]) == 1
    assert "sha256 differs" in capsys.readouterr().err


def test_predict_needs_no_torch(small: Path) -> None:
    code = (
        "import sys\nfrom flyweight.cli import main\n"
        f"status = main(['predict', {str(small)!r}, 'a film'])\n"
        "print(status, sorted({'torch', 'transformers', 'safetensors', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.splitlines()[-1] == "0 []"
    assert done.stderr == ""


def test_evaluate(small: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(small), "--data", str(labelled), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["figures"]["quality.accuracy"]
    truth = [json.loads(line)["label"] for line in labelled.read_text().splitlines()]
    right = [a[0]["label"] == t for a, t in zip(wanted(small, TEXTS * 2), truth, strict=True)]
    assert found["value"] == pytest.approx(np.mean(right))
    assert found["n"] == 6
    assert main(["evaluate", str(small), "--data", str(labelled)]) == 0
    assert f"{np.mean(right):.4f}" in capsys.readouterr().out


def test_evaluate_names_the_columns(small: Path, labelled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", str(small), "--data", str(labelled), "--text", "texd"]) == 1
    line = capsys.readouterr().err
    assert "'texd'" in line
    assert "did you mean 'text'?" in line


def test_compare(small: Path, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    twin = tmp_path / "twin"
    shutil.copytree(small, twin)
    words = ["compare", str(small), str(twin), "--data", str(labelled), "--rounds", "3", "--batches", "1"]
    words += ["--leave-out", "memory,energy"]
    assert main([*words, "--lengths", "8,16", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["reference"], list(found["models"])) == ("small", ["small", "twin"])
    one, other = found["models"].values()
    assert one["quality.accuracy"]["value"] == other["quality.accuracy"]["value"]
    assert {"latency_ms.p50@1x8", "latency_ms.p50@1x16"} <= set(one)


def test_report(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "page.html"
    assert main(["report", str(small), "--out", str(page)]) == 0
    assert str(page) in capsys.readouterr().out
    assert page.read_text().lstrip().lower().startswith("<!doctype html>")
    assert main(["report", str(small), "--out", str(page), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["task"] == "text-classification"
    assert artifact.verify(small)  # the artifact itself was left alone


def test_report_where_nothing_can_be_written(small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["report", str(small), "--out", str(tmp_path / "no" / "such" / "page.html")]) == 1
    assert capsys.readouterr().err.startswith("error: expected ")


def test_inspect(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", str(small), "--json"]) == 0
    shown = capsys.readouterr()
    found = json.loads(shown.out)
    assert shown.err == ""
    assert (found["family"], found["labels"]) == ("bert", ["negative", "positive"])
    assert main(["inspect", str(small)]) == 0
    assert f"{found['parameters']['embeddings']:,}" in capsys.readouterr().out


def test_plan(tiny: Any, labelled: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path / "cache"))
    model = tiny("bert", labels=("negative", "positive"))
    words = ["quantize", str(model), "--eval", str(labelled), "--bits", "4", "--activations", "none", "--dry-run"]
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["steps"][0]["step"] == "quantize"
    assert "4 bits" in found["steps"][0]["what"]
    assert found["seconds"] > 0
    assert main(words) == 0
    assert "4 bits" in capsys.readouterr().out
    assert not list((tmp_path / "cache").rglob("flyweight.json"))


@pytest.mark.parametrize(("accepted", "status"), [(True, 0), (False, 3)])
def test_acceptance_decides_the_status(
    accepted: bool, status: int, small: Path, tmp_path: Path, monkeypatch: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    verdict = Verdict(accepted=accepted, text="as it is")
    manifest = artifact.read_manifest(small).model_copy(update={"verdict": verdict})
    asked: list[Any] = []
    monkeypatch.setattr("flyweight.api.run_recipe", lambda recipe, out, **_: asked.append(recipe) or manifest)
    words = ["compress", "some/model", "--recipe", "tiny", "--seed", "3", "--text", "review", "--max-drop", "0.02"]
    words += ["--lengths", "8", "--out", str(tmp_path / "out")]
    assert main([*words, "--json"]) == status
    found = json.loads(capsys.readouterr().out)
    assert found["verdict"] == {"accepted": accepted, "text": "as it is"}
    (recipe,) = asked
    assert (recipe.model, recipe.seed, recipe.data.text, recipe.accept.max_drop) == ("some/model", 3, "review", 0.02)
    assert recipe.measure.lengths == (8,)
    assert recipe.steps, "the steps of the recipe stay"
    assert main(words) == status
    assert "as it is" in capsys.readouterr().out


def test_doctor_tells_the_command_for_what_is_missing(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr("flyweight.cli.doctor.have", lambda module: module != "torch")
    assert main(["doctor"]) == 0
    assert 'torch missing; run: pip install "flyweight[compress]"' in capsys.readouterr().out


def test_int8_outlook() -> None:
    from flyweight.cli.doctor import int8_outlook

    assert int8_outlook(["avx2", "avx512_vnni"], "x86_64").startswith("VNNI")
    assert int8_outlook(["avx2", "avx512f"], "x86_64").startswith("no VNNI")
    assert int8_outlook(["avx2", "avx512_vnni", "amx_int8"], "x86_64").startswith("AMX")
    assert int8_outlook(["neon", "asimddp"], "aarch64").startswith("dot-product")
    assert int8_outlook([], "arm64").startswith("unknown")


@pytest.mark.slow
def test_compress_from_the_shell(tiny: Any, labelled: Path, tmp_path: Path) -> None:
    """The main job: flags, artifact, the artifact's own recipe again from the cache, not accepted, refused to overwrite."""
    model = tiny("bert", labels=("negative", "positive"))
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps:\n  - finetune: {max_steps: 3}\n  - quantize: {bits: 8}\naccept: {max_drop: 0.99}\n")
    environment = {**os.environ, "FLYWEIGHT_CACHE": str(tmp_path / "cache")}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "flyweight", *words],
            capture_output=True,
            text=True,
            timeout=600,
            env=environment,
            cwd=tmp_path,
        )

    quick = ["--rounds", "3", "--batches", "1", "--lengths", "16", "--leave-out", "memory,energy"]
    data = ["--train", str(labelled), "--eval", str(labelled), "--validation", str(labelled)]
    done = run("compress", str(model), "--recipe", str(recipe), *data, *quick, "--out", "out", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["verdict"]["accepted"]
    for noise in ("Warning", "it/s", "Loading", "Writing"):
        assert noise not in done.stderr
    again = run("compress", "out/recipe.yaml", "--max-drop", "0", "--out", "again")
    assert again.returncode in (0, 3), again.stderr
    assert "taken from the cache" in again.stderr
    assert (tmp_path / "again" / "flyweight.json").is_file()
    refused = run("compress", "out/recipe.yaml", "--out", "again")
    assert refused.returncode == 1
    assert "--overwrite" in refused.stderr


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Ctrl-C is sent in another way there")
def test_ctrl_c_says_how_to_go_on(tiny: Any, labelled: Path, tmp_path: Path) -> None:
    model = tiny("bert", labels=("negative", "positive"))
    words = ["finetune", str(model), "--train", str(labelled), "--validation", str(labelled), "--epochs", "100000"]
    process = subprocess.Popen(
        [sys.executable, "-m", "flyweight", *words, "--out", str(tmp_path / "out")],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "FLYWEIGHT_CACHE": str(tmp_path / "cache")},
    )
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step"):
            break
    process.send_signal(signal.SIGINT)
    left = process.stderr.read().splitlines()
    assert process.wait(60) == 130
    assert left[-1].startswith("interrupted: ")
    assert "run the same command again" in left[-1]
    assert not any("Traceback" in line for line in left)
    assert not (tmp_path / "out").exists()
