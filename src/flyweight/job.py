"""A recipe made ready: model and data read, everything that cannot work refused, every prefix named by its content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from flyweight import artifact
from flyweight.cache import Cache
from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.engines import openvino
from flyweight.engines.engine import engine_named
from flyweight.errors import EngineError, ModelError, SettingsError
from flyweight.methods.distill.student import kept_layers
from flyweight.methods.quantize.work import REDUCED_BITS, targets_of, widest
from flyweight.models.bundle import Bundle
from flyweight.models.families import FAMILIES
from flyweight.models.load import load, origin_hash, resolve
from flyweight.models.surgery import blocks
from flyweight.recipe import Recipe, StepSpec, check_order, content_key
from flyweight.settings import DistillSettings, FinetuneSettings, PruneSettings, QuantizeSettings, TeacherSettings
from flyweight.splits import Splits, label_names, read_splits, read_unlabelled
from flyweight.tasks import Task, task_named
from flyweight.training.pair import check_fit

__all__ = ["Job", "guess_task", "open_other", "prepare"]

CODE = (
    *(
        "models",
        "methods",
        "tasks",
        "training",
        "calibration.py",
        "engines",
        "data.py",
        "splits.py",
        "tokenization.py",
        "artifact.py",
    ),
    *("measure/flops.py", "measure/size.py"),  # figures of an entry
    *("measure/quality.py", "measure/verdict.py", "runtime.py"),  # what the gate decides by
)
LIBRARIES = ("torch", "transformers", "tokenizers", "onnx")


@dataclass
class Job:
    """A recipe whose model and data have been read and found fit.

    keys:       content hash of every prefix; keys[i] names the model after i steps
    unlabelled: the further texts of every file that a step names
    """

    recipe: Recipe
    task: Task
    bundle: Bundle
    splits: Splits
    keys: list[str]
    cache: Cache
    progress: Progress
    unlabelled: dict[Path, Examples]

    @property
    def leading(self) -> int:
        """How many `finetune` steps make the reference."""
        names = [step.name for step in self.recipe.steps]
        return next((i for i, name in enumerate(names) if name != "finetune"), len(names))

    @property
    def reference_folder(self) -> Path:
        return self.cache.prefix(self.keys[self.leading])

    def cached(self, number: int) -> bool:
        """Whether the model after `number` steps is there already; the reference has its engine's file, too."""
        key = self.keys[number]
        return self.cache.found(key) and (number != self.leading or self.cache.has_engine(key))

    @property
    def done(self) -> int:
        """How many steps need not run. Without the reference those after it are of no use."""
        last = len(self.recipe.steps) if self.cached(self.leading) else self.leading
        return max((i for i in range(1, last + 1) if self.cached(i)), default=0)


def prepare(recipe: Recipe, progress: Progress | None = None, cache: Cache | None = None) -> Job:
    """Read model and data and refuse what cannot work, before any long work. Raises any FlyweightError."""
    progress, cache = progress or NoProgress(), cache or Cache()
    if recipe.model is None:
        raise SettingsError("a model", "none", "name a Hugging Face folder, an artifact or a hub id")
    check_order(recipe.steps)
    check_engines(recipe, progress)
    source = resolve(recipe.model, recipe.revision)
    task = task_named(recipe.task or guess_task(source))
    check_data(recipe, task)
    data = recipe.data
    progress.note(f"reading {recipe.model}")
    names = label_names(data, task)
    bundle = load(str(source), task, labels=names, max_length=data.max_length, truncate=data.truncate, seed=recipe.seed)
    check_order(recipe.steps, bool(bundle.quantized), next(iter(bundle.sparse.values()), None))
    check_task(recipe, task)
    check_head(recipe, bundle)
    check_family(bundle)
    if bundle.quantized:  # its own figures would stand as those of a reference in fp32
        raise ModelError(f"float weights in {recipe.model}", "packed ones", "measure it by `flyweight compare`")
    check_others(recipe, task, bundle)
    progress.note("reading the data")
    splits = read_splits(data, task, bundle.encoder, bundle.labels, samples(recipe))
    if splits.shared and splits.eval is not None:
        progress.note(
            f"warning: {splits.shared} of {len(splits.eval)} evaluation texts stand in the training data as well"
        )
    texts = {path: read_unlabelled(path, data, task, bundle.encoder) for path in unlabelled_files(recipe)}
    keys = prefix_keys(recipe, task, bundle, splits, texts, source)
    return Job(recipe, task, bundle, splits, keys, cache, progress, texts)


def check_engines(recipe: Recipe, progress: Progress) -> None:
    """Engines that are asked for are installed and have the format that is made. Raises EngineError."""
    for name in recipe.measure.engines:
        if reason := engine_named(name).available():
            raise EngineError(f"the engine {name}", reason, "or leave it out of measure.engines (--engines)")
        for step in recipe.steps:
            if name == openvino.NAME and isinstance(step.settings, QuantizeSettings):
                check_packed(step.settings, progress)


def check_packed(settings: QuantizeSettings, progress: Progress) -> None:
    """Weights alone in 1 or 2 bits are refused for OpenVINO; where a budget chooses, it is said that they may come.

    Groups that MatMulNBits does not take are float once the file is loaded, and any engine has them. Raises EngineError.
    """
    grouped = settings.granularity == "group" and settings.group_size % 16 > 0
    if settings.activations != "none" or grouped:
        return
    bits, mean = f"{settings.bits}", settings.bits_per_weight
    if settings.mixed:
        if mean is None or mean > openvino.LEAST_BITS:
            progress.note(
                "warning: openvino runs no layers of 2 bits, which the budget may choose; the run would end there, and go on "
                "without --engines openvino from the steps done"
            )
            return
        bits = f"2 in some layers (bits_per_weight {mean:g})"
    elif settings.bits >= openvino.LEAST_BITS:
        return
    raise EngineError(
        openvino.PACKED,
        bits,
        "take more bits, or leave openvino out of measure.engines (--engines): engine onnxruntime or torch have it",
    )


def unlabelled_files(recipe: Recipe) -> set[Path]:
    settings = [step.settings for step in recipe.steps]
    return {one.unlabelled for one in settings if isinstance(one, TeacherSettings) and one.unlabelled is not None}


def check_data(recipe: Recipe, task: Task) -> None:
    """Every step has the data it needs. Raises SettingsError."""
    for number, step in enumerate(recipe.steps):
        settings, place = step.settings, f"steps[{number}] {step.name}"
        calibrated = isinstance(settings, QuantizeSettings) and settings.calibrated
        if calibrated and recipe.data.calibrate is None and recipe.data.train is None:
            raise SettingsError(
                f"texts to calibrate {place} on", "none", "give --calibrate F, or data.calibrate in the recipe"
            )
        taught = isinstance(settings, TeacherSettings) and settings.taught
        if not (taught or needs_labels(step)) or recipe.data.train is not None:
            continue
        if not (isinstance(settings, TeacherSettings) and settings.unlabelled is not None):
            raise SettingsError(f"training data for {place}", "none", "give --train F, or data.train in the recipe")
        if task.labelled and settings.alpha < 1:
            raise SettingsError(
                f"labelled data for {place} with alpha below 1", "only unlabelled", "set alpha to 1 or give --train F"
            )
    rule, spare = recipe.accept, not task.labelled and samples(recipe) > 0 and recipe.data.calibrate is not None
    if (rule.quality is not None or rule.max_drop is not None) and recipe.data.eval is None and not spare:
        raise SettingsError(
            "held-out data for the acceptance rule", "none", "give --eval F, or data.eval in the recipe"
        )


def needs_labels(step: StepSpec) -> bool:
    settings = step.settings
    if isinstance(settings, PruneSettings):
        return settings.criterion == "taylor" or settings.gradual == "cubic"
    return isinstance(settings, FinetuneSettings)


def check_task(recipe: Recipe, task: Task) -> None:
    """Raises SettingsError for a step that learns from labels where the task has none."""
    for number, step in enumerate(recipe.steps):
        if needs_labels(step) and not task.labelled:
            raise SettingsError(
                f"a task with labels for steps[{number}] {step.name}",
                f"'{task.name}'",
                "give --task text-classification; without labels train by distill and prune one-shot by magnitude",
            )


def check_others(recipe: Recipe, task: Task, bundle: Bundle) -> None:
    """Teachers, students, layers to keep and groups of weights fit, as far as can be told before the first step runs.

    Raises StepError, ModelError.
    """
    depth: int | None = len(next(iter(blocks(bundle.model, bundle.family).values())))
    shaped: Bundle | None = bundle  # a model with the linears that the step will meet
    for step in recipe.steps:
        settings = step.settings
        if isinstance(settings, PruneSettings) and settings.target != "weights":
            shaped = None  # how many are left is known only then
            depth = None if settings.target == "layers" else depth
        if isinstance(settings, QuantizeSettings) and shaped is not None:
            targets_of(shaped, settings)
        if not (isinstance(settings, TeacherSettings) and settings.taught):
            continue
        teacher = bundle if settings.teacher == "reference" else open_other(recipe, task, bundle, settings.teacher)
        if not isinstance(settings, DistillSettings):
            check_fit(bundle, bundle, teacher)
            continue
        student = bundle if settings.student is None else open_other(recipe, task, bundle, settings.student)
        check_fit(bundle, student, teacher)
        if student is not bundle:
            shaped = student
            depth = len(next(iter(blocks(student.model, student.family).values())))
        if depth is not None:
            depth = len(kept_layers(settings.layers, depth))


def open_other(recipe: Recipe, task: Task, bundle: Bundle, name: str) -> Bundle:
    """A teacher or student by path or hub id, for the labels of the model at hand."""
    data = recipe.data
    return load(name, task, labels=bundle.labels, max_length=data.max_length, truncate=data.truncate, seed=recipe.seed)


def check_head(recipe: Recipe, bundle: Bundle) -> None:
    """A head made anew has to be trained first: anything else would compress noise. Raises ModelError."""
    if bundle.fresh_head and (not recipe.steps or recipe.steps[0].name != "finetune"):
        raise ModelError(
            f"a model with a head for {bundle.task}",
            "one without",
            "begin the recipe with finetune, or name a fine-tuned model",
        )


def check_family(bundle: Bundle) -> None:
    """No engine here computes decoders yet; said before they are trained, not when they are exported. Raises ModelError."""
    if any(stack.name == "decoder" for stack in bundle.family.stacks):
        known = [name for name, row in FAMILIES.items() if all(stack.name == "encoder" for stack in row.stacks)]
        raise ModelError(
            f"a model of one of the families {', '.join(known)}",
            f"'{bundle.family.model_type}'",
            "models with a decoder can be inspected, but not compressed yet",
        )


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
        if isinstance(step.settings, QuantizeSettings):
            outside += quantize_inputs(recipe, step.settings, splits)
        keys.append(content_key(keys[-1], step.as_data(), outside))
    return keys


def samples(recipe: Recipe) -> int:
    """How many texts the steps calibrate on; a file given for it is read even where no step looks at them: without labels
    the rest of it is what is measured on."""
    settings = [step.settings for step in recipe.steps if isinstance(step.settings, QuantizeSettings)]
    return max((one.samples for one in settings if one.calibrated or recipe.data.calibrate is not None), default=0)


def quantize_inputs(recipe: Recipe, settings: QuantizeSettings, splits: Splits) -> list[str]:
    """What a quantize step depends on beside model and training data: its texts, the rule that its gate holds, the CPU."""
    rule = [] if settings.gate == "off" else [recipe.accept.model_dump_json()]
    rule += ["reduced range"] if widest(settings) == REDUCED_BITS else []  # `auto` depends on the machine
    if splits.calibration is None or not (settings.calibrated or rule):
        return rule
    return [*rule, splits.calibration.content_hash()]


def outside_hashes(step: StepSpec, texts: Mapping[Path, Examples]) -> list[str]:
    """Content of the models and files that a step names."""
    settings = step.settings
    if not (isinstance(settings, TeacherSettings) and settings.taught):
        return []
    named = [settings.student if isinstance(settings, DistillSettings) else None]
    named.append(None if settings.teacher == "reference" else settings.teacher)
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


def guess_task(source: Path) -> str:
    """The task that the model's own head is for; embedding for a model without one."""
    if artifact.is_artifact(source):
        return artifact.read_manifest(source).task
    try:
        heads = json.loads((source / "config.json").read_bytes()).get("architectures") or [""]
    except (OSError, ValueError):
        return "embedding"  # `load` says what is wrong with the folder
    return "text-classification" if str(heads[0]).endswith("ForSequenceClassification") else "embedding"
