"""What a student is told to imitate: pure functions over tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, log_softmax, mse_loss

__all__ = [
    "Kind",
    "attention_scores",
    "cosine",
    "dist",
    "divergence",
    "hidden_states",
    "logits",
    "projections",
    "relations",
    "soft_targets",
    "token_targets",
    "top_targets",
]

Kind = Literal["forward", "reverse", "skew"]
SKEW = 0.1
"""Share of the teacher in what the student is held against (DistiLLM, Ko et al. 2024: .1)."""
TINY = 1e-8
PADDED = -1e9  # a share of 0 times a finite log is 0; times -inf it is nan


def divergence(student: Tensor, teacher: Tensor, kind: Kind = "forward") -> Tensor:
    """How far two distributions are apart, [..., classes] log-probabilities each -> [...].

    forward: KL(teacher || student): the student covers all that the teacher holds possible
    reverse: KL(student || teacher): it avoids what the teacher holds impossible (MiniLLM, Gu et al. 2024)
    skew:    KL(teacher || .1 teacher + .9 student): as forward, but at most ln 10 (Ko et al. 2024, section 3.1)
    """
    if kind == "reverse":
        student, teacher = teacher, student
    elif kind == "skew":
        parts = torch.stack([teacher + _log(SKEW), student + _log(1 - SKEW)])
        student = torch.logsumexp(parts, 0)
    return (teacher.exp() * (teacher - student)).sum(-1)


def soft_targets(student: Tensor, teacher: Tensor, temperature: float, kind: Kind = "forward") -> Tensor:
    """T^2 * KL(softmax(teacher/T) || softmax(student/T)), mean over the batch (Hinton et al. 2015, section 2).

    student, teacher: logits [batch, classes]. T^2 keeps the gradient's size when T changes. Divided by the batch and
    not by batch x classes, the mistake of `reduction="mean"`. kind: see `divergence`
    """
    given, wanted = log_softmax(student / temperature, dim=-1), log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * divergence(given, wanted, kind).mean()


def top_targets(
    student: Tensor, values: Tensor, indices: Tensor, rest: Tensor, temperature: float, kind: Kind = "forward"
) -> Tensor:
    """`soft_targets` where of the teacher only its k likeliest classes are known, the others together being one more class.

    student: logits [batch, classes]; values: the teacher's log-probabilities at this temperature [batch, k] of the classes
    `indices`; rest: log of the mass of all others [batch], of no account where k is all classes. By the log-sum inequality
    never above `soft_targets`, and equal to it where k is all classes.
    """
    given = log_softmax(student / temperature, dim=-1)
    known = given.gather(-1, indices)
    if indices.shape[-1] < given.shape[-1]:
        others = torch.logsumexp(given.scatter(-1, indices, -torch.inf), -1, keepdim=True)
        known, values = torch.cat([known, others], -1), torch.cat([values, rest[:, None]], -1)
    return temperature**2 * divergence(known, values, kind).mean()


def token_targets(
    student: Tensor,
    teacher: Tensor,
    mask: Tensor,
    temperature: float,
    kind: Kind = "forward",
    causal: bool = True,
) -> Tensor:
    """`soft_targets` at every token, mean over the tokens that count (word-level distillation, Kim and Rush 2016, section 3.1).

    student, teacher: logits [batch, length, vocabulary]; mask: [batch, length], 1 = a token of the text that is learned.
    causal: position t foretells token t + 1, and counts where that one does; the last position foretells nothing.
    """
    if causal:
        student, teacher, mask = student[:, :-1], teacher[:, :-1], mask[:, 1:]
    real = mask.bool()
    if not bool(real.any()):
        return student.sum() * 0.0
    return soft_targets(student[real].float(), teacher[real].float(), temperature, kind)


def dist(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 * ((1 - correlation of rows) + (1 - correlation of columns)) of softmax(. / T) (DIST, Huang et al. 2022).

    student, teacher: logits [batch, classes]. Rows: what an example is like in the eyes of both, mean over the batch; of two
    classes they are all alike or opposite and teach nothing more. Columns: which examples are more of a class, mean over
    classes; a batch of one has none.
    """
    given, wanted = torch.softmax(student / temperature, -1), torch.softmax(teacher / temperature, -1)
    total = 1 - _correlation(given, wanted).mean()
    if len(given) > 1:
        total = total + 1 - _correlation(given.t(), wanted.t()).mean()
    return temperature**2 * total


def logits(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared difference of the logits [batch, classes], over batch and classes (Ba and Caruana 2014; Kim et al. 2021)."""
    return mse_loss(student, teacher)


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


def attention_scores(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor) -> Tensor:
    """MSE of what goes into the attention's softmax, mean over pairs of real tokens, heads and layers (TinyBERT, eq. 7).

    student, teacher: [batch, heads, query, key] each, paired, head by head; mask: [batch, length], 1 = a token
    """
    real = mask.bool()
    both = (real[:, :, None] & real[:, None, :])[:, None]
    parts = []
    for mine, theirs in zip(student, teacher, strict=True):
        error = (mine.float() - theirs.float()).square() * both
        parts.append(error.sum() / (both.sum() * mine.shape[1]))
    return torch.stack(parts).mean()


def relations(student: Sequence[Tensor], teacher: Sequence[Tensor], mask: Tensor, heads: int) -> Tensor:
    """KL between the self-relations of queries, keys and values, summed over the three (MiniLMv2, Wang et al. 2021, section 3).

    student, teacher: queries, keys and values [batch, length, width] each, of one layer; both widths are multiples of
    `heads`. A relation is softmax(x x^T / sqrt(width / heads)) over the real tokens, in each of the `heads` slices of the
    vectors, whatever heads the models themselves have. KL(teacher || student), mean over slices and real tokens.
    """
    real = mask.bool()
    total = student[0].new_zeros((), dtype=torch.float32)
    for mine, theirs in zip(student, teacher, strict=True):
        given, wanted = (_relation(vectors.float(), real, heads) for vectors in (mine, theirs))
        total = total + divergence(given, wanted).transpose(1, 2)[real].mean()
    return total


def _relation(vectors: Tensor, real: Tensor, heads: int) -> Tensor:
    """log softmax over keys, [batch, heads, query, key]; hugely negative, yet finite, where the key is padding."""
    batch, length, width = vectors.shape
    parts = vectors.view(batch, length, heads, width // heads).transpose(1, 2)
    scores = parts @ parts.transpose(-1, -2) / (width // heads) ** 0.5
    return log_softmax(scores.masked_fill(~real[:, None, None, :], PADDED), -1)


def _correlation(one: Tensor, other: Tensor) -> Tensor:
    """Pearson's, along the last dimension; 0 where one of the two does not vary."""
    one, other = (x - x.mean(-1, keepdim=True) for x in (one, other))
    one, other = (x / (x.square().sum(-1, keepdim=True) + TINY).sqrt() for x in (one, other))
    return (one * other).sum(-1)


def _log(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).log())
