"""`flyweight recipes` and `flyweight cache`."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from flyweight.cli.options import Json
from flyweight.cli.output import bytes_text, print_json, print_table


def recipes_list(json: Json = False) -> None:
    """The recipes that come with Flyweight."""
    from flyweight.recipe import shipped

    found = shipped()
    if json:
        print_json({"recipes": found})
    else:
        print_table(("recipe", "what it does"), found.items())


def recipes_show(
    name: Annotated[
        str, typer.Argument(metavar="NAME|FILE", help="A shipped recipe, or a YAML file.", show_default=False)
    ],
    json: Json = False,
) -> None:
    """One recipe as YAML: save it, change it, give it to `flyweight compress`."""
    from flyweight.recipe import read_recipe

    recipe = read_recipe(name)
    if json:
        print_json(recipe.model_dump(mode="json"))
    else:
        typer.echo(recipe.to_yaml(), nl=False)


def cache_list(json: Json = False) -> None:
    """What the cache of finished and begun recipe steps holds, the last used first."""
    from flyweight.cache import Cache

    store = Cache()
    entries = sorted(store.entries(), key=lambda entry: -entry.used)
    total = sum(entry.bytes for entry in entries)
    if json:
        rows = [{"kind": e.kind, "key": e.key, "bytes": e.bytes, "used": e.used} for e in entries]
        print_json({"path": store.root, "bytes": total, "cap_bytes": store.cap(), "entries": rows})
        return
    rows_shown = [
        (e.kind, e.key[:12], bytes_text(e.bytes), time.strftime("%Y-%m-%d %H:%M", time.localtime(e.used)))
        for e in entries
    ]
    if rows_shown:
        print_table(("kind", "key", ">size", "last used"), rows_shown)
    typer.echo(f"{store.root}: {bytes_text(total)} of at most {bytes_text(store.cap())}")


def cache_clear(json: Json = False) -> None:
    """Empty the cache. Finished artifacts are not in it and stay."""
    from flyweight.cache import Cache

    store = Cache()
    freed = store.clear()
    if json:
        print_json({"path": store.root, "freed_bytes": freed})
    else:
        typer.echo(f"{store.root}: freed {bytes_text(freed)}")
