"""The public names are there and documented; importing the package and asking for help stays cheap."""

from __future__ import annotations

import inspect
import json
import subprocess
import sys

import pytest

import flyweight

HEAVY = ("torch", "transformers", "onnxruntime", "accelerate", "datasets", "onnx", "safetensors", "pandas", "pyarrow")


@pytest.mark.parametrize("name", flyweight.__all__)
def test_name_is_there_and_documented(name: str) -> None:
    value = getattr(flyweight, name)
    if inspect.isclass(value) or inspect.isfunction(value):
        assert inspect.getdoc(value), f"flyweight.{name} has no docstring"
    assert name in dir(flyweight)


def test_names_are_unique_and_few() -> None:
    assert len(set(flyweight.__all__)) == len(flyweight.__all__) <= 30


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'compres'"):
        _ = flyweight.compres


def heavy_after(code: str) -> list[str]:
    """Which heavy packages a fresh interpreter has loaded after `code`."""
    report = f"import sys, json; print('LOADED', json.dumps([n for n in {HEAVY!r} if n in sys.modules]))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\n{report}"], capture_output=True, text=True, timeout=120, check=True
    )
    return json.loads(done.stdout.rpartition("LOADED ")[2])


CHEAP = {
    "import": "import flyweight",
    "errors": "from flyweight import FlyweightError, Manifest",
    "steps": "from flyweight.steps import STEPS; [s.settings.model_json_schema() for s in STEPS.values()]",
    "recipe": "from flyweight.recipe import read_recipe; read_recipe('balanced')",
    "help": "import sys; sys.argv = ['flyweight', '--help']\nfrom flyweight.cli import main\n"
    "try: main()\nexcept SystemExit as end: assert not end.code, end.code",
    "compress-help": "import sys; sys.argv = ['flyweight', 'compress', '--help']\nfrom flyweight.cli import main\n"
    "try: main()\nexcept SystemExit as end: assert not end.code, end.code",
}


@pytest.mark.parametrize("code", CHEAP.values(), ids=CHEAP.keys())
def test_imports_nothing_heavy(code: str) -> None:
    assert heavy_after(code) == []


def test_the_check_sees_a_heavy_import() -> None:
    assert heavy_after("import onnxruntime") == ["onnxruntime"]
