"""The formula against torch's own counter, which watches every matrix product of an eager run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="needs the extra `compress`")
import transformers  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from flyweight.measure.flops import flops, flops_figure  # noqa: E402
from flyweight.models.bundle import Bundle  # noqa: E402
from flyweight.models.families import family_of  # noqa: E402

ENCODERS = ("bert", "distilbert", "roberta", "electra", "mpnet")
CLASSIFIERS = (*ENCODERS, "llama", "gpt2", "t5")


def bundle_of(folder: Path, headless: bool = False) -> Bundle:
    """What these functions read of a bundle; no tokenizer is needed."""
    auto = transformers.AutoModel if headless else transformers.AutoModelForSequenceClassification
    model = auto.from_pretrained(folder, attn_implementation="eager").eval()
    nothing: Any = None
    return Bundle(model, nothing, family_of(model.config), "text-classification", nothing)


def counted(bundle: Bundle, length: int) -> int:
    ids = torch.full((1, length), 7)
    ids[0, -1] = getattr(bundle.model.config, "eos_token_id", None) or 7  # T5's head looks for the end
    arrays = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if type(bundle.model).__name__ in ("T5Model", "MarianModel"):
        arrays["decoder_input_ids"] = ids
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        bundle.model(**arrays)
    return int(counter.get_total_flops())


@pytest.mark.parametrize("length", [8, 33])
@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_equals_torch_with_a_head(tiny: Callable[..., Path], model_type: str, length: int) -> None:
    bundle = bundle_of(tiny(model_type, ("a", "b", "c")))
    assert flops(bundle, length) == counted(bundle, length)


@pytest.mark.parametrize("model_type", [*ENCODERS, "t5", "marian"])
def test_equals_torch_without_a_head(tiny: Callable[..., Path], model_type: str) -> None:
    bundle = bundle_of(tiny(model_type), headless=True)
    assert flops(bundle, 16) == counted(bundle, 16)


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_equals_torch_after_structure_went(tiny: Callable[..., Path], model_type: str) -> None:
    surgery = pytest.importorskip("flyweight.models.surgery")
    bundle = bundle_of(tiny(model_type, ("a", "b")))
    before = flops(bundle, 16)
    for stack in bundle.family.stacks:
        surgery.keep_layers(bundle.model, bundle.family, {stack.name: [0, 2]})
        surgery.keep_neurons(bundle.model, bundle.family, stack.name, 1, list(range(13)))
        for attention in range(len(stack.attention)):
            surgery.keep_heads(bundle.model, bundle.family, stack.name, 0, attention, [1])
    after = flops(bundle, 16)
    assert after == counted(bundle, 16)
    assert after < 0.6 * before


def test_a_bert_by_hand(tiny: Callable[..., Path]) -> None:
    bundle = bundle_of(tiny("bert", ("a", "b")))
    n, hidden, neurons, layers = 10, 32, 64, 4
    block = 2 * n * (4 * hidden * hidden + 2 * hidden * neurons) + 2 * 2 * n * n * hidden
    head = 2 * hidden * hidden + 2 * hidden * 2  # pooler and classifier see one token
    assert flops(bundle, n) == layers * block + head
    figure = flops_figure(bundle, n)["flops"]
    assert figure.value == flops(bundle, n)
    assert "10 tokens" in figure.method


def test_minilm_has_the_known_cost(minilm: Path) -> None:
    bundle = bundle_of(minilm, headless=True)
    blocks = 6 * (2 * 128 * (4 * 384**2 + 2 * 384 * 1536) + 4 * 128**2 * 384)
    assert flops(bundle) == blocks + 2 * 384**2
