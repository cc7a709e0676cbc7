"""An artifact in use, from texts to answers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from engine_cases import LABELS, bundle_of, quantize, torch_answers
from flyweight.artifact import Engine, write_manifest
from flyweight.engines import onnxruntime as engine
from flyweight.errors import ArtifactError, DataError, EngineError, SettingsError
from flyweight.golden import TEXTS
from flyweight.methods.quantize.grid import Grid
from flyweight.models.bundle import Bundle
from flyweight.models.storage import save
from flyweight.runtime import open_model

Tiny = Callable[..., Path]
SHORT = tuple(text for text in TEXTS if len(text) < 60)  # the tiny models take 64 tokens
WORDS = (
    "a quiet film that grows on you",
    "loud , long and empty",
    "bright , clever and a little sad , like a good song",
)


def write(bundle: Bundle, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    entry: Engine = engine.export(bundle, folder)
    write_manifest(folder, save(bundle, folder).model_copy(update={"engines": {"onnxruntime": entry}}))
    return folder


@pytest.fixture(scope="module")
def bundle(tiny: Tiny) -> Bundle:
    return bundle_of(tiny("bert", labels=LABELS))


@pytest.fixture(scope="module")
def artifact(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(bundle, tmp_path_factory.mktemp("artifact"))


@pytest.mark.parametrize("name", ["onnxruntime", "torch"])
def test_answers_are_those_of_the_model_in_the_order_of_the_texts(artifact: Path, bundle: Bundle, name: str) -> None:
    with open_model(artifact, engine=name) as session:
        texts = list(SHORT)
        found = session.predict(texts, batch_size=3)
        assert session.manifest.labels == LABELS
        assert session.task.name == "text-classification"
    for text, answer in zip(texts, found, strict=True):
        logits = torch_answers(bundle, bundle.encoder.examples([text]).batch([0], 0))[0]
        shares = np.exp(logits) / np.exp(logits).sum()
        assert [one["label"] for one in answer] == [LABELS[i] for i in np.argsort(-shares)]
        assert [one["score"] for one in answer] == pytest.approx(sorted(shares, reverse=True), abs=1e-4)


def test_outputs_keep_the_order_of_the_examples(artifact: Path) -> None:
    with open_model(artifact) as session:
        examples = session.encoder.examples(SHORT)
        alone = np.concatenate([session.outputs(examples.take([i])) for i in range(len(examples))])
        for size in (1, 3, 32):
            np.testing.assert_allclose(session.outputs(examples, batch_size=size), alone, rtol=1e-4, atol=1e-5)


def test_pairs_and_single_texts_together(artifact: Path) -> None:
    with open_model(artifact) as session:
        both = session.predict([WORDS[0], (WORDS[0], WORDS[1]), (WORDS[1], WORDS[0])])
        scores = [answer[0]["score"] for answer in both]
        assert len(set(scores)) == 3
        assert session.predict([(WORDS[1], WORDS[0])])[0][0]["score"] == pytest.approx(scores[2], abs=1e-5)
        assert session.predict([]) == []


def test_embeddings(tiny: Tiny, tmp_path: Path) -> None:
    folder = write(bundle_of(tiny("mpnet"), "embedding"), tmp_path / "embedding")
    with open_model(folder) as session:
        vectors = np.array(session.predict(WORDS))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1, rtol=1e-5)


def test_texts_that_cannot_be_used(artifact: Path) -> None:
    long = "a film " * 100
    with open_model(artifact) as session:
        with pytest.raises(DataError, match="expected at most 64 tokens at text 2, got 202"):
            session.predict([WORDS[0], long])
        with pytest.raises(DataError, match="expected words in text 2, got an empty text"):
            session.predict([WORDS[0], " "])
        with pytest.raises(DataError, match="at least one text"):
            session.outputs(session.encoder.examples([]))
    with open_model(artifact, truncate=True) as session:
        assert len(session.predict([long])) == 1


def test_what_cannot_be_opened(artifact: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"expected an artifact at .*, got no flyweight.json there"):
        open_model(tmp_path)
    with pytest.raises(SettingsError, match="'onnxrutime' .did you mean 'onnxruntime'"):
        open_model(artifact, engine="onnxrutime")
    copy = tmp_path / "copy"
    shutil.copytree(artifact, copy)
    path = copy / "onnx" / "model.onnx"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ArtifactError, match="sha256 differs"):
        open_model(copy)
    path.unlink()
    with pytest.raises(ArtifactError, match=r"expected onnx/model.onnx in .*, got no such file"):
        open_model(copy)


def test_an_engine_that_is_not_installed(artifact: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find = __import__("importlib.util").util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "torch" else find(name))
    with pytest.raises(EngineError, match="expected the engine torch, got torch is not installed"):
        open_model(artifact, engine="torch")


LIGHT = """
import json, sys
from flyweight.runtime import open_model
session = open_model(sys.argv[1])
answers = session.predict(json.loads(sys.argv[2]))
heavy = {"torch", "transformers", "safetensors", "datasets", "accelerate", "onnx"} & set(sys.modules)
print(json.dumps([answers, sorted(heavy)]))
"""


@pytest.mark.parametrize("quantized", [False, True])
def test_a_fresh_process_without_torch_gives_the_same_answers(tiny: Tiny, tmp_path: Path, quantized: bool) -> None:
    bundle = bundle_of(tiny("roberta", labels=LABELS))
    if quantized:
        quantize(bundle, Grid(2, "asymmetric"), "dynamic")
    folder = write(bundle, tmp_path / "artifact")
    command = [sys.executable, "-c", LIGHT, str(folder), json.dumps(WORDS)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    answers, heavy = json.loads(done.stdout)
    assert heavy == []
    with open_model(folder) as session:
        assert answers == session.predict(WORDS)


def test_int8_answers_do_not_depend_on_their_neighbours(tiny: Tiny, tmp_path: Path) -> None:
    """Activations are rounded by the range of a whole batch: a session takes texts one by one where they are."""
    bundle = quantize(bundle_of(tiny("bert", labels=LABELS)), Grid(8), "dynamic")
    with open_model(write(bundle, tmp_path / "int8")) as model:
        assert model.manifest.activations == "dynamic"
        alone = [model.predict([text])[0] for text in WORDS]
        assert model.predict(WORDS) == alone
        assert model.predict(WORDS, batch_size=len(WORDS)) != alone  # what would happen otherwise
