"""One function a verb. Each takes what the command takes and gives back what it prints."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flyweight import artifact
from flyweight.artifact import Manifest
from flyweight.context import Progress
from flyweight.errors import Interrupted, SettingsError
from flyweight.job import prepare
from flyweight.plan import Plan, make_plan, refuse_what_cannot_fit
from flyweight.recipe import Recipe, StepSpec, read_recipe
from flyweight.run import run_steps
from flyweight.settings import Settings
from flyweight.steps import step_named

__all__ = [
    "compress",
    "distill",
    "finetune",
    "make_recipe",
    "plan",
    "prune",
    "quantize",
    "run_recipe",
    "run_step",
    "step_recipe",
]


def make_recipe(recipe: str | Path | Recipe = "balanced", **given: Any) -> Recipe:
    """A recipe with fields replaced: `model`, `task`, `seed`, ... of Recipe, and those of DataSettings, Accept and
    MeasureSettings by their own names. None means: as the recipe says. Raises SettingsError for an unknown name."""
    base = recipe if isinstance(recipe, Recipe) else read_recipe(recipe)
    values: dict[str, Any] = {}
    parts = {name: dict[str, Any]() for name in ("data", "accept", "measure")}
    for key, value in given.items():
        if value is None:
            continue
        if key in parts and isinstance(value, Mapping):
            parts[key] |= value
            continue
        part = next((name for name in parts if key in type(getattr(base, name)).model_fields), None)
        if key in Recipe.model_fields and (key not in parts or isinstance(value, Settings)):
            values[key] = value
        elif part is not None:
            parts[part][key] = value
        else:
            raise SettingsError(
                "a field of the recipe, its data, accept or measure", f"'{key}'", "see `flyweight compress --help`"
            )
    for name, changes in parts.items():
        old = values.get(name, getattr(base, name))
        values[name] = type(old).read({**old.model_dump(), **changes}, name) if changes else old
    whole = {field: getattr(base, field) for field in Recipe.model_fields}
    return Recipe.read({**whole, **values}, "recipe")


def plan(recipe: Recipe, progress: Progress | None = None) -> Plan:
    """What `run_recipe` would do and cost. Reads model and data and times a few batches; changes nothing."""
    return make_plan(prepare(recipe, progress))


def run_recipe(
    recipe: Recipe, out: Path | str, *, overwrite: bool = False, progress: Progress | None = None
) -> Manifest:
    """Run a whole recipe and write the artifact to `out`. Steps done before come from the cache.

    Raises FlyweightError before long work where model, data, disk or memory cannot do, and Interrupted on Ctrl-C.
    """
    from flyweight.finish import finish

    out = Path(out)
    artifact.refuse_existing(out.absolute(), overwrite)
    with _resumable():
        job = prepare(recipe, progress)
        refuse_what_cannot_fit(make_plan(job), job)
        return finish(job, run_steps(job), out, overwrite)


@contextlib.contextmanager
def _resumable() -> Iterator[None]:
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted("finished steps are kept; run the same command again to go on from there") from None


def compress(
    model: str | Path | None = None,
    *,
    out: str | Path,
    recipe: str | Path | Recipe = "balanced",
    overwrite: bool = False,
    progress: Progress | None = None,
    **given: Any,
) -> Manifest:
    """The main job: `compress("model", task="text-classification", train="train.jsonl", eval="eval.jsonl", out="small")`.

    given: any field of Recipe, DataSettings, Accept and MeasureSettings, e.g. `seed=1, text="review", max_drop=0.01`.
    """
    whole = make_recipe(recipe, model=None if model is None else str(model), **given)
    return run_recipe(whole, out, overwrite=overwrite, progress=progress)


def run_step(
    name: str,
    model: str | Path,
    settings: Settings | Mapping[str, Any] | None = None,
    *,
    out: str | Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    **given: Any,
) -> Manifest:
    """One step on a model: what `flyweight finetune | distill | prune | quantize` do.

    settings: of the step, as its class or as a mapping; given: as for `compress`
    """
    recipe = make_recipe(step_recipe(name, model, settings), **given)
    return run_recipe(recipe, out, overwrite=overwrite, progress=progress)


def step_recipe(name: str, model: str | Path, settings: Settings | Mapping[str, Any] | None = None) -> Recipe:
    """A recipe of one step."""
    if not isinstance(settings, Settings):
        settings = step_named(name).settings.read(settings or {}, name)
    return Recipe(model=str(model), steps=(StepSpec(name, settings),))


finetune = partial(run_step, "finetune")
distill = partial(run_step, "distill")
prune = partial(run_step, "prune")
quantize = partial(run_step, "quantize")
