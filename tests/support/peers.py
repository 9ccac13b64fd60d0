"""The libraries whose DenseNets are fused or that train them, the real ones; skips the test where one is missing."""

from __future__ import annotations

from types import ModuleType

import pytest

from benchmarks import peers


def torchvision_densenet() -> ModuleType:
    """The module torchvision.models.densenet."""
    return _peer("torchvision.models.densenet")


def timm_densenet() -> ModuleType:
    """The module timm.models.densenet."""
    return _peer("timm.models.densenet")


def monai_densenet() -> ModuleType:
    """The module monai.networks.nets.densenet."""
    return _peer("monai.networks.nets.densenet")


def torchxrayvision_models() -> ModuleType:
    """The module torchxrayvision.models."""
    return _peer("torchxrayvision.models")


def lightning() -> ModuleType:
    """The module pytorch_lightning, which imports torchvision."""
    return _peer("pytorch_lightning")


def _peer(name: str) -> ModuleType:
    try:
        return peers.peer(name)
    except peers.Unavailable as reason:
        pytest.skip(str(reason))
