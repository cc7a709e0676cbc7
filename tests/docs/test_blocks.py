"""Code in the documentation: README's is run on a tiny model, everything else is held against the command line's own flags."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tiny import SENTENCES

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/**/*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


class Block(NamedTuple):
    page: Path
    language: str
    words: str
    text: str


def blocks(*languages: str) -> Iterator[Block]:
    for page in PAGES:
        for language, words, text in FENCE.findall(page.read_text("utf-8")):
            if language in languages:
                yield Block(page, language, words.strip(), text)


def commands(text: str) -> list[str]:
    return [line.removeprefix("$ ") for line in text.splitlines() if line.startswith("$ ")]


CONSOLE = [(b.page.relative_to(ROOT).as_posix(), line) for b in blocks("console") for line in commands(b.text)]
PYTHON = [pytest.param(b.text, id=f"{b.page.relative_to(ROOT)}-{i}") for i, b in enumerate(blocks("python"))]


@pytest.mark.parametrize(("page", "line"), CONSOLE)
def test_command_is_possible(page: str, line: str) -> None:
    program, *arguments = shlex.split(line.partition(" > ")[0])
    if program == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE)
        assert arguments[0] in targets
    elif program == "flyweight":
        check_flags(arguments)
    else:
        assert [program, arguments[0]] == ["pip", "install"], f"{page}: what is {program}?"


def check_flags(arguments: list[str]) -> None:
    """Every flag and argument is one that the command takes; raises a usage error otherwise."""
    import typer

    from flyweight.cli import app

    command: Any = typer.main.get_command(app)
    context = command.make_context("flyweight", ["--help"], resilient_parsing=True)
    while hasattr(command, "commands"):
        name = arguments.pop(0)
        assert name in command.commands, f"no command '{name}'"
        command = command.commands[name]
        context = type(context)(command, info_name=name, parent=context)
    values, rest, _ = command.make_parser(context).parse_args(arguments)
    assert not rest, f"unexpected {rest}"
    for parameter in command.params:
        parameter.handle_parse_result(context, values, [])


def test_a_wrong_flag_is_noticed() -> None:
    with pytest.raises(Exception, match="No such option"):
        check_flags(["compress", "model", "--recipes", "fast"])


@pytest.mark.parametrize("text", PYTHON)
def test_python_compiles(text: str) -> None:
    compile(text, "block", "exec")


@pytest.fixture
def place(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with what README's commands name: a small model and two files of data."""
    shutil.copytree(tiny("bert", labels=("negative", "positive")), tmp_path / "path" / "to" / "model")
    for name, turns in (("train", 6), ("eval", 2)):
        rows = [
            {"text": f"{text} {name[0]}{turn}", "label": ("negative", "positive")[(number + turn) % 2]}
            for turn in range(turns)
            for number, text in enumerate(SENTENCES)
        ]
        lines = [json.dumps(row) + "\n" for row in rows]
        (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return tmp_path


def test_readme_runs(place: Path) -> None:
    """All commands and all Python of README, in order, in one folder. `make` and `pip` are what runs the tests anyway."""
    environment = {
        **os.environ,
        "FLYWEIGHT_CACHE": str(place / "cache"),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
    }
    ran = 0
    for block in blocks("console", "python"):
        if block.page.name != "README.md":
            continue
        lines = commands(block.text) if block.language == "console" else [block.text]
        for line in lines:
            if line.startswith(("make ", "pip ")):
                continue
            command = shlex.split(line) if block.language == "console" else [sys.executable, "-c", line]
            done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True, timeout=600)
            # 3: finished, but the random model's answers moved by more than the recipe allows
            assert done.returncode in (0, 3), f"{line}\n{done.stdout[-500:]}\n{done.stderr[-2000:]}"
            ran += 1
    assert ran >= 7
