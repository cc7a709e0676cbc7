from __future__ import annotations

import pytest

from flyweight.artifact import Manifest
from sample_manifest import make


@pytest.fixture
def manifest() -> Manifest:
    return make()
