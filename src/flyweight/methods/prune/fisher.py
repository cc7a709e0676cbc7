"""Fisher information of gates on heads and neurons, and what it says about removing them (Kwon et al. 2022, sections 4 and 5).

Near a trained model the loss grows by 1/2 (1 - m)^T F (1 - m) when gates of one become m, with F = mean over examples of g g^T
and g the gradient of an example's loss by the gates (eq. 5). Its diagonal alone says how many units every block keeps (eq. 6);
its blocks say which units of a block go well together (section 5.2).

With labels the loss is the task's. Without, it is how far the answer moves from the model's own, to second order: for classes
the loss of a label drawn from the model's own probabilities, for vectors the sum of the vector's entries with random signs r.
The latter's gradient is J^T r, and as r r^T is the identity in the mean, that of g g^T is J^T J: 1/2 (1 - m)^T F (1 - m) is
then half the squared distance by which the vector moves.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flyweight.data import Examples
from flyweight.errors import StepError
from flyweight.methods.prune.scores import Group, Scores, groups, sample, visit
from flyweight.tasks import task_named
from flyweight.training import Loss, TaskObjective, checkpoint
from flyweight.training.device import weights
from flyweight.training.objective import answer

if TYPE_CHECKING:
    from flyweight.context import Context
    from flyweight.models.bundle import Bundle
    from flyweight.settings import PruneSettings

__all__ = ["Gradients", "OwnAnswer", "diagonal", "expected", "gradients", "information", "rearranged"]

Gradients = dict[Group, Tensor]
"""{group: [examples, units] float32}, each example's gradient of its loss by the gates"""


def gradients(bundle: Bundle, settings: PruneSettings, context: Context) -> Gradients:
    """Of every head and neuron of `settings.target` on `settings.samples` texts; kept below `context.work`.

    Raises StepError without texts, TrainingError for a loss that is no number, StorageError.
    """
    data, labelled = _texts(settings, context)
    objective: Loss = TaskObjective(bundle, settings) if labelled else OwnAnswer(bundle, context.seed)
    about = (settings.target, labelled, context.seed, data.content_hash(), weights(bundle.model))
    folder, key = context.work / "gradients", checkpoint.content_hash("gradients", *about)
    sizes = groups(bundle, settings.target)
    if (kept := checkpoint.load(folder, key, context.progress.note)) is not None:
        return {group: kept["gradients"][str(group)] for group in sizes}
    found = {group: torch.zeros(len(data), size) for group, size in sizes.items()}

    def each(batch: Gradients, indices: NDArray[np.int64]) -> None:
        for group, gradient in batch.items():
            found[group][torch.from_numpy(indices)] = gradient

    visit(bundle, settings.target, objective, data, each, context.progress, "Fisher information")
    checkpoint.save(folder, {"key": key, "gradients": {str(group): one for group, one in found.items()}})
    return found


def _texts(settings: PruneSettings, context: Context) -> tuple[Examples, bool]:
    """(texts, whether their labels are of use)"""
    train = context.train
    if train is not None and train.labels is not None and context.task.labelled:
        return sample(train, settings.samples, context.seed), True
    texts = train if context.calibration is None else context.calibration
    if texts is None or not len(texts):
        raise StepError("texts to take Fisher information on", "none", "give --train F or --calibrate F")
    return sample(texts, settings.samples, context.seed), False


class OwnAnswer:
    """What stands in for the task's loss where there are no labels: see the module's docstring."""

    def __init__(self, bundle: Bundle, seed: int) -> None:
        self.bundle, self.chance = bundle, torch.Generator().manual_seed(seed)

    def loss(self, batch: dict[str, Tensor], indices: NDArray[np.int64]) -> Tensor:
        """Mean over the batch, a scalar."""
        found = answer(self.bundle, batch)  # [batch, classes or width]
        task = task_named(self.bundle.task)
        if task.labelled:
            shares = found.detach().softmax(-1).cpu()
            drawn = torch.multinomial(shares, 1, generator=self.chance)[:, 0]
            return task.loss(found, drawn.to(found.device))
        signs = torch.randint(0, 2, found.shape, generator=self.chance) * 2 - 1
        return (found * signs.to(found)).sum(-1).mean()


def diagonal(found: Gradients) -> Scores:
    """Mean over examples of g^2, {group: [units] float32} (eq. 6)."""
    return {group: gradient.double().square().mean(0).float() for group, gradient in found.items()}


def information(gradient: Tensor) -> Tensor:
    """F of one group: gradient [examples, units] -> mean of g g^T, [units, units] float64."""
    wide = gradient.double()
    return wide.t() @ wide / max(len(gradient), 1)


def expected(gradient: Tensor, gone: list[int]) -> float:
    """By how much the loss grows when the units `gone` of one group go: 1/2 (1 - m)^T F (1 - m)."""
    return float(gradient[:, gone].double().sum(1).square().mean()) / 2


def rearranged(fisher: Tensor, gone: list[int]) -> list[int]:
    """Units to remove instead of `gone`, as many: one is swapped for one that stays as long as 1/2 (1 - m)^T F (1 - m) falls.

    fisher: [units, units]. Units that stay are offered in turn, those of the least information first, and take the place of the
    one whose return lowers the loss most, as in the paper's code; what is left at the end, no single swap can lower. In the
    place of i, j changes the loss by (F p)_j - (F p)_i + (F_ii + F_jj) / 2 - F_ij, p = 1 - m.
    """
    full: NDArray[np.float64] = fisher.double().cpu().numpy()
    half: Any = np.diagonal(full) / 2
    least = 1e-12 * float(half.sum())
    out = np.zeros(len(full), dtype=bool)
    out[gone] = True
    pull = full[:, out].sum(1)  # F p
    swapped = bool(gone)
    while swapped:
        swapped = False
        for j in np.argsort(half, kind="stable"):
            if out[j]:
                continue
            inside = np.flatnonzero(out)
            change = pull[j] + half[j] + half[inside] - pull[inside] - full[j, inside]
            best = int(change.argmin())
            if change[best] < -least:
                i = inside[best]
                out[j], out[i], swapped = True, False, True
                pull += full[:, j] - full[:, i]
    return [int(unit) for unit in np.flatnonzero(out)]
