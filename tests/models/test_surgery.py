"""What is cut away changes the outputs exactly as if it had been silenced, and what is left reloads."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModel

import tiny as tiny_models
from flyweight.artifact import BlockShape
from flyweight.errors import ModelError, StepError
from flyweight.models import shared_bias, surgery
from flyweight.models.bundle import Bundle
from flyweight.models.families import family_of
from surgery_cases import close, differs, outputs, rebuilt

# one plain T5 and one with a gated MLP, one Llama with biases
VARIANTS = {
    **{name: (name, {}) for name in tiny_models.FAMILIES},
    "t5-gated": ("t5", {"feed_forward_proj": "gated-gelu"}),
    "llama-biased": ("llama", {"attention_bias": True, "mlp_bias": True}),
}


@pytest.fixture(params=sorted(VARIANTS))
def make(request, tiny):
    """A function that gives a fresh model of one family, always with the same weights."""
    name, changes = VARIANTS[request.param]
    return lambda: AutoModel.from_pretrained(tiny(name, **changes)).eval()


def silence_head(block, attention, unit):
    """Zero the columns of o that read this unit's output."""
    _, query, _ = surgery.layout(block, attention)
    columns = surgery.weight_2d(block.get_submodule(attention.o))
    columns.data[:, unit * query : (unit + 1) * query] = 0


def silence_block(block, stack):
    """Attention and MLP add nothing any more: with norms before them the block is then the identity."""
    for linear in [block.get_submodule(attention.o) for attention in stack.attention] + [
        surgery.mlp_linears(block, stack)[1]
    ]:
        linear.weight.data.zero_()
        if linear.bias is not None:
            linear.bias.data.zero_()


def attentions(model, family):
    for name, stack in surgery.stacks(model, family).items():
        for number in range(len(stack.attention)):
            yield name, stack, number


def test_head_removed_is_head_silenced(make):
    whole = outputs(make())
    family = family_of(make().config)
    for name, stack, number in attentions(make(), family):
        attention = stack.attention[number]
        cut, silenced = make(), make()
        block = surgery.blocks(silenced, family)[name][1]
        units = surgery.layout(block, attention).units
        for gone in (0, units - 1):
            cut, silenced = make(), make()
            silence_head(surgery.blocks(silenced, family)[name][1], attention, gone)
            keep = [unit for unit in range(units) if unit != gone]
            surgery.keep_heads(cut, family, name, 1, number, keep)
            close(outputs(cut), outputs(silenced))
            differs(outputs(cut), whole)
            left = surgery.blocks(cut, family)[name][1]
            assert surgery.layout(left, attention).units == units - 1
            assert surgery.kept_heads(left, attention) == tuple(keep)
            before, after = (sum(p.numel() for p in m.parameters()) for m in (silenced, cut))
            assert after < before


def test_every_block_with_other_heads_and_twice(make):
    """Blocks keep different heads, then lose more: numbers compose and the shared bias follows."""
    cut, silenced = make(), make()
    family = family_of(cut.config)
    for name, stack, number in attentions(cut, family):
        attention = stack.attention[number]
        for index, block in enumerate(surgery.blocks(silenced, family)[name]):
            units = surgery.layout(block, attention).units
            first = [unit for unit in range(units) if unit != index % units]
            second = first if index == 0 or len(first) < 2 else first[1:]
            surgery.keep_heads(cut, family, name, index, number, first)
            surgery.keep_heads(cut, family, name, index, number, [first.index(unit) for unit in second])
            for unit in set(range(units)) - set(second):
                silence_head(block, attention, unit)
            assert surgery.kept_heads(surgery.blocks(cut, family)[name][index], attention) == tuple(second)
    close(outputs(cut), outputs(silenced))
    close(outputs(copy.deepcopy(cut)), outputs(silenced))
    # one of the tiny Llama's two units in every block: other ones, but equally many, and nothing is shared
    assert surgery.sync_config(cut, family) is (family.model_type == "llama")
    close(outputs(rebuilt(cut, family)), outputs(silenced))


def test_neurons_removed_are_neurons_silenced(make):
    family = family_of(make().config)
    for name, stack in surgery.stacks(make(), family).items():
        cut, silenced = make(), make()
        gone = {0, 7, 63}
        _, down = surgery.mlp_linears(surgery.blocks(silenced, family)[name][2], stack)
        for neuron in gone:
            surgery.weight_2d(down).data[:, neuron] = 0
        surgery.keep_neurons(cut, family, name, 2, [neuron for neuron in range(64) if neuron not in gone])
        close(outputs(cut), outputs(silenced))
        differs(outputs(cut), outputs(make()))
        assert [shape.neurons for shape in surgery.shapes(cut, family)[name]][:3] == [64, 64, 61]
        assert surgery.sync_config(cut, family) is False
        close(outputs(rebuilt(cut, family)), outputs(silenced))


def test_layer_removed_is_layer_skipped(make):
    """With norms after the sum a skipped block is replaced by the identity; with norms before, silencing does it."""
    family = family_of(make().config)
    before = family.model_type in ("llama", "gpt2", "t5")
    for name, stack in surgery.stacks(make(), family).items():
        for gone in (0, 1, 2):
            cut, skipped = make(), make()
            block = surgery.blocks(skipped, family)[name][gone]
            if before:
                silence_block(block, stack)
            else:
                block.forward = lambda hidden, *args, **kwargs: hidden if family.model_type != "mpnet" else (hidden,)
            keep = [i for i in range(len(surgery.blocks(cut, family)[name])) if i != gone]
            surgery.keep_layers(cut, family, {name: keep})
            close(outputs(cut), outputs(skipped))
            differs(outputs(cut), outputs(make()))
            assert surgery.sync_config(cut, family) is True
            assert getattr(cut.config, stack.layers_key) == len(keep)


def test_plain_folder_reloads_without_flyweight(make, tmp_path):
    """Layers and neurons alike in all blocks: AutoModel builds the very same model from config.json alone."""
    model = make()
    family = family_of(model.config)
    for name, modules in surgery.blocks(model, family).items():
        surgery.keep_layers(model, family, {name: [1, 2]})
        for number in range(len(modules)):
            surgery.keep_neurons(model, family, name, number, range(number, 48 + number))
    assert surgery.sync_config(model, family) is True
    model.save_pretrained(tmp_path)
    again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    close(outputs(again.eval()), outputs(model))
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in make().parameters()) * 0.85


def test_heads_alike_are_plain_where_the_config_has_a_head_size(make, tmp_path):
    model = make()
    family = family_of(model.config)
    for name, stack, number in attentions(model, family):
        for index, block in enumerate(surgery.blocks(model, family)[name]):
            units = surgery.layout(block, stack.attention[number]).units
            surgery.keep_heads(model, family, name, index, number, range(units // 2, units))
    whole = outputs(model)
    plain = surgery.sync_config(model, family)
    assert plain is (family.model_type in ("llama", "t5"))
    model.save_pretrained(tmp_path)
    if plain:
        again, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        close(outputs(again.eval()), whole)
        # and a plain one can lose more, then needs its manifest, and gets it right
        for name, stack, number in attentions(model, family):
            block = surgery.blocks(model, family)[name][1]
            if surgery.layout(block, stack.attention[number]).units > 1:
                surgery.keep_heads(model, family, name, 1, number, [1])
                assert surgery.kept_heads(block, stack.attention[number]) == (3,)
        if family.model_type == "t5":
            assert surgery.sync_config(model, family) is False
    close(outputs(rebuilt(model, family)), outputs(model))


def test_numbers_of_heads_that_the_config_class_refuses_are_not_plain(tiny):
    """Llama's config wants the hidden size to be a multiple of the number of heads."""
    model = AutoModel.from_pretrained(tiny("llama", num_key_value_heads=4)).eval()
    family = family_of(model.config)
    for block in range(4):
        surgery.keep_heads(model, family, "decoder", block, 0, [0, 1, 3])
    assert surgery.sync_config(model, family) is False
    assert model.config.num_attention_heads == 4
    close(outputs(rebuilt(model, family)), outputs(model))


@pytest.mark.parametrize("name", ["mpnet", "t5"])
def test_shared_bias_keeps_only_columns_in_use(tiny, name):
    model = AutoModel.from_pretrained(tiny(name)).eval()
    family = family_of(model.config)
    count = len(surgery.blocks(model, family)["encoder"])
    for block in range(count):
        surgery.keep_heads(model, family, "encoder", block, 0, [1, 2] if block else [1, 3])
    _, base = surgery.base_of(model, family)
    table = shared_bias.table_of(base, family.stacks[0], surgery.blocks(model, family)["encoder"])
    assert table.weight.shape[1] == table.embedding_dim == 3
    surgery.keep_layers(model, family, {"encoder": range(1, count)})
    table = shared_bias.table_of(base, family.stacks[0], surgery.blocks(model, family)["encoder"])
    assert table.weight.shape[1] == 2
    assert not any(shared_bias.is_sliced(module) for module in model.modules())


@pytest.mark.parametrize("name", ["mpnet", "t5"])
def test_sliced_bias_trains(tiny, name):
    """Gradients reach the columns of the table through the slices, as they do in the silenced model."""
    cut, silenced = (AutoModel.from_pretrained(tiny(name)).eval() for _ in range(2))
    family = family_of(cut.config)
    for block, unit in ((0, 1), (1, 3)):
        surgery.keep_heads(cut, family, "encoder", block, 0, [u for u in range(4) if u != unit])
        silence_head(surgery.blocks(silenced, family)["encoder"][block], family.stacks[0].attention[0], unit)
    ids = torch.tensor([[3, 9, 10, 11, 12, 40]])
    grads = []
    for model in (cut, silenced):
        decoder = {"decoder_input_ids": ids} if name == "t5" else {}
        model(input_ids=ids, **decoder).last_hidden_state.square().mean().backward()
        _, base = surgery.base_of(model, family)
        table = shared_bias.table_of(base, family.stacks[0], surgery.blocks(model, family)["encoder"])
        grads.append(table.weight.grad)
    assert grads[0].abs().max() > 1e-6
    close(grads[0], grads[1])


def test_caches_and_hidden_states_follow_removed_layers(tiny):
    for name, stack in (("llama", "decoder"), ("gpt2", "decoder"), ("t5", "decoder"), ("marian", "decoder")):
        model = AutoModel.from_pretrained(tiny(name)).eval()
        family = family_of(model.config)
        surgery.keep_layers(model, family, {stack: [1, 2]})
        surgery.keep_heads(model, family, stack, 0, 0, [1])
        ids = torch.tensor([[3, 9, 10, 11]])
        key, fixed = ("input_ids", {}) if name in ("llama", "gpt2") else ("decoder_input_ids", {"input_ids": ids})
        with torch.no_grad():
            at_once = model(**{key: ids}, **fixed, use_cache=False).last_hidden_state
            first = model(**{key: ids[:, :3]}, **fixed, use_cache=True)
            then = model(**{key: ids[:, 3:]}, **fixed, use_cache=True, past_key_values=first.past_key_values)
        close(then.last_hidden_state[:, -1], at_once[:, -1])


@pytest.mark.parametrize("name", tiny_models.ENCODERS)
def test_hidden_states_after_cut_and_copy(tiny, name):
    model = AutoModel.from_pretrained(tiny(name)).eval()
    surgery.keep_layers(model, family_of(model.config), {"encoder": [0, 3]})
    for some in (model, copy.deepcopy(model)):
        found = some(input_ids=torch.tensor([[3, 9, 10]]), output_hidden_states=True)
        assert len(found.hidden_states) == 3
        close(found.hidden_states[-1], found.last_hidden_state)


def test_nothing_left_is_refused(make):
    model = make()
    family = family_of(model.config)
    name = next(iter(surgery.stacks(model, family)))
    if family.model_type == "gpt2":  # whose Conv1D cannot read nothing
        with pytest.raises(
            StepError, match=r"at least one head kept in block 1 of the decoder, got none; lower the amount"
        ):
            surgery.keep_heads(model, family, name, 1, 0, [])
        with pytest.raises(StepError, match="at least one neuron kept"):
            surgery.keep_neurons(model, family, name, 0, [])
    with pytest.raises(StepError, match="at least one layer kept"):
        surgery.keep_layers(model, family, {name: []})
    for wrong in ([0, 9], [1, 0], [0, 0], [-1]):
        with pytest.raises(StepError, match="ascending"):
            surgery.keep_layers(model, family, {name: wrong})
    with pytest.raises(StepError, match="stacks among"):
        surgery.keep_layers(model, family, {"middle": [0]})
    close(outputs(model), outputs(make()))


def test_reshape_refuses_more_than_the_config_builds(make):
    model = make()
    family = family_of(model.config)
    shapes = surgery.shapes(model, family)
    name = next(iter(shapes))
    for wrong, what in (
        ((*shapes[name], shapes[name][0]), "layers"),
        ((BlockShape(heads=shapes[name][0].heads, neurons=65), *shapes[name][1:]), "neurons"),
        ((BlockShape(heads=((0, 1, 2, 3, 4),) * len(shapes[name][0].heads), neurons=64), *shapes[name][1:]), "heads"),
    ):
        with pytest.raises(ModelError, match=f"at least .* {what}"):
            surgery.reshape(make(), family, {**shapes, name: wrong})
    with pytest.raises(ModelError, match="shapes of"):
        surgery.reshape(make(), family, {"middle": shapes[name]})


def test_names_of_sparse_weights_follow_layers(make):
    model = make()
    family = family_of(model.config)
    names = list(surgery.linears(model, family))
    weights = {f"{name}.weight": model.get_parameter(f"{name}.weight").detach().clone() for name in names}
    model_names = dict.fromkeys([*weights, "pooler.dense.weight"], "unstructured")
    bundle = Bundle(model, SimpleNamespace(), family, "embedding", SimpleNamespace(), sparse=model_names)
    stack = next(iter(surgery.stacks(model, family).values()))
    surgery.keep_layers_of(bundle, {stack.name: [0, 2]})
    assert set(bundle.sparse) == {f"{name}.weight" for name in surgery.linears(model, family)} | {"pooler.dense.weight"}
    for name in surgery.linears(model, family):
        old = name.replace(f"{stack.blocks}.1.", f"{stack.blocks}.2.")
        assert torch.equal(model.get_parameter(f"{name}.weight"), weights[f"{old}.weight"])


@pytest.mark.parametrize("name", ["mpnet", "bert", "t5"])
def test_cut_models_export(tiny, name):
    """torch.export keeps the slices of the shared bias as ordinary gathers and lets batch and length vary."""
    model = AutoModel.from_pretrained(tiny(name)).eval()
    family = family_of(model.config)
    for block in range(3):
        surgery.keep_heads(model, family, "encoder", block, 0, [unit for unit in range(4) if unit != block])
    batch, length = torch.export.Dim("batch", min=2, max=8), torch.export.Dim("length", min=2, max=32)
    ids = torch.randint(3, 100, (2, 7))

    class Wrapper(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids, attention_mask):
            decoder = {"decoder_input_ids": input_ids} if name == "t5" else {}
            return self.model(input_ids=input_ids, attention_mask=attention_mask, **decoder).last_hidden_state

    shape = {0: batch, 1: length}
    exported = torch.export.export(
        Wrapper(), (ids, torch.ones_like(ids)), dynamic_shapes=(shape, shape), strict=False
    ).module()
    other = torch.randint(3, 100, (3, 11))
    with torch.no_grad():
        close(exported(other, torch.ones_like(other)), Wrapper()(other, torch.ones_like(other)))
    assert not any("flyweight_whole_bias" in module.__dict__ for module in model.modules())
