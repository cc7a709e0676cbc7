"""What can be refused of a recipe before its first step runs: engines, data, tasks, other models and their shapes."""

from __future__ import annotations

from functools import partial

from flyweight.context import Progress
from flyweight.engines import openvino
from flyweight.engines.engine import engine_named
from flyweight.errors import EngineError, ModelError, SettingsError, StepError
from flyweight.keys import samples
from flyweight.measure.blocks import check_given
from flyweight.measure.latency import Point
from flyweight.measure.race import Terms
from flyweight.methods.distill.student import kept_layers, open_student
from flyweight.methods.distill.width import check_narrower
from flyweight.methods.quantize.work import targets_of
from flyweight.models.bundle import Bundle
from flyweight.models.families import FAMILIES
from flyweight.models.load import load
from flyweight.models.surgery import blocks
from flyweight.recipe import Recipe, StepSpec
from flyweight.settings import DistillSettings, FinetuneSettings, PruneSettings, QuantizeSettings, TeacherSettings
from flyweight.tasks import Task
from flyweight.training.imitation import check_inside
from flyweight.training.pair import check_fit, check_tokens, check_top, check_trained, same_tokens

__all__ = ["check_data", "check_engines", "check_family", "check_head", "check_others", "check_task", "open_other"]


def check_engines(recipe: Recipe, progress: Progress) -> None:
    """Engines that are asked for are installed and have the format that is made, and tables of times are theirs.

    Raises EngineError, StepError.
    """
    for step in recipe.steps:
        if isinstance(step.settings, PruneSettings) and step.settings.timed:
            check_timed(recipe, step.settings)
    for name in recipe.measure.engines:
        if reason := engine_named(name).available():
            raise EngineError(f"the engine {name}", reason, "or leave it out of measure.engines (--engines)")
        for step in recipe.steps:
            if name == openvino.NAME and isinstance(step.settings, QuantizeSettings):
                check_packed(step.settings, progress)


def check_timed(recipe: Recipe, settings: PruneSettings) -> None:
    """What a wish in time is measured with is there, and a table that is given is of it. Raises EngineError, StepError."""
    if reason := engine_named(settings.engine).available():
        raise EngineError(f"the engine {settings.engine} to take times on", reason)
    if settings.table is not None:
        point, threads = Point(*settings.shape), recipe.measure.threads
        check_given(settings.table, Terms(settings.engine, settings.precision, point, threads))


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


def check_data(recipe: Recipe, task: Task) -> None:
    """Every step has the data it needs. Raises SettingsError."""
    for number, step in enumerate(recipe.steps):
        settings, place = step.settings, f"steps[{number}] {step.name}"
        calibrated = isinstance(settings, PruneSettings | QuantizeSettings) and settings.calibrated
        if calibrated and recipe.data.calibrate is None and recipe.data.train is None:
            raise SettingsError(
                f"texts to calibrate {place} on", "none", "give --calibrate F, or data.calibrate in the recipe"
            )
        tokens = isinstance(settings, PruneSettings) and settings.target == "vocabulary" and settings.corpus is None
        if tokens and recipe.data.train is None:
            raise SettingsError(f"texts whose tokens stay for {place}", "none", "give --corpus F or --train F")
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
    at_hand, cut = bundle, False  # whose tokens the step will meet, and whether some of them have gone by then
    shaped: Bundle | None = bundle  # a model with the linears that the step will meet
    depth: int | None = _depth(bundle)
    for number, step in enumerate(recipe.steps):
        settings = step.settings
        if isinstance(settings, PruneSettings) and settings.target != "weights":
            shaped = None  # how many are left is known only then
            depth = None if settings.target == "layers" else depth
        if isinstance(settings, QuantizeSettings) and shaped is not None:
            targets_of(shaped, settings)
        if isinstance(settings, TeacherSettings) and settings.taught:
            load_other = partial(open_other, recipe, task, bundle)
            if isinstance(settings, DistillSettings) and settings.student is not None:
                at_hand = shaped = open_student(settings.student, bundle, load_other, recipe.seed)
                cut, depth = cut and same_tokens(at_hand, bundle), _depth(at_hand)
            whole = shaped is at_hand and depth == _depth(at_hand)
            if isinstance(settings, DistillSettings) and settings.width is not None:
                check_narrower(at_hand, settings.width)
                shaped = None
            for name in settings.teachers:
                teacher = bundle if name == "reference" else load_other(name)
                if name != "reference":  # that one may be fine-tuned by then
                    check_trained(teacher)
                check_fit(at_hand, teacher)
                if whole and isinstance(settings, DistillSettings) and name == settings.teacher:
                    check_inside(at_hand, teacher, settings, kept_layers(settings.layers, _depth(at_hand)))
                if cut and settings.inside:
                    _refuse_inside(f"steps[{number}] {step.name}", settings.inside)
                elif settings.inside:
                    check_tokens("the student", at_hand, f"the teacher for {settings.inside}", teacher, settings.inside)
            if isinstance(settings, DistillSettings):
                check_top(settings.top_k, teacher)
                depth = None if depth is None else len(kept_layers(settings.layers, depth))
        cut |= isinstance(settings, PruneSettings) and settings.target == "vocabulary"


def _depth(bundle: Bundle) -> int:
    return len(next(iter(blocks(bundle.model, bundle.family).values())))


def _refuse_inside(place: str, names: str) -> None:
    raise StepError(
        f"{place} with {names} before the vocabulary is pruned",
        "it afterwards, when the teacher reads other tokens",
        f"swap the two, or set {names} to 0: answers alone teach across vocabularies",
    )


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
