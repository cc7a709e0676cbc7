"""`flyweight predict`: answers of an artifact, without torch."""

from __future__ import annotations

import json as json_module
import sys
from collections.abc import Iterator
from itertools import islice
from typing import Annotated, Any

import typer

from flyweight.cli.options import Artifact, EngineName, Json, Threads, Truncate
from flyweight.cli.output import print_json
from flyweight.errors import DataError

Text = str | tuple[str, str]
CHUNK = 256


def predict(
    path: Artifact,
    texts: Annotated[
        list[str] | None, typer.Argument(metavar="TEXT", help="Texts; without any, lines of stdin are read.")
    ] = None,
    pair: Annotated[
        bool, typer.Option("--pair", metavar="", help="Each input is two texts with a tab between them.")
    ] = False,
    truncate: Truncate = False,
    threads: Threads = 1,
    engine: EngineName = "onnxruntime",
    json: Json = False,
) -> None:
    """Answers of an artifact: for each text its label and score (or vector), separated by tabs."""
    from flyweight.runtime import open_model

    inputs = (as_input(text, where, pair) for where, text in given_texts(texts))
    session = open_model(path, engine=engine, threads=threads, truncate=truncate)
    found: list[dict[str, Any]] = []
    count = 0
    try:
        while chunk := list(islice(inputs, CHUNK)):
            count += len(chunk)
            for text, answer in zip(chunk, session.predict(chunk), strict=True):
                if json:
                    found.append({"input": text, "answer": answer})
                else:
                    typer.echo(line(text, answer))
        if not count:
            raise DataError("at least one text", "empty input", "give texts as arguments, or lines on stdin")
        if json:
            print_json({"model": path, "task": session.manifest.task, "predictions": found})
    finally:
        session.close()


def given_texts(texts: list[str] | None) -> Iterator[tuple[str, str]]:
    """(where it stands, text), from the arguments or line by line from stdin."""
    if texts:
        yield from ((f"text {number}", text) for number, text in enumerate(texts, 1))
        return
    if sys.stdin is None or sys.stdin.isatty():
        raise DataError("texts as arguments, or lines on stdin", "none", 'try: flyweight predict PATH "some text"')
    try:
        for number, text in enumerate(sys.stdin, 1):
            yield f"stdin:{number}", text.rstrip("\r\n")
    except UnicodeDecodeError:
        raise DataError("UTF-8 text on stdin", "other bytes", "convert the input to UTF-8") from None


def as_input(text: str, where: str, pair: bool) -> Text:
    if not text.strip():
        raise DataError(f"a text at {where}", "an empty one", "mend or drop the line")
    if not pair:
        return text
    first, tab, second = text.partition("\t")
    if not tab:
        raise DataError(f"two texts with a tab between them at {where}", "one", "leave out --pair, or add the second")
    return first, second


def line(text: Text, answer: Any) -> str:
    """`text<TAB>label<TAB>score`; a vector is printed as a JSON list."""
    shown = text if isinstance(text, str) else "\t".join(text)
    if isinstance(answer, list) and answer and isinstance(answer[0], dict):
        return f"{shown}\t{answer[0]['label']}\t{answer[0]['score']:.4f}"
    return f"{shown}\t{json_module.dumps(answer)}"
