"""What --dry-run counts of prune and distill steps, held against counters in the steps themselves on tiny models, and by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from flyweight.calibration import walk
from flyweight.hessian import Moments
from flyweight.measure.reading import Lengths, Read, in_order, predicted, trained, walked
from flyweight.measure.work import NOTHING, Rates, Work, machine_rates
from flyweight.methods.distill.expected import Student, asking, narrowing, student_share
from flyweight.methods.prune import solving
from flyweight.methods.prune.anatomy import Place, anatomy_of
from flyweight.methods.prune.expected import Before, Texts, expected, left_of
from flyweight.methods.prune.restore import restore as restored
from flyweight.methods.prune.scores import groups
from flyweight.methods.prune.structured import cut
from flyweight.methods.prune.wishing import wish
from flyweight.models import surgery
from flyweight.models.bundle import Bundle
from flyweight.plan.speed import counted as kept_by
from flyweight.plan.training import Pupil, training, updates_of
from flyweight.settings import DistillSettings, FinetuneSettings, PruneSettings
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


def test_a_sweep_of_the_size_that_is_timed_gives_its_kinds_back() -> None:
    """Work of a linear by hand: 8 columns, 3 rows, N:M in portions of 32 columns."""
    place = anatomy_place(8, (3,))
    plain, of_four = solving.sparsegpt(place, "unstructured"), solving.sparsegpt(place, "2:4")
    assert plain.roots == plain.inverses == pytest.approx(2 * 512 / 3)
    assert plain.wide == 3 * 8 * 8
    assert plain.products == 4 * 2 * 3 * 8 * 8
    assert (plain.rank_ones, of_four.rank_ones) == (128 * 24, 32 * 24)
    assert (plain.ranked, of_four.ranked, plain.sorted, of_four.sorted) == (24, 0, 0, 12)


def test_restoring_takes_sums_and_solutions_of_what_stays() -> None:
    read = Read(10, 4096.0, 512)
    place = anatomy_place(9, (4,), 9, "neurons")
    half = solving.restored(place, 1 / 3, read, masks=False)  # three columns and a one
    assert half.products == 2 * 4096 * 4 * (4 + 4)
    assert half.added == 6 * 4 * 8  # portions of about 1024 tokens, one more of either part
    assert half.roots == pytest.approx(4 * 64 / 3)
    assert half.wide == 4 * (2 * 4 * 16 + 2 * 4 * 16)
    assert solving.sums_bytes([place], 1.0, 1 / 3) == 2 * 8 * 4 * 8


def test_a_wish_by_latency_takes_a_table_and_races(tiny: Tiny) -> None:
    bundle = opened(tiny, "bert")
    counted, _ = told(bundle, target="heads+neurons", speedup=2.0, cost="flops")
    raced, _ = told(bundle, target="heads+neurons", speedup=2.0)
    assert raced.tokens > counted.tokens + 128 * 16  # a race has at least so many rounds at 1x128
    assert raced.seconds > counted.seconds + 5
    anatomy = anatomy_of(bundle)
    left = anatomy.weights - anatomy.inside // 2
    found = wish(PruneSettings(target="heads+neurons", speedup=2.0), anatomy, 0.5)
    whole = 4 * anatomy.weights
    assert found.bytes == max(4 * whole, whole + 4 * 4 * left)  # three copies of what is exported beside what is open


def test_gates_and_their_memory(tiny: Tiny) -> None:
    bundle = opened(tiny, "bert")
    read = in_order(np.sort(lengths_of(bundle)))
    work, memory = told(bundle, gate_bytes=1000.0, target="heads", amount=0.5, criterion="fisher")
    assert work.gated == read.tokens
    heads = sum(place.units for place in anatomy_of(bundle).places if place.what == "heads")
    assert memory >= 1000 * read.largest + 4 * read_count(bundle) * heads
    assert told(bundle, gate_bytes=0.0, target="heads", amount=0.5, criterion="fisher")[1] < memory


def test_a_training_by_hand() -> None:
    """8 texts of 5 tokens, batches of 4, 2 epochs: 4 updates and two looks at 3 texts of 7 tokens."""
    settings = FinetuneSettings(epochs=2, batch_size=4)
    rates = Rates.of(tokens=1.0, back_tokens=10.0, updates=0.01)
    eight, three = np.full(8, 5), np.full(3, 7)
    found = training(settings, eight, three, Pupil(100, 0.5, 2.0), rates, Work(tokens=3))
    assert found.seconds == pytest.approx(0.5 * 4 * 20 * 11 + 3 + 2 * 0.5 * 21 + 4 * 100 * 0.01)
    # two moments, best weights, and gradients or what 20 tokens keep, whichever is more
    assert found.bytes == 400 * 2 + 400 + 400
    assert training(settings, eight, three, Pupil(100, 0.5, 200.0), rates, NOTHING).bytes == 400 * 2 + 4000 + 400
    assert training(settings, eight, None, Pupil(100, 0.5, 2.0), rates, NOTHING).bytes == 400 * 2 + 400
    once = training(settings.model_copy(update={"max_steps": 1}), eight, None, Pupil(100, 1.0, 2.0), rates, NOTHING)
    assert once.seconds == pytest.approx(20 * 11 + 1)
    assert updates_of(settings, 9) == 6


def test_teachers_are_asked_once_or_in_every_step() -> None:
    parts, held = [np.full(8, 5)], np.full(3, 7)
    asked = asking(DistillSettings(), parts, held, 4, 1000)
    assert (asked.tokens, asked.passes, asked.hashed) == (40 + 21, 2, 4000)
    two = asking(DistillSettings(more_teachers=("other",)), parts, held, 4, 1000)
    assert two.tokens == 80 + 21
    inside = asking(DistillSettings(hidden_weight=1.0, batch_size=4), parts, held, 4, 1000)
    assert inside.tokens == asked.tokens + 4 * 20
    changed = asking(DistillSettings(augment=0.2, batch_size=4, more_teachers=("other",)), parts, None, 4, 1000)
    assert changed.tokens == 2 * 4 * 20
    assert asking(DistillSettings(alpha=0.0, hidden_weight=1.0), parts, None, 2, 1000).tokens == 2 * 40


def test_students() -> None:
    assert student_share(DistillSettings(layers="every-other"), 5, 32) == (3 / 5, 1.0)
    assert student_share(DistillSettings(layers=(0, 3)), 4, 32) == (0.5, 1.0)
    assert student_share(DistillSettings(width=16), 4, 32) == (0.5, 0.5)
    small = narrowing(np.full(300, 10), Student(32, 4, 4, 8, 64), 16)
    assert small.tokens == 2 * 256 * 10  # two passes over as many texts as are looked at
    assert narrowing(np.full(300, 10), Student(64, 4, 4, 16, 64), 16).wide > 2 * small.wide


def test_what_the_way_back_keeps_is_counted_as_it_is() -> None:
    """Two linears and a relu: their inputs and the relu's output, each once; no weights."""
    model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.ReLU(), torch.nn.Linear(5, 4))
    with kept_by(model) as kept:
        model(torch.randn(7, 6))
    assert kept[0] == 4 * 7 * (6 + 5)


def anatomy_place(width: int, outs: tuple[int, ...], units: int = 0, what: str = "") -> Place:
    return Place(width, outs, 0.0, 1.0, units, what)


def read_count(bundle: Bundle) -> int:
    return len(texts(bundle))


def test_wanda_sorts_groups_or_rows() -> None:
    place, read = anatomy_place(8, (3, 5)), Read(2, 10.0, 5)
    assert solving.wanda(place, read, "2:4") == Work(moved=40 * 10 * 8 + 120 * 64, sorted=64)
    assert solving.wanda(place, read, "unstructured").sorted == 5 * 64
