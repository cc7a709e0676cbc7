"""A result against its reference in the engine they are meant for, call by call, for as many rounds as it takes."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self

import numpy as np

from flyweight.artifact import Measurement
from flyweight.engines import onnxruntime, openvino
from flyweight.engines.engine import Predictor, engine_named
from flyweight.errors import EngineError, StepError
from flyweight.measure.int8 import in_int8
from flyweight.measure.latency import Point, Timing, latency_ratio, time_calls

if TYPE_CHECKING:
    from flyweight.models.bundle import Bundle

__all__ = ["Race", "Terms", "check_terms", "ready"]


class Terms(NamedTuple):
    """What a time is taken on. precision: "int8" as the `quantize` step makes it with its defaults."""

    engine: Literal["onnxruntime", "openvino"] = "onnxruntime"
    precision: Literal["fp32", "int8"] = "fp32"
    point: Point = Point(1, 128)
    threads: int = 1

    def __str__(self) -> str:
        return f"{self.engine} {self.precision} {self.point}, {self.threads} thread{'s' if self.threads > 1 else ''}"


def check_terms(bundle: Bundle, terms: Terms) -> None:
    """Before anything is made. Raises EngineError (the engine is missing), StepError (texts longer than the model takes)."""
    if reason := engine_named(terms.engine).available():
        raise EngineError(f"the engine {terms.engine} to take times on", reason)
    longest = bundle.encoder.max_length
    if terms.point.length > longest:
        raise StepError(f"a shape of at most {longest} tokens", f"{terms.point}", "shorten it to what the model takes")


def ready(bundle: Bundle, terms: Terms, folder: Path) -> Predictor:
    """The bundle's model in the engine; its file is written below `folder`. Raises ExportError, EngineError."""
    made = in_int8(bundle) if terms.precision == "int8" else bundle
    path = folder / onnxruntime.export(made, folder).file  # OpenVINO reads the same file
    if terms.engine == "openvino":
        return openvino.open_file(path, terms.threads)
    return onnxruntime.open_file(path, terms.threads)


class Race:
    """Holds the reference open until its `with` ends; `against` opens a result beside it. Raises as `check_terms`, `ready`.

    The two may differ in shapes, vocabulary and family; both run in the precision of the terms.
    """

    def __init__(self, reference: Bundle, terms: Terms, seed: int = 0) -> None:
        check_terms(reference, terms)
        self._terms, self._seed = terms, seed
        self._vocabulary = _vocabulary(reference)
        self._closing = ExitStack()
        try:
            self._reference = self._opened(reference, self._closing)
        except BaseException:
            self._closing.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.close()

    @contextmanager
    def against(self, bundle: Bundle) -> Iterator[Callable[[int], Measurement]]:
        """Gives `take(rounds)`: runs both in turn for so many further rounds; the speed-up over all rounds so far.

        Both read the same tokens: those that both have.
        """
        taken: list[Any] = []
        vocabulary = min(self._vocabulary, _vocabulary(bundle))
        with ExitStack() as closing:
            pair = {"reference": self._reference, "result": self._opened(bundle, closing)}

            def take(rounds: int) -> Measurement:
                timing = Timing(rounds, least=rounds)
                taken.append(time_calls(pair, [self._terms.point], vocabulary, timing, self._seed)[self._terms.point])
                result, reference = (np.concatenate([part[name] for part in taken]) for name in ("result", "reference"))
                return latency_ratio(result, reference)

            yield take

    def _opened(self, bundle: Bundle, closing: ExitStack) -> Predictor:
        """Its file goes when the model is closed: an engine may still read from it."""
        folder = closing.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True))
        predictor = ready(bundle, self._terms, Path(folder))
        closing.callback(predictor.close)
        return predictor


def _vocabulary(bundle: Bundle) -> int:
    return int(bundle.model.config.vocab_size)
