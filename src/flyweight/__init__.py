"""Flyweight: the smallest, fastest model that still meets your quality bar, proved by measurement.

The public names, imported when first used: `import flyweight` itself loads neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_WHERE = {
    "Bundle": "flyweight.models.bundle",
    "FlyweightError": "flyweight.errors",
    "Manifest": "flyweight.artifact",
    "Measurement": "flyweight.artifact",
    "Recipe": "flyweight.recipe",
    "verify": "flyweight.artifact",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'flyweight' has no attribute '{name}'")
    return getattr(importlib.import_module(_WHERE[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
