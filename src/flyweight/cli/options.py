"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from flyweight.cli.flags import Fields
from flyweight.settings import DataSettings

Model = Annotated[
    str, typer.Argument(metavar="MODEL", help="A Hugging Face folder, an artifact, or a hub id.", show_default=False)
]
Artifact = Annotated[
    Path, typer.Argument(metavar="PATH", help="A folder written by `flyweight compress`.", show_default=False)
]
Out = Annotated[Path | None, typer.Option(help="Folder to write the artifact to.", metavar="DIR", show_default=False)]
Overwrite = Annotated[bool, typer.Option("--overwrite", metavar="", help="Replace the artifact that stands at --out.")]
Seed = Annotated[int, typer.Option(help="Seed of everything random.", min=0, metavar="INT")]
Task = Annotated[
    str | None,
    typer.Option(help="`text-classification` or `embedding`; by default what the model's head says.", metavar="TASK"),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME")]
Threads = Annotated[int, typer.Option(help="CPU threads of the engine.", min=1, metavar="INT")]
Truncate = Annotated[
    bool, typer.Option("--truncate", metavar="", help="Cut texts that are too long instead of refusing them.")
]
EngineName = Annotated[
    str, typer.Option(help="What runs the artifact: `onnxruntime`, `openvino` or `torch`.", metavar="ENGINE")
]
Json = Annotated[bool, typer.Option("--json", metavar="", help="Print one JSON object on stdout, and nothing else.")]
Columns = Annotated[DataSettings, Fields(("text", "text_pair", "label", "max_length", "truncate"))]
