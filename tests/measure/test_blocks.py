"""How the table of times is taken and kept. The clock is moved by the models: nothing here depends on how fast the machine is."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

import sample_manifest
from engine_cases import LABELS, bundle_of
from flyweight.artifact import StepRecord, write_manifest
from flyweight.cache import Cache
from flyweight.errors import ArtifactError, StepError, StorageError
from flyweight.measure import blocks as module
from flyweight.measure.blocks import (
    bytes_left_out,
    check_given,
    costs_in,
    latency_costs,
    measure_table,
    passing,
    round_robin,
    settled,
    steady,
)
from flyweight.measure.costs import Costs, Kind, flop_costs
from flyweight.measure.latency import Point, Timing
from flyweight.measure.race import Terms
from flyweight.models import surgery
from flyweight.models.bundle import Bundle

Tiny = Callable[..., Path]
HEADS, NEURONS = Kind("encoder", 0), Kind("encoder")
TERMS = Terms(point=Point(1, 12))
QUICK = Timing(rounds=6, limit_s=1e9)


class Clocked:
    """Takes milliseconds by a formula of its shapes; nothing is really run."""

    def __init__(self, ms: float, name: str, now: list[float], log: list[str]) -> None:
        self.ms, self.name, self.now, self.log = ms, name, now, log

    def run(self, arrays: Any) -> np.ndarray:
        self.now[0] += self.ms * self.now[1]
        self.log.append(self.name)
        return np.zeros((1, 2), np.float32)

    def close(self) -> None:
        self.log.append(f"{self.name} closed")


class Told:
    """Keeps what a person would be told."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.tracked: list[tuple[str, int | None]] = []

    def track(self, items: Iterable[Any], what: str, total: int | None = None, done: int = 0) -> Iterator[Any]:
        self.tracked.append((what, total))
        yield from items

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """[milliseconds, how many times slower the machine is]"""
    clock = [0.0, 1.0]
    monkeypatch.setattr(module.time, "perf_counter_ns", lambda: round(clock[0] * 1e6))
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0] / 1e3)
    return clock


def of_shapes(bundle: Bundle) -> float:
    shapes = surgery.shapes(bundle.model, bundle.family)["encoder"]
    return 3.0 + sum(1.0 + 2.0 * len(shape.heads[0]) + 0.25 * shape.neurons for shape in shapes)


@pytest.fixture
def machine(now: list[float], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Engines are made up: their log."""
    log: list[str] = []
    monkeypatch.setattr(
        module, "ready", lambda bundle, terms, folder: Clocked(of_shapes(bundle), folder.name, now, log)
    )
    return log


def test_a_round_runs_every_model_once(now: list[float]) -> None:
    log: list[str] = []
    predictors = {name: Clocked(ms, name, now, log) for name, ms in (("a", 60.0), ("b", 80.0), ("c", 10.0))}
    found = round_robin(predictors, {}, Timing(4, 1e9), lambda: log.append("-"))
    assert found.tolist() == [[60.0] * 4, [80.0] * 4, [10.0] * 4]
    assert log[:9] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    rounds = "".join(log[9:])
    # untimed before timed where it is short or nothing is known of it yet; the caches are emptied before every timed call
    assert rounds == "a-ab-bc-c" + "-bc-c-a" + "c-c-a-b" + "-a-bc-c"


def test_it_ends_at_the_limit_but_not_before_enough_rounds(now: list[float]) -> None:
    def rounds(limit: float) -> int:
        return round_robin({"a": Clocked(1000.0, "a", now, [])}, {}, Timing(50, limit, least=6), lambda: None).shape[1]

    assert rounds(2.0) == 6
    assert 6 < rounds(15.0) < 20


def test_it_ends_when_what_was_taken_is_enough(now: list[float]) -> None:
    seen: list[tuple[int, ...]] = []

    def enough(taken: np.ndarray) -> bool:
        seen.append(taken.shape)
        return taken.shape[1] == 9

    predictors = {name: Clocked(5.0, name, now, []) for name in "ab"}
    assert round_robin(predictors, {}, Timing(50, 1e9, least=7), lambda: None, enough=enough).shape == (2, 9)
    assert seen == [(2, 7), (2, 8), (2, 9)]  # not asked before enough rounds


def test_times_are_settled_when_their_medians_are_narrow() -> None:
    chance = np.random.default_rng(0)

    def taken(rounds: int, noise: float) -> np.ndarray:
        return np.exp(
            chance.normal(0, noise, (30, rounds)) + chance.normal(0, 1, rounds)
        )  # rounds differ, which is taken out

    assert settled(taken(12, 0.005))
    assert not settled(taken(12, 0.05))
    assert settled(taken(200, 0.05))
    assert not settled(taken(4, 0.0001))  # too few to bound a median


def test_a_busy_machine_is_told(tiny: Tiny, now: list[float], monkeypatch: pytest.MonkeyPatch) -> None:
    chance, told = np.random.default_rng(0), Told()

    class Noisy(Clocked):
        def run(self, arrays: Any) -> np.ndarray:
            now[1] = float(np.exp(chance.normal(0, 0.4)))
            return super().run(arrays)

    monkeypatch.setattr(module, "ready", lambda bundle, terms, folder: Noisy(of_shapes(bundle), "x", now, []))
    table = measure_table(bundle_of(tiny("bert", LABELS)), TERMS, told, timing=Timing(10, 1e9, least=6))
    assert table.rounds == 10  # it did not settle before
    assert "the machine was busy" in told.notes[-1]


def test_a_table_of_a_busy_machine_is_measured_again_later_and_the_surer_one_kept(
    tiny: Tiny, now: list[float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, chance, noise, made = bundle_of(tiny("bert", LABELS)), np.random.default_rng(0), [0.4], [0]

    class Noisy(Clocked):
        def run(self, arrays: Any) -> np.ndarray:
            now[1] = float(np.exp(chance.normal(0, noise[0])))
            return super().run(arrays)

    def ready(bundle: Bundle, terms: Terms, folder: Path) -> Noisy:
        made[0] += 1
        return Noisy(of_shapes(bundle), "x", now, [])

    def costs(told: Told) -> Costs:
        made[0] = 0
        return latency_costs(bundle, TERMS, tmp_path, told, timing=Timing(10, 1e9, least=6))

    monkeypatch.setattr(module, "ready", ready)
    told = Told()
    first = costs(told)
    (path,) = tmp_path.iterdir()
    assert first.about["spread"] > module.UNSURE
    assert costs(told).about == first.about  # within one run it is not taken twice
    assert made == [0]

    def grow_old() -> None:
        os.utime(path, (path.stat().st_mtime - 2 * module.AGAIN_S,) * 2)

    grow_old()
    noise[0] = 2.0
    assert costs(told).about == first.about  # worse than before
    assert made != [0]
    assert "was taken on a busy machine: measuring it again" in told.notes[-2]
    assert costs(told).about == first.about
    assert made == [0]  # and it is not tried again at once
    grow_old()
    noise[0] = 0.0
    check(costs(told))
    grow_old()
    check(costs(told))
    assert made == [0]  # sure tables do not age


def test_slow_rounds_do_not_move_the_medians() -> None:
    chance = np.random.default_rng(0)
    wanted = np.geomspace(5, 80, 24)
    rounds = np.exp(chance.normal(0, 0.5, 12))  # a machine that is often half or twice as fast
    noise = np.exp(chance.normal(0, 0.002, (24, 12)))
    noise[chance.uniform(size=noise.shape) < 0.05] *= 3  # and is interrupted now and then
    found = np.median(steady(wanted[:, None] * rounds * noise), axis=1)
    np.testing.assert_allclose(found / found[0], wanted / wanted[0], rtol=0.006)
    same = wanted[:, None] * np.ones(12)
    np.testing.assert_allclose(steady(same), same)
    slow = steady(wanted[:, None] * np.array([1, 1, 1, 1, 1, 9.0]))
    np.testing.assert_allclose(slow, same[:, :6])


def check(costs: Costs) -> None:
    assert costs.base == pytest.approx(3.0)
    np.testing.assert_allclose(costs.curves[HEADS][1:], 2.0 * np.arange(4), atol=1e-6)
    np.testing.assert_allclose(np.diff(costs.curves[NEURONS][16:]), 0.25, atol=1e-6)
    assert costs.block["encoder"] == pytest.approx(1.0 + 2.0 + 0.25 * 16)
    assert costs.curves[HEADS][0] == pytest.approx(-2.0)
    assert costs.curves[NEURONS][0] == pytest.approx(-0.25 * 16)  # one neuron costs what a panel of them does


@pytest.mark.parametrize("blocks", [1, 2])
def test_costs_of_a_made_up_machine_are_found(tiny: Tiny, tmp_path: Path, machine: list[str], blocks: int) -> None:
    bundle, told = bundle_of(tiny("mpnet", LABELS)), Told()
    costs = latency_costs(bundle, TERMS, tmp_path, told, blocks, QUICK)
    check(costs)
    shapes = surgery.shapes(bundle.model, bundle.family)
    assert costs.total(shapes) == pytest.approx(of_shapes(bundle))
    # heads, sizes of neurons (16, 32, 48, 64) without the anchor's, none of either, deeper, several
    number = 4 + 4 - 1 + 2 + 1 + 3
    assert told.tracked == [(f"small models for {TERMS}", number), ("times of blocks", 6)]
    assert sorted(machine[-number:]) == sorted(f"{i} closed" for i in range(number))
    assert costs.about["rounds"] == 6
    assert costs.about["additive"] == pytest.approx([0.0] * 2, abs=1e-6)  # of so few heads a quarter is one


def test_a_table_is_measured_once(tiny: Tiny, tmp_path: Path, machine: list[str]) -> None:
    bundle, told = bundle_of(tiny("bert", LABELS)), Told()
    latency_costs(bundle, TERMS, tmp_path, told, timing=QUICK)
    assert len(list(tmp_path.iterdir())) == 1
    machine.clear()
    again = latency_costs(bundle_of(tiny("bert", LABELS, seed=3)), TERMS, tmp_path, told, timing=QUICK)  # other weights
    check(again)
    assert machine == []
    assert told.notes == [f"costs of blocks ({TERMS}) taken from the cache"]
    latency_costs(bundle, TERMS._replace(precision="int8"), tmp_path, told, timing=QUICK)
    assert machine
    machine.clear()
    latency_costs(bundle, TERMS, tmp_path, told, blocks=1, timing=QUICK)
    assert machine
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("harm", ["cut", "edited"])
def test_a_damaged_table_is_measured_again(tiny: Tiny, tmp_path: Path, machine: list[str], harm: str) -> None:
    bundle, told = bundle_of(tiny("bert", LABELS)), Told()
    latency_costs(bundle, TERMS, tmp_path, timing=QUICK)
    (path,) = tmp_path.iterdir()
    whole = path.read_text()
    path.write_text(whole[:-100] if harm == "cut" else whole.replace("1x12", "1x13"))
    machine.clear()
    check(latency_costs(bundle, TERMS, tmp_path, told, timing=QUICK))
    assert machine
    assert len(told.notes) == 1
    assert f"the table of costs in {path} is damaged" in told.notes[0]
    check(costs_in(path, bundle, TERMS))


def test_a_folder_that_takes_nothing_costs_no_more_than_the_cache(
    tiny: Tiny, tmp_path: Path, machine: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, write: object) -> None:
        raise StorageError(f"room to write {path}", "none")

    monkeypatch.setattr(module, "write_atomically", full)
    told = Told()
    check(latency_costs(bundle_of(tiny("bert", LABELS)), TERMS, tmp_path, told, timing=QUICK))
    assert "the table of costs is not kept: expected room" in told.notes[-1]


def test_a_table_that_somebody_gives(tiny: Tiny, tmp_path: Path, machine: list[str]) -> None:
    bundle, path = bundle_of(tiny("bert", LABELS)), tmp_path / "mine.json"
    path.write_text(measure_table(bundle, TERMS, timing=QUICK).model_dump_json())
    check(costs_in(path, bundle, TERMS))
    with pytest.raises(StepError, match=r"for threads '2', got one for '1' in .*mine\.json; leave the table out"):
        costs_in(path, bundle, TERMS._replace(threads=2))
    check_given(path, TERMS)
    for other in ({"threads": 2}, {"engine": "openvino"}, {"precision": "int8"}, {"point": Point(1, 13)}):
        with pytest.raises(StepError, match=r"a table of costs for .*, got one for .*mine\.json; leave the table out"):
            check_given(path, TERMS._replace(**other))
    with pytest.raises(StepError, match=r"for encoder block 'width 32, .*, got one for 'width 32, 4 heads of 8, 64"):
        costs_in(path, bundle_of(tiny("bert", LABELS, intermediate_size=48)), TERMS)
    with pytest.raises(StepError, match=r"a table of costs at .*none\.json, got no such file"):
        costs_in(tmp_path / "none.json", bundle, TERMS)
    path.write_text("{")
    for read in (lambda: costs_in(path, bundle, TERMS), lambda: check_given(path, TERMS)):
        with pytest.raises(StepError, match=r"a whole table of costs at .*mine\.json"):
            read()
    assert path.read_text() == "{"  # it is not ours to write


def test_a_table_is_found_in_an_artifact_that_was_made_by_it(tiny: Tiny, tmp_path: Path, machine: list[str]) -> None:
    bundle = bundle_of(tiny("bert", LABELS))
    costs = latency_costs(bundle, TERMS, tmp_path / "cache", timing=QUICK)
    (file,) = (tmp_path / "cache").iterdir()

    def artifact(name: str, *notes: dict[str, Any]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        steps = tuple(StepRecord(name="prune", settings={}, seconds=1.0, notes=one) for one in notes)
        write_manifest(folder, sample_manifest.make(steps=steps))
        return folder

    wished = {"costs": json.loads(json.dumps({"unit": "ms", "multiple_of": 1, **costs.about}))}
    counted = {"costs": {"unit": "FLOP", "counted": "2 x multiply-adds"}}
    for path in (file, artifact("pruned", wished), artifact("twice", counted, wished, counted)):
        found = costs_in(path, bundle, TERMS)
        check(found)
        assert found.about == costs.about
    with pytest.raises(StepError, match=r"for threads '2', got one for '1' in .*pruned; leave the table out"):
        costs_in(tmp_path / "pruned", bundle, TERMS._replace(threads=2))
    with pytest.raises(StepError, match=r"an artifact with a table of costs, got none in .*counted; name one that was"):
        costs_in(artifact("counted", counted), bundle, TERMS)
    wished["costs"]["table"]["rows"] = []
    with pytest.raises(StepError, match=r"a whole table of costs at .*damaged, got"):
        costs_in(artifact("damaged", wished), bundle, TERMS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ArtifactError, match=r"empty"):
        costs_in(tmp_path / "empty", bundle, TERMS)


def test_a_table_that_was_used_is_not_the_first_to_go(tiny: Tiny, tmp_path: Path, machine: list[str]) -> None:
    bundle, cache = bundle_of(tiny("bert", LABELS)), Cache(tmp_path)
    latency_costs(bundle, TERMS, cache.tables, timing=QUICK)
    (entry,) = cache.entries()
    os.utime(entry.path, (1e9, 1e9))
    latency_costs(bundle, TERMS, cache.tables, timing=QUICK)
    (after,) = cache.entries()
    assert after.used > 1.5e9
    assert (after.kind, after.path) == ("tables", entry.path)
    assert after.bytes == entry.path.stat().st_size > 0
    assert cache.clear() == after.bytes
    assert not list(cache.entries())
    machine.clear()
    latency_costs(bundle, TERMS, cache.tables, timing=QUICK)
    assert machine  # measured again


def test_texts_longer_than_the_model_takes_are_refused_first(tiny: Tiny, tmp_path: Path, machine: list[str]) -> None:
    with pytest.raises(StepError, match="a shape of at most 64 tokens, got 1x65"):
        latency_costs(bundle_of(tiny("bert", LABELS)), Terms(point=Point(1, 65)), tmp_path)
    assert machine == []


def test_as_many_bytes_pass_as_blocks_are_left_out(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(tiny("bert", LABELS))
    each = sum(p.numel() for p in surgery.blocks(bundle.model, bundle.family)["encoder"][0].parameters())
    assert bytes_left_out(bundle, Terms(), 2) == 2 * 4 * each
    assert bytes_left_out(bundle, Terms(precision="int8"), 1) == 3 * each
    assert bytes_left_out(bundle, Terms(), 5) == 0
    monkeypatch.setattr(module, "MOST_BYTES", 4096)
    read = passing(10**12)  # held at the limit, or there would be no room
    memory = next(cell.cell_contents for cell in read.__closure__ or () if isinstance(cell.cell_contents, np.ndarray))
    assert memory.nbytes == 4096
    passing(0)()
    read()


@pytest.mark.parametrize(("family", "precision"), [("bert", "fp32"), ("mpnet", "int8")])
def test_the_real_engine_gives_a_whole_table(tiny: Tiny, tmp_path: Path, family: str, precision: Any) -> None:
    bundle = bundle_of(tiny(family, LABELS))
    terms = TERMS._replace(precision=precision)
    costs = latency_costs(bundle, terms, tmp_path, blocks=1, timing=Timing(rounds=6, limit_s=5.0))
    counted = flop_costs(bundle)
    assert {kind: len(curve) for kind, curve in costs.curves.items()} == {
        kind: len(curve) for kind, curve in counted.curves.items()
    }
    assert all(np.isfinite(curve[1:]).all() for curve in costs.curves.values())
    assert costs.total(surgery.shapes(bundle.model, bundle.family)) > 0
    assert costs.about["precision"] == precision
    assert len(costs.about["additive"]) == 2
    assert costs_in(next(tmp_path.iterdir()), bundle, terms).base == costs.base
