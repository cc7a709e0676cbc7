"""The name of the model after every step: a hash of all that it depends on."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path

from flyweight import artifact
from flyweight.data import Examples
from flyweight.errors import DataError
from flyweight.measure.environment import environment
from flyweight.methods.quantize.work import REDUCED_BITS, widest
from flyweight.models.bundle import Bundle
from flyweight.models.load import origin_hash, resolve
from flyweight.recipe import Recipe, StepSpec, content_key
from flyweight.settings import DistillSettings, PruneSettings, QuantizeSettings, TeacherSettings
from flyweight.splits import Splits
from flyweight.tasks import Task

__all__ = ["prefix_keys", "samples"]

CODE = (  # what decides an entry of the cache: its weights, and its figures
    *("models", "methods", "tasks", "training", "engines", "measure"),
    *("calibration.py", "hessian.py", "data.py", "splits.py", "tokenization.py", "artifact.py", "runtime.py"),
)
LIBRARIES = ("torch", "transformers", "tokenizers", "onnx")


def prefix_keys(
    recipe: Recipe, task: Task, bundle: Bundle, splits: Splits, texts: Mapping[Path, Examples], source: Path
) -> list[str]:
    """Hash of all that the model after each step depends on: code, origin, data, seed, settings, other models and files."""
    parts = (splits.train, splits.validation)
    data = [None if part is None else part.content_hash() for part in parts]
    encoder = bundle.encoder
    first = (
        code_hash(),
        origin_hash(source),
        task.name,
        bundle.labels,
        encoder.max_length,
        encoder.truncate,
        recipe.seed,
        data,
    )
    keys = [content_key(*first)]
    for step in recipe.steps:
        outside = outside_hashes(step, texts)
        if isinstance(step.settings, PruneSettings):
            outside += prune_inputs(recipe, step.settings, splits)
        if isinstance(step.settings, QuantizeSettings):
            outside += quantize_inputs(recipe, step.settings, splits)
        keys.append(content_key(keys[-1], step.as_data(), outside))
    return keys


def samples(recipe: Recipe) -> int:
    """How many texts the steps calibrate on; a file given for it is read even where no step looks at them: without labels
    the rest of it is what is measured on."""
    settings = [step.settings for step in recipe.steps if isinstance(step.settings, PruneSettings | QuantizeSettings)]
    return max((one.samples for one in settings if one.calibrated or recipe.data.calibrate is not None), default=0)


def quantize_inputs(recipe: Recipe, settings: QuantizeSettings, splits: Splits) -> list[str]:
    """What a quantize step depends on beside model and training data: its texts, the rule that its gate holds, the CPU."""
    rule = [] if settings.gate == "off" else [recipe.accept.model_dump_json()]
    rule += ["reduced range"] if widest(settings) == REDUCED_BITS else []  # `auto` depends on the machine
    if splits.calibration is None or not (settings.calibrated or rule):
        return rule
    return [*rule, splits.calibration.content_hash()]


def prune_inputs(recipe: Recipe, settings: PruneSettings, splits: Splits) -> list[str]:
    """What a prune step depends on beside model and training data: its texts, and the machine that a wish is met on."""
    found = []
    if settings.timed:
        about = environment()
        version = about["versions"].get(settings.engine, "none")
        found.append(f"{about['cpu']}, {settings.engine} {version}, {recipe.measure.threads} threads")
    if settings.table is not None:
        found.append(path_hash(settings.table, "a table of costs, or an artifact that has one"))
    if settings.corpus is not None:
        return [*found, path_hash(settings.corpus)]
    if splits.calibration is None or not (settings.calibrated or settings.target == "vocabulary"):
        return found
    return [*found, splits.calibration.content_hash()]


def path_hash(path: Path, what: str = "a file of texts") -> str:
    """Of a file, or of all files of a folder. Raises DataError for none."""
    if not path.exists():
        raise DataError(what, f"no such file: {path}", "check the path")
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return content_key([artifact.known_hash(one) for one in files])


def outside_hashes(step: StepSpec, texts: Mapping[Path, Examples]) -> list[str]:
    """Content of the models and files that a step names."""
    settings = step.settings
    if not (isinstance(settings, TeacherSettings) and settings.taught):
        return []
    named = [settings.student if isinstance(settings, DistillSettings) else None]
    named += [name for name in settings.teachers if name != "reference"]
    hashes = [origin_hash(resolve(name)) for name in named if name is not None]
    if settings.unlabelled is not None:
        hashes.append(texts[settings.unlabelled].content_hash())
    return hashes


def code_hash() -> str:
    """The code that decides what comes out, ours and the libraries'; an upgrade must not bring old results back."""
    root = Path(__file__).parent
    digest = hashlib.sha256("".join(metadata.version(name) for name in LIBRARIES).encode())
    for part in CODE:
        paths = [root / part] if (root / part).is_file() else sorted((root / part).rglob("*.py"))
        for path in paths:
            digest.update(path.read_bytes())
    return digest.hexdigest()
