"""What the name of a pruned model depends on beside the model: texts, machine, engine, threads, and files that a step names."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

from flyweight import keys
from flyweight.errors import DataError
from flyweight.recipe import Recipe
from flyweight.settings import MeasureSettings, PruneSettings
from flyweight.splits import Splits

NONE = Splits(None, None, None)


def found(threads: int = 1, **values: object) -> tuple[str, ...]:
    given = PruneSettings.read({"target": "heads+neurons", "speedup": 2.0, **values}, "prune")
    return tuple(keys.prune_inputs(Recipe(measure=MeasureSettings(threads=threads)), given, NONE))


def test_a_wish_in_time_depends_on_machine_engine_and_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    names = {found(), found(threads=2), found(engine="openvino")}
    monkeypatch.setattr(keys, "environment", lambda: {"cpu": "another", "versions": {"onnxruntime": "1.0"}})
    names.add(found())
    monkeypatch.setattr(keys, "environment", lambda: {"cpu": "another", "versions": {"onnxruntime": "1.1"}})
    names.add(found())
    assert len(names) == 5
    assert found(cost="flops") == found(cost="flops", threads=2) == ()


def test_a_table_counts_by_its_content(tmp_path: Path) -> None:
    path, other = tmp_path / "a.json", tmp_path / "b.json"
    path.write_text("{}")
    other.write_text("{}")
    assert found(table=path) == found(table=other) != found()
    other.write_text("{ }")
    assert found(table=path) != found(table=other)
    artifact = tmp_path / "artifact"
    artifact.mkdir()
    (artifact / "flyweight.json").write_text("1")
    before = found(table=artifact)
    (artifact / "flyweight.json").write_text("22")
    assert found(table=artifact) != before


def test_a_table_that_is_not_there_is_told_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"a table of costs, or an artifact that has one, got no such file: .*none\.json"
    ):
        found(table=tmp_path / "none.json")


@pytest.mark.parametrize(
    "values", [{"speedup": 2.0, "cost": "flops"}, {"speedup": 2.0, "cost": "bytes"}, {"amount": 0.5}]
)
def test_a_table_goes_with_times_alone(values: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="table goes with speedup and cost latency"):
        PruneSettings(target="heads", table=Path("t.json"), **values)  # type: ignore[arg-type]
