"""torchvision's DenseNet, for tests that compare with it."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any

import pytest
import torch

_KEPT: list[Any] = []  # a Library withdraws what it declared when it is collected


@functools.cache
def _import() -> ModuleType | None:
    try:
        torch.ops.torchvision.nms  # noqa: B018
    except AttributeError:
        # The wheel's operators don't load on every build of torch, and the import asks for these two; the models don't.
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _KEPT.append(library)
    try:
        return importlib.import_module("torchvision.models.densenet")
    except (ImportError, RuntimeError):
        return None


def torchvision_densenet() -> ModuleType:
    """The module torchvision.models.densenet; skips the test where torchvision is not installed."""
    module = _import()
    if module is None:
        pytest.skip("torchvision is not installed")
    return module
