"""A race: what runs when, and what is made of it. The clock is moved by the models, never by the machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch", reason="needs the extra `compress`")

from engine_cases import LABELS, bundle_of
from flyweight.engines.engine import Arrays
from flyweight.errors import EngineError, StepError
from flyweight.measure import latency, race
from flyweight.measure.latency import Point
from flyweight.measure.race import Race, Terms, ready
from flyweight.models import surgery
from flyweight.models.bundle import Bundle

Tiny = Callable[..., Path]
TERMS = Terms(point=Point(2, 9))


class Clocked:
    """The real model, which takes as many made-up milliseconds as it has neurons."""

    def __init__(self, bundle: Bundle, inner: race.Predictor, log: list[str], now: list[int]) -> None:
        shapes = surgery.shapes(bundle.model, bundle.family)["encoder"]
        self.ms, self.inner, self.log, self.now = sum(shape.neurons for shape in shapes), inner, log, now

    def run(self, arrays: Arrays) -> np.ndarray:
        assert arrays["input_ids"].shape == (2, 9)
        self.now[0] += self.ms * 1_000_000
        self.log.append(str(self.ms))
        return self.inner.run(arrays)

    def close(self) -> None:
        self.log.append(f"{self.ms} closed")
        self.inner.close()


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    now = [0]
    monkeypatch.setattr(latency.time, "perf_counter_ns", lambda: now[0])
    monkeypatch.setattr(latency.time, "perf_counter", lambda: now[0] / 1e9)
    monkeypatch.setattr(
        race, "ready", lambda bundle, terms, folder: Clocked(bundle, ready(bundle, terms, folder), found, now)
    )
    return found


def halved(bundle: Bundle) -> Bundle:
    result = bundle.copy()
    for block in range(4):
        surgery.keep_neurons(result.model, result.family, "encoder", block, range(32))
    return result


def test_both_run_in_turn_and_rounds_add_up(tiny: Tiny, log: list[str]) -> None:
    bundle = bundle_of(tiny("bert", LABELS))
    with Race(bundle, TERMS) as held:
        with held.against(halved(bundle)) as take:
            first = take(8)
            assert (first.n, first.value, first.low, first.high) == (8, 2.0, 2.0, 2.0)
            # three to warm up, and the first timed one of each comes after one that is not
            assert log[:10] == ["256"] * 3 + ["128"] * 3 + ["256", "256", "128", "128"]
            assert log[10:18] == ["128", "256", "256", "128"] * 2  # who goes first changes
            assert take(16).n == 24
            assert log.count("256") == log.count("128") == 8 + 16 + 2 * (3 + 1)
        assert log[-1] == "128 closed"
        log.clear()
        with held.against(bundle) as take:  # the reference is still open
            assert take(6).value == 1.0
        assert log[-1] == "256 closed"
    assert log[-2:] == ["256 closed"] * 2


def test_a_result_of_another_family_shape_and_vocabulary_runs_beside_its_reference(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both real engines read the same tokens, none of which lies beyond the smaller vocabulary."""
    seen: list[int] = []
    made = latency.random_arrays

    def arrays(point: Point, vocabulary: int, seed: int) -> Arrays:
        seen.append(vocabulary)
        return made(point, vocabulary, seed)

    monkeypatch.setattr(latency, "random_arrays", arrays)
    large, small = bundle_of(tiny("roberta", LABELS)), bundle_of(tiny("mpnet", LABELS))
    sizes = [int(one.model.config.vocab_size) for one in (large, small)]
    assert sizes[0] > sizes[1]
    for reference, result in ((large, small), (small, large)):
        with Race(reference, TERMS) as held, held.against(result) as take:
            assert take(6).n == 6
    assert seen == [sizes[1]] * 2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_the_file_is_of_the_precision_and_answers(tiny: Tiny, tmp_path: Path, precision: str) -> None:
    import onnx

    bundle = bundle_of(tiny("mpnet", LABELS))
    model = ready(bundle, TERMS._replace(precision=precision), tmp_path)  # type: ignore[arg-type]
    assert model.run(latency.random_arrays(Point(2, 9), 60, 0)).shape == (2, 2)
    model.close()
    kinds = {node.op_type for path in tmp_path.rglob("*.onnx") for node in onnx.load(str(path)).graph.node}
    assert ("MatMulInteger" in kinds) == (precision == "int8")
    assert not bundle.quantized


def test_openvino_reads_the_same_file(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("openvino", reason="needs the extra `openvino`")
    bundle = bundle_of(tiny("bert", LABELS))
    arrays = latency.random_arrays(Point(2, 9), 60, 0)
    found = {}
    for engine in ("onnxruntime", "openvino"):
        model = ready(bundle, Terms(engine, point=Point(2, 9)), tmp_path / engine)
        found[engine] = model.run(arrays).copy()
        model.close()
    np.testing.assert_allclose(found["openvino"], found["onnxruntime"], atol=1e-4)


def test_what_cannot_run_is_refused_before_anything_is_made(
    tiny: Tiny, log: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = bundle_of(tiny("bert", LABELS))
    monkeypatch.setattr(race, "ready", lambda *_: pytest.fail("nothing is to be made"))
    with pytest.raises(StepError, match=r"a shape of at most 64 tokens, got 1x65"):
        Race(bundle, Terms(point=Point(1, 65)))
    monkeypatch.setattr("flyweight.engines.onnxruntime.available", lambda: "onnxruntime is not installed")
    with pytest.raises(EngineError, match="the engine onnxruntime to take times on, got onnxruntime is not installed"):
        Race(bundle, TERMS)


def test_terms_read_as_one_line() -> None:
    assert str(Terms()) == "onnxruntime fp32 1x128, 1 thread"
    assert str(Terms("openvino", "int8", Point(32, 64), 4)) == "openvino int8 32x64, 4 threads"
