from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import artifacts


@pytest.fixture(scope="session")
def small(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a tiny classifier (negative, positive; at most 64 tokens). Never write into it."""
    return artifacts.write(tiny("bert", labels=("negative", "positive")), tmp_path_factory.mktemp("artifact") / "small")


@pytest.fixture(scope="session")
def vectors(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact of a tiny embedding model. Never write into it."""
    return artifacts.write(tiny("bert", labels=None), tmp_path_factory.mktemp("artifact") / "vectors", "embedding")
