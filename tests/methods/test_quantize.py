"""The step: which weights are quantized with which grid, what the model then answers, what is refused before anything changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from torch import nn
from transformers.pytorch_utils import Conv1D

from flyweight import artifact
from flyweight.context import Context
from flyweight.errors import SettingsError, StepError
from flyweight.methods.quantize import quantize
from flyweight.models import surgery
from flyweight.models.activations import fake_quantize, simulate
from flyweight.models.bundle import Bundle
from flyweight.models.codes import parameter_value
from flyweight.models.load import load
from flyweight.models.storage import restore, save
from flyweight.settings import QuantizeSettings
from flyweight.tasks import task_named
from solver_cases import sparsified
from tiny import CLASSIFIERS, SENTENCES

TASK = task_named("text-classification")
Tiny = Callable[..., Path]


def opened(tiny: Tiny, model_type: str = "bert", **changes: Any) -> Bundle:
    return load(tiny(model_type, ("negative", "positive"), **changes), TASK)


def context(tmp_path: Path) -> Context:
    def none(*arguments: Any) -> Bundle:
        raise AssertionError("quantizing needs no other model")

    return Context(task=TASK, seed=0, work=tmp_path, reference=none, load=none)


def outputs(bundle: Bundle) -> torch.Tensor:
    arrays = bundle.encoder.examples(SENTENCES).batch(range(len(SENTENCES)), bundle.encoder.pad)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items() if name in bundle.family.inputs}
    with torch.no_grad():
        answer: torch.Tensor = bundle.model(**inputs).logits
    return answer


def test_the_record_names_the_weights_that_changed_most(tiny: Tiny, tmp_path: Path) -> None:
    bundle, about = opened(tiny), context(tmp_path)
    floats = bundle.copy().model
    made = quantize(bundle, QuantizeSettings(bits=3, granularity="tensor"), about)
    changed = {}
    for name in made.quantized:
        weight, now = floats.get_parameter(name).detach(), made.model.get_parameter(name).detach()
        changed[name.removesuffix(".weight")] = float((now - weight).norm() / weight.norm())
    worst = dict(sorted(changed.items(), key=lambda item: -item[1])[:5])
    assert about.notes["relative_error"] == pytest.approx(worst, abs=1e-6)
    assert min(worst.values()) > 0.05


@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_every_family(tiny: Tiny, model_type: str, tmp_path: Path) -> None:
    bundle = opened(tiny, model_type)
    before = outputs(bundle)
    original = {name: parameter.detach().clone() for name, parameter in bundle.model.named_parameters()}
    work = context(tmp_path)
    made = quantize(bundle, QuantizeSettings(), work)
    tables, linears = surgery.embeddings(made.model, made.family), surgery.linears(made.model, made.family)
    modules = dict(made.model.named_modules())
    owners = {
        id(module.weight): name
        for name, module in modules.items()
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding)
    }
    assert made.activations == "dynamic"
    for name, parameter in made.model.named_parameters():
        if name in made.quantized:
            value = parameter_value(made.quantized[name])
            assert torch.equal(value, parameter)
            step = made.quantized[name].scale
            error = value - original[name]
            assert ((error.t() if made.quantized[name].info.transposed else error).abs() <= step * 0.5001).all()
        else:
            assert torch.equal(parameter, original[name]), name
    assert {f"{name}.weight" for name in (*tables, *linears)} <= made.quantized.keys()
    left = {
        owners[id(p)] for name, p in made.model.named_parameters() if name not in made.quantized and id(p) in owners
    }
    assert all("relative_attention_bias" in name or "token_type" in name for name in left), left
    assert work.notes["tensors"] == len(made.quantized)
    assert work.notes["weights"] == sum(codes.codes.numel() for codes in made.quantized.values())
    similarity = torch.cosine_similarity(outputs(made).flatten(), before.flatten(), dim=0)
    assert similarity > 0.99
    assert not torch.equal(outputs(made), before)


def test_bits_by_place(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(
        opened(tiny, "electra"), QuantizeSettings(bits=3, scheme="asymmetric", embeddings=5), context(tmp_path)
    )
    grids = {
        name: (codes.info.bits, codes.info.scheme, codes.info.granularity) for name, codes in made.quantized.items()
    }
    for name, found in grids.items():
        if "encoder.layer" in name:
            assert found == (3, "asymmetric", "channel"), name
        elif name.endswith(("word_embeddings.weight", "position_embeddings.weight")):
            assert found == (5, "asymmetric", "channel"), name
        else:
            assert found == (8, "asymmetric", "channel"), name
    heads = {name for name in grids if "encoder.layer" not in name and "_embeddings.weight" not in name}
    assert heads == {"classifier.dense.weight", "classifier.out_proj.weight", "electra.embeddings_project.weight"}


def test_binary_blocks_keep_tables_and_head_at_8_bits(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(opened(tiny), QuantizeSettings(bits=1, scheme="binary"), context(tmp_path))
    for name, codes in made.quantized.items():
        inside = "encoder.layer" in name
        assert (codes.info.bits, codes.info.scheme) == ((1, "binary") if inside else (8, "symmetric"))
        if inside:
            weight = made.model.get_parameter(name)
            assert all(len(row.abs().unique()) == 1 for row in weight)


def test_one_bit_tables(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(opened(tiny), QuantizeSettings(embeddings=1), context(tmp_path))
    assert made.quantized["bert.embeddings.word_embeddings.weight"].info.scheme == "binary"


def test_skip_and_embeddings_none(tiny: Tiny, tmp_path: Path) -> None:
    settings = QuantizeSettings(embeddings=None, skip=("classifier*", "*.layer.0.*"))
    made = quantize(opened(tiny), settings, context(tmp_path))
    assert not [n for n in made.quantized if "embeddings" in n or n.startswith("classifier") or ".layer.0." in n]
    assert "bert.encoder.layer.1.output.dense.weight" in made.quantized
    assert "bert.pooler.dense.weight" in made.quantized


def test_tied_weights_are_quantized_once(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(opened(tiny, "t5"), QuantizeSettings(), context(tmp_path))
    assert "transformer.shared.weight" in made.quantized
    assert not [name for name in made.quantized if "embed_tokens" in name]
    artifact.write_manifest(tmp_path / "a", save(made, tmp_path / "a"))
    assert torch.equal(outputs(restore(tmp_path / "a")), outputs(made))


def test_a_head_tied_to_a_table_left_in_float_stays_in_float(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny, "gpt2")
    bundle.model = transformers.AutoModelForCausalLM.from_pretrained(tiny("gpt2"), dtype=torch.float32)
    assert bundle.model.lm_head.weight is bundle.model.transformer.wte.weight
    made = quantize(bundle, QuantizeSettings(embeddings=None), context(tmp_path))
    assert len(made.quantized) == 4 * 4
    assert not [name for name in made.quantized if "wte" in name or "lm_head" in name]


@pytest.mark.parametrize(
    "settings",
    [
        QuantizeSettings(bits=4),
        QuantizeSettings(bits=2, scheme="asymmetric"),
        QuantizeSettings(bits=1, scheme="binary"),
    ],
)
@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
def test_pruned_weights_stay_zero(tiny: Tiny, tmp_path: Path, settings: QuantizeSettings, model_type: str) -> None:
    bundle = sparsified(opened(tiny, model_type))
    zeros = {name: bundle.model.get_parameter(name).detach() == 0 for name in bundle.sparse}
    made = quantize(bundle, settings, context(tmp_path))
    for name, zero in zeros.items():
        assert (made.model.get_parameter(name)[zero] == 0).all(), name
        assert made.quantized[name].mask is not None
        if settings.scheme == "binary":
            assert (made.model.get_parameter(name)[~zero] != 0).all(), name


def test_refusals_leave_the_model_alone(tiny: Tiny, tmp_path: Path) -> None:
    bundle = opened(tiny)
    before = {name: tensor.clone() for name, tensor in bundle.model.state_dict().items()}

    def refusal(settings: QuantizeSettings) -> str:
        with pytest.raises(StepError) as caught:
            quantize(bundle, settings, context(tmp_path))
        for name, tensor in bundle.model.state_dict().items():
            assert torch.equal(tensor.nan_to_num(), before[name]), name
        return str(caught.value)

    grouped = QuantizeSettings(bits=4, granularity="group", group_size=24, activations="none")
    assert refusal(grouped) == (
        "expected a group_size that divides the 32 inputs of bert.encoder.layer.0.attention.self.query, got 24; "
        "such as 16, or skip this layer"
    )
    assert "got 'clasifier*', which fits none" in refusal(QuantizeSettings(skip=("clasifier*",)))
    assert "expected something to quantize" in refusal(QuantizeSettings(skip=("*",)))
    weight = bundle.model.get_parameter("bert.encoder.layer.2.intermediate.dense.weight")
    with torch.no_grad():
        weight[3, 4] = float("nan")
    before["bert.encoder.layer.2.intermediate.dense.weight"] = weight.detach().nan_to_num().clone()
    assert "expected finite weights in bert.encoder.layer.2.intermediate.dense, got NaN or inf" in refusal(
        QuantizeSettings()
    )


def test_once_only(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(opened(tiny), QuantizeSettings(), context(tmp_path))
    with pytest.raises(StepError, match="expected a model in float, got one already quantized"):
        quantize(made, QuantizeSettings(), context(tmp_path))


def test_simulated_activations_equal_integer_kernels(tiny: Tiny, tmp_path: Path) -> None:
    """One linear of the model against onnxruntime's DynamicQuantizeLinear and MatMulInteger with our integers."""
    made = quantize(opened(tiny), QuantizeSettings(scheme="symmetric"), context(tmp_path))
    name = "bert.encoder.layer.1.output.dense"
    linear = made.model.get_submodule(name)
    assert isinstance(linear, nn.Linear)
    codes = made.quantized[f"{name}.weight"]
    integers = (codes.codes.to(torch.int16) - 128).to(torch.int8).numpy().T
    value = torch.randn(3, 7, 64, generator=torch.Generator().manual_seed(0)) + 0.2
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
        helper.make_node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["s", "ws"], ["scale"]),
        helper.make_node("Mul", ["f", "scale"], ["p"]),
        helper.make_node("Add", ["p", "b"], ["y"]),
    ]
    constants = {"w": integers, "ws": codes.scale[:, 0].numpy(), "b": linear.bias.detach().numpy()}
    graph = helper.make_graph(
        nodes,
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 7, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 7, 32])],
        [numpy_helper.from_array(np.ascontiguousarray(array), key) for key, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = session.run(None, {"x": value.numpy()})[0]
    with torch.no_grad():
        plain = linear(value)
        with simulate(made):
            rounded = linear(value)
        assert torch.equal(linear(value), plain)  # nothing is left behind
        assert torch.equal(rounded, linear(fake_quantize(value)))
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=1e-4, atol=1e-5 * float(np.abs(expected).max()))
    assert np.abs(plain.numpy() - expected).max() > 100 * np.abs(rounded.numpy() - expected).max()


def test_nothing_is_simulated_without_dynamic_activations(tiny: Tiny, tmp_path: Path) -> None:
    made = quantize(opened(tiny), QuantizeSettings(activations="none"), context(tmp_path))
    before = outputs(made)
    with simulate(made):
        assert torch.equal(outputs(made), before)
    made.activations = "dynamic"
    with simulate(made):
        assert not torch.equal(outputs(made), before)


def test_the_real_model_at_8_bits(minilm: Path, tmp_path: Path) -> None:
    """Weights alone at 8 bits per channel barely move a real encoder's vectors; its file is a quarter of float32."""
    task = task_named("embedding")
    bundle = load(minilm, task)
    arrays = bundle.encoder.examples(SENTENCES).batch(range(len(SENTENCES)), bundle.encoder.pad)
    inputs = {name: torch.from_numpy(array) for name, array in arrays.items()}
    with torch.no_grad():
        before = task.answer(bundle.model(**inputs), inputs)
        made = quantize(bundle, QuantizeSettings(), replace(context(tmp_path), task=task))
        weights = task.answer(made.model(**inputs), inputs)
        with simulate(made):
            dynamic = task.answer(made.model(**inputs), inputs)
    assert (before * weights).sum(-1).min() > 0.999
    assert (before * dynamic).sum(-1).mean() > 0.98
    save(made, tmp_path / "a")
    assert (tmp_path / "a" / "model.safetensors").stat().st_size < 0.27 * (minilm / "model.safetensors").stat().st_size


def test_biases_that_were_trained_are_not_corrected() -> None:
    with pytest.raises(SettingsError, match="bias_correction goes with weights that were not trained"):
        QuantizeSettings.read({"method": "train", "bias_correction": True}, "quantize")
