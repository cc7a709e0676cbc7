"""The walk over blocks: what it hands out is what the whole model computes."""

from __future__ import annotations

import pytest
import torch

import tiny
from flyweight.calibration import Site, calibrate, walk
from flyweight.errors import StepError
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.models.load import load
from flyweight.tasks import task_named


@pytest.fixture(params=tiny.FAMILIES)
def bundle(request, tmp_path) -> Bundle:
    return load(str(tiny.write(tmp_path, request.param)), task_named("embedding"))


def texts(bundle: Bundle):
    return bundle.encoder._replace(truncate=True).examples(tiny.SENTENCES)


def last_inputs(bundle, examples, module):
    """What `module` reads when the whole model runs text by text: the slow, obvious way."""
    found = []
    hook = module.register_forward_pre_hook(lambda _, given: found.append(given[0].detach().flatten(0, -2)))
    order = examples.lengths.argsort(kind="stable")
    with torch.no_grad():
        for i in order:
            arrays = {k: torch.from_numpy(v) for k, v in examples.batch([i], bundle.encoder.pad).items()}
            named = {k: arrays[k] for k in bundle.family.inputs if k in arrays}
            if bundle.model.config.is_encoder_decoder:
                named["decoder_input_ids"] = arrays["input_ids"]
            bundle.model.eval()(**named)
    hook.remove()
    return torch.cat(found)


def test_streams_what_the_whole_model_computes(bundle):
    examples = texts(bundle)
    visited = []
    for block in walk(bundle, examples, wanted=True):
        visited.append(block.name)
        for site in block.sites:
            for module in site.linears.values():
                given = torch.cat(list(block.stream(site)))
                assert torch.allclose(given, last_inputs(bundle, examples, module), atol=2e-5), site.name
        for batch, hidden in enumerate(block.inputs):
            assert torch.allclose(block.run(batch), block.wanted[batch], atol=1e-5)
            assert hidden is block.inputs[batch]
    names = {id(m): n for n, m in bundle.model.named_modules()}
    assert visited == [names[id(b)] for bs in surgery.blocks(bundle.model, bundle.family).values() for b in bs]


def test_sites_hold_every_linear_once_and_share_inputs(bundle):
    found = [name for block in walk(bundle, texts(bundle)) for site in block.sites for name in site.linears]
    assert sorted(found) == sorted(surgery.linears(bundle.model, bundle.family))
    first = next(iter(walk(bundle, texts(bundle))))
    attention = surgery.stacks(bundle.model, bundle.family)[first.stack].attention[0]
    wanted = [f"{first.name}.{path}" for path in dict.fromkeys((attention.q, attention.k, attention.v))]
    assert sorted(first.sites[0].linears) == sorted(wanted)


def test_later_blocks_see_changed_weights_and_wanted_stays_that_of_the_float_model(bundle):
    examples = texts(bundle)
    untouched = [[one.clone() for one in block.wanted] for block in walk(bundle, examples, wanted=True)]
    stack = next(iter(surgery.blocks(bundle.model, bundle.family)))
    for i, block in enumerate(walk(bundle, examples, wanted=True)):
        if block.stack == stack:
            assert all(torch.equal(a, b) for a, b in zip(block.wanted, untouched[i], strict=True))
        if block.number:
            assert not torch.allclose(block.inputs[0], untouched[i - 1][0])
        with torch.no_grad():
            for site in block.sites:
                for module in site.linears.values():
                    module.weight.mul_(0.9)


def test_solver_sees_errors_of_earlier_sites(tmp_path):
    bundle = load(str(tiny.write(tmp_path, "bert")), task_named("embedding"))
    order: list[str] = []
    sums: dict[str, float] = {}

    class Doubling:
        def make(self, site: Site) -> list[float]:
            order.append(site.name)
            return []

        def accumulate(self, state: list[float], inputs: torch.Tensor) -> None:
            assert inputs.ndim == 2
            assert inputs.dtype == torch.float32
            state.append(float(inputs.abs().sum()))

        def solve(self, site: Site, state: list[float]) -> None:
            sums[site.name] = sum(state)
            with torch.no_grad():
                for module in site.linears.values():
                    module.weight.mul_(2)

    down = "encoder.layer.0.output.dense"
    before = float(last_inputs(bundle, texts(bundle), bundle.model.get_submodule(down)).abs().sum())
    calibrate(bundle, texts(bundle), Doubling())
    assert order[:4] == [
        f"encoder.layer.0.{p}"
        for p in ("attention.self.query", "attention.output.dense", "intermediate.dense", "output.dense")
    ]
    assert sums[down] > 1.2 * before


def test_mode_is_put_back_and_bad_input_is_named(tmp_path):
    bundle = load(str(tiny.write(tmp_path, "bert")), task_named("embedding"))
    bundle.model.train()
    blocks = walk(bundle, texts(bundle))
    next(blocks)
    blocks.close()
    assert bundle.model.training
    with pytest.raises(StepError, match="texts to calibrate on"):
        next(walk(bundle, texts(bundle).take([])))
    with torch.no_grad():
        bundle.model.encoder.layer[1].output.dense.weight[0, 0] = float("nan")
    with pytest.raises(StepError, match=r"encoder\.layer\.1"):
        list(walk(bundle, texts(bundle)))


def test_a_visitor_who_knows_the_answers_spares_the_walk_a_pass(tmp_path):
    bundle = load(str(tiny.write(tmp_path, "mpnet")), task_named("embedding"))
    examples = texts(bundle)
    plain = [[one.clone() for one in block.inputs] for block in walk(bundle, examples)]
    passes, hooks = [], []
    for i, block in enumerate(walk(bundle, examples)):
        assert all(torch.equal(a, b) for a, b in zip(block.inputs, plain[i], strict=True))
        with torch.no_grad():
            block.outputs = [block.run(batch) for batch in range(len(block.inputs))]
        hooks.append(block.module.register_forward_hook(lambda *_, name=block.name: passes.append(name)))
    for hook in hooks:
        hook.remove()
    assert len(hooks) == 4
    assert not passes


def test_the_way_to_the_first_block_does_not_compute_the_others(bundle):
    lists = surgery.blocks(bundle.model, bundle.family)
    first = next(iter(lists.values()))
    computed = []
    linears = [m for block in first[1:] for m in block.modules() if isinstance(m, surgery.LINEARS)]
    hooks = [m.register_forward_hook(lambda *_: computed.append(1)) for m in linears]
    blocks = walk(bundle, texts(bundle))
    next(blocks)
    assert not computed
    blocks.close()
    for hook in hooks:
        hook.remove()
    assert not any("forward" in vars(module) for module in bundle.model.modules())
