"""The one gradient loop and what goes with it. Every method that needs gradients brings an objective.

train       optimizer steps with checkpoints, resume and early stop
accumulate  gradients without an optimizer (Taylor and Fisher scores)
predict     answers of a model in hand, in the order of the examples
"""

from __future__ import annotations

from flyweight.training.device import evaluating, find_device, placed, seeded
from flyweight.training.gradients import accumulate
from flyweight.training.loop import TrainResult, learning_rate_factor, train
from flyweight.training.objective import Loss, Objective, TaskObjective, keep_zeros, parameter_groups
from flyweight.training.predict import outputs, predict, validation

__all__ = [
    "Loss",
    "Objective",
    "TaskObjective",
    "TrainResult",
    "accumulate",
    "evaluating",
    "find_device",
    "keep_zeros",
    "learning_rate_factor",
    "outputs",
    "parameter_groups",
    "placed",
    "predict",
    "seeded",
    "train",
    "validation",
]
