"""What a wish in time needs is looked for before the model is even read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

from flyweight.checks import check_engines
from flyweight.context import NoProgress
from flyweight.errors import EngineError, FlyweightError, StepError
from flyweight.measure.latency import Point
from flyweight.measure.race import Terms
from flyweight.measure.table import FORMAT, machine_key
from flyweight.recipe import Recipe, StepSpec
from flyweight.settings import MeasureSettings, PruneSettings


def check(threads: int = 1, **values: object) -> None:
    given = PruneSettings.read({"target": "heads+neurons", "speedup": 2.0, **values}, "prune")
    steps = (StepSpec("finetune", PruneSettings(amount=0.5)), StepSpec("prune", given))
    check_engines(Recipe(steps=steps, measure=MeasureSettings(threads=threads)), NoProgress())


def table(path: Path, key: dict[str, str]) -> Path:
    rows = [
        {"kept": [["encoder", None, 4]], "deep": {"encoder": deep}, "ms": float(deep), "low": None, "high": None}
        for deep in (2, 6)
    ]
    path.write_text(json.dumps({"format": FORMAT, "key": key, "rows": rows, "rounds": 6, "seconds": 1.0}))
    return path


def test_an_engine_that_is_missing_is_told_where_it_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flyweight.engines.openvino.available", lambda: "openvino is not installed")
    with pytest.raises(EngineError, match="the engine openvino to take times on, got openvino is not installed"):
        check(engine="openvino")
    check(engine="openvino", cost="flops")
    check()


def test_a_table_of_another_machine_engine_or_terms_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = machine_key(Terms(point=Point(1, 24), threads=2))
    whole = {"family": "bert", **here}
    path = table(tmp_path / "a.json", whole)
    check(threads=2, shape=(1, 24), table=path)
    for wrong, name in (
        ({"shape": (1, 32)}, "batch x tokens"),
        ({"precision": "int8"}, "precision"),
        ({"threads": 3}, "threads"),
    ):
        with pytest.raises(
            StepError, match=f"a table of costs for {name} .*, got one for .*a.json; leave the table out"
        ):
            check(**{"threads": 2, "shape": (1, 24), "table": path, **wrong})
    other = table(tmp_path / "b.json", whole | {"processor": "another one (avx2)"})
    with pytest.raises(StepError, match=r"for processor .*, got one for 'another one \(avx2\)' in .*b.json"):
        check(threads=2, shape=(1, 24), table=other)
    with pytest.raises(StepError, match=r"got one for 'onnxruntime 0.1'"):
        check(threads=2, shape=(1, 24), table=table(tmp_path / "c.json", whole | {"engine": "onnxruntime 0.1"}))


def test_a_table_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text("no table")
    (tmp_path / "folder").mkdir()
    for name in ("none.json", "text.json", "folder"):
        with pytest.raises(FlyweightError, match=name):
            check(table=tmp_path / name)
