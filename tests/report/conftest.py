from __future__ import annotations

import pytest
from sample_manifest import make

from flyweight.artifact import Manifest


@pytest.fixture
def manifest() -> Manifest:
    return make()
