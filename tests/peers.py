"""torchvision's DenseNet, for tests that compare with it."""

from __future__ import annotations

from types import ModuleType

import pytest

from benchmarks import peers


def torchvision_densenet() -> ModuleType:
    """The module torchvision.models.densenet; skips the test where torchvision is not installed."""
    try:
        return peers.torchvision_densenet()
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
