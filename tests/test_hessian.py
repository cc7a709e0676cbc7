"""The Hessian core against float64 done slowly: over all blocks of tiny models, and equation by equation."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from flyweight.calibration import walk
from flyweight.errors import StepError
from flyweight.hessian import Moments, Way, best_of, bytes_needed, damped, factor, inverse, lost, relative, sweep
from flyweight.models import surgery
from solver_cases import block_outputs, opened, texts

Tiny = Callable[..., Path]


def gram_of(width: int, tokens: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ torch.randn(
        width, width, generator=generator, dtype=torch.float64
    )
    return mixed.t() @ mixed / tokens


@pytest.mark.parametrize("family", ["bert", "llama", "gpt2", "t5", "mpnet"])
def test_moments_over_all_blocks_equal_float64_on_the_whole_model(tiny: Tiny, family: str) -> None:
    """The walk's sums, batch after batch, against all tokens at once from the model run text by text."""
    bundle = opened(tiny, family)
    examples = texts(bundle)
    found: dict[str, list[Tensor]] = {}
    linears = surgery.linears(bundle.model, bundle.family)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, given, name=name: found.setdefault(name, []).append(given[0].detach().flatten(0, -2).double())
        )
        for name, module in linears.items()
    ]
    block_outputs(bundle, examples)
    for hook in hooks:
        hook.remove()
    inputs = {name: torch.cat(parts) for name, parts in found.items()}
    met = set()
    for block in walk(bundle, examples):
        for site in block.sites:
            made = Moments.seen(block, site, bundle.device)
            for name, module in site.linears.items():
                x = inputs[name]
                met.add(name)
                assert made.tokens == len(x)
                scale = float((x**2).mean())
                torch.testing.assert_close(made.gram(name), x.t() @ x / len(x), rtol=1e-4, atol=1e-4 * scale)
                torch.testing.assert_close(made.mean, x.mean(0), rtol=1e-4, atol=1e-4 * scale**0.5)
                torch.testing.assert_close(made.mean_size.double(), x.abs().mean(0), rtol=1e-4, atol=1e-5)
                centred = (x - x.mean(0)).t() @ (x - x.mean(0)) / len(x)
                torch.testing.assert_close(made.centred(name), centred, rtol=1e-3, atol=1e-4 * scale)
                weight = surgery.weight_2d(module).detach()
                change = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
                answers, errors = x @ weight.double().t(), x @ change.double().t()
                assert lost(change, made.gram(name)) == pytest.approx(float((errors**2).sum() / len(x)), rel=1e-4)
                ratio = float(errors.norm() / answers.norm())
                assert relative(change, weight, made.gram(name)) == pytest.approx(ratio, rel=1e-4)
    assert met == set(linears)


def test_damping_is_a_share_of_the_mean_diagonal_of_live_inputs() -> None:
    gram = torch.tensor([[4.0, 1.0, 0.0], [1.0, 2.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert damped(gram, 0.1).tolist() == [[4.3, 1.0, 0.0], [1.0, 2.3, 0.0], [0.0, 0.0, 3.0]]
    assert gram[0, 0] == 4
    assert damped(torch.zeros(2, 2).double(), 0.1).tolist() == [[1.0, 0.0], [0.0, 1.0]]


@pytest.mark.parametrize("sort", [True, False])
def test_factor_and_inverse_are_those_of_the_damped_hessian(sort: bool) -> None:
    gram = gram_of(9, 40)
    made = factor(gram, 0.05, "here", sort)
    order = sorted(range(9), key=lambda j: -float(gram[j, j])) if sort else list(range(9))
    assert made.order.tolist() == order
    hessian = (gram + 0.05 * gram.diagonal().mean() * torch.eye(9).double())[order][:, order]
    torch.testing.assert_close(made.upper.t() @ made.upper, torch.linalg.inv(hessian))
    assert torch.equal(made.upper, made.upper.triu())
    for j in range(9):  # what SparseGPT's scores rest on
        rest = torch.linalg.inv(hessian[j:, j:])[0, 0]
        torch.testing.assert_close(made.upper[j, j] ** 2, rest)
    found = inverse(gram, 0.05, "here")
    torch.testing.assert_close(found.matrix, torch.linalg.inv(damped(gram, 0.05)))
    torch.testing.assert_close(found.ridge, (0.05 * gram.diagonal().mean()).expand(9))


@pytest.mark.parametrize("columns", [1, 4, 32, 70])
def test_sweep_is_optimal_brain_surgery_with_the_rest_moving_after_every_column(columns: int) -> None:
    """One row and one column at a time, the inverse of what is left taken anew; 70 columns are several blocks of most sizes."""
    width = 70
    gram = damped(gram_of(width, 200), 0.01)
    weight = torch.randn(3, width, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    made = factor(gram, 1e-12, "here")
    left = weight.t()[made.order]
    met = []

    def settle(j: int) -> Tensor:
        met.append(j)
        return left[j].round()

    sweep(left, made.upper, settle, columns)
    assert met == list(range(width))
    expected = torch.empty_like(weight)
    for i in range(3):
        now = weight[i].clone()
        for at, j in enumerate(made.order.tolist()):
            rest = made.order[at:]
            column = torch.linalg.inv(gram[rest][:, rest])[:, 0]
            expected[i, j] = now[j]
            now[rest] -= (now[j] - now[j].round()) / column[0] * column
    torch.testing.assert_close(left.t(), expected[:, made.order], rtol=1e-6, atol=1e-6)


def test_best_of_some_columns_is_least_squares_and_of_all_is_the_weight() -> None:
    inputs = torch.randn(50, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    inputs[:, 4] += inputs[:, 1]
    gram, weight = inputs.t() @ inputs / 50, torch.randn(3, 7, dtype=torch.float64)
    keep = [0, 1, 5, 6]
    least = torch.linalg.lstsq(inputs[:, keep], inputs @ weight.t()).solution.t()
    torch.testing.assert_close(best_of(weight, gram, keep, 1e-12, "x"), least)
    torch.testing.assert_close(best_of(weight, gram, list(range(7)), 10.0, "x"), weight)
    assert best_of(weight.float(), gram, keep, 0.01, "x").dtype == torch.float32
    assert best_of(weight, gram, [], 0.01, "x").shape == (3, 0)


def test_singular_hessians_and_dead_inputs_have_an_answer() -> None:
    inputs = torch.randn(3, 8, generator=torch.Generator().manual_seed(4), dtype=torch.float64)  # rank 3
    inputs[:, 2] = 0
    gram, weight = inputs.t() @ inputs / 3, torch.ones(2, 8)
    assert torch.isfinite(factor(gram, 0.01, "x").upper).all()
    assert torch.isfinite(inverse(gram, 0.01, "x").matrix).all()
    assert inverse(gram, 0.01, "x").matrix[2].count_nonzero() == 1
    made = best_of(weight, gram, [0, 1, 2], 0.01, "x")
    assert torch.isfinite(made).all()
    assert (made[:, 2] == 1).all()
    assert torch.isfinite(inverse(torch.zeros(3, 3).double(), 0.01, "x").matrix).all()
    assert relative(weight, weight * 0, gram * 0) == 0


def test_bad_input_is_named() -> None:
    wrong = torch.tensor([[1.0, 20.0], [20.0, 1.0]], dtype=torch.float64)
    attempts: list[Callable[[], object]] = [
        lambda: factor(wrong, 0.01, "layer.down"),
        lambda: inverse(wrong, 0.01, "layer.down"),
        lambda: best_of(torch.ones(1, 2), wrong, [0, 1], 0.01, "layer.down"),
        lambda: inverse(wrong * torch.nan, 0.01, "layer.down"),
    ]
    for attempt in attempts:
        with pytest.raises(
            StepError, match=r"Hessian of the inputs of layer\.down, got none up to damping 10; give more"
        ):
            attempt()
    assert inverse(wrong, 2.0, "x").damping == pytest.approx(20)  # 1 + 20 > 20
    for value in (float("nan"), float("inf"), 1e30):
        state = Moments(torch.zeros(2, 2).double(), torch.zeros(2).double())
        state.add(torch.tensor([[value, 1.0]]))
        for what in (state.gram, state.centred):
            with pytest.raises(StepError, match=r"finite activations into layer\.up, got NaN or inf"):
                what("layer.up")


MEASURED = """
import sys, threading, time
import torch
from flyweight.hessian import Moments, factor, relative
from flyweight.methods.prune.obs import ordered
from flyweight.methods.prune.sparsegpt import corrected
from flyweight.methods.prune.wanda import kept

torch.set_num_threads(1)

def held():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def work(way, inputs, weight):
    n = inputs.shape[1]
    if way == "squares":
        return kept(weight, inputs.double().square().sum(0).sqrt(), 0.5)
    state = Moments(torch.zeros(n, n).double(), torch.zeros(n).double())
    state.add(inputs)
    gram = state.gram("x")
    if way == "inverse":
        return ordered(weight, gram, 1, 0.01, least=n - 70)
    made = factor(gram, 0.01, "x", sort=False)
    return relative(corrected(weight, made, gram.diagonal() == 0, 0.5) - weight, weight, gram)

def peak(way, out, n):
    inputs, weight = torch.randn(64, n), torch.randn(out, n)
    start, most, done = held(), [0], threading.Event()

    def look():
        while not done.wait(0.002):
            most[0] = max(most[0], held())

    watcher = threading.Thread(target=look)
    watcher.start()
    work(way, inputs, weight)
    done.set()
    watcher.join()
    return most[0] - start

for case in sys.argv[1:]:
    way, out, n = case.split(",")
    work(way, torch.randn(64, 512), torch.randn(64, 512))  # libraries take what they keep
    print(peak(way, int(out), int(n)))
"""


def test_memory_is_as_estimated() -> None:
    if not Path("/proc/self/statm").exists():
        pytest.skip("memory is read from /proc")
    cases: list[tuple[Way, int, int]] = [
        ("factor", 256, 1536),
        ("factor", 2048, 1024),
        ("inverse", 384, 1536),
        ("squares", 1024, 1024),
    ]
    given = [f"{way},{out},{width}" for way, out, width in cases]
    own = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "1000000",
    }  # what is freed is given back at once, as with large models
    run = subprocess.run([sys.executable, "-c", MEASURED, *given], capture_output=True, text=True, check=True, env=own)
    for (way, out, width), line in zip(cases, run.stdout.split(), strict=True):
        estimate = bytes_needed([(out, width)], 0, width, way)
        assert 0.75 * estimate < int(line) < 1.25 * estimate, (way, out, width)


def test_the_estimate_counts_inputs_and_outputs_of_one_block_and_the_worst_linear() -> None:
    one = bytes_needed([(768, 768)], 0, 768, "factor")
    assert bytes_needed([(768, 768)], 1000, 768, "factor") - one == 2 * 4 * 1000 * 768
    assert bytes_needed([(768, 768), (768, 3072)], 0, 768, "factor") == bytes_needed([(768, 3072)], 0, 768, "factor")
    assert bytes_needed([(768, 3072)], 0, 768, "factor") > 5 * 8 * 3072**2
    assert bytes_needed([(768, 768)], 0, 768, "factor", batch=10) == one  # not while the sums are taken
    assert bytes_needed([(768, 768)], 0, 768, "factor", batch=5000) == 6 * 4 * 5000 * 768 + 20 * 768**2
    assert bytes_needed([(768, 768)], 0, 768, "squares", batch=5000) == (24 + 16) * 5000 * 768
    assert bytes_needed([], 10, 8, "squares") == 2 * 4 * 10 * 8
