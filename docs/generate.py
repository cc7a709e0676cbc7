"""Write the generated parts of the pages again: `python -m docs.generate`; with `--check` only say which are stale.

A generated part stands between `<!-- generated: NAME -->` and `<!-- end -->`; the rest of a page is written by hand.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

ROOT = Path(__file__).parent.parent
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/reference/artifact.md",
    "docs/reference/cli.md",
    "docs/reference/matrix.md",
    "docs/reference/settings.md",
)
PART = re.compile(r"(<!-- generated: (?P<name>[\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def main(arguments: list[str]) -> int:
    stale = [page for page in PAGES if (ROOT / page).read_text("utf-8") != render(page)]
    if "--check" in arguments:
        print("\n".join(f"{page} is stale; run: python -m docs.generate" for page in stale))
        return 1 if stale else 0
    for page in stale:
        (ROOT / page).write_text(render(page), encoding="utf-8")
        print(f"{page} written")
    return 0


def render(page: str) -> str:
    """The page with its generated parts as they should be."""
    text = (ROOT / page).read_text("utf-8")
    return PART.sub(lambda found: found[1] + "\n" + PARTS[found["name"]]() + "\n" + found[3], text)


# The command line


def cli() -> str:
    import typer

    from flyweight.cli import app

    lines: list[str] = []
    for name, command in _commands("flyweight", typer.main.get_command(app)):
        lines += [f"## `{name}`", "", _sentence(command.help), "", *_parameters(command)]
        if command.epilog:
            lines += [command.epilog, ""]
    return "\n".join(lines)


def _commands(name: str, command: Any) -> Iterator[tuple[str, Any]]:
    inside = getattr(command, "commands", None)
    if not inside:
        yield name, command
        return
    if name == "flyweight":
        yield name, command
    for part, child in inside.items():
        yield from _commands(f"{name} {part}", child)


def _sentence(text: str | None) -> str:
    return re.sub(r"[ \t]*\n[ \t]*", "\n", (text or "").strip())


def _parameters(command: Any) -> Iterator[str]:
    shown = [p for p in command.params if not getattr(p, "hidden", False) and p.name != "help"]
    arguments = [p for p in shown if p.param_type_name == "argument"]
    panels: dict[str, list[Any]] = {}
    for option in (p for p in shown if p.param_type_name == "option"):
        panels.setdefault(getattr(option, "rich_help_panel", None) or "Options", []).append(option)
    if arguments:
        yield from _table(("argument", ""), [(f"`{_metavar(a, command)}`", _cell(a.help)) for a in arguments])
    for panel, options in panels.items():
        rows = [(_flags(option), _default(option), _cell(option.help)) for option in options]
        yield from _table((panel.lower(), "default", ""), rows)


def _metavar(argument: Any, command: Any) -> str:
    return argument.metavar or argument.name.upper()


def _flags(option: Any) -> str:
    flags = ", ".join(f"`{flag}`" for flag in [*option.opts, *option.secondary_opts])
    return f"{flags} {option.metavar}".replace("|", "\\|") if option.metavar else flags


def _default(option: Any) -> str:
    shown = getattr(option, "show_default", None)
    if isinstance(shown, str):
        return f"`{shown}`"
    plain = isinstance(option.default, str | int | float) and not isinstance(option.default, bool)
    return f"`{option.default}`" if plain and shown else ""


# Settings


def settings() -> str:
    from flyweight import settings as module
    from flyweight.recipe import Recipe

    order = ("Finetune", "Distill", "Prune", "Quantize", "Data", "Accept", "Measure")
    classes = [("recipe", Recipe)]
    classes += [(name.lower(), getattr(module, name if name == "Accept" else f"{name}Settings")) for name in order]
    lines: list[str] = []
    for title, cls in classes:
        lines += [f"## {title}", "", _sentence(cls.__doc__), ""]
        lines += list(_table(("key", "value", "default", "meaning"), [_setting(cls, n) for n in cls.model_fields]))
    return "\n".join(lines)


def _setting(cls: type[BaseModel], name: str) -> tuple[str, str, str, str]:
    schema = cls.model_json_schema(mode="validation")["properties"].get(name, {})
    field = cls.model_fields[name]
    default = "" if field.default_factory or field.is_required() else field.get_default()
    limits = _limits(schema)
    meaning = f"{field.description or ''} {limits}".strip()
    return f"`{name}`", _cell(_kind(schema)), "" if default in ("", ()) else f"`{default}`", _cell(meaning)


def _kind(schema: dict[str, Any]) -> str:
    options = schema.get("anyOf", [schema])
    words: list[str] = []
    for option in options:
        if "enum" in option or "const" in option:
            words += [f"`{value}`" for value in option.get("enum", [option.get("const")])]
        elif "$ref" in option or option.get("type") == "object":
            words.append("mapping")
        elif option.get("type") == "array":
            words.append(f"list of {_kind(option.get('items') or {'type': 'step'})}")
        elif option.get("type") == "null":
            words.append("none")
        else:
            words.append("path" if option.get("format") == "path" else option.get("type", "step"))
    return " or ".join(words)


def _limits(schema: dict[str, Any]) -> str:
    names = {"minimum": "at least", "exclusiveMinimum": "above", "maximum": "at most", "exclusiveMaximum": "below"}
    found = [f"{word} {o[key]:g}" for o in schema.get("anyOf", [schema]) for key, word in names.items() if key in o]
    return f"({' and '.join(found)})" if found else ""


# The manifest


def manifest() -> str:
    from flyweight import artifact

    lines: list[str] = []
    for name in (
        "Manifest",
        "BlockShape",
        "QuantizedTensor",
        "Engine",
        "Measurement",
        "StepRecord",
        "Verdict",
        "FileEntry",
    ):
        cls: type[BaseModel] = getattr(artifact, name)
        title = "`flyweight.json`" if name == "Manifest" else name
        lines += [f"### {title}", "", "```text", _dedent(cls.__doc__), "```", ""]
        rows = []
        for key, field in cls.model_fields.items():
            kind = _type_name(field.annotation)
            rows.append((f"`{key}`", _cell(f"`{kind}`"), _cell(field.description)))
        lines += list(_table(("key", "type", ""), rows))
    return "\n".join(lines)


def _type_name(annotation: Any) -> str:
    text = (
        annotation.__name__ if isinstance(annotation, type) and not hasattr(annotation, "__args__") else str(annotation)
    )
    return re.sub(r"flyweight\.\w+\.|typing\.", "", text)


def _dedent(text: str | None) -> str:
    import inspect

    return inspect.cleandoc(text or "")


# Families x steps x engines, and figures


def matrix() -> str:
    from tests.parity.matrix import CELLS, ENGINES, FAMILIES, STEPS

    lines: list[str] = []
    for engine in ENGINES:
        rows = []
        for step in STEPS:
            cells = [CELLS[family, step, engine] for family in FAMILIES]
            rows.append((step, *("yes" if reason is None else f"[{_note(reason)}]" for reason in cells)))
        lines += [f"## {engine}", "", *_table(("step", *FAMILIES), rows)]
    lines += [f"{number}. {reason}" for reason, number in sorted(_NOTES.items(), key=lambda item: item[1])]
    return "\n".join(lines) + "\n"


_NOTES: dict[str, int] = {}


def _note(reason: str) -> int:
    return _NOTES.setdefault(reason, len(_NOTES) + 1)


def benchmark_main() -> str:
    return _results("main").partition("\n\n")[2]  # without its title


def benchmark_quantization() -> str:
    return _results("quantization").partition("\n\n")[2]


def benchmark_structure() -> str:
    """Its drawing lies beside the results."""
    return _results("structure").partition("\n\n")[2].replace("](structure-", "](../benchmarks/results/structure-")


def _results(table: str) -> str:
    path = ROOT / "benchmarks" / "results" / f"{table}.md"
    return path.read_text("utf-8")


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    yield "| " + " | ".join(head) + " |"
    yield "|" + " --- |" * len(head)
    for row in rows:
        yield "| " + " | ".join(row) + " |"
    yield ""


def _cell(text: str | None) -> str:
    return " ".join((text or "").split()).replace("|", "\\|")


PARTS: dict[str, Callable[[], str]] = {
    "cli": cli,
    "settings": settings,
    "manifest": manifest,
    "matrix": matrix,
    "benchmark-main": benchmark_main,
    "benchmark-quantization": benchmark_quantization,
    "benchmark-structure": benchmark_structure,
}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
