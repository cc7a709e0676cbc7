"""Students of fewer hidden channels: the linear algebra against slow references, the models against their teachers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="distillation needs the extra `compress`")

import training_cases as cases  # noqa: E402
from distill_cases import SETTINGS, School  # noqa: E402
from flyweight import artifact  # noqa: E402
from flyweight.errors import StepError  # noqa: E402
from flyweight.methods.distill import distill, reduce, width  # noqa: E402
from flyweight.models import stream  # noqa: E402
from flyweight.models.bundle import Bundle  # noqa: E402
from flyweight.models.storage import restore, save  # noqa: E402
from flyweight.models.surgery import blocks, keep_heads, keep_neurons  # noqa: E402
from flyweight.training import predict  # noqa: E402

LABELS = ("negative", "positive")
ENCODERS = ("bert", "distilbert", "roberta", "electra", "mpnet")


def rows(count: int, size: int, seed: int = 0) -> torch.Tensor:
    """Tokens of a stream with a few strong directions and a mean that is large beside what varies."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(size, size, generator=generator, dtype=torch.float64) * torch.logspace(0, -3, size).double()
    found = torch.randn(count, size, generator=generator, dtype=torch.float64) @ mix.T
    return found + 5 * torch.randn(size, generator=generator, dtype=torch.float64)


def moments(x: torch.Tensor) -> reduce.Moments:
    return reduce.Moments(x.mean(0), torch.cov(x.T, correction=0))


# linear algebra


@pytest.mark.parametrize("width", [2, 5, 11, 12])
def test_basis_spans_what_holds_most_and_keeps_the_mean_apart(width: int) -> None:
    x = rows(200, 12)
    q = reduce.basis([moments(x)], width)
    eye = torch.eye(width, dtype=torch.float64)
    torch.testing.assert_close(q.T @ q, eye)
    centred = x - x.mean(1, keepdim=True)
    narrow = x @ q
    torch.testing.assert_close(
        centred @ q, narrow - narrow.mean(1, keepdim=True)
    )  # taking the mean out commutes with it
    about = centred - centred.mean(0)
    held = (about @ q).square().sum()
    best = torch.linalg.svdvals(about)[: width - 1].square().sum()  # the ones are the direction that `about` lacks
    torch.testing.assert_close(held, best)


def test_the_full_basis_is_the_coordinates_themselves() -> None:
    for x in (rows(200, 12), rows(3, 12)):  # also where texts hold fewer tokens than there are channels
        torch.testing.assert_close(reduce.basis([moments(x)], 12), torch.eye(12, dtype=torch.float64))


def test_of_all_bases_of_the_space_it_is_the_one_nearest_to_coordinates() -> None:
    """Turning it by any rotation that keeps the ones moves it away from the coordinates that it chose."""
    q = reduce.basis([moments(rows(300, 10))], 4)
    chosen = reduce._pivots(q)
    wanted = torch.eye(10, dtype=torch.float64)[:, chosen]
    distances = []
    inner = reduce._complement(4)
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        turn = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64)).Q
        whole = inner @ turn @ inner.T + torch.full((4, 4), 0.25, dtype=torch.float64)
        distances.append(float((q @ whole - wanted).norm()))
    assert float((q - wanted).norm()) < min(distances)


def test_places_count_the_same_whatever_their_size() -> None:
    one, other = rows(300, 8, 1), rows(300, 8, 2)
    scaled = reduce.basis([moments(one), moments(100 * other)], 4)
    torch.testing.assert_close(reduce.basis([moments(one), moments(other)], 4), scaled)


def test_reader_is_least_squares() -> None:
    generator = torch.Generator().manual_seed(8)
    x = (torch.randn(500, 10, generator=generator) @ torch.randn(10, 10, generator=generator) + 3).double()
    q = reduce.basis([moments(rows(300, 10, 9))], 6)
    gain, shift = reduce.reader(q, moments(x))
    z = x @ q
    design = torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)
    best = design @ torch.linalg.lstsq(design, x).solution
    guess = z @ gain.T + shift
    plain = z @ q.T + x.mean(0) - q @ (q.T @ x.mean(0))
    error = [float((x - found).square().sum()) for found in (best, guess, plain)]
    assert error[0] <= error[1] < 1.01 * error[0] < 0.9 * error[2]
    torch.testing.assert_close(guess @ q, z)  # what is inside is read as it is
    full = torch.eye(10, dtype=torch.float64)
    gain, shift = reduce.reader(full, moments(x))
    torch.testing.assert_close(gain, full)
    torch.testing.assert_close(shift, torch.zeros(10, dtype=torch.float64), atol=1e-9, rtol=0)


def test_scores_of_low_rank_are_the_best_over_what_is_read() -> None:
    """Against the truncated SVD of the whole weighted product (Eckart and Young), computed without any trick."""
    generator = torch.Generator().manual_seed(3)
    z = rows(400, 7)
    query, key = torch.randn(2, 6, 8, generator=generator, dtype=torch.float64)
    design = torch.cat([z, torch.ones(400, 1, dtype=torch.float64)], 1)
    exact = (design @ query.T) @ (design @ key.T).T / 6**0.5
    for size in (6, 4, 1):
        one, other = reduce.low_rank_scores(query, key, moments(z), size)
        found = (design @ one.T) @ (design @ other.T).T / size**0.5
        values = torch.linalg.svdvals(exact)
        best = values[size:].square().sum()
        torch.testing.assert_close(
            (found - exact).square().sum(), best, rtol=1e-5, atol=1e-9 * float(exact.square().sum())
        )


def test_values_of_low_rank_are_the_best_over_what_is_read() -> None:
    generator = torch.Generator().manual_seed(4)
    z = rows(400, 7)
    value, output = torch.randn(5, 7, generator=generator).double(), torch.randn(7, 5, generator=generator).double()
    about = z - z.mean(0)
    exact = about @ value.T @ output.T
    for size in (5, 3, 1):
        one, other = reduce.low_rank_values(value, output, moments(z).covariance, size)
        best = torch.linalg.svdvals(exact)[size:].square().sum()
        error = (about @ one.T @ other.T - exact).square().sum()
        torch.testing.assert_close(error, best, rtol=1e-5, atol=1e-9 * float(exact.square().sum()))


def test_norm_by_least_squares() -> None:
    generator = torch.Generator().manual_seed(5)
    given, wanted = torch.randn(2, 50, 3, generator=generator).double()
    given[:, 2] = 0.0
    both = (given * wanted).mean(0) - given.mean(0) * wanted.mean(0)
    scale, shift = reduce.fit_norm(reduce.Moments(given.mean(0), given.var(0, correction=0)), wanted.mean(0), both)
    for channel in (0, 1):
        slope, start = np.polyfit(given[:, channel].numpy(), wanted[:, channel].numpy(), 1)
        assert float(scale[channel]) == pytest.approx(slope)
        assert float(shift[channel]) == pytest.approx(start)
    assert (float(scale[2]), float(shift[2])) == (1.0, pytest.approx(float(wanted[:, 2].mean())))


def test_units_that_stay_guess_those_that_go() -> None:
    """Two units that say the same: one of them is enough, and the answers stay."""
    generator = torch.Generator().manual_seed(6)
    seen = torch.randn(300, 3, generator=generator).double() * torch.tensor([3.0, 2.0, 1.0]) + 1
    units = torch.cat([seen, 2 * seen[:, :1] - 1], 1)
    weight, bias = torch.randn(2, 4, generator=generator).double(), torch.randn(2, generator=generator).double()
    weight[:, 0] *= 0.1
    keep, fewer, moved = reduce.kept_units(weight, bias, moments(units), 3)
    assert keep == [1, 2, 3]
    torch.testing.assert_close(units[:, keep] @ fewer.T + moved, units @ weight.T + bias, atol=0.01, rtol=0)
    keep, whole, same = reduce.kept_units(weight, bias, moments(units), 4)
    assert keep == [0, 1, 2, 3]
    torch.testing.assert_close((whole, same), (weight, bias))


# models


def narrow(bundle: Bundle, width_now: int, school: School) -> Bundle:
    auto = "AutoModelForSequenceClassification"
    return width.narrowed(bundle, width_now, cases.examples(60, seed=3), school.context, auto)[0]


@pytest.mark.parametrize("pruned", [False, True])
@pytest.mark.parametrize("model_type", ENCODERS)
def test_full_width_gives_the_same_answers(
    tiny: Callable[..., Path], tmp_path: Path, model_type: str, pruned: bool
) -> None:
    school = School(tiny(model_type, labels=LABELS), tmp_path)
    bundle, data = school.bundle(), cases.examples(20, seed=4)
    if pruned:
        keep_heads(bundle.model, bundle.family, "encoder", 1, 0, [0, 2])
        keep_neurons(bundle.model, bundle.family, "encoder", 2, range(0, 64, 3))
    before = cases.weights_hash(bundle.model)
    found = narrow(bundle, 32, school)
    np.testing.assert_allclose(predict(found, data), predict(bundle, data), atol=2e-5)
    assert cases.weights_hash(bundle.model) == before


def doubled(narrow: Bundle, wide: Bundle) -> None:
    """Fill a model of twice the width and twice the head size so that it answers as the narrow one, every channel twice.

    Norms see the same mean and variance; what reads takes half of both copies; heads carry zeros in their second half.
    """
    named = dict(wide.model.named_modules())
    of = {id(module): name for name, module in narrow.model.named_modules()}
    kinds: dict[str, str] = {}
    for parts, ups, down in width._blocks(narrow):
        kinds |= {of[id(module)]: kind for kind, module in parts.items()}
        kinds |= {of[id(up)]: "read" for up in ups} | {of[id(down)]: "write"}
    first, last = stream.head(narrow.model, narrow.family)
    kinds |= {of[id(first)]: "both", of[id(last)]: "read"}
    if narrow.family.embedding_projection:
        kinds["electra.embeddings_project"] = "write"

    def padded(x: torch.Tensor) -> torch.Tensor:  # [4 heads x 4, ...] -> [4 heads x 8, ...]
        heads = x.unflatten(0, (4, 4))
        return torch.cat([heads, torch.zeros_like(heads)], 1).flatten(0, 1)

    with torch.no_grad():
        for name, module in narrow.model.named_modules():
            kind, own = kinds.get(name), dict(module.named_parameters(recurse=False))
            for part, value in own.items():
                target = named[name].get_parameter(part)
                new = value
                if part == "weight" and kind in ("q", "k", "v", "read", "both"):
                    new = torch.cat([new, new], 1) / 2
                if part == "weight" and kind == "o":
                    new = padded(new.t()).t()
                if kind in ("q", "k"):
                    new = padded(new) * 2**0.25
                if kind == "v":
                    new = padded(new)
                if kind in ("o", "write", "both"):
                    new = torch.cat([new, new])
                if kind is None and new.shape != target.shape:  # tables and norms
                    new = torch.cat([new, new], -1)
                target.copy_(new)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_stream_that_needs_half_its_channels_is_halved_without_loss(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str
) -> None:
    monkeypatch.setattr(reduce, "RIDGE", 1e-9)  # it would shrink the guess of a copy by a thousandth
    sizes = {"embedding_size": 12} if model_type == "electra" else {}
    key = "dim" if model_type == "distilbert" else "hidden_size"
    small, large = (School(tiny(model_type, labels=LABELS, **{key: n}, **sizes), tmp_path) for n in (16, 32))
    model, wide, data = small.bundle(), large.bundle(), cases.examples(20, seed=4)
    doubled(model, wide)
    expected = predict(model, data)
    np.testing.assert_allclose(predict(wide, data), expected, atol=1e-4)
    found = narrow(wide, 16, large)
    assert found.model.config.hidden_size == 16
    assert np.std(np.diff(expected)) > 0.05
    np.testing.assert_allclose(predict(found, data), expected, atol=2e-3)


def test_what_is_narrow_is_stored_and_loads_again(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("mpnet", labels=LABELS), tmp_path)
    found, data = narrow(school.bundle(), 8, school), cases.examples(20, seed=4)
    again = narrow(school.bundle(), 8, school)  # a run that was killed finds its checkpoint by the start
    assert cases.weights_hash(again.model) == cases.weights_hash(found.model)
    keep_heads(found.model, found.family, "encoder", 1, 0, [0, 2])
    artifact.write_manifest(tmp_path / "out", save(found, tmp_path / "out"))
    again = restore(tmp_path / "out")
    assert again.model.config.hidden_size == 8
    assert [len(stack) for stack in blocks(again.model, again.family).values()] == [4]
    np.testing.assert_array_equal(predict(again, data), predict(found, data))


def test_tables_as_wide_as_the_stream_become_narrower_with_it(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("electra", labels=LABELS, embedding_size=32), tmp_path)
    data = cases.examples(20, seed=4)
    whole, half = (narrow(school.bundle(), size, school) for size in (32, 16))
    np.testing.assert_allclose(predict(whole, data), predict(school.bundle(), data), atol=2e-5)
    assert half.model.config.embedding_size == half.model.electra.embeddings.word_embeddings.embedding_dim == 16
    assert predict(half, data).shape == (20, 2)


def test_width_and_layers_in_one_step_with_maps_from_the_basis(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("bert", labels=LABELS), tmp_path)
    changes = {"width": 16, "hidden_weight": 0.5, "epochs": 3.0, "control": True, "relation_weight": 0.1}
    found = distill(school.bundle(), SETTINGS.model_copy(update={**changes, "relation_heads": 4}), school.context)
    assert (found.model.config.hidden_size, found.model.config.num_hidden_layers) == (16, 2)
    notes = school.context.notes
    assert notes["history"][-1]["loss"] < notes["history"][0]["loss"]
    assert notes["control"]["steps"] == notes["steps"]
    plain = copy.deepcopy(found)
    assert np.isfinite(predict(plain, school.context.train)).all()


def test_widths_that_cannot_be(tiny: Callable[..., Path], tmp_path: Path) -> None:
    school = School(tiny("bert", labels=LABELS), tmp_path)
    for size, text in (
        (36, "at most the model's 32, got 36"),
        (30, "multiple of the model's 4 heads, got 30; set it to 28"),
    ):
        with pytest.raises(StepError, match=text):
            distill(school.bundle(), SETTINGS.model_copy(update={"width": size}), school.context)
    sparse = replace(school.bundle(), sparse={"bert.encoder.layer.0.output.dense.weight": "2:4"})
    with pytest.raises(StepError, match="dense weights for width, got 1 pruned"):
        width.check_narrower(sparse, 16)
    electra = cases.open_bundle(tiny("electra", labels=LABELS))
    with pytest.raises(StepError, match="other than that of the tables, 16"):
        width.check_narrower(electra, 16)
    decoder = cases.open_bundle(tiny("gpt2", labels=LABELS))
    with pytest.raises(StepError, match="an encoder for width, got 'gpt2'"):
        width.check_narrower(decoder, 16)
    gone, cut = (cases.open_bundle(tiny("bert", labels=("a", "b"))) for _ in range(2))
    keep_heads(gone.model, gone.family, "encoder", 2, 0, [])
    with pytest.raises(StepError, match="an attention in every block for width, got none in block 2"):
        width.check_narrower(gone, 16)
    stream.keep_dimensions(cut.model, cut.family, range(24))
    with pytest.raises(StepError, match="a model as wide as it was built for width"):
        width.check_narrower(cut, 16)
    vectors = School(tiny("bert"), tmp_path, "embedding", train=cases.examples(8, labels=False), validation=None)
    with pytest.raises(StepError, match="a task with labels for width, got 'embedding'"):
        distill(vectors.bundle(), SETTINGS.model_copy(update={"width": 16}), vectors.context)
    assert school.calls == 0
