"""What a quantized layer can fall back to: more bits, inputs in float, float."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from flyweight.methods.quantize.work import widest

if TYPE_CHECKING:
    from torch import Tensor

    from flyweight.methods.quantize.work import Target, Work
    from flyweight.models.bundle import Codes

__all__ = ["Rung", "Unit", "climb", "corrected", "stand", "units_of", "widened"]


@dataclass(frozen=True)
class Rung:
    """One state of a layer. codes: by module name, None for float; the first rung of a ladder is what the method made."""

    name: str
    codes: Mapping[str, Codes | None]


@dataclass
class Unit:
    """Targets that fall back together, and where they stand.

    error: what they do to their block's output as the method left them, see `sensitivity`; None outside the blocks
    gain:  what the metric gains when they alone go back to float, on the examples that rank; None where it was not taken
    biases: those that were corrected, as they were before, by module name
    made:  as they were corrected
    """

    targets: list[Target]
    rungs: list[Rung]
    biases: Mapping[str, Tensor]
    made: Mapping[str, Tensor]
    error: float | None = None
    gain: float | None = None
    at: int = 0

    @property
    def name(self) -> str:
        return self.targets[0].module

    @property
    def top(self) -> int:
        """The rung of float."""
        return len(self.rungs) - 1

    @property
    def became(self) -> str:
        return self.rungs[self.at].name

    def as_note(self) -> dict[str, Any]:
        return {
            "layer": self.name,
            "linears": [target.module for target in self.targets],
            "was": self.rungs[0].name,
            "output_error": None if self.error is None else round(self.error, 8),
            "metric_change": None if self.gain is None else round(self.gain, 6),
            "became": self.became if self.at else "kept",
        }


def units_of(work: Work, errors: Mapping[tuple[str, ...], float | None]) -> list[Unit]:
    """One a site, in the order of `errors`; then the tables and linears outside the blocks, each its own.

    errors: {module names of a site's targets: error}
    """
    left = {name: target for name, target in work.targets.items() if target.parameter in work.codes}
    groups: list[tuple[list[Target], float | None]] = []
    for names, error in errors.items():
        groups.append(([left.pop(name) for name in names], error))
    groups += [([target], None) for target in left.values()]
    return [_unit(work, targets, error) for targets, error in groups]


def _unit(work: Work, targets: list[Target], error: float | None) -> Unit:
    made = {target.module: work.codes[target.parameter] for target in targets}
    after = corrected(work, targets)
    before = {name: work.biases[name] for name in after}
    return Unit(targets, _rungs(work, targets, made), before, after, error)


def _rungs(work: Work, targets: list[Target], made: Mapping[str, Codes]) -> list[Rung]:
    bits = {codes.info.bits for codes in made.values()}
    top = 8 if targets[0].part == "table" else widest(work.settings)
    rungs = [Rung(" and ".join(f"{one}" for one in sorted(bits)) + (" bit" if bits == {1} else " bits"), made)]
    last: Mapping[str, Codes] = made
    for wider in (4, top):
        if min(bits) < wider:
            last = {
                target.module: last[target.module]
                if made[target.module].info.bits >= wider
                else widened(work, target, made[target.module], wider)
                for target in targets
            }
            least = "at least " if max(bits) > wider else ""
            rungs.append(Rung(f"{least}{wider} bits", last))
    if any(codes.input_scale is not None for codes in last.values()):
        free = {name: _free(codes) for name, codes in last.items()}
        rungs.append(Rung(f"{rungs[-1].name}, inputs in float", free))
    return [*rungs, Rung("float", dict.fromkeys(made))]


def widened(work: Work, target: Target, codes: Codes, bits: int) -> Codes:
    """The weight rounded to nearest in more bits; smoothing, outlier channels and the grid of the inputs stay as they are.

    Binary and ternary weights become symmetric ones.
    """
    weight, grid = work.weight(target), target.grid
    if codes.smooth is not None:
        weight = weight * codes.smooth
    if codes.outliers is not None:
        weight = weight.index_fill(1, codes.outliers, 0)
    wide = grid._replace(bits=bits, scheme="asymmetric" if grid.scheme == "asymmetric" else "symmetric")
    made = work.rounded(target, wide, weight)
    return replace(
        made,
        smooth=codes.smooth,
        outliers=codes.outliers,
        outlier_values=codes.outlier_values,
        input_scale=codes.input_scale,
        input_zero_point=codes.input_zero_point,
        input_shift=codes.input_shift,
    )


def _free(codes: Codes) -> Codes:
    """The same weight, its inputs in float."""
    return replace(codes, input_scale=None, input_zero_point=None, input_shift=None)


def climb(work: Work, unit: Unit, rung: int) -> None:
    """Put the layer on a rung, up or down. A bias that was corrected for the first rung's error is as it was on all others, but
    for what a shift of the inputs loses there.
    """
    unit.at = rung
    for target in unit.targets:
        codes = unit.rungs[rung].codes[target.module]
        bias = (unit.biases if rung else unit.made).get(target.module)
        lost = work.lost(target, codes) if rung and codes is not None else None
        stand(work, target, codes, bias if bias is None or lost is None else bias + lost)


def stand(work: Work, target: Target, codes: Codes | None, bias: Tensor | None) -> None:
    """Put codes, or the float weight again for None, and the bias that goes with them; None leaves the bias as it is."""
    if codes is None:
        work.take_back(target)
    else:
        work.put(target, codes)
    if bias is not None:
        with torch.no_grad():
            target.owner.get_parameter("bias").copy_(bias)


def corrected(work: Work, targets: Iterable[Target]) -> dict[str, Tensor]:
    """{module name: bias as it is now} of those targets whose bias `work.biases` has as it was."""
    return {
        target.module: target.owner.get_parameter("bias").detach().clone()
        for target in targets
        if target.module in work.biases
    }
