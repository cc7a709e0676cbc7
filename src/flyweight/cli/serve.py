"""`flyweight serve`: an artifact over HTTP."""

from __future__ import annotations

from typing import Annotated

import typer

from flyweight.cli.options import Artifact, EngineName, Threads


def serve(
    path: Artifact,
    host: Annotated[str, typer.Option(help="Address to listen on; only this machine reaches the default.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(help="Port to listen on.", metavar="INT")] = 8080,
    threads: Threads = 1,
    engine: EngineName = "onnxruntime",
    max_batch: Annotated[int, typer.Option(help="Most inputs in one request.", min=1, metavar="INT")] = 32,
    max_body: Annotated[int, typer.Option(help="Largest request body in bytes.", min=1, metavar="INT")] = 2_000_000,
    max_waiting: Annotated[
        int, typer.Option(help="Most requests that wait; more are told to come back.", min=1, metavar="INT")
    ] = 256,
) -> None:
    """Answer HTTP requests with an artifact: `POST /predict`, `GET /health`, `GET /info`, `GET /openapi.json`."""
    from flyweight.serve.app import Limits
    from flyweight.serve.server import serve as run

    limits = Limits(body_bytes=max_body, batch=max_batch, waiting=max_waiting)
    run(path, host, port, threads, limits, engine)
