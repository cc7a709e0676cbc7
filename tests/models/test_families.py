"""Every path and attribute that a row names is there in the model that transformers builds."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification

import tiny as tiny_models
from flyweight.errors import ModelError
from flyweight.models import surgery
from flyweight.models.families import FAMILIES, family_of


@pytest.fixture(params=sorted(FAMILIES))
def model_type(request):
    return request.param


def test_table_and_tiny_models_cover_the_same_families():
    assert set(FAMILIES) == set(tiny_models.FAMILIES)
    assert all(name == row.model_type for name, row in FAMILIES.items())


def test_paths_and_attributes_exist(tiny, model_type):
    model = AutoModel.from_pretrained(tiny(model_type))
    family = family_of(model.config)
    assert type(model).base_model_prefix == family.base
    for name, stack in surgery.stacks(model, family).items():
        modules = surgery.blocks(model, family)[name]
        assert len(modules) == getattr(model.config, stack.layers_key)
        for block in modules:
            for attention in stack.attention:
                module = block.get_submodule(attention.module)
                units, query, size = surgery.layout(block, attention)
                heads = getattr(model.config, stack.heads_key)
                assert (units * query, size) == (32, 8)
                assert units * (query // size) == heads
                if stack.kv_heads_key:
                    assert units == getattr(model.config, stack.kv_heads_key)
                assert all(getattr(module, count) == heads for count in attention.counts)
                assert all(getattr(module, width) == 32 for width in attention.widths)
            ups, down = surgery.mlp_linears(block, stack)
            neurons = getattr(model.config, stack.neurons_key)
            assert all(surgery.weight_2d(up).shape == (neurons, 32) for up in ups)
            assert surgery.weight_2d(down).shape == (32, neurons)


def test_norms_feed_linears_of_their_width(tiny, model_type):
    """What a norm feeds reads exactly the norm's output: hooks see the very same tensor (or its neighbour block's)."""
    model = AutoModel.from_pretrained(tiny(model_type)).eval()
    family = family_of(model.config)
    given, taken = {}, {}
    watched = []
    for name, modules in surgery.blocks(model, family).items():
        stack = surgery.stacks(model, family)[name]
        for number, block in enumerate(modules):
            for norm, fed in stack.norms.items():
                source = block.get_submodule(norm)
                source.register_forward_hook(lambda m, args, out: given.__setitem__(m, out))
                for path in fed:
                    target = modules[number + 1] if path.startswith("next:") and number + 1 < len(modules) else block
                    if path.startswith("next:") and target is block:
                        continue
                    path = path.removeprefix("next:")
                    if dict(target.named_modules()).get(path) is None:
                        assert "wi" in path  # T5's two forms of the MLP
                        continue
                    linear = target.get_submodule(path)
                    linear.register_forward_pre_hook(lambda m, args: taken.__setitem__(m, args[0]))
                    watched.append((source, linear, path))
    ids = torch.tensor([[3, 9, 10, 11, 12]])
    decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        model(input_ids=ids, **decoder)
    assert watched
    for source, linear, path in watched:
        assert torch.equal(given[source].view(-1), taken[linear].reshape(-1)), path


def test_every_block_linear_is_found_once(tiny, model_type):
    model = AutoModel.from_pretrained(tiny(model_type))
    family = family_of(model.config)
    found = surgery.linears(model, family)
    named = dict(model.named_modules())
    assert all(named[name] is module for name, module in found.items())
    prefixes = tuple(f"{stack.blocks}." for stack in family.stacks)
    two_dimensional = [
        name
        for name, module in named.items()
        if name.startswith(prefixes) and getattr(module, "weight", None) is not None and module.weight.ndim == 2
    ]
    assert set(found) == {name for name in two_dimensional if "relative_attention_bias" not in name}


@pytest.mark.parametrize("model_type", tiny_models.CLASSIFIERS)
def test_heads_and_embeddings(tiny, model_type):
    model = AutoModelForSequenceClassification.from_pretrained(tiny(model_type, labels=("negative", "positive")))
    family = family_of(model.config)
    prefix, base = surgery.base_of(model, family)
    assert prefix == f"{family.base}."
    head = family.heads["text-classification"]
    parts = {name.split(".")[0] for name, _ in model.named_parameters()}
    assert parts == {family.base, *head}
    tables = surgery.embeddings(model, family)
    assert model.get_input_embeddings() in tables.values()
    assert all(dict(model.named_modules())[name] is module for name, module in tables.items())
    if family.embedding_projection:
        assert base.get_submodule(family.embedding_projection).weight.shape == (32, 16)


@pytest.mark.parametrize("model_type", ["roberta", "mpnet"])
def test_position_offset(tiny, model_type):
    """The longest input is the table's length less the offset: one token more has no position."""
    model = AutoModel.from_pretrained(tiny(model_type))
    offset = family_of(model.config).position_offset
    longest = model.config.max_position_embeddings - offset
    model(input_ids=torch.full((1, longest), 9))
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, longest + 1), 9))


def test_unknown_family_lists_the_known():
    with pytest.raises(ModelError, match=r"'distilbrt' \(did you mean 'distilbert'\?\); known: bert, .*marian"):
        family_of(SimpleNamespace(model_type="distilbrt"))


def test_inputs_are_arguments_of_the_model(tiny, model_type):
    import inspect

    model = AutoModel.from_config(AutoConfig.from_pretrained(tiny(model_type)))
    assert set(family_of(model.config).inputs) <= set(inspect.signature(model.forward).parameters)
