from __future__ import annotations

import copy
import json
import math
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs the extra `compress`")

import training_cases as cases  # noqa: E402
from flyweight.errors import Interrupted, SettingsError, StorageError, TrainingError  # noqa: E402
from flyweight.settings import FinetuneSettings  # noqa: E402
from flyweight.training import (  # noqa: E402
    TaskObjective,
    accumulate,
    checkpoint,
    find_device,
    keep_zeros,
    learning_rate_factor,
    loop,
    outputs,
    parameter_groups,
    predict,
    train,
)
from flyweight.training.batches import grouped, share, tensors  # noqa: E402


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path]) -> Path:
    return tiny("bert", labels=("negative", "positive"))


@pytest.fixture
def every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)


# batches


def test_batches_hold_every_example_once_and_follow_from_seed_and_epoch() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 1003)
    epochs = [grouped(lengths, 8, seed=1, epoch=epoch) for epoch in (0, 0, 1)]
    for batches in epochs:
        assert sorted(np.concatenate(batches).tolist()) == list(range(1003))
        assert len(batches) == math.ceil(1003 / 8)
        assert sorted(map(len, batches))[0] == 3
        assert {len(batch) for batch in batches} == {3, 8}
    assert all(np.array_equal(a, b) for a, b in zip(epochs[0], epochs[1], strict=True))
    assert not np.array_equal(epochs[0][0], epochs[2][0])
    assert not np.array_equal(epochs[0][0], grouped(lengths, 8, seed=2, epoch=0)[0])


def test_batches_waste_little_on_padding_and_are_not_sorted() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, 4000)
    batches = grouped(lengths, 16, seed=0, epoch=0)
    padded = sum(lengths[batch].max() * len(batch) for batch in batches)
    assert padded < 1.05 * lengths.sum()
    longest = [int(lengths[batch].max()) for batch in batches]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.2


@pytest.mark.parametrize("count", [1, 2, 7, 8])
def test_shares_of_processes_average_to_the_batch(count: int) -> None:
    batch = np.arange(count)
    values = np.random.default_rng(0).normal(size=count)
    parts = [share(batch, rank, 3) for rank in range(3)]
    assert np.mean([weight * values[mine].mean() for mine, weight in parts]) == pytest.approx(values.mean())
    assert all(len(mine) for mine, _ in parts)


# the schedule


def test_learning_rate_by_hand() -> None:
    linear = [learning_rate_factor(step, 10, 0.3, "linear") for step in range(10)]
    assert linear == pytest.approx([1 / 4, 2 / 4, 3 / 4, 1, 6 / 7, 5 / 7, 4 / 7, 3 / 7, 2 / 7, 1 / 7])
    cosine = [learning_rate_factor(step, 4, 0.0, "cosine") for step in range(4)]
    assert cosine == pytest.approx([1, 0.5 + math.sqrt(0.5) / 2, 0.5, 0.5 - math.sqrt(0.5) / 2])
    assert learning_rate_factor(0, 1, 1.0, "linear") == 0.5


def test_biases_and_norms_are_not_decayed(folder: Path) -> None:
    model = cases.open_bundle(folder).model
    decayed, kept = parameter_groups(model, FinetuneSettings(weight_decay=0.3))
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.3, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(names[id(p)].endswith(".bias") or "LayerNorm" in names[id(p)] for p in kept["params"])
    assert not any(names[id(p)].endswith(".bias") or "LayerNorm" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(kept["params"]) == len(names)


# the loop


def test_loop_equals_a_slow_obvious_one(folder: Path) -> None:
    """No dropout; a plain loop with torch's own parts, one example after the other, gradients averaged by hand."""
    settings = FinetuneSettings(epochs=1.5, batch_size=8, learning_rate=1e-3, warmup=0.25, weight_decay=0.1, clip=0.5)
    bundle, data = cases.open_bundle(folder, dropout=0.0), cases.examples(30)
    slow = copy.deepcopy(bundle.model)
    result = train(bundle.model, TaskObjective(bundle, settings), data, settings, seed=5, pad=0, device="cpu")
    assert result.steps == 6

    decay = {name: 0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1 for name, _ in slow.named_parameters()}
    optimizer = torch.optim.AdamW([{"params": [p], "weight_decay": decay[n]} for n, p in slow.named_parameters()])
    order = [grouped(data.lengths, 8, 5, 0), grouped(data.lengths, 8, 5, 1)]
    for step, factor in enumerate([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4]):
        batch = order[step // 4][step % 4]
        optimizer.zero_grad()
        for i in batch:
            ids = torch.from_numpy(data.take([i]).ids[None].astype(np.int64))
            logits = slow(input_ids=ids).logits[0]
            (-torch.log_softmax(logits, -1)[data.labels[i]] / len(batch)).backward()
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in slow.parameters()))
        for parameter in slow.parameters():
            parameter.grad *= min(1.0, 0.5 / (norm + 1e-6))
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * factor
        optimizer.step()
    for (name, mine), theirs in zip(bundle.model.named_parameters(), slow.parameters(), strict=True):
        if not name.endswith("key.bias"):  # its gradient is 0 (softmax ignores it): AdamW divides noise by noise
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=2e-5, msg=name)


def test_learns_and_keeps_the_best_weights(folder: Path) -> None:
    bundle = cases.open_bundle(folder, dropout=0.0)
    settings = cases.SETTINGS.model_copy(update={"learning_rate": 3e-3, "epochs": 3})
    result = cases.run(bundle, None, settings=settings, data=cases.examples(300))
    assert result.history[-1]["loss"] < 0.5 * result.history[0]["loss"]
    assert result.best_metric > 0.8
    assert [entry["step"] for entry in result.history] == [19, 38, 57, 76, 95, 114]
    assert [entry["epoch"] for entry in result.history] == [0.5, 1, 1.5, 2, 2.5, 3]
    assert result.best_metric == max(entry["metric"] for entry in result.history)
    held = cases.examples(30, seed=1)
    accuracy = (predict(bundle, held).argmax(-1) == held.labels).mean()
    assert accuracy == pytest.approx(result.best_metric)
    assert not bundle.model.training  # as it was


def test_best_weights_are_those_of_the_best_evaluation_and_patience_ends_it(folder: Path) -> None:
    bundle = cases.open_bundle(folder)
    metrics = iter([0.1, 0.9, 0.3, 0.9, 1.0])
    seen: list[str] = []

    def evaluate() -> float:
        seen.append(cases.weights_hash(bundle.model))
        return next(metrics)

    settings = cases.SETTINGS.model_copy(update={"patience": 2, "epochs": 5.0})
    result = cases.run(bundle, None, settings=settings, evaluate=evaluate)
    assert (result.steps, result.stopped, result.best_step, result.best_metric) == (22, True, 11, 0.9)
    assert cases.weights_hash(bundle.model) == seen[1]
    assert len(seen) == 4


def test_nan_metric_is_never_the_best(folder: Path) -> None:
    bundle = cases.open_bundle(folder)
    metrics = iter([math.nan, 0.2, math.nan, math.nan])
    result = cases.run(bundle, None, evaluate=lambda: next(metrics))
    assert (result.best_metric, result.best_step) == (0.2, 11)
    assert ["metric" in entry for entry in result.history] == [False, True, False, False]


@pytest.mark.parametrize(
    ("changes", "steps"), [({"max_steps": 3}, 3), ({"epochs": 0.5}, 6), ({"epochs": 0}, 0), ({"epochs": 1.01}, 12)]
)
def test_how_long(folder: Path, changes: dict[str, Any], steps: int) -> None:
    result = cases.run(cases.open_bundle(folder), None, settings=cases.SETTINGS.model_copy(update=changes))
    assert result.steps == steps
    assert (result.history[-1]["step"] if steps else 0) == steps


def test_same_seed_same_bits_and_the_callers_chance_is_left_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(11)
    random.seed(11)
    np.random.seed(11)
    expected = torch.rand(3), random.random(), np.random.random()
    hashes = []
    for number in range(2):
        torch.manual_seed(11)
        random.seed(11)
        np.random.seed(11)
        bundle = cases.open_bundle(folder)
        cases.run(bundle, tmp_path / str(number))
        hashes.append(cases.weights_hash(bundle.model))
        got = torch.rand(3), random.random(), np.random.random()
        assert torch.equal(expected[0], got[0])
        assert expected[1:] == got[1:]
    assert hashes[0] == hashes[1]


def test_leaves_no_accelerator_behind(folder: Path) -> None:
    """Accelerate's state is a singleton: other settings in the same process would be refused."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, PartialState

    for device in ("cpu", None, "cpu"):
        cases.run(
            cases.open_bundle(folder), None, settings=cases.SETTINGS.model_copy(update={"max_steps": 1}), device=device
        )
        assert PartialState._shared_state == {}
        assert AcceleratorState._shared_state == {}
    with pytest.raises(TrainingError):
        cases.run(cases.open_bundle(folder), None, spoil=lambda loss, call: loss * math.nan)
    assert PartialState._shared_state == {}
    own = Accelerator(mixed_precision="bf16", cpu=True)
    cases.run(cases.open_bundle(folder), None, settings=cases.SETTINGS.model_copy(update={"max_steps": 1}))
    assert own.state.mixed_precision == "bf16"
    AcceleratorState._reset_state(True)


def test_device_that_is_not_there() -> None:
    assert find_device("cpu") == torch.device("cpu")
    with pytest.raises(SettingsError, match="device, got 'gpu0'; known: cpu"):
        find_device("gpu0")
    if not torch.cuda.is_available():
        with pytest.raises(SettingsError, match="device of this machine, got 'cuda'"):
            find_device("cuda")


def test_no_examples(folder: Path) -> None:
    with pytest.raises(TrainingError, match="at least one example"):
        cases.run(cases.open_bundle(folder), None, data=cases.examples(3).take([]))


class WithOwn(TaskObjective):
    """Has a parameter that the model has not, with a learning rate of its own, and state."""

    def __init__(self, bundle: Any, settings: Any) -> None:
        super().__init__(bundle, settings)
        self.own, self.count = torch.nn.Parameter(torch.ones(2)), 0

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [*super().parameter_groups(), {"params": [self.own], "lr": 0.5, "weight_decay": 0.0}]

    def loss(self, batch: dict[str, Any], indices: np.ndarray) -> Any:
        return super().loss(batch, indices) + self.own.square().sum()

    def after_step(self, step: int, total: int) -> None:
        self.count += 1
        if self.count == 5:
            os.kill(os.getpid(), signal.SIGINT)

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count = state["count"] + 100


def test_objectives_own_parameters_and_state_are_trained_and_kept(folder: Path, tmp_path: Path) -> None:
    settings = cases.SETTINGS.model_copy(update={"max_steps": 8})
    data, ends = cases.examples(84), []
    for work in (None, tmp_path):
        bundle = cases.open_bundle(folder)
        objective = WithOwn(bundle, settings)
        if work is None:
            objective.count = 1000
        else:
            with pytest.raises(Interrupted):
                train(bundle.model, objective, data, settings, seed=0, pad=0, work=work, device="cpu")
            bundle = cases.open_bundle(folder)
            objective = WithOwn(bundle, settings)
        train(bundle.model, objective, data, settings, seed=0, pad=0, work=work, device="cpu")
        ends.append(objective)
    assert torch.equal(ends[0].own, ends[1].own)
    assert float(ends[0].own.detach().abs().max()) < 0.9
    assert ends[1].count == 5 + 100 + 3


# killed, stopped, damaged


def worker(folder: Path, work: Path, kill_at: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(Path(cases.__file__)), str(folder), str(work), str(kill_at)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_twice_ends_bit_identical(folder: Path, tmp_path: Path) -> None:
    """A real SIGKILL within step 4 and, after resuming, within step 15; both in the middle of an epoch; dropout is on."""
    whole = cases.open_bundle(folder)
    expected = cases.run(whole, None)
    for kill_at, kept in ((4, 3), (15, 14)):
        done = worker(folder, tmp_path, kill_at)
        assert done.returncode == -signal.SIGKILL, done.stderr
        state = torch.load(tmp_path / checkpoint.FILE, weights_only=True)
        assert state["position"]["step"] == kept
    done = worker(folder, tmp_path, 0)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["resumed"] == 14
    assert found["hash"] == cases.weights_hash(whole.model)
    assert found["history"] == expected.history


def test_dropout_is_on_in_these_tests(folder: Path) -> None:
    """Else the test above would not see a forgotten random state."""
    hashes = []
    for dropout in (0.0, 0.1):
        bundle = cases.open_bundle(folder, dropout=dropout)
        cases.run(bundle, None)
        hashes.append(cases.weights_hash(bundle.model))
    assert hashes[0] != hashes[1]


def test_finished_training_returns_at_once(folder: Path, tmp_path: Path) -> None:
    first, second = cases.open_bundle(folder), cases.open_bundle(folder)
    done = cases.run(first, tmp_path)
    again = cases.run(second, tmp_path, after=lambda step: pytest.fail("it trained again"))
    assert (again.steps, again.history, again.resumed_from) == (done.steps, done.history, done.steps)
    assert cases.weights_hash(first.model) == cases.weights_hash(second.model)


def test_ctrl_c_in_a_step_says_how_to_resume_and_nothing_is_lost(folder: Path, tmp_path: Path) -> None:
    whole, stopped = cases.open_bundle(folder), cases.open_bundle(folder)
    cases.run(whole, None)

    def stop(step: int) -> None:
        if step == 8:
            os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="step 8 of 22 is kept: run the same command again"):
        cases.run(stopped, tmp_path, stop)
    assert signal.getsignal(signal.SIGINT) is handler
    again = cases.open_bundle(folder)
    assert cases.run(again, tmp_path).resumed_from == 8
    assert cases.weights_hash(again.model) == cases.weights_hash(whole.model)


def test_ctrl_c_in_an_evaluation_takes_it_again(folder: Path, tmp_path: Path) -> None:
    whole, stopped = cases.open_bundle(folder), cases.open_bundle(folder)
    expected = cases.run(whole, None)
    measure = cases.validation(stopped, cases.examples(30, seed=1))
    calls = []

    def evaluate() -> float:
        calls.append(torch.rand(1))  # an evaluation that draws random numbers changes nothing
        if len(calls) == 2:
            raise KeyboardInterrupt
        return measure()

    with pytest.raises(Interrupted, match="step 11 of 22"):
        cases.run(stopped, tmp_path, evaluate=evaluate)
    again = cases.open_bundle(folder)
    result = cases.run(again, tmp_path)
    assert result.resumed_from == 11
    assert result.history == expected.history
    assert cases.weights_hash(again.model) == cases.weights_hash(whole.model)


def test_second_ctrl_c_breaks_a_step_off_and_keeps_the_last_checkpoint(
    folder: Path, tmp_path: Path, every_step: None
) -> None:
    def twice(step: int) -> None:
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    whole, stopped = cases.open_bundle(folder), cases.open_bundle(folder)
    cases.run(whole, None)
    with pytest.raises(Interrupted, match="step 4 of 22 is kept"):
        cases.run(stopped, tmp_path, twice)
    again = cases.open_bundle(folder)
    assert cases.run(again, tmp_path).resumed_from == 4
    assert cases.weights_hash(again.model) == cases.weights_hash(whole.model)


def test_ctrl_c_without_a_folder_says_that_nothing_was_kept(folder: Path) -> None:
    with pytest.raises(Interrupted, match="nothing was kept"):
        cases.run(cases.open_bundle(folder), None, lambda step: os.kill(os.getpid(), signal.SIGINT))


def test_trains_outside_the_main_thread(folder: Path) -> None:
    results = []
    settings = cases.SETTINGS.model_copy(update={"max_steps": 2})
    thread = threading.Thread(
        target=lambda: results.append(cases.run(cases.open_bundle(folder), None, settings=settings))
    )
    thread.start()
    thread.join()
    assert results[0].steps == 2


def test_nan_loss_names_step_and_rate_and_leaves_the_last_good_checkpoint(
    folder: Path, tmp_path: Path, every_step: None
) -> None:
    with pytest.raises(TrainingError) as caught:
        cases.run(cases.open_bundle(folder), tmp_path, spoil=lambda loss, call: loss * math.nan if call == 9 else loss)
    text = str(caught.value)
    assert text.startswith("expected a finite loss at step 9 of 22, got nan at learning rate 0.00")
    assert "lower learning_rate" in text
    assert f"the last good checkpoint (step 8) stays at {tmp_path / checkpoint.FILE}" in text
    state = torch.load(tmp_path / checkpoint.FILE, weights_only=True)
    assert state["position"]["step"] == 8
    assert all(bool(torch.isfinite(value).all()) for value in state["weights"].values())


def test_infinite_gradient_and_weights_are_not_written(folder: Path, tmp_path: Path, every_step: None) -> None:
    def steep(loss: Any, call: int) -> Any:
        return loss + torch.sqrt((loss - loss.detach()).abs()) if call == 3 else loss  # finite, its slope is not

    with pytest.raises(TrainingError, match="finite gradient at step 3"):
        cases.run(cases.open_bundle(folder), tmp_path, spoil=steep)
    bundle = cases.open_bundle(folder)

    def burst(step: int) -> None:
        if step == 6:
            bundle.model.classifier.bias.data.fill_(math.inf)

    with pytest.raises(TrainingError, match=r"finite weight \(classifier.bias\) at step 6.*checkpoint \(step 5\)"):
        cases.run(bundle, tmp_path, burst)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "pickle"])
def test_damaged_checkpoint_is_noted_and_replaced(folder: Path, tmp_path: Path, how: str) -> None:
    settings = cases.SETTINGS.model_copy(update={"max_steps": 4})
    first = cases.open_bundle(folder)
    cases.run(first, tmp_path, settings=settings)
    path, trap = tmp_path / checkpoint.FILE, tmp_path / "trap"
    whole = path.read_bytes()
    content = {
        "cut": whole[: len(whole) // 2],
        "flipped": whole[: len(whole) // 2] + bytes([whole[len(whole) // 2] ^ 1]) + whole[len(whole) // 2 + 1 :],
        "empty": b"",
        "pickle": pickle.dumps(Trap(str(trap))),
    }[how]
    path.write_bytes(content)
    notes, again = cases.Notes(), cases.open_bundle(folder)
    result = cases.run(again, tmp_path, settings=settings, progress=notes)
    assert result.resumed_from == 0
    assert any("is damaged" in line and "starting over" in line for line in notes.lines)
    assert cases.weights_hash(again.model) == cases.weights_hash(first.model)
    assert not trap.exists()
    assert cases.run(cases.open_bundle(folder), tmp_path, settings=settings).resumed_from == 4


class Trap:
    """Unpickling it would write a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (Path.write_text, (Path(self.path), "caught"))


def test_pickle_inside_a_torch_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"key": "k", "trap": Trap(str(tmp_path / "trap"))}, tmp_path / checkpoint.FILE)
    lines: list[str] = []
    assert checkpoint.load(tmp_path, "k", lines.append) is None
    assert "is damaged" in lines[0]
    assert not (tmp_path / "trap").exists()


@pytest.mark.parametrize("other", ["settings", "data", "labels", "weights", "seed", "key"])
def test_checkpoint_of_other_work_is_not_taken(folder: Path, tmp_path: Path, other: str) -> None:
    settings = cases.SETTINGS.model_copy(update={"max_steps": 2})
    cases.run(cases.open_bundle(folder), tmp_path, settings=settings)
    bundle, data, key, seed = cases.open_bundle(folder), cases.examples(84), "", 3
    if other == "settings":
        settings = settings.model_copy(update={"weight_decay": 0.02})
    elif other == "data":
        data = cases.examples(84, seed=9)
    elif other == "labels":
        data.labels[0] = 1 - data.labels[0]
    elif other == "weights":
        bundle.model.classifier.bias.data[0] += 1
    elif other == "seed":
        seed = 4
    else:
        key = "another teacher"
    notes = cases.Notes()
    objective = TaskObjective(bundle, settings)
    result = train(
        bundle.model, objective, data, settings, seed=seed, pad=0, work=tmp_path, key=key, progress=notes, device="cpu"
    )
    assert result.resumed_from == 0
    assert any("belongs to other settings, data or weights" in line for line in notes.lines)


def test_disk_full_while_checkpointing_leaves_the_old_one(folder: Path, tmp_path: Path, every_step: None) -> None:
    resource = pytest.importorskip("resource", reason="no limits on file size here")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = tmp_path / checkpoint.FILE

    def fill(step: int) -> None:
        if step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size // 2, hard))

    try:
        with pytest.raises(StorageError, match=r"room and permission to write .*checkpoint.pt.*free space"):
            cases.run(cases.open_bundle(folder), tmp_path, fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [entry.name for entry in tmp_path.iterdir()] == [checkpoint.FILE]
    whole, again = cases.open_bundle(folder), cases.open_bundle(folder)
    cases.run(whole, None)
    assert cases.run(again, tmp_path).resumed_from == 2
    assert cases.weights_hash(again.model) == cases.weights_hash(whole.model)


def test_too_little_room_is_refused_before_the_start(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = type(checkpoint.shutil.disk_usage(tmp_path))
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda _: usage(10, 9, 1000))
    with pytest.raises(StorageError, match="MB for checkpoints"):
        cases.run(cases.open_bundle(folder), tmp_path / "new", lambda step: pytest.fail("it trained"))


def test_progress_tells_where_it_is(folder: Path, tmp_path: Path) -> None:
    notes = cases.Notes()
    cases.run(cases.open_bundle(folder), tmp_path, progress=notes, what="fine-tuning")
    assert notes.lines[0] == "track fine-tuning 0/22"
    assert any(line.startswith("step 11 of 22: loss ") and ", validation " in line for line in notes.lines)


# zeros, gradients, answers


def test_pruned_weights_stay_exactly_zero(folder: Path) -> None:
    bundle = cases.open_bundle(folder)
    name = "bert.encoder.layer.1.intermediate.dense.weight"
    weight = bundle.model.get_parameter(name)
    with torch.no_grad():
        weight[weight.abs() < weight.abs().median()] = 0.0
    before, pruned = weight.detach().clone(), weight == 0
    free = copy.deepcopy(bundle)
    with keep_zeros(bundle.model, [name]):
        cases.run(bundle, None)
    assert torch.equal(weight == 0, pruned)
    assert not torch.equal(weight, before)
    cases.run(free, None)  # without the guard they come back
    assert int((free.model.get_parameter(name) == 0).sum()) == 0
    bundle.model.train()
    TaskObjective(bundle, cases.SETTINGS).loss(
        tensors(cases.examples(4), np.arange(4), 0, weight.device), None
    ).backward()
    assert bool((weight.grad[pruned] != 0).any())  # the guard is gone


def test_zeroed_gradients_keep_moments_clean_even_when_infinite() -> None:
    layer = torch.nn.Linear(2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.0, 2.0]]))
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    with keep_zeros(layer, ["weight"]):
        (layer(torch.tensor([[math.inf, 1.0]])).nan_to_num(0.0) + layer(torch.tensor([[5.0, 1.0]]))).sum().backward()
        optimizer.step()
    assert layer.weight.tolist()[0][0] == 0.0
    assert optimizer.state[layer.weight]["exp_avg"].tolist()[0][0] == 0.0


def test_accumulated_gradients_are_those_of_each_batch_in_order(folder: Path) -> None:
    bundle, data = cases.open_bundle(folder), cases.examples(10)
    bundle.model.bert.encoder.layer[0].train()
    frozen = bundle.model.bert.embeddings.word_embeddings.weight.requires_grad_(False)
    kept = torch.ones_like(bundle.model.classifier.weight)
    bundle.model.classifier.weight.grad = kept
    seen: list[Any] = []
    mean = accumulate(
        bundle.model, TaskObjective(bundle, cases.SETTINGS), data, lambda g, i: seen.append((g, i)), pad=0, batch_size=4
    )
    assert [indices.tolist() for _, indices in seen] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert bundle.model.bert.encoder.layer[0].training
    assert not bundle.model.bert.encoder.layer[1].training
    assert not frozen.requires_grad
    assert bundle.model.classifier.weight.grad is kept
    assert bundle.model.classifier.bias.grad is None

    slow, losses = copy.deepcopy(bundle.model).eval().requires_grad_(True), []
    for gradients, indices in seen:
        slow.zero_grad()
        for i in indices:
            logits = slow(input_ids=torch.from_numpy(data.take([i]).ids[None].astype(np.int64))).logits[0]
            losses.append(-torch.log_softmax(logits, -1)[data.labels[i]])
            (losses[-1] / len(indices)).backward()
        for name, parameter in slow.named_parameters():
            torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-3, atol=1e-5, msg=name)
    assert mean == pytest.approx(float(sum(losses).detach()) / 10, rel=1e-4)


def test_accumulate_for_named_parameters_alone_and_on_errors(folder: Path) -> None:
    bundle, data, seen = cases.open_bundle(folder), cases.examples(3), []
    objective = cases.Hooked(bundle, cases.SETTINGS, spoil=lambda loss, call: loss * math.inf if call == 5 else loss)
    accumulate(
        bundle.model,
        objective,
        data,
        lambda g, i: seen.append(set(g)),
        pad=0,
        batch_size=1,
        names=["classifier.weight"],
    )
    assert seen == [{"classifier.weight"}] * 3
    with pytest.raises(TrainingError, match="finite loss on examples 1 to 1"):
        accumulate(bundle.model, objective, data, lambda g, i: None, pad=0, batch_size=1)
    assert all(p.requires_grad and p.grad is None for p in bundle.model.parameters())


def test_answers_come_in_the_order_of_the_examples(folder: Path) -> None:
    bundle, data = cases.open_bundle(folder), cases.examples(23)
    bundle.model.train()
    found = predict(bundle, data, batch_size=4)
    assert bundle.model.training
    assert found.dtype == np.float32
    bundle.model.eval()
    for i in range(23):
        with torch.no_grad():
            alone = bundle.model(input_ids=torch.from_numpy(data.take([i]).ids[None].astype(np.int64))).logits[0]
        np.testing.assert_allclose(found[i], alone.numpy(), rtol=1e-4, atol=1e-5)
    ids = outputs(bundle.model, lambda batch: batch["input_ids"][:, 0], data, pad=0)
    assert ids.tolist() == data.ids[data.starts[:-1]].tolist()
    assert len(predict(bundle, data.take([]))) == 0


@pytest.mark.parametrize("model_type", ["distilbert", "roberta", "electra", "mpnet"])
def test_every_encoder_trains(tiny: Callable[..., Path], model_type: str) -> None:
    bundle = cases.open_bundle(tiny(model_type, labels=("negative", "positive")))
    result = cases.run(bundle, None, settings=cases.SETTINGS.model_copy(update={"epochs": 4}))
    assert result.history[-1]["loss"] < result.history[0]["loss"]
