"""What a student is told to imitate: pure functions over tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, kl_div, log_softmax

__all__ = ["cosine", "hidden_states", "projections", "soft_targets"]


def soft_targets(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(softmax(teacher/T) || softmax(student/T)), mean over the batch (Hinton et al. 2015, section 2).

    student, teacher: logits [batch, classes]. T^2 keeps the gradient's size when T changes. Divided by the batch and
    not by batch x classes, the mistake of `reduction="mean"`.
    """
    wanted = log_softmax(teacher / temperature, dim=-1)
    given = log_softmax(student / temperature, dim=-1)
    return temperature**2 * kl_div(given, wanted, reduction="batchmean", log_target=True)


def cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of the vectors [batch, width], mean over the batch."""
    return (1.0 - cosine_similarity(student, teacher, dim=-1)).mean()


def hidden_states(
    student: Sequence[Tensor], teacher: Sequence[Tensor], maps: Sequence[nn.Module], mask: Tensor
) -> Tensor:
    """MSE(student W, teacher) over real tokens, mean over tokens, width and pairs of layers (TinyBERT, eq. 8).

    student, teacher: [batch, length, width] each, paired; maps: W of each pair; mask: [batch, length], 1 = a token
    """
    real = mask.bool()
    parts = [
        (project(mine)[real].float() - theirs[real].float()).square().mean()
        for mine, theirs, project in zip(student, teacher, maps, strict=True)
    ]
    return torch.stack(parts).mean()


def projections(pairs: int, student_width: int, teacher_width: int) -> nn.ModuleList:
    """One learned map a pair of layers, student width -> teacher width, thrown away after the training.

    Where both widths agree there is none: the states are compared as they are (Sun et al. 2019, section 3), so that a
    student cut from its teacher is held where it came from. TinyBERT learns W there too; that gives the student
    a way to match the loss by rotating its states away from those its later layers were trained on.
    """
    if student_width == teacher_width:
        return nn.ModuleList(nn.Identity() for _ in range(pairs))
    return nn.ModuleList(nn.Linear(student_width, teacher_width, bias=False) for _ in range(pairs))
