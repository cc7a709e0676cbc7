"""All commands, in the order of the help page. Verbs import what they need when they run, so that help is quick."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from flyweight import __version__
from flyweight.cli import compress, doctor, predict, quality, recipes, report, serve
from flyweight.cli.flags import with_flags

__all__ = ["app"]

app = typer.Typer(
    name="flyweight",
    help="Make a language model small and fast on your data, and prove by measurement what that gained and lost.",
    add_completion=True,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"flyweight {__version__}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool,
        typer.Option(
            "--version", metavar="", callback=show_version, is_eager=True, help="Print the version and leave."
        ),
    ] = False,
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", metavar="", help="Show tracebacks and the libraries' own messages; may stand anywhere."
        ),
    ] = False,
) -> None:
    pass


def add(group: typer.Typer, name: str, command: Callable[..., None], *examples: str) -> None:
    epilog = "\n\n".join(["Example:" if len(examples) == 1 else "Examples:", *examples])
    group.command(name, epilog=epilog.replace("[", r"\["))(with_flags(command))


add(app, "doctor", doctor.doctor, "flyweight doctor")
add(app, "inspect", quality.inspect, "flyweight inspect path/to/model")
add(
    app,
    "compress",
    compress.compress,
    "flyweight compress path/to/model --train train.jsonl --eval eval.jsonl --recipe balanced --out small",
    "flyweight compress recipe.yaml --out small",
)
for verb, step_example in compress.EXAMPLES.items():
    add(app, verb, compress.step_command(verb), f"flyweight {verb} {step_example}")
add(app, "evaluate", quality.evaluate, "flyweight evaluate small --data test.jsonl")
add(app, "compare", quality.compare, "flyweight compare small tiny --data test.jsonl")
add(
    app,
    "predict",
    predict.predict,
    'flyweight predict small "a fine film"',
    "flyweight predict small --json < lines.txt",
)
add(app, "report", report.report, "flyweight report small --out report.html")
add(app, "serve", serve.serve, "flyweight serve small --port 8080")

recipe_commands = typer.Typer(help="The recipes that come with Flyweight.", no_args_is_help=True)
add(recipe_commands, "list", recipes.recipes_list, "flyweight recipes list")
add(recipe_commands, "show", recipes.recipes_show, "flyweight recipes show balanced > mine.yaml")
app.add_typer(recipe_commands, name="recipes")

cache_commands = typer.Typer(help="The cache of finished and begun recipe steps.", no_args_is_help=True)
add(cache_commands, "ls", recipes.cache_list, "flyweight cache ls")
add(cache_commands, "clear", recipes.cache_clear, "flyweight cache clear")
app.add_typer(cache_commands, name="cache")
