"""The accuracy gate: layers that harm most fall back to more bits or to float until the acceptance rule holds.

The rule is the one that the finished artifact is held against (`measure.verdict`): the 95 % lower bound of the paired
difference to the reference, here on the validation examples, with the rounding of activations simulated. Where it does not
hold, every layer is looked at twice: how far it alone moves the output of its block, and, for the worst, what the task's
metric gains when it goes back to float. In that order layers go back to float until the rule holds; then each of them is
lowered again, rung by rung, to the fewest bits that the rule bears. The table of all this stands in the record of the step.

A layer is a site here: linears that read one tensor (q, k and v) share the grid of their inputs and fall back together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from flyweight.artifact import Measurement
from flyweight.errors import StepError
from flyweight.measure.quality import difference, quality, resamples
from flyweight.measure.verdict import accept
from flyweight.methods.quantize.kept import parts_of
from flyweight.methods.quantize.ladder import Unit, climb, units_of
from flyweight.methods.quantize.sensitivity import chosen, site_errors
from flyweight.models.activations import simulate
from flyweight.runtime import neutral_batch
from flyweight.training import checkpoint, predict
from flyweight.training.device import weights
from flyweight.training.teacher import kept

if TYPE_CHECKING:
    from flyweight.artifact import Verdict
    from flyweight.data import Examples
    from flyweight.methods.quantize.work import Work

__all__ = ["Gate", "open_gate"]

RANKED = 512  # examples that the metric is taken on to rank layers; all of them decide
BATCH = 64
CANDIDATES = 16  # layers that the metric is taken of, the worst by output error
NO_DATA = "give --validation F or --train F (without labels: more texts in --calibrate)"
Outputs = NDArray[np.float32]


class Judged(NamedTuple):
    """verdict: by the rule; value, change, low: the metric, minus the reference's, and the lower bound of that."""

    verdict: Verdict
    value: float
    change: float
    low: float

    @property
    def missed(self) -> str:
        """How a verdict that is no acceptance goes on."""
        return self.verdict.text.removeprefix("Not accepted: ").rstrip(".")

    def as_note(self) -> dict[str, float]:
        return {name: round(number, 6) for name, number in zip(self._fields[1:], self[1:], strict=True)}


def open_gate(work: Work) -> Gate | None:
    """Called before anything is changed: takes the answers of the reference and of the float model. None: nothing to hold.

    Raises StepError with `gate: required` where there is no rule, no validation example, or float itself misses the rule.
    """
    settings, context = work.settings, work.context
    rule, required = context.accept, settings.gate == "required"
    if settings.gate == "off":
        return None
    if rule.quality is None and rule.max_drop is None:
        if required:
            raise StepError("an acceptance rule for gate required", "none", "give --max-drop or --quality")
        return None
    examples = context.validation
    if examples is None or not len(examples) or (context.task.labelled and examples.labels is None):
        if required:
            raise StepError("validation examples for gate required", "none", NO_DATA)
        context.progress.note(f"warning: the gate was left out, as there are no validation examples: {NO_DATA}")
        work.notes["gate"] = {"told": "Left out: there were no validation examples."}
        return None
    reference = context.reference()
    batch = neutral_batch(settings.activations)  # that of all answers, so that nothing but the model differs
    own = context.seen_by(reference).validation  # the same texts: its vocabulary may not have been pruned
    assert own is not None
    answers = predict(reference, own, batch_size=batch, progress=context.progress, what="gate: reference")
    del reference
    if not context.task.labelled:
        examples = replace(examples, labels=answers)
    gate = Gate(work, examples, answers)
    gate.look_at_float()
    return gate


@dataclass
class Gate:
    """examples: labelled validation examples; reference: its answers to them"""

    work: Work
    examples: Examples
    reference: Outputs
    possible: bool = True
    evaluations: int = 0

    def __post_init__(self) -> None:
        self._sampled = resamples(self.task, self.reference, self.examples, self.seed)
        self._figures = quality(self.task, self.reference, self.examples, self._sampled)

    @property
    def task(self) -> Any:
        return self.work.context.task

    @property
    def seed(self) -> int:
        return self.work.context.seed

    def judge(self, outputs: Outputs) -> Judged:
        """Hold answers to all examples against the rule, as the artifact will be in the end."""
        sampled = resamples(self.task, outputs, self.examples, self.seed)
        figures = quality(self.task, outputs, self.examples, sampled)
        told = difference(figures, self._figures, sampled, self._sampled, "the reference")
        key = f"quality.{self.task.metric}"
        change: Measurement = told[f"{key}.difference"]
        verdict = accept(self.work.context.accept, self._figures[key], change, self.task.metric)
        low = change.value if change.low is None else change.low
        return Judged(verdict, figures[key].value, change.value, low)

    def answers(self, examples: Examples | None = None) -> Outputs:
        """Of the model as it stands, its activations rounded as the engine rounds them; on all examples, or on a few.

        A few are taken in batches even where answers depend a little on their neighbours there: enough to rank layers. All are
        kept below `Context.work`, by the content of the model: a killed run, begun again, goes the same way to where it was.
        """
        work = self.work
        view = replace(work.bundle, quantized=work.codes, activations=work.settings.activations)
        batch = neutral_batch(view.activations) if examples is None else BATCH
        asked = self.examples if examples is None else examples
        self.evaluations += 1

        def ask() -> Outputs:
            with simulate(view):
                return predict(view, asked, batch_size=batch)

        codes = {name: parts_of(one) for name, one in view.quantized.items()}
        about = checkpoint.content_hash(view.activations, batch, asked.content_hash(), weights(view.model), codes)
        return kept(work.context.work / "gate" / f"{about[:32]}.npy", len(asked), ask, work.context.progress)

    def look_at_float(self) -> None:
        """Before anything is changed: what float cannot do, no fallback can."""
        bundle, context = self.work.bundle, self.work.context
        if all(step.name == "finetune" for step in bundle.steps):
            return  # it is the reference
        batch = neutral_batch(self.work.settings.activations)
        answers = predict(bundle, self.examples, batch_size=batch, progress=context.progress, what="gate: float")
        judged = self.judge(answers)
        if judged.verdict.accepted:
            return
        if self.work.settings.gate == "required":
            raise StepError(
                "a model that meets the acceptance rule before it is quantized",
                judged.missed,
                "compress less in the steps before, loosen the rule, or set gate to auto",
            )
        self.possible = False
        context.progress.note(f"warning: the gate cannot hold: the float model itself misses the rule: {judged.missed}")

    def hold(self) -> None:
        """Called when all codes are put. Notes `gate`. Raises StepError with `gate: required` where the rule cannot hold."""
        work, context = self.work, self.work.context
        first = judged = self.judge(self.answers())
        rows: list[dict[str, Any]] = []
        told = ""
        if judged.verdict.accepted:
            told = "The rule held at once: no layer fell back."
        elif not self.possible:
            told = "The float model itself misses the rule: no layer fell back."
        elif work.settings.method == "train":
            told = "The rule does not hold, and what was trained as one is not taken back layer by layer."
            if work.settings.gate == "required":
                raise StepError(
                    "a trained model that meets the acceptance rule", judged.missed, "train longer or with more bits"
                )
            context.progress.note(f"warning: {told}")
        else:
            context.progress.note(f"gate: {judged.verdict.text}")
            units = self.ranked()
            judged = self.fall_back(units)
            fallen = [unit for unit in units if unit.at]
            rows = [unit.as_note() for unit in units]
            told = f"{len(fallen)} of {len(units)} layers fell back."
            if not judged.verdict.accepted:
                self.give_up(judged)
            for unit in fallen:
                context.progress.note(f"gate: {unit.name} falls back to {unit.became}")
            context.progress.note(f"gate: {told} {judged.verdict.text}")
        work.notes["gate"] = {
            "told": told,
            "verdict": judged.verdict.text,
            "held": judged.verdict.accepted,
            "rule": context.accept.model_dump(exclude_none=True),
            "metric": self.task.metric,
            "examples": len(self.examples),
            "evaluations": self.evaluations,
            "before": first.as_note(),
            "after": judged.as_note(),
            "layers": rows,
        }

    def give_up(self, judged: Judged) -> None:
        """Called where the rule does not hold with all layers in float. Raises StepError with `gate: required`."""
        if self.work.settings.gate == "required":
            raise StepError(
                "a model that meets the acceptance rule in few bits or in float",
                f"{judged.missed}, even with all layers in float",
                "loosen the rule, or set gate to auto",
            )
        self.work.context.progress.note(
            f"warning: the rule does not hold even with all layers in float, which they stay: {judged.missed}"
        )

    def ranked(self) -> list[Unit]:
        """All layers, the most harmful first; every one with its output error, the worst with what the metric gains."""
        context = self.work.context
        errors = site_errors(self.work, context.calibration if context.calibration is not None else self.examples)
        units = units_of(self.work, errors)
        by_error = sorted(units, key=lambda unit: -np.inf if unit.error is None else -unit.error)
        candidates = by_error[:CANDIDATES]
        rows = chosen(len(self.examples), RANKED, self.seed)
        few, near = self.examples.take(rows), self.reference[rows]
        now = self.answers(few)
        scores, away = self.task.scores(now, few), _distance(now, near)
        keys: dict[str, tuple[float, float]] = {}
        for unit in context.progress.track(candidates, "gate: layer by layer", total=len(candidates)):
            climb(self.work, unit, unit.top)
            then = self.answers(few)
            climb(self.work, unit, 0)
            gains = self.task.scores(then, few) - scores
            unit.gain = float(gains.mean())
            noise = float(gains.std()) / max(len(few), 1) ** 0.5
            keys[unit.name] = (unit.gain if abs(unit.gain) > noise else 0.0, away - _distance(then, near))
        return [*sorted(candidates, key=lambda unit: keys[unit.name], reverse=True), *by_error[CANDIDATES:]]

    def fall_back(self, units: Sequence[Unit]) -> Judged:
        """Put the fewest leading layers into float that make the rule hold, then lower each again as far as it bears.

        Where it does not hold with all of them, all of them stay there.
        """
        work, progress = self.work, self.work.context.progress

        def with_first(number: int) -> Judged:
            for place, unit in enumerate(units):
                climb(work, unit, unit.top if place < number else 0)
            return self.judge(self.answers())

        count, judged = _fewest(with_first, len(units), progress)
        if not judged.verdict.accepted:
            return judged
        fallen = list(units[:count])
        for unit in progress.track(fallen[::-1], "gate: lowering again", total=count):
            for rung in range(1 if unit is fallen[-1] else 0, unit.top):  # without the last one the rule did not hold
                climb(work, unit, rung)
                tried = self.judge(self.answers())
                if tried.verdict.accepted:
                    judged = tried
                    break
            else:
                climb(work, unit, unit.top)
        return judged


def _fewest(tried: Callable[[int], Judged], most: int, progress: Any) -> tuple[int, Judged]:
    """(least n for which `tried(n)` is accepted, that verdict), were acceptance to grow with n: by doubling, then halving.

    The model is left as `tried(n)` makes it. Where not even all `most` are accepted: (most, that verdict).
    """
    low, high, found = 0, most, None
    sizes = [*(2**i for i in range(most.bit_length()) if 2**i < most), most]
    for number in progress.track(sizes, "gate: falling back", total=len(sizes)):
        found = tried(number)
        if found.verdict.accepted:
            high = number
            break
        low = number
    assert found is not None
    at = high
    while high - low > 1:
        middle = (low + high) // 2
        other = tried(middle)
        at = middle
        if other.verdict.accepted:
            high, found = middle, other
        else:
            low = middle
    return (high, found) if at == high else (high, tried(high))


def _distance(outputs: Outputs, reference: Outputs) -> float:
    """Mean squared distance of answers: finer than a metric of right and wrong."""
    return float(np.square(outputs.astype(np.float64) - reference).mean())
