"""Recipes and steps in the documentation are ones that the settings take: every YAML block, and every command of a step."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from flyweight.cli import app
from flyweight.cli.flags import read_flags
from flyweight.errors import FlyweightError
from flyweight.recipe import Recipe, check_order
from flyweight.settings import Settings
from flyweight.steps import STEPS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^```(\w+)[^\n]*\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def found(language: str) -> list[tuple[str, str]]:
    """(page, text) of all blocks in this language."""
    texts = [(page, FENCE.findall(page.read_text("utf-8"))) for page in PAGES]
    return [
        (page.relative_to(ROOT).as_posix(), text) for page, some in texts for kind, text in some if kind == language
    ]


def step_commands() -> list[tuple[str, str]]:
    lines = [(page, line) for page, text in found("console") for line in text.splitlines()]
    return [
        (page, line[2:]) for page, line in lines if line.split()[:2] == ["$", "flyweight"] and line.split()[2] in STEPS
    ]


def read_step(line: str) -> Settings:
    """The step's settings as the command line makes them of its flags."""
    _, name, *arguments = shlex.split(line)
    group: Any = typer.main.get_command(app)
    command = group.commands[name]
    context = command.make_context(name, ["--help"], resilient_parsing=True)
    values, _, _ = command.make_parser(context).parse_args(arguments)
    cls = STEPS[name].settings
    return read_flags(cls, {key: value for key, value in values.items() if key in cls.model_fields})


@pytest.mark.parametrize(("page", "text"), found("yaml"))
def test_recipe_is_one(page: str, text: str) -> None:
    recipe = Recipe.parse(yaml.safe_load(text), page)
    assert recipe.steps
    check_order(recipe.steps)


@pytest.mark.parametrize(("page", "line"), step_commands())
def test_step_takes_its_flags(page: str, line: str) -> None:
    read_step(line)


def test_there_are_some_of_every_step() -> None:
    assert {line.split()[1] for _, line in step_commands()} == {"distill", "prune", "quantize"}


def test_a_wrong_recipe_is_noticed() -> None:
    with pytest.raises(FlyweightError, match="an amount"):
        Recipe.parse({"steps": [{"prune": {"target": "heads"}}]}, "page")
    with pytest.raises(FlyweightError, match="two wishes"):
        read_step("flyweight prune model --target heads --amount 0.5 --speedup 2 --out cut")
