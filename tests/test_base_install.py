"""The base install, in an environment of its own: what it weighs, and that an artifact runs there without torch."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path

import pytest
from filelock import FileLock

ROOT = Path(__file__).parent.parent
LIMIT_MB = 230
BASE_MODULES = [
    "errors",
    "extras",
    "settings",
    "data",
    "tokenization",
    "artifact",
    "context",
    "steps",
    "recipe",
    "cache",
    "splits",
    "runtime",
    "compare",
    "tasks",
    "tasks.text_classification",
    "tasks.embedding",
    "engines.engine",
    "engines.onnxruntime",
    "measure.suite",
    "measure.latency",
    "measure.memory",
    "measure.energy",
    "measure.quality",
    "measure.environment",
    "report.table",
    "report.html",
    "report.card",
    "serve",
    "cli",
]
ABSENT = ("torch", "transformers", "safetensors", "datasets", "accelerate", "onnx")

Command = Callable[..., subprocess.CompletedProcess[str]]


def run(*command: str | Path, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    return subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment,
        stdin=subprocess.DEVNULL,
    )


def checked(*command: str | Path) -> None:
    done = run(*command, timeout=900)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def scripts(venv: Path) -> Path:
    return venv / ("Scripts" if os.name == "nt" else "bin")


@pytest.fixture(scope="session")
def venv(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`pip install .` under constraints, in .venvs/base: its dependencies until they change, the package until a source does.

    Several test processes share it: the first makes it, the others wait.
    """
    place, constraints = ROOT / ".venvs" / "base", ROOT / "constraints.txt"
    place.parent.mkdir(exist_ok=True)
    with FileLock(f"{place}.lock"):
        _install(place, constraints, tmp_path_factory.mktemp("source") / "flyweight")
    return place


def _install(place: Path, constraints: Path, source: Path) -> None:
    """`source` is for a copy of the package: pip leaves a build folder where it builds."""
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # this environment's pip, aimed at that one: it needs none of its own
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", scripts(place) / "python"]
    pip += ["install", "-q"]
    install = (*pip, "--no-build-isolation")
    wanted = digest([ROOT / "pyproject.toml", constraints])
    stamp = place / "installed"
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(place, ignore_errors=True)
        checked(sys.executable, "-m", "venv", "--without-pip", place)
        checked(*pip, "-c", constraints, "setuptools")
        checked(*install, "-c", constraints, source)
        stamp.write_text(wanted)
    wanted = digest(sorted(path for path in source.rglob("*") if path.is_file()))
    stamp = place / "package"
    if not stamp.is_file() or stamp.read_text() != wanted:
        checked(*install, "--no-deps", "--force-reinstall", "--no-index", source)
        stamp.write_text(wanted)


def digest(paths: Iterable[Path]) -> str:
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


@pytest.fixture(scope="session")
def flyweight(venv: Path) -> Command:
    """The command `flyweight` of the base install."""
    return lambda *arguments: run(scripts(venv) / "flyweight", *arguments)


@pytest.fixture(scope="session")
def artifact(tiny: Callable[..., Path], reviews: object, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny quantized model, made by the full install."""
    from flyweight import api

    out = tmp_path_factory.mktemp("base") / "artifact"
    labels = ("negative", "positive")
    api.quantize(
        tiny("bert", labels=labels), {"bits": 8}, out=out, eval=reviews.eval, truncate=True, rounds=3, lengths=(16,)
    )
    return out


def installed_files(venv: Path) -> dict[str, tuple[int, int]]:
    """{distribution: (bytes, bytes of them that are compiled Python)}, without pip and setuptools, which are the venv's own."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    place = run(scripts(venv) / "python", "-c", code).stdout.strip()
    found = {}
    for distribution in metadata.distributions(path=[place]):
        if distribution.name in ("pip", "setuptools"):
            continue
        files = [Path(str(file.locate())) for file in distribution.files or ()]
        sizes = {file: file.stat().st_size for file in files if file.is_file()}
        compiled = sum(size for file, size in sizes.items() if "__pycache__" in file.parts)
        found[distribution.name] = (sum(sizes.values()), compiled)
    return found


def test_size(venv: Path) -> None:
    """What the wheels bring; Python's own bytecode cache, which `pip install --no-compile` leaves out, comes on top."""
    found = installed_files(venv)
    total = sum(size - compiled for size, compiled in found.values()) / 1e6
    largest = sorted(((size - compiled) / 1e6, name) for name, (size, compiled) in found.items())[-8:]
    assert total <= LIMIT_MB, f"{total:.0f} MB; the largest: {largest}"


def test_absent(venv: Path) -> None:
    code = f"import importlib.util as u; print([n for n in {ABSENT!r} if u.find_spec(n)])"
    assert run(scripts(venv) / "python", "-c", code).stdout.strip() == "[]"


def test_modules_import(venv: Path) -> None:
    code = "import importlib, sys\nfor name in sys.argv[1:]: importlib.import_module('flyweight.' + name)"
    done = run(scripts(venv) / "python", "-c", code, *BASE_MODULES)
    assert done.returncode == 0, done.stderr[-1500:]


def test_predict(flyweight: Command, artifact: Path) -> None:
    done = flyweight("predict", artifact, "a quiet film that grows on you", "loud , long and empty", "--json")
    assert done.returncode == 0, done.stderr
    answers = [row["answer"] for row in json.loads(done.stdout)["predictions"]]
    from flyweight.runtime import open_model

    session = open_model(artifact)
    expected = session.predict(["a quiet film that grows on you", "loud , long and empty"])
    for got, want in zip(answers, expected, strict=True):
        assert [(a["label"], pytest.approx(a["score"], abs=1e-6)) for a in want] == [
            (a["label"], a["score"]) for a in got
        ]


def test_evaluate(flyweight: Command, artifact: Path, reviews: object) -> None:
    done = flyweight("evaluate", artifact, "--data", reviews.eval, "--truncate", "--json")
    assert done.returncode == 0, done.stderr
    figure = json.loads(done.stdout)["figures"]["quality.accuracy"]
    assert figure["low"] <= figure["value"] <= figure["high"]
    kept = json.loads((artifact / "flyweight.json").read_text())["measurements"]["result"]["quality.accuracy"]
    assert figure["value"] == pytest.approx(kept["value"], abs=1e-6)


def test_compare(flyweight: Command, artifact: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(artifact, other)
    done = flyweight("compare", artifact, other, "--rounds", "3", "--batches", "1", "--lengths", "16", "--json")
    assert done.returncode == 0, done.stderr
    models = json.loads(done.stdout)["models"]
    assert len(models) == 2
    assert all("latency_ms.p50@1x16" in figures for figures in models.values())


def test_report(flyweight: Command, artifact: Path, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    done = flyweight("report", artifact, "--out", page)
    assert done.returncode == 0, done.stderr
    assert "<html" in page.read_text("utf-8")


def test_doctor(flyweight: Command) -> None:
    done = flyweight("doctor", "--json")
    assert done.returncode == 0, done.stderr
    assert "onnxruntime" in done.stdout


def test_training_names_the_extra(flyweight: Command, artifact: Path, tmp_path: Path) -> None:
    done = flyweight("quantize", artifact, "--out", tmp_path / "out")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert 'pip install "flyweight[compress]"' in done.stderr


@pytest.fixture
def service(venv: Path, artifact: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [scripts(venv) / "flyweight", "serve", artifact, "--port", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(200):
            assert process.poll() is None, process.stderr.read().decode()
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                time.sleep(0.1)
        yield address
    finally:
        process.terminate()
        process.communicate(timeout=30)


def test_serve(service: str) -> None:
    body = json.dumps({"inputs": "a quiet film that grows on you"}).encode()
    request = urllib.request.Request(f"{service}/predict", body, {"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        found = json.loads(answer.read())
    assert {entry["label"] for entry in found} == {"negative", "positive"}
    assert sum(entry["score"] for entry in found) == pytest.approx(1, abs=1e-5)
