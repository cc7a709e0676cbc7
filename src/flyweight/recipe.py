"""A recipe: an ordered list of steps with a model, a task, data and an acceptance rule. Read, validated, written.

flyweight: 1
model: path/to/model            # a Hugging Face folder, an artifact, or a hub id
task: text-classification
data: {train: train.jsonl, eval: eval.jsonl}
steps:
  - finetune: {epochs: 3}
  - distill: {layers: every-other}
  - quantize: {bits: 8}
accept: {max_drop: 0.02}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import yaml
from pydantic import ConfigDict, Field, field_serializer, field_validator

from flyweight.errors import SettingsError, StepError, nearest
from flyweight.settings import (
    Accept,
    DataSettings,
    DistillSettings,
    MeasureSettings,
    PruneSettings,
    Settings,
    TeacherSettings,
)
from flyweight.steps import STEPS, step_named

__all__ = ["Recipe", "StepSpec", "check_order", "read_recipe", "shipped"]

PATHS = {"train", "eval", "validation", "calibrate"}


class StepSpec(NamedTuple):
    """One step of a recipe."""

    name: str
    settings: Settings

    def as_data(self) -> dict[str, Any]:
        """`{name: {every setting}}`: defaults are written out, so that a later version runs the same."""
        return {self.name: self.settings.model_dump(mode="json")}


class Recipe(Settings):
    """Everything a run depends on."""

    model_config = ConfigDict(arbitrary_types_allowed=True)

    flyweight: Literal[1] = 1
    """Format of this file."""
    summary: str = ""
    """One line for `flyweight recipes list`."""
    model: str | None = None
    """A Hugging Face folder, an artifact, or a hub id."""
    revision: str | None = None
    """Branch, tag or commit of a hub id."""
    task: str | None = None
    """The task; by default what the model's head says."""
    data: DataSettings = Field(default_factory=DataSettings)
    """Files and columns."""
    seed: int = Field(0, ge=0)
    """Seed of everything random."""
    steps: tuple[StepSpec, ...] = ()
    """What to do, in this order."""
    accept: Accept = Field(default_factory=Accept)
    """The rule that the result has to meet; otherwise it is marked and the exit status is 3."""
    measure: MeasureSettings = Field(default_factory=MeasureSettings)
    """How to measure."""

    @field_validator("steps", mode="before")
    @classmethod
    def _read_steps(cls, value: Any) -> tuple[StepSpec, ...]:
        if not isinstance(value, list | tuple):
            raise ValueError("a list of steps, each `- name: {settings}`")
        return tuple(item if isinstance(item, StepSpec) else _read_step(item, i) for i, item in enumerate(value))

    @field_serializer("steps")
    def _write_steps(self, steps: tuple[StepSpec, ...]) -> list[dict[str, Any]]:
        return [step.as_data() for step in steps]

    @classmethod
    def parse(cls, content: Mapping[str, Any], where: str) -> Self:
        """Validate the content of a recipe file. Raises SettingsError with the YAML path of the first wrong key."""
        values = dict(content)
        parts: dict[str, type[Settings]] = {"data": DataSettings, "accept": Accept, "measure": MeasureSettings}
        for key, part in parts.items():
            if isinstance(values.get(key), Mapping):
                values[key] = part.read(values[key], f"{where}: {key}")
        return cls.read(values, where)

    def with_paths_from(self, folder: Path) -> Self:
        """Relative data files, model, teacher and student folders are taken from the folder of the recipe file."""
        data = {k: folder / v for k in PATHS if (v := getattr(self.data, k)) is not None and not v.is_absolute()}
        near = partial(_near, folder)
        return self.model_copy(
            update={
                "model": near(self.model) if self.model else None,
                "data": self.data.model_copy(update=data),
                "steps": tuple(_with_paths(step, near) for step in self.steps),
            }
        )

    def to_yaml(self, private: bool = False) -> str:
        """The recipe as a file that runs again: settings of steps written out, paths absolute.

        private: to be read, not run: without the folders that models and files are in
        """
        change = _name if private else _absolute
        data = {k: Path(change(v.absolute())) for k in PATHS if (v := getattr(self.data, k)) is not None}
        changes = {
            "data": self.data.model_copy(update=data),
            "model": change(self.model) if self.model else None,
            "steps": tuple(_with_paths(step, change) for step in self.steps),
        }
        whole = self.model_copy(update=changes)
        content = {"flyweight": 1, **whole.model_dump(mode="json", exclude_defaults=True)}
        content = {k: v for k, v in content.items() if v != {} and v is not None and k != "summary"}
        return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)


def _near(folder: Path, value: Any) -> Any:
    """`folder/value` where that exists; hub ids stay as they are."""
    if Path(value).is_absolute() or not (folder / value).exists():
        return value
    return type(value)(folder / value)


def _absolute(value: Any) -> Any:
    return type(value)(Path(value).absolute()) if Path(value).exists() else value


def _name(value: Any) -> Any:
    """The last part of a path; hub ids stay as they are."""
    path = Path(value)
    return type(value)(path.name) if path.is_absolute() or path.exists() else value


def _with_paths(step: StepSpec, change: Callable[[Any], Any]) -> StepSpec:
    """The step with `change` made to every path that it names; the teacher `reference` is none."""
    if not isinstance(step.settings, TeacherSettings):
        return step
    named = {name: getattr(step.settings, name, None) for name in ("teacher", "student", "unlabelled", "corpus")}
    paths = {k: v for k, v in named.items() if v is not None and (k, v) != ("teacher", "reference")}
    changes = {k: change(v) for k, v in paths.items()}
    if isinstance(step.settings, DistillSettings):
        more = step.settings.more_teachers
        changes["more_teachers"] = tuple(v if v == "reference" else change(v) for v in more)
    return StepSpec(step.name, step.settings.model_copy(update=changes))


def _read_step(item: Any, number: int) -> StepSpec:
    where = f"steps[{number}]"
    if isinstance(item, str):
        item = {item: {}}
    if not isinstance(item, Mapping) or len(item) != 1:
        raise SettingsError(f"{where} as `- name: {{settings}}`", repr(item), f"the steps are {', '.join(STEPS)}")
    name, values = next(iter(item.items()))
    if values is not None and not isinstance(values, Mapping):
        raise SettingsError(f"settings of {where}.{name} as a mapping", repr(values), "write `key: value` pairs")
    return StepSpec(name, step_named(name).settings.read(values or {}, f"{where}.{name}"))


def shipped() -> dict[str, str]:
    """Names and one-line summaries of the recipes that come with Flyweight."""
    found = {}
    for entry in files("flyweight.recipes").iterdir():
        if entry.name.endswith(".yaml"):
            found[entry.name.removesuffix(".yaml")] = str(yaml.safe_load(entry.read_text("utf-8")).get("summary", ""))
    return dict(sorted(found.items()))


def read_recipe(name: str | Path) -> Recipe:
    """A shipped recipe by name, or a YAML file. Raises SettingsError: unknown name, unreadable YAML, wrong key."""
    path = Path(name)
    is_file = path.suffix in (".yaml", ".yml") or path.is_file()
    if not is_file:
        known = shipped()
        if str(name) not in known:
            raise SettingsError(
                "a shipped recipe or a YAML file",
                f"'{name}'{nearest(str(name), known)}",
                f"shipped: {', '.join(known)}",
            )
        text, where = files("flyweight.recipes").joinpath(f"{name}.yaml").read_text("utf-8"), f"recipe {name}"
    else:
        where = str(path)
        try:
            text = path.read_text("utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise SettingsError(f"a recipe file at {path}", f"'{reason}'", "check the path") from None
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise SettingsError(f"YAML in {where}", f"'{error}'", "mend the file") from None
    if not isinstance(content, Mapping):
        raise SettingsError(f"a mapping in {where}", type(content).__name__, "see `flyweight recipes show balanced`")
    recipe = Recipe.parse(content, where)
    return recipe.with_paths_from(path.absolute().parent) if is_file else recipe


def check_order(steps: Sequence[StepSpec], packed: bool = False, sparse: str | None = None) -> None:
    """Refuse an order that cannot give a sound model. Raises StepError with the reason, before anything runs.

    packed: the model at hand is quantized already; sparse: its sparsity pattern, if it has one
    """
    for number, step in enumerate(steps):
        place = f"steps[{number}] {step.name}"
        if packed and step.name == "quantize":
            raise StepError(f"{place} on float weights", "packed ones", "quantize once: start from the float model")
        if packed:
            raise StepError(
                f"{place} before quantize",
                "it after quantize",
                "packed weights can be neither trained nor cut: make quantize the last step",
            )
        if isinstance(step.settings, PruneSettings):
            _check_zeros(step.settings, place, sparse)
            if step.settings.target == "weights":
                sparse = step.settings.pattern
        packed = packed or step.name == "quantize"


def _check_zeros(settings: PruneSettings, place: str, sparse: str | None) -> None:
    """sparse: the pattern of the zeros that are there already, if there are any"""
    cuts_columns = settings.target not in ("weights", "vocabulary")
    if cuts_columns and sparse not in (None, "unstructured"):
        fours = "four" if sparse == "2:4" else f"{sparse}"
        raise StepError(
            f"{place} ({settings.target}) before pruning weights {sparse}",
            "it afterwards",
            f"cutting columns would break the groups of {fours}: swap the two",
        )
    if (
        cuts_columns
        and sparse is not None
        and (settings.restore in ("linear", "block") or settings.criterion == "hessian")
    ):
        what = "criterion hessian" if settings.criterion == "hessian" else f"restore {settings.restore}"
        raise StepError(
            f"{place} ({what}) before pruning weights",
            "it afterwards",
            "it would fill the zeros: swap the two, or set restore to masks or none with another criterion",
        )


def content_key(*parts: Any) -> str:
    """sha256 of canonical JSON; the name of a cache entry."""
    text = json.dumps(parts, sort_keys=True, default=str, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
