"""`flyweight report`: what an artifact's own measurements say."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flyweight.cli.options import Artifact, Json
from flyweight.cli.output import print_json


def report(
    path: Artifact,
    out: Annotated[
        Path | None,
        typer.Option(help="Write the HTML here; by default the artifact's own is named.", metavar="FILE"),
    ] = None,
    json: Json = False,
) -> None:
    """The figures of an artifact as a table, and as one HTML file with plots that needs no network."""
    from flyweight.artifact import verify

    manifest = verify(path)
    page = Path(path) / "report.html"
    if out is not None or not page.is_file():
        from flyweight.recipe import read_recipe
        from flyweight.report.html import html

        recipe = Path(path) / "recipe.yaml"
        page = out or Path("report.html")
        page.write_text(
            html(manifest, read_recipe(recipe).to_yaml(private=True) if recipe.is_file() else None), encoding="utf-8"
        )
    if json:
        from flyweight.cli.compress import summary

        print_json({"artifact": path, "report": page, **summary(manifest)})
        return
    from flyweight.report.table import table

    typer.echo(table(manifest))
    typer.echo(f"report: {page}")
