"""A recipe made ready: model and data read, everything that cannot work refused, every prefix named by its content."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from flyweight import artifact
from flyweight.cache import Cache
from flyweight.checks import check_data, check_engines, check_family, check_head, check_others, check_task
from flyweight.context import NoProgress, Progress
from flyweight.data import Examples
from flyweight.errors import ModelError, SettingsError
from flyweight.keys import prefix_keys, samples
from flyweight.models.bundle import Bundle
from flyweight.models.load import load, resolve
from flyweight.recipe import Recipe, check_order, content_key
from flyweight.settings import TeacherSettings
from flyweight.splits import Splits, label_names, read_splits, read_unlabelled
from flyweight.tasks import Task, task_named

__all__ = ["Job", "guess_task", "prepare"]


@dataclass
class Job:
    """A recipe whose model and data have been read and found fit.

    splits:     the examples in the tokens of `bundle`, the model that everything begins with
    keys:       content hash of every prefix; keys[i] names the model after i steps
    unlabelled: the further texts of every file that a step names
    reread:     splits and further texts in the tokens of other models, by their tokenizer's content
    """

    recipe: Recipe
    task: Task
    bundle: Bundle
    splits: Splits
    keys: list[str]
    cache: Cache
    progress: Progress
    unlabelled: dict[Path, Examples]
    reread: dict[str, tuple[Splits, dict[Path, Examples]]] = field(default_factory=dict)

    def read_by(self, bundle: Bundle) -> tuple[Splits, dict[Path, Examples]]:
        """(splits, further texts) in the tokens of `bundle`, in the same order.

        Where its vocabulary is another one than that of the model at the beginning, the files are read once more. Raises
        DataError for a text that has become too long.
        """
        encoder, first = bundle.encoder, self.bundle.encoder
        if encoder.tokenizer.get_vocab(with_added_tokens=True) == first.tokenizer.get_vocab(with_added_tokens=True):
            return self.splits, self.unlabelled
        key = content_key(encoder.tokenizer.to_str())
        if key not in self.reread:
            self.progress.note("reading the data in the new vocabulary")
            data = self.recipe.data
            splits = read_splits(data, self.task, encoder, bundle.labels, samples(self.recipe))
            texts = {path: read_unlabelled(path, data, self.task, encoder) for path in self.unlabelled}
            self.reread[key] = splits, texts
        return self.reread[key]

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


def unlabelled_files(recipe: Recipe) -> set[Path]:
    settings = [step.settings for step in recipe.steps]
    return {one.unlabelled for one in settings if isinstance(one, TeacherSettings) and one.unlabelled is not None}


def guess_task(source: Path) -> str:
    """The task that the model's own head is for; embedding for a model without one."""
    if artifact.is_artifact(source):
        return artifact.read_manifest(source).task
    try:
        heads = json.loads((source / "config.json").read_bytes()).get("architectures") or [""]
    except (OSError, ValueError):
        return "embedding"  # `load` says what is wrong with the folder
    return "text-classification" if str(heads[0]).endswith("ForSequenceClassification") else "embedding"
