"""One command from argv to exit status. Every error ends here, as one line on stderr."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Sequence

import typer

from flyweight.cli.quiet import no_chatter, no_telemetry
from flyweight.errors import FlyweightError, Interrupted, StorageError

# UsageError under typer's own copy of click as well as under click: BadParameter is the one that typer exports.
UsageError = typer.BadParameter.__mro__[1]
FULL = {errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)}


def run(argv: Sequence[str]) -> int:
    """0 done; 1 an error; 2 wrong usage; 3 finished but not accepted; 130 interrupted."""
    arguments, debug = split_debug(argv)
    no_telemetry()
    if not debug:
        no_chatter()
    try:
        return _invoke(arguments)
    except BrokenPipeError:  # the reader of our output has gone: nothing to say, and nobody to say it to
        _close_stdout()
        return 1
    except (Exception, KeyboardInterrupt) as error:
        if debug and not isinstance(error, UsageError):
            raise
        status, line = explain(error)
        print(line, file=sys.stderr)
        return status


def split_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """`--debug` may stand anywhere before a `--`."""
    end = list(argv).index("--") if "--" in argv else len(argv)
    left = [word for word in argv[:end] if word != "--debug"]
    return [*left, *argv[end:]], len(left) < end


def explain(error: BaseException) -> tuple[int, str]:
    """(exit status, the one line for the user)."""
    if isinstance(error, Interrupted):
        return 130, f"interrupted: {error}"
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        return 130, "interrupted"
    if isinstance(error, UsageError):
        context = getattr(error, "ctx", None)
        where = context.command_path if context else "flyweight"
        text = " ".join(error.format_message().split()).rstrip(".")  # type: ignore[attr-defined]
        return 2, f"error: {text}; see `{where} --help`"
    if isinstance(error, OSError) and error.errno in FULL:
        error = StorageError("room on the disk", f"'{error.strerror}'", "free space; what was there before is intact")
    elif isinstance(error, OSError) and error.filename and error.strerror:
        error = StorageError(
            f"to read or write {error.filename}", f"'{error.strerror}'", "check the path and its rights"
        )
    if isinstance(error, FlyweightError):
        return 1, f"error: {error}"
    if isinstance(error, MemoryError):
        return 1, "error: expected enough memory, got none; use a smaller --batch-size or model, or a larger machine"
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return 1, f"error: unexpected {text}; run again with --debug for the traceback"


def _invoke(arguments: list[str]) -> int:
    from flyweight.cli.commands import app

    if "_FLYWEIGHT_COMPLETE" in os.environ:  # shell completion asks
        app()
    # Not `app()`: it would turn Ctrl-C, a full disk and wrong usage into messages of its own.
    command = typer.main.get_command(app)
    try:
        with command.make_context("flyweight", arguments or ["--help"]) as context:
            command.invoke(context)
    except typer.Exit as leave:
        sys.stdout.flush()
        return int(leave.exit_code)
    sys.stdout.flush()
    return 0


def _close_stdout() -> None:
    """Keep the interpreter from failing once more when it flushes stdout at exit."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, sys.stdout.fileno())
    os.close(devnull)
