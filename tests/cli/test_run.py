"""Exit statuses and the one line on stderr."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from flyweight import __version__
from flyweight.cli import main
from flyweight.cli.run import explain, split_debug
from flyweight.errors import DataError, Interrupted


def command(*words: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "flyweight", *words], capture_output=True, text=True, timeout=120, **options
    )


def failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    """Let `flyweight recipes list` end in `error`."""

    def fail() -> None:
        raise error

    monkeypatch.setattr("flyweight.recipe.shipped", fail)


def one_line(text: str) -> str:
    assert text.count("\n") == 1, text
    return text.removesuffix("\n")


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"flyweight {__version__}\n"


def test_no_words_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    shown = capsys.readouterr().out
    for verb in ("doctor", "inspect", "compress", "finetune", "distill", "prune", "quantize", "evaluate", "compare"):
        assert verb in shown
    for verb in ("predict", "report", "recipes", "cache", "serve"):
        assert verb in shown


def test_every_command_has_help_and_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    from flyweight.cli import app

    root = typer.main.get_command(app)
    paths = [
        [name, *rest]
        for name, command in root.commands.items()
        for rest in ([[sub] for sub in command.commands] if hasattr(command, "commands") else [[]])
    ]
    assert len(paths) == 16
    for path in paths:
        assert main([*path, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "Example" in shown, path
        assert "Usage: flyweight " + " ".join(path) in shown


def test_our_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, DataError("a file", "none\n at all", "look"))
    assert main(["recipes", "list"]) == 1
    shown = capsys.readouterr()
    assert one_line(shown.err) == "error: expected a file, got none at all; look"
    assert shown.out == ""


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nonsense"], "error: No such command 'nonsense'; see `flyweight --help`"),
        (["recipes", "list", "--wrong"], None),
        (["predict"], "error: Missing argument 'PATH'; see `flyweight predict --help`"),
        (
            ["quantize", "m", "--bits", "x"],
            "error: Invalid value: --bits: expected INT, got 'x'; see `flyweight quantize --help`",
        ),
        (["quantize", "m", "--seed", "-1"], None),
        (["evaluate", "m"], None),
    ],
)
def test_wrong_usage(argv: list[str], line: str | None, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    text = one_line(shown.err)
    assert text.startswith("error: ")
    assert text.endswith("--help`")
    if line is not None:
        assert text == line


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["prune", "m", "--amount", "3", "--out", "o"], ["--amount", "less than 1", "got 3"]),
        (["prune", "m", "--out", "o"], ["either an amount or a threshold"]),
        (["compress", "m", "--recipe", "balnced", "--out", "o"], ["'balnced' (did you mean 'balanced'?)"]),
        (["compress", "r.yaml", "--recipe", "tiny", "--out", "o"], ["one recipe"]),
        (["compress", "nowhere.yaml", "--out", "o"], ["nowhere.yaml", "No such file"]),
        (["compress", "m"], ["give --out DIR"]),
        (["quantize", "m"], ["give --out DIR"]),
        (["recipes", "show", "tinny"], ["did you mean 'tiny'?"]),
        (["predict", "nowhere", "text"], ["nowhere", "artifact"]),
        (["report", "nowhere"], ["nowhere", "artifact"]),
        (["serve", "nowhere"], ["nowhere", "artifact"]),
    ],
)
def test_bad_input(argv: list[str], words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    text = one_line(shown.err)
    assert text.startswith("error: ")
    for word in words:
        assert word in text


def test_wrong_key_of_a_recipe(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("steps:\n  - quantize: {bitz: 8}\n")
    assert main(["compress", str(recipe), "--out", str(tmp_path / "out")]) == 1
    assert "steps[0].quantize, got 'bitz' (did you mean 'bits'?)" in one_line(capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (Interrupted("run it again to go on"), 130, "interrupted: run it again to go on"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (OSError(errno.ENOSPC, "No space left on device"), 1, None),
        (MemoryError(), 1, None),
        (ValueError("a\nb"), 1, "error: unexpected ValueError: a b; run again with --debug for the traceback"),
        (PermissionError(errno.EACCES, "Permission denied", "x"), 1, None),
    ],
)
def test_any_error_is_one_line(
    error: BaseException,
    status: int,
    line: str | None,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    failing(monkeypatch, error)
    assert main(["recipes", "list"]) == status
    shown = capsys.readouterr()
    assert shown.out == ""
    text = one_line(shown.err)
    assert text == line if line else text.startswith("error: ")


def test_full_disk_is_told_as_such() -> None:
    status, line = explain(OSError(errno.ENOSPC, "No space left on device"))
    assert (status, line.split(";")[0]) == (1, "error: expected room on the disk, got 'No space left on device'")


def test_debug_lets_the_error_through(monkeypatch: pytest.MonkeyPatch) -> None:
    failing(monkeypatch, ValueError("boom"))
    for argv in (["--debug", "recipes", "list"], ["recipes", "list", "--debug"]):
        with pytest.raises(ValueError, match="boom"):
            main(argv)


def test_debug_after_two_dashes_is_a_text() -> None:
    assert split_debug(["predict", "--debug", "p", "--", "--debug"]) == (["predict", "p", "--", "--debug"], True)
    assert split_debug(["predict", "--", "--debug"]) == (["predict", "--", "--debug"], False)


def test_not_accepted_is_status_3(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    failing(monkeypatch, typer.Exit(3))
    assert main(["recipes", "list"]) == 3
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name == "nt", reason="pipes break differently there")
def test_reader_that_goes_away_is_no_error() -> None:
    done = subprocess.run(
        f"{sys.executable} -m flyweight compress --help | true; {sys.executable} -m flyweight recipes list | head -c 1",
        shell=True,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stderr == ""


def test_json_is_one_object_and_nothing_else(tmp_path: Path) -> None:
    environment = {**os.environ, "FLYWEIGHT_CACHE": str(tmp_path)}
    for words in (["doctor"], ["recipes", "list"], ["recipes", "show", "tiny"], ["cache", "ls"], ["cache", "clear"]):
        done = command(*words, "--json", env=environment)
        assert done.returncode == 0, done.stderr
        assert isinstance(json.loads(done.stdout), dict), words
        assert done.stderr == ""
        assert done.stdout.count("\n") == 1


def test_no_color_is_respected() -> None:
    done = command("--help", env={**os.environ, "NO_COLOR": "1", "FORCE_COLOR": "", "TERM": "xterm-256color"})
    assert "\x1b[3" not in done.stdout


def test_shown_recipe_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from flyweight.recipe import read_recipe

    for name in ("fast", "balanced", "tiny"):
        assert main(["recipes", "show", name]) == 0
        path = tmp_path / f"{name}.yaml"
        path.write_text(capsys.readouterr().out)
        assert read_recipe(path) == read_recipe(name).model_copy(update={"summary": ""})


def test_cache_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("FLYWEIGHT_CACHE", str(tmp_path))
    entry = tmp_path / "prefixes" / "abcdef0123456789"
    entry.mkdir(parents=True)
    (entry / "file").write_bytes(b"x" * 1500)
    assert main(["cache", "ls", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["bytes"], [e["key"] for e in listed["entries"]]) == (1500, ["abcdef0123456789"])
    assert main(["cache", "ls"]) == 0
    assert "abcdef012345" in capsys.readouterr().out
    assert main(["cache", "clear", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["freed_bytes"] == 1500
    assert not entry.exists()


def test_help_is_quick_and_light() -> None:
    """The best of three on a busy machine; a heavy import would take seconds every time."""
    code = (
        "import sys, time; began = time.process_time()\n"
        "from flyweight.cli import main\n"
        "status = main(['--help'])\n"
        "heavy = {'torch', 'transformers', 'onnxruntime', 'numpy', 'fastapi', 'granian', 'datasets'} & set(sys.modules)\n"
        "print(status, sorted(heavy), time.process_time() - began, file=sys.stderr)"
    )
    best = 9.0
    for _ in range(3):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
        status, heavy, seconds = done.stderr.rsplit("\n", 2)[-2].split(" ", 2)
        assert (status, heavy) == ("0", "[]")
        best = min(best, float(seconds))
    assert best < 1.0
