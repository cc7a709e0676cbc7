"""From times of small models to costs, on times that are made up; and the file that keeps them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

from engine_cases import LABELS, bundle_of
from flyweight.artifact import BlockShape
from flyweight.errors import StepError
from flyweight.measure import table as module
from flyweight.measure.costs import Kind
from flyweight.measure.latency import Point
from flyweight.measure.probes import Probe, plan
from flyweight.measure.race import Terms
from flyweight.measure.table import Row, Table, costs_of, file_name, key_of, predicted, read_table, rising
from flyweight.models import surgery

Tiny = Callable[..., Path]
HEADS, NEURONS = Kind("encoder", 0), Kind("encoder")
MPNET = {HEADS: 12, NEURONS: 3072}
KEY = {"family": "mpnet", "engine": "onnxruntime 1.0", "processor": "one (avx2)", "threads": "1"}


def made(probes: dict[str, Probe], time: Callable[[Probe], float], spread: float = 0.0) -> Table:
    rows = []
    for probe in probes.values():
        kept = tuple((kind.stack, kind.attention, units) for kind, units in probe.kept.items())
        ms = time(probe)
        rows.append(Row(kept=kept, deep=probe.deep, ms=ms, low=ms * (1 - spread), high=ms * (1 + spread)))
    return Table(key=KEY, rows=tuple(rows), rounds=12, seconds=1.0)


def of_block(kept: dict[Kind, int]) -> float:
    """Curved in heads, in steps of 16 in neurons; 0.5 stays."""
    return 0.5 + 0.9 * kept[HEADS] + 0.01 * kept[HEADS] ** 2 + 0.006 * kept[NEURONS]


def test_a_part_that_is_gone_is_measured_by_itself() -> None:
    """Attention or feed-forward part that are there at all cost 0.3 and 0.2; few neurons cost what a panel of them does."""

    def time(probe: Probe) -> float:
        there = 0.3 * (probe.kept[HEADS] > 0) + 0.2 * (probe.kept[NEURONS] > 0)
        return 0.7 + probe.deep["encoder"] * (of_block(probe.kept) + there)

    probes = plan(MPNET, 2, [HEADS, NEURONS])
    assert {name for name in probes if name.endswith(": 0")} == {f"{HEADS}: 0", f"{NEURONS}: 0"}
    found = costs_of(made(probes, time))
    assert found.curves[HEADS][0] == pytest.approx(-0.3 - 0.9 - 0.01)
    assert found.curves[NEURONS][0] == pytest.approx(-0.2 - 0.006 * 16)
    np.testing.assert_allclose(found.curves[NEURONS][1:17], 0.0, atol=1e-9)
    without = {"encoder": (BlockShape(heads=((),), neurons=0), BlockShape(heads=((1,),), neurons=0))}
    assert found.total(without) == pytest.approx(0.7 + 0.5 + 0.5 + 0.9 + 0.01 + 0.3)
    only = costs_of(made(plan(MPNET, 2, [NEURONS]), time))
    assert np.isnan(only.curves[HEADS][0])
    assert only.curves[NEURONS][0] == pytest.approx(found.curves[NEURONS][0])


def test_costs_that_add_up_are_found_again() -> None:
    found = costs_of(made(plan(MPNET, 2), lambda probe: 0.7 + probe.deep["encoder"] * of_block(probe.kept)))
    assert found.unit == "ms"
    assert found.base == pytest.approx(0.7)
    heads = found.curves[HEADS]
    assert len(heads) == 13
    assert np.isnan(heads[0])
    k = np.arange(1, 13)
    np.testing.assert_allclose(heads[1:], 0.9 * (k - 1) + 0.01 * (k**2 - 1), atol=1e-9)
    neurons = found.curves[NEURONS]
    assert len(neurons) == 3073
    assert neurons[1] == 0.0
    np.testing.assert_allclose(neurons[16:], 0.006 * (np.arange(16, 3073) - 16), atol=1e-9)
    assert found.block["encoder"] == pytest.approx(of_block({HEADS: 1, NEURONS: 16}))  # fewer cost no less: a panel
    shapes = {
        "encoder": tuple(BlockShape(heads=(tuple(range(k)),), neurons=n) for k, n in ((12, 3072), (3, 400), (1, 33)))
    }
    wanted = 0.7 + sum(of_block({HEADS: k, NEURONS: n}) for k, n in ((12, 3072), (3, 400), (1, 33)))
    assert found.total(shapes) == pytest.approx(wanted)
    assert found.about["additive"] == pytest.approx([0, 0, 0], abs=1e-9)
    assert found.multiple == 1


def test_two_stacks_and_two_attentions() -> None:
    most = {
        Kind("encoder", 0): 4,
        Kind("encoder"): 128,
        Kind("decoder", 0): 4,
        Kind("decoder", 1): 4,
        Kind("decoder"): 96,
    }
    each = dict(zip(most, (1.0, 0.01, 2.0, 3.0, 0.02), strict=True))

    def time(probe: Probe) -> float:
        return 5 + sum(probe.deep[kind.stack] * each[kind] * units for kind, units in probe.kept.items())

    found = costs_of(made(plan(most, 2), time))
    assert found.base == pytest.approx(5)
    for kind, cost in each.items():
        start = 16 if kind.attention is None else 1
        np.testing.assert_allclose(np.diff(found.curves[kind][start:]), cost)
    assert found.block == pytest.approx({"encoder": 1 + 0.16, "decoder": 2 + 3 + 0.32})


def test_what_does_not_add_up_is_told() -> None:
    """Together they take a tenth more than apart."""
    probes = plan(MPNET, 2)
    several = {"all of all", "half of all", "few heads"}
    names = {id(probe): name for name, probe in probes.items()}

    def time(probe: Probe) -> float:
        alone = 0.7 + probe.deep["encoder"] * of_block(probe.kept)
        return 1.1 * alone if names[id(probe)] in several else alone

    assert costs_of(made(probes, time)).about["additive"] == pytest.approx([0.1] * 3, abs=1e-4)


@pytest.mark.parametrize(("panel", "wanted"), [(16, 16), (8, 8), (1, 1)])
def test_sizes_that_are_slow_are_named(panel: int, wanted: int) -> None:
    """A kernel computes `panel` neurons at once, slowly enough to be seen."""

    def time(probe: Probe) -> float:
        neurons = -(-probe.kept[NEURONS] // panel) * panel
        slow = 1.03 if probe.kept[NEURONS] % panel else 1.0
        return slow * (0.7 + probe.deep["encoder"] * of_block({**probe.kept, NEURONS: neurons}))

    sure = costs_of(made(plan(MPNET, 2), time, spread=0.003))
    assert sure.multiple == wanted
    assert set(sure.about["odd_neurons"]) == {"1", "8"}
    assert costs_of(made(plan(MPNET, 2), time, spread=0.02)).multiple == 1  # it may as well be noise
    assert costs_of(made(plan(MPNET, 2), time, spread=0.003)).about["spread"] == pytest.approx(0.003)
    # and nothing of it gets between the regular sizes
    np.testing.assert_allclose(
        sure.curves[NEURONS][770], np.interp(770, [768, 1152], sure.curves[NEURONS][[768, 1152]])
    )


def test_noise_that_leaves_nothing_outside_the_blocks() -> None:
    """The deeper probe took more than three times as long: no time is taken to be negative, and the anchor is kept to."""

    def time(probe: Probe) -> float:
        return of_block(probe.kept) * (2 if probe.deep["encoder"] == 2 else 7)

    table = made(plan(MPNET, 2), time)
    found = costs_of(table)
    assert found.base == 0
    assert predicted(found, table.rows[0].probe) == pytest.approx(table.rows[0].ms)


def test_noise_makes_nothing_cheaper_than_less_of_it() -> None:
    """Probes out of turn: 8 heads take less than 5, all blocks together less than their heads and neurons."""

    def time(probe: Probe) -> float:
        ms = 0.7 + probe.deep["encoder"] * of_block(probe.kept)
        if probe.deep["encoder"] == 2 and probe.kept[HEADS] == 8:
            return 0.6 * ms
        return ms if probe.deep["encoder"] == 2 else 0.55 * ms

    found = costs_of(made(plan(MPNET, 2), time))
    for curve in found.curves.values():
        assert (np.diff(curve[1:]) >= 0).all()
    assert found.block["encoder"] == 0
    assert found.base > 0


def test_falling_neighbours_are_pooled() -> None:
    assert rising([1, 2, 2, 5]) == [1, 2, 2, 5]
    assert rising([1, 4, 3, 2, 8]) == [1, 3, 3, 3, 8]
    assert rising([3, 2, 1]) == [2, 2, 2]
    assert rising([1, 6, 2, 3]) == pytest.approx([1, 11 / 3, 11 / 3, 11 / 3])
    chance = np.random.default_rng(0)
    values = np.cumsum(chance.normal(0.2, 1, 12))
    found = np.asarray(rising(values))
    for _ in range(300):  # no other rising line is nearer
        other = np.sort(found + chance.normal(0, 0.3, 12))
        assert ((found - values) ** 2).sum() <= ((other - values) ** 2).sum() + 1e-12


def example() -> Table:
    return made(plan(MPNET, 2), lambda probe: 0.7 + probe.deep["encoder"] * of_block(probe.kept), spread=0.01)


def test_a_file_gives_back_what_was_written(tmp_path: Path) -> None:
    table = example()
    (tmp_path / "t.json").write_text(table.model_dump_json())
    again = read_table(tmp_path / "t.json", KEY)
    assert again == table
    for kind, curve in costs_of(table).curves.items():
        np.testing.assert_array_equal(costs_of(again).curves[kind], curve)
    assert json.dumps(costs_of(again).about)


@pytest.mark.parametrize(
    ("name", "other"),
    [("engine", "onnxruntime 1.1"), ("processor", "another (avx2)"), ("family", "bert"), ("threads", "2")],
)
def test_a_table_of_something_else_is_refused_naming_both(tmp_path: Path, name: str, other: str) -> None:
    (tmp_path / "t.json").write_text(example().model_dump_json())
    with pytest.raises(StepError) as error:
        read_table(tmp_path / "t.json", {**KEY, name: other})
    text = str(error.value)
    assert text.startswith(f"expected a table of costs for {name} '{other}', got one for '{KEY[name]}' in ")
    assert "\n" not in text


def test_a_table_that_tells_less_or_is_of_another_format_is_refused(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_text(example().model_dump_json())
    with pytest.raises(StepError, match="for precision 'int8', got one for 'none'"):
        read_table(tmp_path / "t.json", {**KEY, "precision": "int8"})
    (tmp_path / "t.json").write_text(example().model_copy(update={"format": 9}).model_dump_json())
    with pytest.raises(StepError, match="of format 2, got 9"):
        read_table(tmp_path / "t.json", KEY)


def test_a_damaged_file_is_one(tmp_path: Path) -> None:
    path, whole = tmp_path / "t.json", json.loads(example().model_dump_json())
    rows = whole["rows"]
    damaged = {
        "cut": json.dumps(whole)[:-40],
        "empty": "",
        "a list": "[]",
        "no times": json.dumps({**whole, "rows": []}),
        "a time of nothing": json.dumps({**whole, "rows": [{**rows[0], "ms": 0.0}, *rows[1:]]}),
        "not a number": json.dumps({**whole, "rows": [{**rows[0], "ms": float("nan")}, *rows[1:]]}),
        "no deeper one": json.dumps({**whole, "rows": [row for row in rows if row["deep"] == {"encoder": 2}]}),
        "not all heads": json.dumps(
            {**whole, "rows": [row for row in rows if row["kept"][0][2] != 12 or row["kept"][1][2] > 999]}
        ),
        "another kind": json.dumps({**whole, "rows": [*rows, {**rows[0], "kept": [["decoder", 0, 1]]}]}),
    }
    for name, text in damaged.items():
        path.write_text(text)
        with pytest.raises(ValueError, match=r"."):
            read_table(path, KEY)
            pytest.fail(name)
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path / "none.json", KEY)


def test_a_key_says_what_times_depend_on(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = bundle_of(tiny("mpnet", LABELS))
    key = key_of(bundle, Terms("onnxruntime", "int8", Point(2, 24), 3))
    assert key["encoder block"] == "width 32, 4 heads of 8, 64 neurons, gelu, shared bias"
    assert (key["encoder layers"], key["precision"], key["batch x tokens"], key["threads"]) == (
        "4",
        "int8",
        "2x24",
        "3",
    )
    assert key["engine"].startswith("onnxruntime 1.")
    llama = key_of(bundle_of(tiny("llama", LABELS)), Terms())
    assert llama["decoder block"] == "width 32, 2 heads of 2 x 8, 64 neurons and gates, silu, no bias of positions"
    names = {file_name(key)}
    for terms in (Terms(), Terms(precision="int8"), Terms(point=Point(1, 32)), Terms(threads=2), Terms("openvino")):
        names.add(file_name(key_of(bundle, terms)))
    monkeypatch.setattr(module, "cpu_model", lambda: "another")
    names.add(file_name(key_of(bundle, Terms())))
    monkeypatch.undo()
    monkeypatch.setattr(module, "versions", lambda: {"onnxruntime": "0.1"})
    names.add(file_name(key_of(bundle, Terms())))
    monkeypatch.undo()
    surgery.keep_neurons(bundle.model, bundle.family, "encoder", 0, range(10))
    assert file_name(key_of(bundle, Terms())) in names  # the other blocks are as they were
    for block in range(1, 4):
        surgery.keep_neurons(bundle.model, bundle.family, "encoder", block, range(48))
    names.add(file_name(key_of(bundle, Terms())))
    assert len(names) == 9
