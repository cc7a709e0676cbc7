"""What --dry-run counts of prune and distill steps, held against counters in the steps themselves on tiny models, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flyweight.calibration import walk
from flyweight.hessian import Moments
from flyweight.measure.reading import Lengths, in_order, predicted, trained, walked
from flyweight.measure.work import NOTHING, Rates, Work, machine_rates
from flyweight.methods.prune.anatomy import anatomy_of
from flyweight.methods.prune.expected import Before, Texts, expected, left_of
from flyweight.methods.prune.restore import restore as restored
from flyweight.methods.prune.scores import groups
from flyweight.methods.prune.structured import cut
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.settings import PruneSettings
from flyweight.training import predict
from flyweight.training.batches import by_length
from solver_cases import context, opened, texts

Tiny = Callable[..., Path]


@contextmanager
def counting(bundle: Bundle) -> Iterator[list[float]]:
    """[0]: multiply-adds of the blocks' linears times rows; [1]: calls of the first linear of all blocks, as passes are counted."""
    found = [0.0, 0.0]
    hooks = []
    linears = surgery.linears(bundle.model, bundle.family)
    first = next(iter(linears))

    def hook(name: str) -> Callable[..., None]:
        def count(module: Any, given: tuple[Any, ...], output: Any) -> None:
            found[0] += given[0].shape[:-1].numel() * surgery.weight_2d(module).numel()
            found[1] += name == first

        return count

    for name, module in linears.items():
        hooks.append(module.register_forward_hook(hook(name)))
    try:
        yield found
    finally:
        for one in hooks:
            one.remove()


def test_kinds_of_work_add_up() -> None:
    rates = Rates.of(passes=2.0, tokens=0.5, wide=1e-3)
    one = Work(passes=3, tokens=8, wide=1000, roots=7)
    assert one.takes(rates) == pytest.approx(6 + 4 + 1)
    assert one.plus(one, NOTHING) == one.times(2)
    assert Work(seconds=1.5).takes(rates) == 1.5
    assert Work._fields == Rates._fields


def test_rates_are_measured_for_everything_but_passes() -> None:
    found = machine_rates(256)
    model = {"passes", "tokens", "back_passes", "back_tokens", "gated", "seconds"}
    assert set(found) == set(Work._fields) - model
    assert all(0 < rate < 1e-3 for rate in found.values())


LENGTHS = np.array([3, 5, 3, 9, 5, 5, 3, 3] * 9)


def test_batches_are_those_that_will_be_made() -> None:
    read = walked(LENGTHS)  # 36 of 3 tokens, 27 of 5, 9 of 9: batches of at most 16 of one length
    assert (read.batches, read.tokens, read.largest) == (3 + 2 + 1, LENGTHS.sum(), 81)
    read = predicted(LENGTHS, 32)
    sizes = [len(batch) * LENGTHS[batch].max() for batch in by_length(LENGTHS, 32)]
    assert (read.batches, read.tokens, read.largest) == (3, sum(sizes), max(sizes))
    read = in_order(np.array([1, 2, 3, 4, 5]), 2)
    assert (read.batches, read.tokens, read.largest) == (3, 2 * 2 + 4 * 2 + 5, 8)
    read = trained(np.full(10, 7), 4, 6)  # three batches an epoch, two epochs
    assert (read.batches, read.tokens, read.largest) == (6, 2 * 70, 28)
    assert walked(LENGTHS[:0]).batches == 0


@pytest.mark.parametrize("family", ["bert", "distilbert", "llama", "gpt2", "t5"])
def test_places_are_those_that_the_walk_finds(tiny: Tiny, family: str) -> None:
    bundle = opened(tiny, family)
    anatomy = anatomy_of(bundle)
    assert anatomy.weights == sum(one.numel() for one in bundle.model.parameters())
    linears = surgery.linears(bundle.model, bundle.family).values()
    assert anatomy.inside == sum(surgery.weight_2d(one).numel() for one in linears)
    for block, places in zip(walk(bundle, texts(bundle)), anatomy.blocks, strict=True):
        wanted = sorted((place.width, out) for place in places for out in place.outs)
        found = sorted(
            tuple(reversed(surgery.weight_2d(one).shape)) for site in block.sites for one in site.linears.values()
        )
        assert found == wanted
    for places in anatomy.blocks:
        assert places[0].before == 0
        assert places[-1].after == pytest.approx(1)
        assert [one.after for one in places[:-1]] == [one.before for one in places[1:]]
    assert anatomy.part("heads") + anatomy.part("neurons") == pytest.approx(1)


def lengths_of(bundle: Bundle) -> Lengths:
    return texts(bundle).lengths


def told(bundle: Bundle, gate_bytes: float = 0.0, labelled: bool = False, **settings: Any) -> tuple[Work, int]:
    some = lengths_of(bundle)
    made = PruneSettings(**settings)
    part = Texts(train=some, calibration=some, labelled=labelled)
    return expected(made, Before(anatomy_of(bundle), part, gate_bytes))


def passes_of(bundle: Bundle, work: Work) -> float:
    """Multiply-adds of the linears in what is counted as tokens."""
    return work.tokens * anatomy_of(bundle).inside


def test_a_streamed_walk_counts_the_tokens_that_go_through_linears(tiny: Tiny) -> None:
    """SparseGPT and Wanda look at every place; the hook counts what runs, the look at where things are included."""
    bundle = opened(tiny, "bert")
    with counting(bundle) as seen:
        for block in walk(bundle, texts(bundle)):
            for site in block.sites:
                Moments.seen(block, site, bundle.device)
    shortest = int(lengths_of(bundle).min())
    looks = anatomy_of(bundle).inside * shortest * int((lengths_of(bundle) == shortest).sum())
    work, _ = told(bundle, target="weights", amount=0.5, criterion="hessian", samples=512)
    assert passes_of(bundle, work) == pytest.approx(seen[0] - looks, rel=0.02)


def test_layers_by_cosine_are_one_pass_and_by_loss_one_a_try(tiny: Tiny) -> None:
    bundle = opened(tiny, "bert")
    count = len(anatomy_of(bundle).blocks)
    tokens = walked(lengths_of(bundle)).tokens
    work, _ = told(bundle, target="layers", amount=0.5, criterion="cosine")
    assert work.tokens == pytest.approx(tokens * (1 + 1 / count))
    work, _ = told(bundle, target="layers", amount=0.5, criterion="loss")
    with counting(bundle) as seen:
        predict(bundle, texts(bundle))
    assert passes_of(bundle, work) == pytest.approx(seen[0] * (1 + count + count - 1))


@pytest.mark.parametrize("restore", ["masks", "linear"])
def test_restoring_counts_what_runs_in_both_models(tiny: Tiny, tmp_path: Path, restore: str) -> None:
    """Half of the neurons stay: what the hook counts in either model, against what is told."""
    bundle = opened(tiny, "bert")
    dense = bundle.copy()
    settings = PruneSettings(target="neurons", amount=0.5, restore=restore, samples=512)
    cut(bundle, "neurons", {group: list(range(size // 2)) for group, size in groups(bundle, "neurons").items()})
    with counting(bundle) as mine, counting(dense) as whole:
        restored(bundle, dense, settings, context(tmp_path, texts(bundle)))
    work, _ = told(dense, **settings.model_dump(exclude_defaults=True))
    stages = (
        2 + 2 * left_of(settings, anatomy_of(dense)).work
    )  # the answers that others are held against, and three looks
    judged = stages * predicted(lengths_of(dense)).tokens
    assert (work.tokens - judged) * anatomy_of(dense).inside == pytest.approx(mine[0] + whole[0], rel=0.25)


def test_shapes_that_are_left() -> None:
    class Half:
        inside = 12

        def part(self, what: str) -> float:
            return {"heads": 1 / 3, "neurons": 2 / 3}[what]

    anatomy: Any = Half()
    assert left_of(PruneSettings(target="heads", amount=0.5), anatomy) == (0.5, 1.0, pytest.approx(5 / 6))
    both = left_of(PruneSettings(target="heads+neurons", speedup=4.0), anatomy)
    assert both == (pytest.approx(0.25), pytest.approx(0.25), pytest.approx(0.25))
    neurons = left_of(PruneSettings(target="neurons", speedup=1.5), anatomy)
    assert neurons.work == pytest.approx(1 / 1.5)
    assert neurons.heads == 1
    assert left_of(PruneSettings(target="layers", amount=0.25), anatomy).work == 0.75
    assert left_of(PruneSettings(target="vocabulary"), anatomy).work == 1
