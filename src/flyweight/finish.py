"""The end of a run: export, parity, measurement against the reference, verdict, card, report, artifact."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from flyweight import artifact
from flyweight.artifact import KernelReport, Manifest, Verdict
from flyweight.data import Examples
from flyweight.engines.engine import Predictor, engine_named
from flyweight.engines.kernels import profile, report
from flyweight.job import Job
from flyweight.measure.environment import environment
from flyweight.measure.latency import Point, random_arrays
from flyweight.measure.size import disk
from flyweight.measure.static import static_figures
from flyweight.measure.suite import Candidate, Figures, Labelled, measure
from flyweight.measure.verdict import accept
from flyweight.models.bundle import Bundle
from flyweight.models.storage import save
from flyweight.models.surgery import linears
from flyweight.report.card import card
from flyweight.report.html import html
from flyweight.run import add_engine, reopen, share_engines
from flyweight.runtime import neutral_batch
from flyweight.samples import changed_answers
from flyweight.training import predict

__all__ = ["finish"]

REFERENCES = ("reference_torch", "reference_onnxruntime")
Pages = Mapping[str, Callable[[Manifest], str]]


def finish(job: Job, bundle: Bundle, out: Path, overwrite: bool = False) -> Manifest:
    """Write the artifact. Raises ExportError, ArtifactError, StorageError; nothing is left behind then."""
    with artifact.write_folder(out, overwrite) as folder:
        manifest = save(bundle, folder)
        manifest = share_engines(job, bundle, folder, add_engine(job, bundle, folder, manifest))
        manifest = manifest.model_copy(update={"kernels": kernels_that_ran(job, bundle, folder, manifest)})
        manifest = manifest.model_copy(update={"seed": job.recipe.seed, "environment": environment()})
        (folder / "recipe.yaml").write_text(job.recipe.to_yaml(), encoding="utf-8")
        artifact.write_manifest(folder, manifest)
        figures = measure_beside_reference(job, bundle, folder)
        manifest = manifest.model_copy(update={"measurements": figures, "verdict": verdict(job, figures)})
        samples = None
        if job.recipe.measure.include_samples:
            samples = changed_answers(job.recipe.data, job.task, job.reference_folder, folder)
        pages: Pages = {
            "README.md": partial(card, samples=samples is not None),
            "report.html": partial(html, recipe_yaml=job.recipe.to_yaml(private=True), samples=samples),
        }
        return write_pages(folder, manifest, pages)


def kernels_that_ran(job: Job, bundle: Bundle, folder: Path, manifest: Manifest) -> dict[str, KernelReport]:
    """What every engine makes of the file, from its profile of one text of the longest measured length."""
    inside = [f"{name}.weight" for name in linears(bundle.model, bundle.family)]
    length = max(job.recipe.measure.within(bundle.encoder.max_length).lengths)
    arrays = random_arrays(Point(1, length), bundle.encoder.tokenizer.get_vocab_size(), job.recipe.seed)
    found = {}
    for name, entry in manifest.engines.items():
        job.progress.note(f"asking {name} for its kernels")
        ran = profile(name, folder / entry.file, arrays, threads=job.recipe.measure.threads)
        found[name] = report(ran, inside, manifest.quantized, name)
    return found


def measure_beside_reference(job: Job, bundle: Bundle, folder: Path) -> dict[str, Figures]:
    """{"reference_torch" | "reference_onnxruntime" | "result": figures}, all in one run; and the same two in further engines."""
    reference = reopen(job, job.leading)
    answers = held_out_examples(job, reference)
    settings = job.recipe.measure.within(job.bundle.encoder.max_length)
    threads, length = settings.threads, max(settings.lengths)

    def candidate(of: Bundle, where: Path, engine: str) -> Candidate:
        known = static_figures(of, length)
        opened: Callable[[], Predictor] = partial(engine_named(engine).open, where, threads=threads)
        size, batch = of.encoder.tokenizer.get_vocab_size(), neutral_batch(of.activations)
        labelled, own = None, job.read_by(of)[0].eval
        if answers is not None and own is not None:
            labelled = Labelled(job.task, replace(own, labels=answers.labels), of.encoder.pad)
        return Candidate(opened, where, engine, size, labelled, batch, known)

    candidates = {
        "reference_torch": candidate(reference, job.reference_folder, "torch"),
        "reference_onnxruntime": candidate(reference, job.reference_folder, "onnxruntime"),
        "result": candidate(bundle, folder, "onnxruntime"),
    }
    for name in settings.engines:
        candidates[f"reference_{name}"] = candidate(reference, job.reference_folder, name)
        candidates[f"result_{name}"] = candidate(bundle, folder, name)
    return measure(
        candidates,
        settings,
        references=(*REFERENCES, *(f"reference_{name}" for name in settings.engines)),
        seed=job.recipe.seed,
        progress=job.progress,
        card=bundle.device.type == "cuda",
    )


def held_out_examples(job: Job, reference: Bundle) -> Examples | None:
    """The evaluation examples; where the task has no labels the reference's own answers stand in for them."""
    held_out = job.read_by(reference)[0].eval
    if held_out is None or job.task.labelled:
        return held_out
    return replace(held_out, labels=predict(reference, held_out))


def verdict(job: Job, figures: dict[str, Figures]) -> Verdict:
    """The acceptance rule against the reference in torch fp32: what the engine loses counts as well."""
    metric = f"quality.{job.task.metric}"
    if metric not in figures["result"]:
        return Verdict(accepted=True, text="Quality was not measured: no held-out data were given (--eval F).")
    reference, result = figures["reference_torch"], figures["result"]
    return accept(job.recipe.accept, reference[metric], result[f"{metric}.difference"], job.task.metric)


def results(figures: Mapping[str, Figures]) -> dict[str, str]:
    """Columns of the artifact itself, with the engine that each was taken in."""
    further = {name: name.removeprefix("result_") for name in figures if name.startswith("result_")}
    return {"result": "onnxruntime", **further}


def write_pages(folder: Path, manifest: Manifest, pages: Pages) -> Manifest:
    """Card, report and manifest tell the folder's own size: write them until it no longer changes."""
    manifest = artifact.write_manifest(folder, manifest)
    for _ in range(5):
        for name, page in pages.items():
            (folder / name).write_text(page(manifest), encoding="utf-8")
        manifest = artifact.write_manifest(folder, manifest)
        before = manifest.measurements
        figures = before | {name: before[name] | disk(folder, engine) for name, engine in results(before).items()}
        if figures == before:
            break
        manifest = manifest.model_copy(update={"measurements": figures})
    return manifest
