"""What is asked of the commands, and what each costs: the one place where flags and estimates stand."""

from __future__ import annotations

from typing import NamedTuple

from benchmarks.models import MINILM, MPNET, Model
from benchmarks.tuned import SEEDS

PLAIN = "plain"
"""The model as its package carries it, not fine-tuned."""


class Ask(NamedTuple):
    """One command, whose artifact is judged and timed beside the reference.

    flags:   {reference}, {mpnet} and {minilm} stand for the row's own reference, MPNet's, and MiniLM as its package carries it
    start:   key of the row whose artifact it begins with; PLAIN; or nothing: the reference of its model and seed
    minutes: on 2 quiet cores, with judging
    total:   how many times as fast as the reference the result shall be; `--speedup` is what the start lacks of it
    control: `MODEL-KEY` of the row that it is held against, seed by seed
    asked:   runs only where it is named (as MPNet's rows do, and all but the first seed of the others)
    kept:    whether its artifact stays, for other rows or to be looked at; of those that are many only figures do
    """

    key: str
    summary: str
    verb: str
    flags: str
    minutes: float
    start: str = ""
    total: float | None = None
    control: str = ""
    seeds: tuple[int, ...] = SEEDS
    model: Model = MINILM
    asked: bool = False
    kept: bool = True

    def row(self, seed: int) -> str:
        return row_name(self.model, self.key, seed)

    @property
    def reference_seeds(self) -> tuple[int, ...]:
        """MPNet was fine-tuned under one seed."""
        return tuple(reference_seed(self.model, seed) for seed in self.seeds)


def row_name(model: Model, key: str, seed: int) -> str:
    return f"{model.key}-{key}-s{seed}"


def reference_seed(model: Model, seed: int) -> int:
    return 0 if model.key == MPNET.key else seed


PARTS = "--target heads+neurons"
WISH = f"{PARTS} --criterion fisher --restore linear"
ANSWERS = "--temperature 2 --alpha 0.7"
INSIDE = f"{ANSWERS} --hidden-weight 1"


def _mpnet(
    key: str, summary: str, verb: str, flags: str, minutes: float, start: str = "", total: float | None = None
) -> Ask:
    return Ask(key, summary, verb, flags, minutes, start, total, seeds=(0,), model=MPNET, asked=True)


def _cut(key: str, summary: str, flags: str, minutes: float = 9, start: str = "", total: float | None = None) -> Ask:
    return _mpnet(key, summary, "prune", flags, minutes, start, total)


def _taught(key: str, summary: str, flags: str, minutes: float, start: str = "") -> Ask:
    """By the reference's answers and hidden states, whatever the start."""
    return _mpnet(key, summary, "distill", f"--teacher {{reference}} {INSIDE} {flags}", minutes, start)


ONE_SHOT = (
    _cut("1.25x", "1.25x, no training", f"{WISH} --speedup 1.25"),
    _cut("1.5x", "**1.5x, no training**", f"{WISH} --speedup 1.5"),
    _cut("2x", "2x, no training", f"{WISH} --speedup 2"),
    _cut("2.5x", "2.5x, no training", f"{WISH} --speedup 2.5"),
    _cut("2x-block", "2x, no training but of each block by itself", f"{PARTS} --restore block --speedup 2", 20),
    _cut("2x-magnitude", "2x by magnitude alone", f"{PARTS} --criterion magnitude --restore none --speedup 2", 7),
    _cut("2x-taylor", "2x by Taylor alone", f"{PARTS} --criterion taylor --restore none --speedup 2", 8),
    _cut("2x-magnitude-linear", "2x by magnitude, restored as ours", f"{PARTS} --criterion magnitude --speedup 2", 8),
    _cut("2x-taylor-linear", "2x by Taylor, restored as ours", f"{PARTS} --criterion taylor --speedup 2", 9),
)
RECOVERED = (
    _taught("4x-1", "on the way to 4x: 2x, then distilled", "--epochs 2 --learning-rate 5e-5", 20, "2x"),
    _cut("4x-2", "on the way: cut to 4x", WISH, 7, "4x-1", 4.0),
    _taught("4x", "**4x, recovered**", "--epochs 4 --learning-rate 5e-5", 23, "4x-2"),
    _taught("6l", "every other layer, distilled", "--layers every-other --epochs 3 --learning-rate 5e-5", 25),
    _cut("4x-layers-1", "of these cut to 4x", WISH, 7, "6l", 4.0),
    _taught(
        "4x-layers",
        "4x by every other layer, heads and neurons, recovered",
        "--epochs 4 --learning-rate 5e-5",
        23,
        "4x-layers-1",
    ),
)
TENFOLD = (
    _taught("4l", "four layers, distilled", "--layers 0,4,7,11 --epochs 4 --learning-rate 5e-5", 25),
    _cut("10x-1", "on the way to 10x: four layers cut to 5.5x", WISH, 6, "4l", 5.5),
    _taught("10x-2", "on the way: distilled again", "--epochs 3 --learning-rate 1e-4", 15, "10x-1"),
    _cut("10x-3", "on the way: cut to 10x", WISH, 5, "10x-2", 10.0),
    _taught(
        "10x",
        "**10x, distilled and pruned**, 13 epochs in three stages",
        "--epochs 6 --learning-rate 1e-4",
        24,
        "10x-3",
    ),
    _cut(
        "10x-cofi",
        "10x by CoFi alone, 8 epochs",
        f"{PARTS} --gradual l0 --speedup 10 --epochs 8 --learning-rate 5e-5 {INSIDE}",
        80,  # in parts of 25 minutes
    ),
    _taught("1l", "one layer (layers alone), distilled for 6 epochs", "--layers 0 --epochs 6 --learning-rate 1e-4", 23),
    _mpnet(
        "1l-alone",
        "one layer, trained for 6 epochs without a teacher",
        "distill",
        "--layers 0 --alpha 0 --epochs 6 --learning-rate 1e-4",
        8,
    ),
)
HANDED = (
    Ask(
        "alone",
        "MiniLM fine-tuned for 5 epochs, no teacher",
        "finetune",
        "--epochs 5 --learning-rate 5e-5 --task text-classification",
        9,
        PLAIN,
    ),
    Ask(
        "to-minilm",
        "**MiniLM taught by MPNet** for 5 epochs",
        "distill",
        f"--student {{minilm}} {ANSWERS} --epochs 5 --learning-rate 5e-5",
        13,
        control="minilm-alone",
        model=MPNET,
        asked=True,
    ),
)


def _students() -> tuple[Ask, ...]:
    """Each with its control: the same start, steps and rate on the labels alone."""
    shapes = {
        "3l": ("three layers", "--layers every-other", 8.0),
        "2l": ("two layers", "--layers 0,3", 7.0),
        "1l": ("one layer", "--layers 0", 5.0),
        "half": ("half the width", "--width 192", 12.0),
    }
    found = []
    for key, (what, flags, minutes) in shapes.items():
        rest = f"{flags} --epochs 6 --learning-rate 1e-4"
        taught = f"{rest} {INSIDE}"
        found += [
            Ask(key, f"**{what}**, distilled", "distill", taught, minutes, control=f"minilm-{key}-alone"),
            Ask(f"{key}-alone", f"{what}, no teacher", "distill", f"{rest} --alpha 0", 0.6 * minutes),
        ]
    two = f"--layers every-other {ANSWERS} --more-teachers {{mpnet}} --epochs 6 --learning-rate 1e-4"
    last = Ask("3l-two", "three layers, taught by MPNet as well", "distill", two, 11, control="minilm-3l-alone")
    return (*found, last._replace(asked=True))


STUDENTS = _students()
VOCABULARY = Ask("vocabulary", "**a third of the vocabulary**", "prune", "--target vocabulary --amount 0.6667", 2)

SPEEDUPS = (1.25, 1.5, 2.0, 2.5)
STAGES = {
    "magnitude": ("by magnitude", "--criterion magnitude --restore none"),
    "search": ("by Fisher's diagonal", "--criterion fisher --restore none --no-rearrange"),
    "rearranged": ("+ rearranged", "--criterion fisher --restore none"),
    "masks": ("+ rearranged + masks tuned", "--criterion fisher --restore masks"),
    "linear-search": ("+ linears solved, not rearranged", "--criterion fisher --restore linear --no-rearrange"),
    "linear": ("+ rearranged + linears solved", "--criterion fisher --restore linear"),
    "block": ("+ rearranged + blocks trained one by one", "--criterion fisher --restore block"),
}


def curve_key(stage: str, speedup: float) -> str:
    return f"curve-{stage}-{speedup:g}x"


CURVE = tuple(
    Ask(
        curve_key(stage, speedup),
        f"{speedup:g}x fewer FLOPs, {summary}",
        "prune",
        f"{PARTS} --cost flops --speedup {speedup:g} {flags}",
        5 if stage == "block" else 1.8,
        kept=False,
    )
    for stage, (summary, flags) in STAGES.items()
    for speedup in SPEEDUPS
)
"""By FLOPs, so that all stages have the same shapes: a wish of time is met by trial, and would give each stage its own."""

ZEROS = tuple(
    Ask(
        f"zeros-{criterion}-{name}",
        f"{summary}, {what}",
        "prune",
        f"--target weights --criterion {criterion} {flags}",
        3 if criterion == "hessian" else 2,
        kept=criterion == "magnitude",
    )
    for criterion, summary in (("magnitude", "magnitude"), ("wanda", "Wanda"), ("hessian", "SparseGPT"))
    for name, what, flags in (("50", "50 %", "--amount 0.5"), ("2of4", "2:4", "--pattern 2:4"))
)
NINETY = Ask("zeros-magnitude-90", "magnitude, 90 %", "prune", "--target weights --amount 0.9", 2, seeds=(0,))
"""For its time: what is left of its quality is nothing."""

ASKS = (*ONE_SHOT, *RECOVERED, *TENFOLD, *HANDED, *STUDENTS, VOCABULARY, *CURVE, *ZEROS, NINETY)
