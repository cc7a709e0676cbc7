"""One run over real artifacts of a tiny model, in torch and on the engine: every key, paired, and the page made of it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

from flyweight.artifact import Manifest, Measurement, read_manifest, write_manifest
from flyweight.engines import onnxruntime
from flyweight.engines.engine import engine_named
from flyweight.measure import memory, suite
from flyweight.measure.environment import environment
from flyweight.measure.flops import flops_figure
from flyweight.measure.size import part_bytes, weights
from flyweight.measure.suite import Candidate, Figures, Labelled, measure
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.models.storage import save
from flyweight.models.surgery import keep_layers
from flyweight.report.card import card
from flyweight.report.html import html
from flyweight.settings import MeasureSettings
from flyweight.tasks import task_named

TASK = task_named("text-classification")
SETTINGS = MeasureSettings(batches=(1, 4), lengths=(8, 16), rounds=8)


def labelled(bundle: Bundle, rows: int = 60) -> Labelled:
    generator = np.random.default_rng(0)
    words = ["wonderful", "bored", "film", "dull", "moving", "plot", "the"]
    texts = [" ".join(generator.choice(words, 1 + int(n))) for n in generator.integers(0, 12, rows)]
    examples = bundle.encoder.examples(texts)
    examples = type(examples)(examples.ids, examples.types, examples.starts, generator.integers(0, 2, rows))
    return Labelled(TASK, examples, bundle.encoder.pad)


def write(bundle: Bundle, folder: Path) -> Path:
    folder.mkdir()
    manifest = save(bundle, folder)
    write_manifest(folder, manifest.model_copy(update={"engines": {"onnxruntime": onnxruntime.export(bundle, folder)}}))
    return folder


@pytest.fixture(scope="module", autouse=True)
def short() -> Iterator[None]:
    """Energy turns and repeated memory runs as short as they can be: the figures themselves are not judged here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suite, "ENERGY_TURN_S", 0.05)
        patch.setattr(memory, "ENOUGH_S", 0.0)
        yield


@pytest.fixture(scope="module")
def ran(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Figures]]:
    """The folder of the result, and the figures of a whole run."""
    root = tmp_path_factory.mktemp("run")
    whole = load(str(tiny("bert", ("negative", "positive"))), TASK)
    rows = labelled(whole)
    small = whole.copy()
    keep_layers(small.model, small.family, {"encoder": [0]})
    reference, result = write(whole, root / "reference"), write(small, root / "result")

    def candidate(bundle: Bundle, folder: Path, engine: str) -> Candidate:
        known: dict[str, Measurement] = weights(bundle) | part_bytes(bundle) | flops_figure(bundle, 16)
        opened = partial(engine_named(engine).open, folder, 1)
        return Candidate(opened, folder, engine, bundle.encoder.tokenizer.get_vocab_size(), rows, figures=known)

    candidates = {
        "reference_torch": candidate(whole, reference, "torch"),
        "reference_onnxruntime": candidate(whole, reference, "onnxruntime"),
        "result": candidate(small, result, "onnxruntime"),
    }
    return result, measure(candidates, SETTINGS, references=tuple(candidates)[:2], seed=1)


def test_every_key_is_there_for_every_model(ran: tuple[Path, dict[str, Figures]]) -> None:
    points = ["1x8", "1x16", "4x8", "4x16"]
    wanted = {"parameters", "nonzero_parameters", "flops", "bytes", "artifact_bytes", "peak_memory_bytes"}
    wanted |= {f"latency_ms.{q}@{point}" for q in ("p50", "p90", "p99") for point in points}
    wanted |= {"throughput_per_s@4x8", "throughput_per_s@4x16", "energy_j_per_item", "co2e_g_per_item"}
    wanted |= {"cost_per_million", "quality.accuracy", "quality.macro_f1"}
    for name, figures in ran[1].items():
        assert wanted <= figures.keys(), name
        for key, figure in figures.items():
            assert figure.method, key
            assert np.isfinite(figure.value), key
            if figure.low is not None and figure.high is not None:
                assert figure.low <= figure.value <= figure.high, (name, key)
    result = ran[1]["result"]
    assert "quality.accuracy.difference" in result
    assert {f"speedup.{name}@{p}" for name in ("reference_torch", "reference_onnxruntime") for p in points} <= set(
        result
    )
    assert "quality.accuracy.difference" not in ran[1]["reference_torch"]
    assert not any(key.startswith("speedup.reference_torch") for key in ran[1]["reference_torch"])


def test_the_figures_fit_each_other(ran: tuple[Path, dict[str, Figures]]) -> None:
    torch, onnx, result = (ran[1][name] for name in ("reference_torch", "reference_onnxruntime", "result"))
    assert onnx["quality.accuracy.difference"].value == 0  # fp32 on another engine answers alike
    assert onnx["quality.accuracy"] == torch["quality.accuracy"]
    for key in ("parameters", "flops", "bytes", "bytes.mlp"):
        assert result[key].value < onnx[key].value
    assert onnx["peak_memory_bytes"].value < torch["peak_memory_bytes"].value  # the runtime is light
    rate, price = result["throughput_per_s@4x16"], result["cost_per_million"]
    assert price.value == pytest.approx(SETTINGS.price_per_hour / 3600 / rate.value * 1e6)
    assert rate.value == pytest.approx(4000 / result["latency_ms.p50@4x16"].value)
    joules, grams = result["energy_j_per_item"], result["co2e_g_per_item"]
    assert grams.value == pytest.approx(joules.value / 3.6e6 * SETTINGS.grams_per_kwh)


def test_the_pages_made_of_it(ran: tuple[Path, dict[str, Figures]], tmp_path: Path) -> None:
    folder, figures = ran
    manifest = manifest_of(folder, figures)
    page = html(manifest, "flyweight: 1\n")
    assert page.count("<svg") >= 5
    assert "wonderful" not in page  # no row of the data
    done = snippet(card(manifest), folder)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"\['(negative|positive)', '(negative|positive)'\]", done.stdout.strip())


def manifest_of(folder: Path, figures: dict[str, Figures]) -> Manifest:
    return read_manifest(folder).model_copy(update={"measurements": figures, "environment": environment()})


def snippet(text: str, folder: Path) -> subprocess.CompletedProcess[Any]:
    """Run the card's Python in a fresh process, in the artifact's folder."""
    found = re.search(r"```python\n(.*?)```", text, re.S)
    assert found
    command = [sys.executable, "-c", found[1]]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, env=os.environ, check=False)


def test_without_labels_there_is_no_quality(ran: tuple[Path, dict[str, Figures]]) -> None:
    folder = ran[0]
    settings = MeasureSettings(batches=(1,), lengths=(8,), rounds=3)
    one = Candidate(partial(onnxruntime.open, folder, 1), folder, "onnxruntime", 50)
    figures = measure({"only": one}, settings)["only"]
    assert not any(key.startswith(("quality", "speedup")) for key in figures)
    assert "parameters" not in figures
    assert figures["latency_ms.p50@1x8"].low is None  # three rounds bound nothing
