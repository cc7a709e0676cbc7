"""`flyweight inspect`, `evaluate` and `compare`: what a model is, how good it is, and how several stand side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from flyweight.cli.flags import Fields
from flyweight.cli.options import Columns, EngineName, Json, Model, Revision, Task, Threads
from flyweight.cli.output import bytes_text, print_json, print_table
from flyweight.cli.progress import working
from flyweight.cli.sensitivity import Data, Groups, Page, Samples, Sensitivity, Unlabelled, page_at, show, write_page
from flyweight.extras import need
from flyweight.settings import MeasureSettings

# one engine runs all that is compared: --engine
Measured = Annotated[MeasureSettings, Fields(tuple(name for name in MeasureSettings.model_fields if name != "engines"))]
Labelled = Annotated[Path, typer.Option(help="Labelled examples.", metavar="FILE", show_default=False)]


def inspect(
    model: Model,
    columns: Columns,
    revision: Revision = None,
    task: Task = None,
    length: Annotated[
        int, typer.Option(help="Input length in tokens that FLOPs are counted at.", min=1, metavar="INT")
    ] = 128,
    sensitivity: Sensitivity = False,
    data: Data = None,
    unlabelled: Unlabelled = False,
    samples: Samples = 256,
    groups: Groups = 8,
    out: Page = None,
    json: Json = False,
) -> None:
    """What a model is made of, what can be pruned and quantized, and what each part costs to lose on your data."""
    need("torch", "inspect models")
    need("transformers", "inspect models")
    from flyweight.inspection import inspect as look

    page = page_at(out, sensitivity)
    with working() as progress:
        found = look(
            model,
            revision,
            length,
            task=task,
            sensitivity=sensitivity,
            data=data,
            settings=columns,
            unlabelled=unlabelled,
            samples=samples,
            groups=groups,
            progress=progress,
        )
    if page is not None:
        write_page(page, found)
    if json:
        print_json(found)
    elif sensitivity:
        show(found, page)
    else:
        print_model(found)


def print_model(found: dict[str, Any]) -> None:
    print_table(("model", ""), [(name, plain(found[name])) for name in ("model", "family", "task", "labels")])
    for stack, blocks in found["blocks"].items():
        rows = [(number, plain(block["heads"]), block["neurons"]) for number, block in enumerate(blocks)]
        print_table((f"{stack} block", ">heads", ">neurons"), rows)
    print_table(("part", ">parameters"), [(name, f"{count:,}") for name, count in found["parameters"].items()])
    print_table(("figure", ">value", "unit", "method"), figure_rows(found["figures"]))
    if ran := [(name, line) for name, report in found["kernels"].items() for line in report["text"]]:
        print_table(("engine", "what it ran"), ran)
    print_table(("possible", ""), found["possible"].items())


def evaluate(
    path: Model,
    data: Labelled,
    columns: Columns,
    engine: EngineName = "onnxruntime",
    threads: Threads = 1,
    json: Json = False,
) -> None:
    """Quality of an artifact, or of a model that has a head, on labelled data, with 95 % intervals."""
    from flyweight.compare import evaluate as judge

    with working() as progress:
        found = judge(path, data, settings=columns, engine=engine, threads=threads, progress=progress)
    figures = {key: figure.model_dump() for key, figure in found.items()}
    if json:
        print_json({"model": path, "data": data, "figures": figures})
    else:
        print_table(("figure", ">value", "95 % interval", ">n"), quality_rows(figures))


def compare(
    paths: Annotated[
        list[str], typer.Argument(metavar="PATH", help="Artifacts (or models); the first is the reference.")
    ],
    columns: Columns,
    measured: Measured,
    data: Annotated[
        Path | None, typer.Option(help="Labelled examples, for quality.", metavar="FILE", show_default=False)
    ] = None,
    engine: EngineName = "onnxruntime",
    json: Json = False,
) -> None:
    """All measurements of several artifacts side by side, interleaved in one run."""
    from flyweight.compare import compare as measure

    with working() as progress:
        found = measure(paths, data, settings=columns, measured=measured, engine=engine, progress=progress)
    if json:
        models = {name: {k: f.model_dump() for k, f in figures.items()} for name, figures in found.items()}
        print_json({"reference": next(iter(found)), "models": models})
        return
    from flyweight.report.table import compare_table

    typer.echo(compare_table(found))


def figure_rows(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    return [(key, number(row["value"], row["unit"]), row["unit"], row["method"]) for key, row in figures.items()]


def quality_rows(figures: dict[str, Any]) -> list[tuple[str, str, str, str]]:
    rows = []
    for key, row in figures.items():
        interval = "" if row["low"] is None else f"{row['low']:.4f} to {row['high']:.4f}"
        rows.append((key, f"{row['value']:.4f}", interval, plain(row["n"])))
    return rows


def number(value: float, unit: str) -> str:
    return bytes_text(value) if unit == "B" else f"{value:,.6g}" if value % 1 else f"{value:,.0f}"


def plain(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return "" if value is None else str(value)
