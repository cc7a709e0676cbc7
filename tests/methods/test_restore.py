"""Making up for what went: the solves against plain least squares over tokens, the walk against whole blocks of every family."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

import tiny as folders
from flyweight.calibration import walk
from flyweight.context import Context
from flyweight.errors import StepError
from flyweight.methods.prune import rebuild as rebuilding
from flyweight.methods.prune import restore as restoring
from flyweight.methods.prune import structured
from flyweight.methods.prune.refit import LARGEST, Lack, factors, refitted
from flyweight.methods.prune.restore import restore
from flyweight.methods.prune.scores import groups, magnitude
from flyweight.models import surgery
from flyweight.settings import PruneSettings
from flyweight.tasks import task_named
from training_cases import open_bundle

TINY = 1e-9


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gathered(reads, lacks, biased):
    lack = Lack.none(torch.zeros(lacks.shape[1], reads.shape[1]), biased)
    for part in range(3):
        lack.add(reads[part::3], lacks[part::3])
    return lack


# the solves


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("damping", [TINY, 0.1])
def test_linear_is_ridge_regression_over_tokens(biased, damping):
    """Against augmented rows: sqrt(l) more of each input, and none of the bias."""
    reads, lacks = some(50, 6) + 0.5, some(50, 4, seed=1)
    lack = gathered(reads, lacks, biased)
    wide = torch.cat([reads, torch.ones(50, 1, dtype=torch.float64)], 1) if biased else reads
    ridge = (damping * reads.square().sum(0).mean()).sqrt() * torch.eye(6, wide.shape[1], dtype=torch.float64)
    expected = torch.linalg.lstsq(
        torch.cat([wide, ridge]), torch.cat([lacks, torch.zeros(6, 4, dtype=torch.float64)])
    ).solution.t()
    found = refitted(lack, damping, "layer")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lack.left(found), (lacks - wide @ found.t()).square().sum(0))
    assert bool((lack.left(found) < lack.squares).all())
    torch.testing.assert_close(lack.left(torch.zeros_like(found)), lacks.square().sum(0))


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("damping", [TINY, 0.1])
def test_factors_are_ridge_regression_on_what_each_unit_gives(size, damping):
    reads, weight = some(40, 6), some(5, 6, seed=1)
    lacks = 0.3 * some(40, 5, seed=2)
    units = 6 // size
    gives = torch.stack(
        [(p @ w.t()).flatten() for p, w in zip(reads.split(size, 1), weight.split(size, 1), strict=True)], 1
    )
    ridge = damping * gives.square().sum(0).mean() * torch.eye(units, dtype=torch.float64)
    expected = 1 + torch.linalg.solve(gives.t() @ gives + ridge, gives.t() @ lacks.flatten())
    found = factors(gathered(reads, lacks, True), weight, size, damping, "layer")
    torch.testing.assert_close(found, expected)
    assert (found - 1).abs().max() > 1e-3


def test_factors_stay_within_ten_and_are_ones_where_cutting_them_off_would_hurt():
    reads = some(30, 2)
    weight = torch.eye(2, dtype=torch.float64)
    found = factors(gathered(reads, 100 * reads * torch.tensor([1.0, 0]), False), weight, 1, TINY, "layer")
    torch.testing.assert_close(found, torch.tensor([LARGEST, 1.0], dtype=torch.float64), atol=1e-6, rtol=0)
    near = torch.stack([reads[:, 0], reads[:, 0] + 1e-3 * reads[:, 1]], 1)  # 0 = 1000 x (second - first) but for a bit
    found = factors(
        gathered(near, reads[:, 1:] @ torch.ones(1, 2).double(), False), torch.ones(2, 2).double(), 1, 1e-12, "x"
    )
    lack = gathered(near, reads[:, 1:] @ torch.ones(1, 2).double(), False)
    assert lack.left(torch.ones(2, 2).double() * (found - 1)).sum() <= lack.squares.sum()


def test_removed_inputs_that_are_sums_of_kept_ones_are_made_up_for_exactly():
    kept, weight = some(60, 5), some(4, 7, seed=1)
    reads = torch.cat([kept, kept @ some(5, 1, seed=2), (kept @ some(5, 1, seed=3)) + 2.0], 1)
    outputs = reads @ weight.t()
    lack = gathered(kept, outputs - kept @ weight[:, :5].t(), True)
    change = refitted(lack, 1e-12, "layer")
    assert bool((lack.left(change) / lack.squares < 1e-9).all())
    fitted = kept @ (weight[:, :5] + change[:, :5]).t() + change[:, 5]
    torch.testing.assert_close(fitted, outputs, atol=1e-5, rtol=1e-5)


def test_inputs_that_are_always_zero_leave_the_damping_of_the_others_as_it_is():
    """As in `flyweight.hessian`: the mean is that of live inputs, so a linear with units that never fire is damped no less."""
    reads, lacks = some(50, 4), some(50, 3, seed=1)
    wide = torch.cat([reads, torch.zeros(50, 12, dtype=torch.float64)], 1)
    for biased in (True, False):
        alone, beside = (refitted(gathered(one, lacks, biased), 0.3, "x") for one in (reads, wide))
        torch.testing.assert_close(beside[:, :4], alone[:, :4])
        assert not beside[:, 4:16].any()


def test_a_singular_matrix_is_damped_more_and_one_that_stays_so_is_named():
    reads = some(30, 1).repeat(1, 3) * torch.tensor([1.0, 1e8, 1e-8])
    assert bool(torch.isfinite(refitted(gathered(reads, some(30, 2, seed=1), False), 1e-17, "x")).all())
    negative = gathered(some(30, 3), some(30, 2), False)
    negative.gram.neg_()
    with pytest.raises(
        StepError, match=r"a positive definite Hessian of the inputs of block 3, got none up to damping 10;"
    ):
        refitted(negative, 0.01, "block 3")


def test_dead_inputs_get_nothing_and_bad_ones_are_named():
    reads = some(20, 3)
    reads[:, 1] = 0
    found = refitted(gathered(reads, some(20, 2, seed=1), True), 0.01, "layer")
    assert found[:, 1].abs().max() == 0
    assert bool(torch.isfinite(refitted(gathered(0 * reads, some(20, 2), False), 0.01, "layer")).all())
    reads[0, 0] = torch.inf
    for solve in (
        lambda lack: refitted(lack, 0.01, "block 3"),
        lambda lack: factors(lack, some(2, 3), 1, 0.01, "block 3"),
    ):
        with pytest.raises(StepError, match="finite activations into block 3"):
            solve(gathered(reads, some(20, 2), False))


def test_damping_is_that_which_leaves_least_to_texts_held_back():
    """What holds beyond the texts is learned with little damping, what does not with more, and noise not at all."""
    reads, real = some(60, 30), some(30, 4, seed=1)
    far = some(500, 30, seed=2)
    noise, other = some(60, 4, seed=3), some(500, 4, seed=4)

    def chosen(share):
        used, judge = (
            gathered(reads, reads @ real + share * noise, False),
            gathered(far, far @ real + share * other, False),
        )
        tried = [torch.zeros_like(used.cross)]
        tried += [refitted(used, 0.01 * restoring.STEP**n, "x") for n in range(restoring.MORE)]
        for together in (False, True):
            found = restoring._best(refitted, used, judge, 0.01, "x", together)
            left = torch.stack([judge.left(one) for one in tried])
            if together:
                assert judge.left(found).sum() == pytest.approx(float(left.sum(1).min()))
            else:
                torch.testing.assert_close(judge.left(found), left.min(0).values)
        return int(left.sum(1).argmin()) - 1

    assert [chosen(share) for share in (0.01, 1.5, 3.0, 6.0)] == [0, 1, 2, 3]
    used, judge = gathered(reads, noise, False), gathered(far, other, False)
    assert not restoring._best(refitted, used, judge, 0.01, "x").any()
    assert torch.equal(restoring._best(refitted, used, used, 0.01, "x"), refitted(used, 0.01, "x"))


def test_an_eighth_of_the_texts_is_held_back_where_there_are_enough():
    sizes = [16, 16, 3, 16, 9, 1, 16, 16, 2, 16, 16]
    batches = [torch.zeros(size, 2) for size in sizes]
    held = restoring.held_back(batches, 0)
    assert held == restoring.held_back(batches, 0)
    assert len({tuple(restoring.held_back(batches, seed)) for seed in range(9)}) > 2
    for seed in range(9):
        count = sum(sizes[batch] for batch in restoring.held_back(batches, seed))
        assert sum(sizes) / 8 <= count < sum(sizes) / 8 + 16
    assert restoring.held_back(batches[:5], 0) == [0, 1, 2, 3, 4]
    assert restoring.held_back([torch.zeros(100, 2)], 0) == [0]
    assert len(restoring.held_back([torch.zeros(100, 2), torch.zeros(100, 2)], 0)) == 1


@pytest.mark.parametrize("way", ["masks", "linear", "block"])
def test_of_many_texts_some_are_held_back_and_judge(tiny, tmp_path, monkeypatch, way):
    monkeypatch.setattr(rebuilding, "STEPS", 16)
    monkeypatch.setattr(restoring, "FEW", 8)
    monkeypatch.setattr(restoring, "TOKENS", 40)
    dense = open_bundle(tiny("mpnet"), task="embedding")
    given = context(tmp_path, dense)
    bundle = cut_of(dense)
    told = restore(bundle, dense, settings(restore=way, damping=0.01), given)
    order = restoring.texts(settings(), given)
    for block, whole in zip(walk(bundle, order), walk(dense, order), strict=True):
        held = restoring.held_back(whole.inputs, 3)
        assert len(held) < len(whole.inputs)
        with torch.no_grad():
            pairs = [(block.run(i), whole.run(i)) for i in held]
        lost, power = (
            sum(float(x.square().sum()) for x in xs) for xs in ([a - b for a, b in pairs], [b for _, b in pairs])
        )
        assert list(told[block.name].values())[-1] == pytest.approx((lost / power) ** 0.5, rel=1e-3)
        steps = list(told[block.name].values())
        assert steps == sorted(steps, reverse=True)


# the walk


def context(tmp_path, bundle, **changes) -> Context:
    given = {
        "calibration": bundle.encoder._replace(truncate=True).examples(folders.SENTENCES),
        "device": "cpu",
        **changes,
    }
    return Context(
        task=task_named("embedding"),
        seed=3,
        work=tmp_path / "work",
        reference=lambda: None,
        load=lambda _: None,
        **given,
    )


def settings(**changes):
    return PruneSettings(**{"target": "heads+neurons", "amount": 0.25, "restore": "linear", "damping": 1e-4, **changes})


def cut_of(dense, target="heads+neurons", share=0.25):
    bundle = dense.copy()
    keep = structured.select(magnitude(bundle, target), share, "layer")
    structured.cut(bundle, target, keep)
    return bundle


def errors(bundle, dense, texts):
    """{block: relative error of its output} when the whole models run side by side."""
    found = {}
    for block, whole in zip(walk(bundle, texts), walk(dense, texts), strict=True):
        with torch.no_grad():
            pairs = [(block.run(i), whole.run(i)) for i in range(len(whole.inputs))]
        lost = sum(float((a - b).square().sum()) for a, b in pairs)
        found[block.name] = (lost / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5
    return found


@pytest.mark.parametrize("name", folders.FAMILIES)
def test_the_sum_is_the_linears_output_and_the_residual_stream(tiny, tmp_path, name):
    """In every family: what is added to a linear's output comes out in the sum, and a sum that is put right puts the block right."""
    bundle = open_bundle(tiny(name), task="embedding")
    texts = context(tmp_path, bundle).calibration
    for block in walk(bundle, texts):
        linears = restoring._readers(bundle, block, "heads+neurons")
        assert len(linears) == len(surgery.stacks(bundle.model, bundle.family)[block.stack].attention) + 1
        with restoring.watched(block, linears, bundle) as run:
            before = run(0)
            assert list(before.sums) == list(before.reads) == list(linears)
            torch.testing.assert_close(before.output, block.run(0))
            for group, (linear, _) in linears.items():
                shift = some(before.sums[group].shape[1]).float()
                handle = linear.register_forward_hook(lambda _, __, output, shift=shift: output + shift, prepend=True)
                after = run(0)
                handle.remove()
                torch.testing.assert_close(
                    after.sums[group] - before.sums[group], shift.expand_as(after.sums[group]), atol=1e-4, rtol=1e-4
                )
                assert not torch.allclose(after.output, before.output, atol=1e-3)
        # the residual is more than nothing: the sum is not the output alone
        group, (linear, _) = list(linears.items())[-1]
        with torch.no_grad():
            alone = linear(before.reads[group])
        assert not torch.allclose(alone, before.sums[group], atol=1e-2)


@pytest.mark.parametrize("way", ["masks", "linear", "block"])
@pytest.mark.parametrize("name", ["bert", "mpnet", "llama", "gpt2", "t5"])
def test_every_block_answers_nearer_to_the_dense_one(tiny, tmp_path, monkeypatch, name, way):
    monkeypatch.setattr(rebuilding, "STEPS", 16)
    dense = open_bundle(tiny(name), task="embedding")
    given = context(tmp_path, dense)
    untouched = {key: value.clone() for key, value in dense.model.state_dict().items()}
    bundle = cut_of(dense)
    start = errors(bundle, dense, given.calibration)
    told = restore(bundle, dense, settings(restore=way), given)
    after = errors(bundle, dense, given.calibration)
    assert all(torch.equal(value, untouched[key]) for key, value in dense.model.state_dict().items())
    for block, error in told.items():
        assert error["linear" if way == "block" else way] <= error["without"]
        assert list(error.values())[-1] == pytest.approx(after[block], rel=1e-3, abs=1e-5)
        assert ("block" in error) == (way == "block")
    decoder = [block for block in told if "decoder" not in block]
    assert sum(after[block] for block in decoder) < (0.99 if way == "masks" else 0.9) * sum(start[b] for b in decoder)
    first = next(iter(told))
    assert told[first]["without"] == pytest.approx(start[first], rel=1e-3)
    assert all(p.requires_grad and p.grad is None for p in bundle.model.parameters())


def by_hand(bundle, dense, texts, damping):
    """Blocks of BERT one after another, every token in one matrix: what `linear` has to come to."""
    for block, whole in zip(walk(bundle, texts), walk(dense, texts), strict=True):
        for path, norm in (
            ("attention.output.dense", "attention.output.LayerNorm"),
            ("output.dense", "output.LayerNorm"),
        ):
            found = []
            for one in (whole, block):
                kept: list[Mapping[str, torch.Tensor]] = []
                hooks = [
                    one.module.get_submodule(path).register_forward_pre_hook(
                        lambda _, x, kept=kept: kept.append(x[0].flatten(0, 1))
                    ),
                    one.module.get_submodule(norm).register_forward_pre_hook(
                        lambda _, x, kept=kept: kept.append(x[0].flatten(0, 1))
                    ),
                ]
                with torch.no_grad():
                    for i in range(len(one.inputs)):
                        one.run(i)
                for hook in hooks:
                    hook.remove()
                found.append((torch.cat(kept[::2]).double(), torch.cat(kept[1::2]).double()))
            (_, wanted), (reads, sums) = found
            linear = block.module.get_submodule(path)
            residual = sums - linear(reads.float()).detach().double()
            size = wanted.square().mean(1, keepdim=True).sqrt()  # a norm will divide by it
            wide = torch.cat([reads, torch.ones(len(reads), 1, dtype=torch.float64)], 1) / size
            reads = reads / size
            old = torch.cat([linear.weight, linear.bias[:, None]], 1).detach().double().t()
            ridge = torch.eye(wide.shape[1], dtype=torch.float64) * damping * reads.square().sum(0).mean()
            ridge[-1, -1] = 0
            # the best weights for (dense sum - this model's residual), damped towards those there were
            new = torch.linalg.solve(wide.t() @ wide + ridge, wide.t() @ ((wanted - residual) / size) + ridge @ old).t()
            with torch.no_grad():
                linear.weight.copy_(new[:, :-1])
                linear.bias.copy_(new[:, -1])


def test_linear_fits_each_sum_to_the_dense_models_block_after_block(tiny, tmp_path):
    dense = open_bundle(tiny("bert"), task="embedding")
    given = context(tmp_path, dense)
    found, expected = cut_of(dense), cut_of(dense)
    restore(found, dense, settings(damping=1e-2), given)
    by_hand(expected, dense, restoring.texts(settings(), given), 1e-2)
    for path, module in surgery.linears(found.model, found.family).items():
        other = expected.model.get_submodule(path)
        torch.testing.assert_close(module.weight, other.weight, atol=2e-3, rtol=2e-3)
        torch.testing.assert_close(module.bias, other.bias, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_units_whose_answers_the_kept_ones_hold_are_made_up_for(tiny, tmp_path, name):
    """A head and 16 neurons are copies of others in every block: without them the model answers as it did."""
    dense = open_bundle(tiny(name), task="embedding")
    keep = {}
    with torch.no_grad():
        for group in groups(dense, "heads+neurons"):
            row = surgery.stacks(dense.model, dense.family)[group.stack]
            block = surgery.blocks(dense.model, dense.family)[group.stack][group.block]
            if group.attention is None:
                makers, units = surgery.mlp_linears(block, row)[0], torch.arange(48, 64)
                others, keep[group] = units - 20, list(range(48))
            else:
                attention = row.attention[0]
                makers = [block.get_submodule(p) for p in dict.fromkeys((attention.q, attention.k, attention.v))]
                parts = torch.arange(3 if attention.fused else 1)[:, None] * 32
                units, others, keep[group] = (
                    (parts + torch.arange(24, 32)).flatten(),
                    (parts + torch.arange(8)).flatten(),
                    [0, 1, 2],
                )
            for maker in makers:
                surgery.weight_2d(maker)[units] = surgery.weight_2d(maker)[others]
                maker.bias[units] = maker.bias[others]
    given, bundle = context(tmp_path, dense), dense.copy()
    structured.cut(bundle, "heads+neurons", keep)
    assert min(errors(bundle, dense, given.calibration).values()) > 0.02
    restore(bundle, dense, settings(damping=1e-7), given)
    assert max(errors(bundle, dense, given.calibration).values()) < 2e-3


def test_masks_scale_whole_units_and_leave_zeros(tiny, tmp_path):
    dense = open_bundle(tiny("bert"), task="embedding")
    bundle = cut_of(dense)
    before = {name: m.weight.detach().clone() for name, m in surgery.linears(bundle.model, bundle.family).items()}
    restore(bundle, dense, settings(restore="masks"), context(tmp_path, dense))
    changed = 0
    for name, module in surgery.linears(bundle.model, bundle.family).items():
        if not name.endswith("output.dense"):
            assert torch.equal(module.weight, before[name])
            continue
        size = 8 if "attention" in name else 1
        by = (module.weight / before[name]).detach().reshape(32, -1, size)
        torch.testing.assert_close(by, by[:1, :, :1].expand_as(by), rtol=1e-4, atol=1e-5)
        changed += int((by - 1).abs().max() > 1e-3)
    assert changed >= 6


def test_a_block_that_got_worse_is_put_back(tiny, tmp_path, monkeypatch):
    dense = open_bundle(tiny("bert"), task="embedding")
    bundle = cut_of(dense)
    before = {key: value.clone() for key, value in bundle.model.state_dict().items()}
    monkeypatch.setattr(restoring, "_best", lambda solve, used, *_: -3 * refitted(used, 0.01, "x"))
    told = restore(bundle, dense, settings(), context(tmp_path, dense))
    worse = [block for block, error in told.items() if error["linear"] == error["without"]]
    assert len(worse) >= 3  # by chance the last one, far off from the start, gets better
    assert all(error["linear"] <= error["without"] for error in told.values())
    for key, value in bundle.model.state_dict().items():
        assert torch.equal(value, before[key]) or not key.startswith(tuple(worse)), key


def test_training_a_block_goes_on_after_the_last_one_that_was_done(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rebuilding, "STEPS", 16)
    dense = open_bundle(tiny("mpnet"), task="embedding")
    given = context(tmp_path, dense)
    whole, again = cut_of(dense), cut_of(dense)
    restore(whole, dense, settings(restore="block"), context(tmp_path / "other", dense))
    trained, train = [], rebuilding._trained

    class Stop(Exception): ...

    def stop(block, *rest):
        trained.append(block.name)
        if len(trained) == 3:
            raise Stop
        return train(block, *rest)

    monkeypatch.setattr(rebuilding, "_trained", stop)
    with pytest.raises(Stop):
        restore(cut_of(dense), dense, settings(restore="block"), given)
    restore(again, dense, settings(restore="block"), given)
    assert trained[2:] == [trained[2], trained[2], *trained[4:]]
    assert len(trained) == 5
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, whole.model.state_dict()[name]), name


def test_training_a_block_keeps_the_start_where_it_does_not_help(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(rebuilding, "STEPS", 8)
    monkeypatch.setattr(rebuilding, "RATE", 10.0)
    dense = open_bundle(tiny("bert"), task="embedding")
    first, second = cut_of(dense), cut_of(dense)
    restore(first, dense, settings(), context(tmp_path, dense))
    told = restore(second, dense, settings(restore="block"), context(tmp_path, dense))
    assert all(torch.equal(v, second.model.state_dict()[k]) for k, v in first.model.state_dict().items())
    assert all(error["block"] == error["linear"] for error in told.values())


def test_without_texts_it_is_refused(tiny, tmp_path):
    dense = open_bundle(tiny("bert"), task="embedding")
    with pytest.raises(StepError, match="expected texts to calibrate on, got none; give --calibrate F or --train F"):
        restore(cut_of(dense), dense, settings(), context(tmp_path, dense, calibration=None))


def test_texts_are_as_many_as_asked_for_and_those_to_calibrate_on_come_first(tiny, tmp_path):
    dense = open_bundle(tiny("bert"), task="embedding")
    given = context(tmp_path, dense)
    assert len(restoring.texts(settings(samples=4), given)) == 4
    given.train, given.calibration = given.calibration, None
    assert len(restoring.texts(settings(samples=6), given)) == 6
