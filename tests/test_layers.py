"""Imports go only downward, there is no cycle, methods do not know one another, and files stay small enough to hold in mind."""

from __future__ import annotations

import ast
import graphlib
import warnings
from functools import cache
from pathlib import Path

import pytest

import flyweight

ROOT = Path(flyweight.__file__).parent

# From the top down. A module may import from its own layer and from those below it.
LAYERS = (
    ("flyweight", "__main__", "cli"),
    ("api", "finish"),
    ("serve", "search", "report"),
    ("checks", "compare", "inspection", "job", "keys", "plan", "recipe", "run", "samples"),
    ("steps",),
    ("methods", "measure", "parity"),
    ("runtime",),
    ("training", "calibration", "hessian", "engines"),
    ("context", "splits"),
    ("tasks", "models"),
    ("tokenization", "artifact", "cache", "golden", "data", "settings", "extras", "errors"),
)
RANK = {name: number for number, layer in enumerate(reversed(LAYERS)) for name in layer}
LONGEST, TOO_LONG = 400, 450


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def part(module: str) -> str:
    """The first name below the package: `flyweight.models.load` -> `models`."""
    names = module.split(".")
    return names[1] if len(names) > 1 else names[0]


def imports(source: str, module: str, is_package: bool, known: set[str]) -> set[tuple[str, bool]]:
    """(module imported, at module level?) for everything of ours that `source` imports, in functions as well."""
    tree = ast.parse(source)
    inside = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    for branch in ast.walk(tree):  # imports for the type checker alone never run
        if isinstance(branch, ast.If) and ast.unparse(branch.test).endswith("TYPE_CHECKING"):
            inside.update(node for statement in branch.body for node in ast.walk(statement))
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                names = module.split(".")
                above = names[: len(names) - node.level + is_package]  # one dot in a package is the package itself
                base = ".".join([*above, *([node.module] if node.module else [])])
            whole = [f"{base}.{alias.name}" for alias in node.names if alias.name != "__version__"]  # a constant
            names = [name if name in known else base for name in whole]
        else:
            continue
        found |= {(name, node not in inside) for name in names if name in known}
    return found


@cache
def graph() -> dict[str, set[tuple[str, bool]]]:
    known = set(modules())
    return {
        name: imports(path.read_text("utf-8"), name, path.name == "__init__.py", known)
        for name, path in modules().items()
    }


def test_imports_of_every_kind_are_seen() -> None:
    source = """
import flyweight.data
from flyweight import errors, __version__
from flyweight.models import load
from . import grid
from .packing import pack
if TYPE_CHECKING:
    from flyweight.context import Context
def late():
    from flyweight.training import train
"""
    known = {f"flyweight.{n}" for n in ("data", "errors", "models.load", "context", "training")}
    known |= {"flyweight.methods.quantize.grid", "flyweight.methods.quantize.packing"}
    here = "flyweight.methods.quantize"
    for module, is_package in ((here, True), (f"{here}.rtn", False)):
        assert imports(source, module, is_package, known) == {
            ("flyweight.data", True),
            ("flyweight.errors", True),
            ("flyweight.models.load", True),
            (f"{here}.grid", True),
            (f"{here}.packing", True),
            ("flyweight.context", False),
            ("flyweight.training", False),
        }


def test_every_module_has_its_layer() -> None:
    homeless = {part(name) for name in modules()} - set(RANK)
    assert not homeless, f"give {sorted(homeless)} a place in LAYERS"


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_go_downward(module: str) -> None:
    wrong = [name for name, _ in graph()[module] if RANK[part(name)] > RANK[part(module)]]
    assert not wrong, f"{module} imports from above: {wrong}"


def test_no_cycle() -> None:
    """Over imports that run when a module is loaded. A package's __init__ does not depend on itself through its parts."""
    order = graphlib.TopologicalSorter({name: {n for n, top in found if top} for name, found in graph().items()})
    order.prepare()  # raises CycleError naming the cycle


def test_methods_do_not_know_one_another() -> None:
    for module, found in graph().items():
        if part(module) != "methods" or module == "flyweight.methods":
            continue
        own = module.split(".")[2]
        others = [n for n, _ in found if part(n) == "methods" and n.split(".")[2:3] not in ([own], [])]
        assert not others, f"{module} imports {others}"


def test_no_utils() -> None:
    vague = {"utils", "util", "helpers", "helper", "misc", "common"}
    found = [name for name in modules() if vague & set(name.split("."))]
    assert not found, f"name these after what they do: {found}"


def test_files_are_small() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in modules().values()}
    for name, count in lines.items():
        if LONGEST < count <= TOO_LONG:
            warnings.warn(f"{name} has {count} lines: look for the second thing it does", stacklevel=1)
    too_long = {name: count for name, count in lines.items() if count > TOO_LONG}
    assert not too_long, f"over {TOO_LONG} lines: {too_long}"
