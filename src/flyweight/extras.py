"""Optional parts: say which command installs what is missing, instead of an ImportError."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from flyweight.errors import MissingExtra

# module -> the extra that brings it
EXTRAS = {
    "torch": "compress",
    "transformers": "compress",
    "accelerate": "compress",
    "safetensors": "compress",
    "datasets": "compress",
    "pyarrow": "compress",
    "onnx": "compress",
    "openvino": "openvino",
    "pynvml": "energy",
}


def have(module: str) -> bool:
    """Whether `module` can be imported; imports nothing."""
    return importlib.util.find_spec(module) is not None


def need(module: str, purpose: str) -> ModuleType:
    """Import `module`, or raise MissingExtra with the command that adds it.

    purpose: what it is needed for, as the end of "... is needed to ...", e.g. "read parquet files".
    """
    if not have(module):
        extra = EXTRAS[module]
        raise MissingExtra(
            f"'{module}' is needed to {purpose} and is not installed", hint=f'run: pip install "flyweight[{extra}]"'
        )
    return importlib.import_module(module)
