"""A small artifact with an engine file, made without a recipe."""

from __future__ import annotations

from pathlib import Path


def write(model: Path, out: Path, task: str = "text-classification") -> Path:
    """Store `model` as it is and export it to onnxruntime."""
    from flyweight import artifact
    from flyweight.engines import onnxruntime
    from flyweight.models.load import load
    from flyweight.models.storage import save
    from flyweight.tasks import task_named

    bundle = load(str(model), task_named(task))
    with artifact.write_folder(out) as folder:
        manifest = save(bundle, folder)
        engine = onnxruntime.export(bundle, folder)
        artifact.write_manifest(folder, manifest.model_copy(update={"engines": {"onnxruntime": engine}}))
    return out
