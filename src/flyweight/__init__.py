"""Flyweight: the smallest, fastest model that still meets your quality bar, proved by measurement.

The public names, imported when first used: `import flyweight` itself loads neither torch nor an engine.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

# public name -> its module; "!" marks those that need the extra `compress`
_WHERE = {
    "Bundle": "flyweight.models.bundle",
    "FlyweightError": "flyweight.errors",
    "Interrupted": "flyweight.errors",
    "Manifest": "flyweight.artifact",
    "Measurement": "flyweight.artifact",
    "Recipe": "flyweight.recipe",
    "Session": "flyweight.runtime",
    "compare": "flyweight.compare",
    "compress": "!flyweight.api",
    "distill": "!flyweight.api",
    "evaluate": "flyweight.compare",
    "finetune": "!flyweight.api",
    "inspect": "!flyweight.inspection",
    "open_model": "flyweight.runtime",
    "plan": "!flyweight.api",
    "prune": "!flyweight.api",
    "quantize": "!flyweight.api",
    "read_recipe": "flyweight.recipe",
    "run_recipe": "!flyweight.api",
    "verify": "flyweight.artifact",
}

__all__ = ["__version__", *_WHERE]


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'flyweight' has no attribute '{name}'")
    where = _WHERE[name]
    if where.startswith("!"):
        from flyweight.extras import need

        need("torch", f"{name} models")
        need("transformers", f"{name} models")
    return getattr(importlib.import_module(where.removeprefix("!")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
