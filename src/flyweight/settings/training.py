"""Gradient methods: fine-tuning, and learning from a teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from flyweight.settings.base import Settings, Share

__all__ = ["DistillSettings", "FinetuneSettings", "TeacherSettings", "TrainSettings"]


class TrainSettings(Settings):
    """What every gradient method shares (see `flyweight.training`)."""

    epochs: float = Field(3.0, ge=0)
    """Passes over the training data."""
    max_steps: int | None = Field(None, ge=1)
    """Stop after this many optimizer steps, whatever `epochs` says."""
    batch_size: int = Field(32, ge=1)
    """Examples per optimizer step."""
    learning_rate: float = Field(5e-5, gt=0)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.01, ge=0)
    """Decoupled weight decay; biases and norms are exempt."""
    warmup: Share = 0.1
    """Share of the steps over which the learning rate rises linearly from 0."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How the learning rate falls to 0 after the warm-up."""
    clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    evaluations_per_epoch: int = Field(1, ge=1)
    """How often the validation metric is taken; the best checkpoint is kept."""
    patience: int | None = Field(None, ge=1)
    """Stop early after this many evaluations without a better one."""


class FinetuneSettings(TrainSettings):
    """Train all weights on the labelled data."""


class TeacherSettings(TrainSettings):
    """What learning from a teacher's answers takes (Hinton et al. 2015)."""

    teacher: str = "reference"
    """`reference` (the model after `finetune`), or a model folder or artifact with the same labels. One that reads other tokens
    teaches by its answers alone."""
    temperature: float = Field(2.0, gt=0)
    """T: softens both distributions."""
    alpha: Share = 0.7
    """Weight of the teacher's answer against the label; 1 needs no labels."""
    hidden_weight: float = Field(0.0, ge=0)
    """Weight of the hidden-state loss (TinyBERT, Jiao et al. 2020, section 3.1); 0 leaves it out."""
    unlabelled: Path | None = None
    """A file of further texts without labels; they take part in the teacher's half of the loss."""

    @property
    def taught(self) -> bool:
        """Whether the step learns from a teacher at all."""
        return True

    @property
    def teachers(self) -> tuple[str, ...]:
        """All that are named, `teacher` first."""
        return (self.teacher,)

    @property
    def inside(self) -> str:
        """The settings in use that compare teacher and student token by token, or nothing."""
        return "hidden_weight" if self.hidden_weight else ""


class DistillSettings(TeacherSettings):
    """Train a student to answer as its teacher does (Hinton et al. 2015).

    Loss: (1-alpha) * CE(y, student) + alpha * (T^2 * KL(softmax(teacher/T) || softmax(student/T)) + dist_weight * DIST
    + mse_weight * MSE of logits), batch mean, + hidden_weight * MSE(projected student hidden states, teacher hidden states)
    + embedding_weight * the same of embeddings + attention_weight * MSE of scores + relation_weight * KL of relations.
    """

    learning_rate: float = Field(1e-4, gt=0)
    """Peak learning rate of AdamW."""
    student: str | None = None
    """A model folder to start from, or one with a config.json alone for a student of random weights; by default the student is
    made from the model at hand by `layers` and `width`."""
    layers: Literal["all", "every-other"] | tuple[int, ...] = "all"
    """Layers that the student keeps: `all`, `every-other`, or a list of numbers from 0."""
    width: int | None = Field(None, ge=1)
    """Hidden width of the student, a multiple of its number of heads: cut by truncated SVD of hidden states on the texts."""
    more_teachers: tuple[str, ...] = ()
    """Further teachers, as `teacher`; their answers count as well, hidden states are those of `teacher`."""
    teacher_weights: tuple[Annotated[float, Field(gt=0)], ...] = ()
    """Weights of the answers of `teacher` and `more_teachers`, in this order; by default all alike."""
    kl: Literal["forward", "reverse", "skew", "none"] = "forward"
    """How answers are compared: KL(teacher || student), KL(student || teacher), or KL(teacher || .1 teacher + .9 student) (Ko et
    al. 2024)."""
    dist_weight: float = Field(0.0, ge=0)
    """Weight of DIST: correlation of rows and columns of the answers (Huang et al. 2022)."""
    mse_weight: float = Field(0.0, ge=0)
    """Weight of the mean squared difference of logits."""
    embedding_weight: float = Field(0.0, ge=0)
    """Weight of the loss of what the first block reads (Jiao et al. 2020, eq. 9)."""
    attention_weight: float = Field(0.0, ge=0)
    """Weight of the loss of attention scores (Jiao et al. 2020, eq. 7); the student has the teacher's heads, or some of them."""
    relation_weight: float = Field(0.0, ge=0)
    """Weight of the relations among queries, keys and values of the last student layer (Wang et al. 2021)."""
    relation_heads: int = Field(32, ge=1)
    """Slices that relations are taken in; they divide both widths, and have nothing to do with the models' heads."""
    layer_map: Literal["uniform", "last"] | tuple[int, ...] = "uniform"
    """The teacher layers that the student's imitate: `uniform`, spread evenly; `last`, the last ones; or one number each."""
    top_k: int | None = Field(None, ge=1)
    """Keep of the teacher's answers only so many classes, and the mass of the others as one more."""
    augment: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of tokens that are masked or replaced at random, anew in every epoch, before the teacher is asked; 0: texts as they
    are. The teacher then answers in every step."""
    control: bool = False
    """Train the same student for the same steps without the teacher as well, and report both."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        inside = self.hidden_weight + self.embedding_weight + self.attention_weight + self.relation_weight
        answers = self.kl != "none" or self.dist_weight + self.mse_weight > 0
        if self.alpha == 1 and not answers and inside == 0:
            raise ValueError("kl none and alpha 1 leave nothing to learn: give another loss a weight")
        if self.augment and inside == 0 and not (self.alpha > 0 and answers):
            raise ValueError("augment is for the teacher's half of the loss: give it a weight, such as alpha")
        if self.top_k is not None and self.augment:
            raise ValueError("top_k is for answers that are kept; with augment the teacher answers anew: leave out one")
        if self.top_k is not None and self.dist_weight + self.mse_weight > 0:
            raise ValueError("dist_weight and mse_weight need the answers for all classes: leave out top_k")
        if self.teacher_weights and len(self.teacher_weights) != len(self.teachers):
            raise ValueError(f"teacher_weights names one weight a teacher, {len(self.teachers)} in all")
        return self

    @property
    def teachers(self) -> tuple[str, ...]:
        return (self.teacher, *self.more_teachers)

    @property
    def inside(self) -> str:
        names = ("hidden_weight", "embedding_weight", "attention_weight", "relation_weight", "augment")
        return ", ".join(name for name in names if getattr(self, name))
