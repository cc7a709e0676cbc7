"""`flyweight compress`, and its single steps as commands of their own."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flyweight.cli.flags import given
from flyweight.cli.options import Json, Model, Out, Overwrite, Revision, Seed, Task
from flyweight.cli.output import bytes_text, print_json, print_table, seconds_text
from flyweight.cli.progress import working
from flyweight.errors import SettingsError
from flyweight.extras import need
from flyweight.settings import Accept, DataSettings, MeasureSettings, Settings
from flyweight.steps import STEPS

if TYPE_CHECKING:
    from flyweight.plan import Plan
    from flyweight.recipe import Recipe

EXAMPLES = {
    "finetune": "path/to/model --train train.jsonl --eval eval.jsonl --epochs 3 --out tuned",
    "distill": "tuned --train train.jsonl --eval eval.jsonl --layers every-other --out student",
    "prune": "tuned --train train.jsonl --eval eval.jsonl --target heads --amount 0.25 --criterion taylor --out cut",
    "quantize": "tuned --eval eval.jsonl --bits 8 --out int8",
}
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", metavar="", help="Print the plan with estimated time, memory and disk, and change nothing."
    ),
]
NOT_ACCEPTED = 3


def compress(
    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A Hugging Face folder, an artifact, a hub id, or a recipe (.yaml).",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str | None, typer.Option(help="A shipped recipe, or a YAML file.", metavar="NAME|FILE", show_default="balanced")
    ] = None,
    out: Out = None,
    overwrite: Overwrite = False,
    task: Task = None,
    revision: Revision = None,
    seed: Annotated[int | None, typer.Option(help="Seed of everything random.", min=0, metavar="INT")] = None,
    dry_run: DryRun = False,
    json: Json = False,
    *,
    data: DataSettings,
    accept: Accept,
    measured: MeasureSettings,
) -> None:
    """Compress a model by a recipe, measure it beside the original, and write the artifact.

    What a recipe says, flags replace. Ends with status 3 when the acceptance rule was not met.
    """
    if model is not None and Path(model).suffix in (".yaml", ".yml"):
        if recipe is not None:
            raise SettingsError("one recipe", f"'{model}' and --recipe {recipe}", "leave one of them out")
        model, recipe = None, model
    from flyweight.recipe import read_recipe

    check_out(out, dry_run)
    base = read_recipe(recipe or "balanced")  # before torch is imported: a slip of the pen is told at once
    need("torch", "compress models")
    from flyweight.api import make_recipe

    flags = given(data) | given(accept) | given(measured)
    whole = make_recipe(base, model=model, task=task, revision=revision, seed=seed, **flags)
    execute(whole, out, overwrite, dry_run, json)


def step_command(name: str) -> Callable[..., None]:
    """The command of one step; its flags are those of the step's settings, the data and the measuring."""
    step = STEPS[name]

    def command(
        model: Model,
        out: Out = None,
        overwrite: Overwrite = False,
        task: Task = None,
        revision: Revision = None,
        seed: Seed = 0,
        dry_run: DryRun = False,
        json: Json = False,
        *,
        settings: Settings,
        data: DataSettings,
        accept: Accept,
        measured: MeasureSettings,
    ) -> None:
        check_out(out, dry_run)
        need("torch", f"{name} models")
        from flyweight.api import make_recipe, step_recipe

        flags = given(data) | given(accept) | given(measured)
        recipe = make_recipe(step_recipe(name, model, settings), task=task, revision=revision, seed=seed, **flags)
        execute(recipe, out, overwrite, dry_run, json)

    summary = step.summary[0].upper() + step.summary[1:]
    command.__doc__ = f"{summary}, measure the result beside the model at hand, and write an artifact."
    signature = inspect.signature(command, eval_str=True)
    parameters = [
        p.replace(annotation=step.settings) if p.name == "settings" else p for p in signature.parameters.values()
    ]
    command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    return command


def check_out(out: Path | None, dry_run: bool) -> None:
    if out is None and not dry_run:
        raise SettingsError("a folder to write", "none", "give --out DIR, or --dry-run to see the plan alone")


def execute(recipe: Recipe, out: Path | None, overwrite: bool, dry_run: bool, json: bool) -> None:
    """Plan or run. Raises typer.Exit(3) when the artifact was written but not accepted."""
    from flyweight.api import plan, run_recipe

    if dry_run:
        with working() as progress:
            planned = plan(recipe, progress)
        show_plan(planned, json)
        return
    assert out is not None  # check_out
    with working() as progress:
        manifest = run_recipe(recipe, out, overwrite=overwrite, progress=progress)
    verdict = manifest.verdict
    if json:
        print_json({"out": out, **summary(manifest)})
    else:
        from flyweight.report.table import table

        typer.echo(table(manifest))
        typer.echo(f'written: {out}\nnext: flyweight predict {out} "some text"')
    if verdict is not None and not verdict.accepted:
        raise typer.Exit(NOT_ACCEPTED)


def summary(manifest: Any) -> dict[str, Any]:
    """What `--json` tells of an artifact."""
    content: dict[str, Any] = manifest.model_dump(mode="json")
    names = ("task", "labels", "family", "steps", "environment", "kernels", "measurements", "verdict")
    return {name: content[name] for name in names}


def show_plan(plan: Plan, json: bool) -> None:
    totals = {"seconds": plan.seconds, "memory_bytes": plan.memory_bytes, "disk_bytes": plan.disk_bytes}
    if json:
        print_json({"steps": [row._asdict() for row in plan.rows], **totals})
        return
    rows = [
        (
            row.step,
            row.what,
            "cached" if row.cached else seconds_text(row.seconds),
            bytes_text(row.memory_bytes),
            bytes_text(row.disk_bytes),
        )
        for row in plan.rows
    ]
    rows.append(("total", "", seconds_text(plan.seconds), bytes_text(plan.memory_bytes), bytes_text(plan.disk_bytes)))
    print_table(("step", "what", ">time", ">memory", ">disk"), rows, title="estimates; nothing was run")
