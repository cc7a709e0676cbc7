"""Students that are not the model at hand with fewer layers: random ones by a config, and pruned ones from the step before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="distillation needs the extra `compress`")

import training_cases as cases  # noqa: E402
from distill_cases import SETTINGS, School  # noqa: E402
from flyweight.errors import ModelError, StepError  # noqa: E402
from flyweight.methods.distill import distill  # noqa: E402
from flyweight.methods.distill.student import from_scratch, is_config, open_student  # noqa: E402
from flyweight.methods.prune import prune  # noqa: E402
from flyweight.models.surgery import blocks, shapes  # noqa: E402
from flyweight.settings import DistillSettings, PruneSettings  # noqa: E402
from flyweight.training import predict  # noqa: E402

LABELS = ("negative", "positive")


def config_folder(tiny: Callable[..., Path], out: Path, like: str = "bert", **changes: object) -> Path:
    """A config.json and nothing else."""
    content = json.loads((tiny(like) / "config.json").read_text())
    out.mkdir(parents=True)
    (out / "config.json").write_text(json.dumps({**content, **changes}))
    return out


# from a config


def test_a_config_makes_a_student_of_random_weights(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("bert", labels=LABELS), tmp_path)
    bundle = school.bundle()
    folder = config_folder(tiny, tmp_path / "small", num_hidden_layers=2, hidden_size=16, max_position_embeddings=32)
    state = torch.random.get_rng_state()
    found = [from_scratch(folder, bundle, seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)
    hashes = [cases.weights_hash(one.model) for one in found]
    assert hashes[0] == hashes[1] != hashes[2]
    assert found[0].labels == bundle.labels
    assert found[0].model.config.id2label == dict(enumerate(LABELS))
    assert found[0].encoder.max_length == 32
    assert found[0].origin != bundle.origin
    assert not found[0].fresh_head  # it is what the teacher is there for
    assert not found[0].model.training
    assert predict(found[0], cases.examples(5)).shape == (5, 2)


@pytest.mark.parametrize("model_type", ["bert", "distilbert", "electra"])
def test_it_learns_from_its_teacher(tiny: Callable[..., Path], tmp_path: Path, model_type: str) -> None:
    """Also one of another family, as long as they read the same tokens; weights are drawn by the seed of the run."""
    school = School(tiny("bert", labels=LABELS), tmp_path)
    folder = config_folder(tiny, tmp_path / "new", model_type, pad_token_id=None)
    settings = DistillSettings(
        **{**SETTINGS.model_dump(), "student": str(folder), "alpha": 1.0, "layers": "all", "learning_rate": 3e-3}
    )
    wanted = np.diff(predict(school.bundle(), school.context.train))
    found = distill(school.bundle(), settings.model_copy(update={"epochs": 4.0}), school.context)
    assert found.family.model_type == model_type
    assert school.loads == []
    start = from_scratch(folder, school.bundle(), 0)
    before, after = (np.square(np.diff(predict(one, school.context.train)) - wanted).mean() for one in (start, found))
    assert after < 0.8 * before


def test_a_folder_with_weights_is_loaded(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("bert", labels=LABELS), tmp_path)
    whole, bare = tiny("bert", labels=LABELS, seed=7), config_folder(tiny, tmp_path / "bare")
    assert [is_config(str(folder)) for folder in (whole, bare, tmp_path / "nowhere")] == [False, True, False]
    assert open_student(str(whole), school.bundle(), school.load, 0).family.model_type == "bert"
    assert school.loads == [str(whole)]
    (bare / "pytorch_model.bin").write_bytes(b"")  # weights that `load` refuses with its own reason
    assert not is_config(str(bare))


def test_configs_that_cannot_be_built(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("bert", labels=LABELS), tmp_path)
    size = len(school.bundle().encoder.tokenizer.get_vocab())
    for number, (changes, error, text) in enumerate(
        (
            ({"vocab_size": 10}, StepError, f"a vocabulary of at least the model's {size} tokens .* got 10"),
            ({"num_attention_heads": 5}, StepError, "a model that .* can build"),
            ({"model_type": "unheard"}, ModelError, "families"),
        )
    ):
        folder = config_folder(tiny, tmp_path / str(number), "bert", **changes)
        settings = SETTINGS.model_copy(update={"student": str(folder), "layers": "all"})
        with pytest.raises(error, match=text):
            distill(school.bundle(), settings, school.context)
    assert school.calls == 0


# from a prune step before


def test_a_pruned_student_learns_from_the_reference(tiny: Callable[..., Path], tmp_path: Path) -> None:
    """Heads and neurons by importance are a `prune` step before: `teacher: reference` is then the model before it."""
    school = School(tiny("mpnet", labels=LABELS), tmp_path, validation=None)
    cut = prune(school.bundle(), PruneSettings(target="heads+neurons", amount=0.5, criterion="taylor"), school.context)
    left = shapes(cut.model, cut.family)
    assert {(len(shape.heads[0]), shape.neurons) for shape in left["encoder"]} == {(2, 32)}
    data = school.context.train
    wanted = np.diff(predict(school.bundle(), data))
    before = np.square(np.diff(predict(cut, data)) - wanted).mean()
    weights = {"hidden_weight": 0.1, "attention_weight": 0.1, "relation_weight": 0.1, "relation_heads": 4}
    more = {"layers": "all", "alpha": 1.0, "epochs": 4.0, "learning_rate": 3e-3}
    settings = SETTINGS.model_copy(update={**weights, **more})
    found = distill(cut, settings, school.context)
    assert shapes(found.model, found.family) == left
    assert school.calls > 0
    assert np.square(np.diff(predict(found, data)) - wanted).mean() < 0.7 * before
    fewer = distill(found, SETTINGS, school.context)
    assert [len(stack) for stack in blocks(fewer.model, fewer.family).values()] == [2]
