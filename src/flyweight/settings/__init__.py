"""Every setting there is. One frozen class a step; its fields are the flags, the YAML keys and the reference pages.

Nothing here imports torch: listing steps and printing help must stay cheap.
"""

from __future__ import annotations

from flyweight.settings.base import Settings
from flyweight.settings.prune import PruneSettings
from flyweight.settings.quantize import QuantizeSettings
from flyweight.settings.running import Accept, DataSettings, MeasureSettings
from flyweight.settings.training import DistillSettings, FinetuneSettings, TeacherSettings, TrainSettings

__all__ = [
    "Accept",
    "DataSettings",
    "DistillSettings",
    "FinetuneSettings",
    "MeasureSettings",
    "PruneSettings",
    "QuantizeSettings",
    "Settings",
    "TeacherSettings",
    "TrainSettings",
]
