"""Every cell of the matrix: a tiny model goes through the step, is exported, agrees with torch, is written and loaded again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from flyweight import artifact
from flyweight.context import Context
from flyweight.data import Examples
from flyweight.engines import onnxruntime
from flyweight.engines.engine import Arrays, engine_named
from flyweight.golden import TEXTS
from flyweight.models.activations import simulate
from flyweight.models.bundle import Bundle
from flyweight.models.families import FAMILIES
from flyweight.models.load import load
from flyweight.models.storage import save
from flyweight.parity import EXACT, check, relative_errors
from flyweight.runtime import open_model
from flyweight.steps import STEPS as TABLE
from flyweight.steps import step_named
from flyweight.tasks import task_named
from tests.parity.matrix import CELLS, ENCODERS, STEPS
from tiny import SENTENCES

TASK = task_named("text-classification")


class Done(NamedTuple):
    """A model after a step, the folder it was written to, and batches to compare answers on."""

    bundle: Bundle
    folder: Path
    batches: list[Arrays]


@pytest.fixture(scope="module")
def after(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Done]:
    """`after(family, step)`: made once for all engines."""
    made: dict[tuple[str, str], Done] = {}

    def make(family: str, step: str) -> Done:
        if (family, step) not in made:
            made.clear()  # cells of one model follow one another
            source = str(tiny(family, labels=("negative", "positive")))
            made[family, step] = run(source, step, tmp_path_factory.mktemp(family))
        return made[family, step]

    return make


def run(source: str, name: str, place: Path) -> Done:
    verb, values = STEPS[name]
    bundle = load(source, TASK)
    untouched = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    settings = step_named(verb).settings.read(values, name)
    data = examples(bundle)
    context = Context(
        task=TASK,
        seed=0,
        work=place / "work",
        reference=lambda: load(source, TASK),
        load=lambda other: load(other, TASK),
        train=data,
        validation=data,
    )
    context.work.mkdir()
    bundle = step_named(verb).function()(bundle, settings, context)
    now = bundle.model.state_dict()
    assert now.keys() != untouched.keys() or any(
        now[k].shape != v.shape or not now[k].equal(v) for k, v in untouched.items()
    ), f"{name} changed nothing"
    batches = some_batches(bundle)
    with artifact.write_folder(place / "artifact") as folder:
        engine = onnxruntime.export(bundle, folder)
        manifest = save(bundle, folder)
        worst = check(bundle, folder, engine, batches)
        manifest = manifest.model_copy(update={"engines": {"onnxruntime": engine.model_copy(update={"parity": worst})}})
        artifact.write_manifest(folder, manifest)
    return Done(bundle, place / "artifact", batches)


def examples(bundle: Bundle) -> Examples:
    tokens = bundle.encoder._replace(truncate=True).examples(SENTENCES)
    return tokens.__class__(tokens.ids, tokens.types, tokens.starts, np.arange(len(SENTENCES)) % 2)


def some_batches(bundle: Bundle) -> list[Arrays]:
    texts = bundle.encoder._replace(truncate=True).examples([*TEXTS, *SENTENCES])
    return [texts.batch(range(i, min(i + 8, len(texts))), bundle.encoder.pad) for i in range(0, len(texts), 8)]


CASES = [cell for cell, reason in CELLS.items() if reason is None]


@pytest.mark.parametrize(("family", "step", "engine"), sorted(CASES), ids=lambda value: value.replace(" ", "-"))
def test_cell(after: Callable[[str, str], Done], family: str, step: str, engine: str) -> None:
    if reason := engine_named(engine).available():
        pytest.skip(reason)
    done = after(family, step)
    with open_model(done.folder, engine=engine) as session:
        answers = [session.predictor.run(batch) for batch in done.batches]
    expected = torch_answers(done)
    if engine == "torch":
        np.testing.assert_allclose(np.concatenate(answers), np.concatenate(expected), rtol=1e-4, atol=1e-5)
    elif session.manifest.engines["onnxruntime"].precision in ("fp32", "weights-only"):  # `check` has judged the others
        assert relative_errors(np.concatenate(answers), np.concatenate(expected)).max() <= EXACT


def torch_answers(done: Done) -> list[np.ndarray]:
    """Batch by batch, as the engine runs them: dynamic ranges are those of a batch."""
    import torch

    found = []
    done.bundle.model.eval()
    with simulate(done.bundle), torch.inference_mode():
        for batch in done.batches:
            tensors = {name: torch.from_numpy(batch[name]) for name in done.bundle.family.inputs}
            found.append(TASK.answer(done.bundle.model(**tensors), tensors).numpy())
    return found


def test_the_table_is_whole() -> None:
    """Every family of the table of families and every step has its cells; every encoder is tested throughout."""
    assert {family for family, _, _ in CELLS} == set(FAMILIES)
    assert {STEPS[step][0] for _, step, _ in CELLS} == set(TABLE)
    missing = {(step, engine) for (family, step, engine), why in CELLS.items() if family in ENCODERS and why}
    assert missing == {("quantize binary", "openvino")}
