"""OpenVINO beside onnxruntime on one artifact: in a recipe, and by --engine on what has an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyweight import api, artifact
from flyweight.cli import main
from flyweight.engines import openvino
from flyweight.engines.kernels import PROFILERS
from flyweight.errors import EngineError

Tiny = Callable[..., Path]
MEASURE: dict[str, Any] = {"batches": [1], "lengths": [8], "rounds": 3, "leave_out": ["memory", "energy"]}
needs_openvino = pytest.mark.skipif(openvino.available() is not None, reason=f"{openvino.available()}")
ENGINES = ["onnxruntime", pytest.param("openvino", marks=needs_openvino)]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "eval.jsonl"
    texts = ("a quiet film", "the plot is thin", "loud , long and empty")
    rows = [{"text": f"{text} {i}", "label": ["negative", "positive"][i % 2]} for i in range(10) for text in texts]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tiny: Tiny, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """int8 in onnxruntime, and in OpenVINO as well where that is installed."""
    engines = ["openvino"] if openvino.available() is None else []
    out = tmp_path_factory.mktemp("made") / "small"
    model = tiny("bert", labels=("negative", "positive"))
    api.quantize(model, {"bits": 8}, out=out, eval=data, measure={**MEASURE, "engines": engines})
    return out


@pytest.mark.parametrize("name", ENGINES)
def test_the_manifest_says_what_each_engine_ran(made: Path, name: str) -> None:
    manifest = artifact.verify(made)
    assert manifest.engines[name].file == "onnx/model.onnx"
    assert manifest.engines[name].parity > 0
    found = manifest.kernels[name]
    assert len(found.linears) == 4 * 6 + 2  # pooler and classifier
    integer = {name for name, run in found.linears.items() if run.precision == "int8"}
    assert len(integer) == (26 if name == "onnxruntime" else 0)
    assert set(manifest.kernels) == set(manifest.engines) <= set(PROFILERS)
    assert sum(total.share for total in found.totals) == pytest.approx(1)


@pytest.mark.parametrize("name", ENGINES)
def test_it_is_told_in_the_report_the_card_and_the_json(
    made: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (first, *_) = artifact.read_manifest(made).kernels[name].text
    assert f"What {name} ran" in (made / "report.html").read_text("utf-8")
    for page in ("README.md", "report.html"):
        assert first in (made / page).read_text("utf-8")
    assert main(["report", str(made), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["kernels"][name]
    assert told["text"][0] == first
    assert main(["report", str(made)]) == 0
    assert first in capsys.readouterr().out
    assert main(["inspect", str(made), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kernels"][name]["text"][0] == first


@needs_openvino
def test_both_models_are_measured_in_both_engines(made: Path) -> None:
    figures = artifact.read_manifest(made).measurements
    assert list(figures) == [
        "reference_torch", "reference_onnxruntime", "result", "reference_openvino", "result_openvino",
    ]  # fmt: skip
    for key in ("quality.accuracy", "latency_ms.p50@1x8", "bytes", "speedup.reference_openvino@1x8"):
        assert key in figures["result_openvino"]
    folder = artifact.read_manifest(made)
    for name in ("result", "result_openvino"):  # the file is shared, so both ship the same bytes
        size = sum(entry.bytes for path, entry in folder.files.items()) + (made / artifact.MANIFEST).stat().st_size
        assert figures[name]["artifact_bytes"].value == size
    assert figures["result"]["bytes"].value == figures["result_openvino"]["bytes"].value


@needs_openvino
def test_every_verb_takes_the_engine(made: Path, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores = {}
    for name in ("onnxruntime", "openvino"):
        assert main(["predict", str(made), "a quiet film", "--engine", name, "--json"]) == 0
        answer = json.loads(capsys.readouterr().out)["predictions"][0]["answer"]
        scores[name] = {one["label"]: one["score"] for one in answer}
        assert main(["evaluate", str(made), "--data", str(data), "--engine", name, "--json"]) == 0
        assert "quality.accuracy" in json.loads(capsys.readouterr().out)["figures"]
    assert scores["openvino"] == pytest.approx(scores["onnxruntime"], abs=0.02)
    flags = ["--batches", "1", "--lengths", "8", "--rounds", "3", "--leave-out", "energy"]
    assert main(["compare", str(made), str(made), "--engine", "openvino", "--json", *flags]) == 0
    models = json.loads(capsys.readouterr().out)["models"]
    assert len(models) == 2
    for figures in models.values():  # memory was taken in a fresh process with this engine
        assert "openvino" in figures["peak_memory_bytes"]["method"]
        assert np.isfinite(figures["latency_ms.p50@1x8"]["value"])


def test_an_engine_that_is_not_there_is_refused_before_the_work(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino, "available", lambda: "openvino is not installed; run: pip install it")
    with pytest.raises(EngineError, match="expected the engine openvino, got openvino is not installed"):
        api.quantize(tiny("bert", labels=("a", "b")), out=tmp_path / "out", measure={"engines": ["openvino"]})
    assert not (tmp_path / "out").exists()
