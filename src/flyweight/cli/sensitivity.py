"""What `flyweight inspect --sensitivity` takes and shows: its options, its tables, its page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flyweight.cli.output import print_table, seconds_text
from flyweight.errors import SettingsError, StorageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from flyweight.measure.harm import Harm, Part

__all__ = ["Data", "Groups", "Page", "Samples", "Sensitivity", "Unlabelled", "page_at", "show", "write_page"]

PANEL = "Sensitivity"
EXTREMES = 8  # rows of the dearest and of the cheapest in the terminal

Sensitivity = Annotated[
    bool,
    typer.Option(
        "--sensitivity",
        metavar="",
        help="Measure what each head, group of neurons and layer costs to lose on the examples of --data.",
        rich_help_panel=PANEL,
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="Examples to measure on; labelled where the task has labels.",
        metavar="FILE",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]
Unlabelled = Annotated[
    bool,
    typer.Option(
        "--unlabelled", metavar="", help="Tell how far the answers move, without labels.", rich_help_panel=PANEL
    ),
]
Samples = Annotated[
    int, typer.Option(help="How many examples; fewer are quicker.", min=1, metavar="INT", rich_help_panel=PANEL)
]
Groups = Annotated[
    int,
    typer.Option(
        help="Groups of a block's neurons, by how much they write.", min=1, metavar="INT", rich_help_panel=PANEL
    ),
]
Page = Annotated[
    Path | None,
    typer.Option(
        help="Write heat maps and tables of the sensitivity to this HTML file.",
        metavar="FILE",
        show_default=False,
        rich_help_panel=PANEL,
    ),
]


def page_at(out: Path | None, wanted: bool) -> Path | None:
    """Where the page goes, looked at before the long work. Raises SettingsError, StorageError."""
    if out is None:
        return None
    if not wanted:
        raise SettingsError("--sensitivity beside --out", "--out alone", "add --sensitivity or leave out --out")
    if out.is_dir() or not out.absolute().parent.is_dir():
        got = f"a folder at {out}" if out.is_dir() else f"no folder {out.absolute().parent}"
        raise StorageError("a file that can be written at --out", got, "name a file in a folder that is there")
    return out


def write_page(page: Path, found: dict[str, Any]) -> None:
    from flyweight.measure.harm import Harm
    from flyweight.report.heatmap import heat_page

    model = found["model"]
    name = Path(model).absolute().name if Path(model).is_dir() else model  # folders of the maker stay private
    page.write_text(heat_page(Harm.model_validate(found["sensitivity"]), name), encoding="utf-8")


def show(found: dict[str, Any], page: Path | None) -> None:
    """Tables: whole parts block by block, then the heads and groups that cost most and least."""
    from flyweight.measure.harm import Harm

    harm = Harm.model_validate(found["sensitivity"])
    facts = [(name, found[name]) for name in ("model", "family", "task")]
    facts += [
        ("cost", harm.cost),
        ("examples", f"{harm.examples} ({harm.tokens:,} tokens)"),
        *((f"whole model's {name}", f"{value:.4f}") for name, value in harm.whole.items()),
        ("parts", f"{len(harm.parts)}, each silenced alone, in {seconds_text(harm.seconds)}"),
    ]
    print_table(("sensitivity", ""), facts)
    whole = [part for part in harm.parts if part.kind in ("layer", "attention", "feed-forward")]
    print_parts("whole parts", whole, harm)
    for kind, title in (("head", "heads"), ("neurons", "neuron groups, 0 writes most")):
        worst, best = harm.extremes(kind, EXTREMES)  # type: ignore[arg-type]
        print_parts(f"{title}: cost most", worst, harm)
        print_parts(f"{title}: cost least", best, harm)
    if page is not None:
        typer.echo(f"heat maps: {page}")


def print_parts(title: str, parts: Sequence[Part], harm: Harm) -> None:
    from flyweight.measure.harm import signed

    if not parts:
        return
    metric = [] if harm.metric is None else [f">{harm.metric.replace('_', ' ')}"]
    rows = []
    for part in parts:
        span = f"{signed(part.cost.low)} to {signed(part.cost.high)}"
        change = [] if part.change is None else [f"{100 * part.change.value:+.1f} points"]
        rows.append((part.name, signed(part.cost.value), span, *change, f"{part.weights:,}"))
    print_table((title, ">cost", ">95 % interval", *metric, ">weights"), rows)
