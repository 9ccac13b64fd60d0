"""Picks who computes: the compiled operations (``torch.ops.densenet_ext``) or the same ones in plain PyTorch.

``select(x)`` gives the operations for a tensor as one namespace, so that a unit asks once and then calls
``ops.bn_relu(...)``, ``ops.channel_stats(...)`` and so on; ``plain`` documents them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from densenet_ext import _extension
from densenet_ext.kernels import fakes, plain
from densenet_ext.kernels.plain import acc_dtype

__all__ = ["OPS", "acc_dtype", "backend", "force_plain", "plain", "select", "why_plain"]

OPS = (
    "channel_stats",
    "append_features",
    "feature_grad",
    "bn_relu",
    "cat_bn_relu",
    "bn_relu_backward_reduce",
    "bn_relu_backward",
    "bn_relu_conv1x1",
    "bn_relu_conv1x1_backward",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_backward_reduce",
    "bn_relu_avg_pool_backward",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward_reduce",
    "bn_relu_max_pool_backward",
)
"""The names of the operations."""

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
_DEVICES = frozenset(
    name for name, compiled in (("cpu", _extension.has_cpu), ("cuda", _extension.has_cuda)) if compiled
)
# Overloads rather than packets: resolving the overload would cost a microsecond at every call.
_compiled: Any = None
if _extension.module is not None:
    _compiled = SimpleNamespace(**{name: getattr(torch.ops.densenet_ext, name).default for name in OPS})
    fakes.register(OPS)
_forced = 0


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """ "compiled" or "plain": who computes on feature maps of this device and dtype."""
    usable = torch.device(device).type in _DEVICES and dtype in _DTYPES and not _forced
    return "compiled" if usable else "plain"


def why_plain(device: torch.device | str) -> str | None:
    """In words why nothing compiled runs on ``device``, or None when it does."""
    kind = torch.device(device).type
    if _extension.module is None:
        return _extension.why_missing
    if kind not in _DEVICES:
        return f"the compiled part has no kernels for {kind}"
    return "plain PyTorch is forced" if _forced else None


def select(x: Tensor) -> Any:
    """The namespace of operations for feature maps like ``x``."""
    if x.device.type in _DEVICES and x.dtype in _DTYPES and not _forced:
        return _compiled
    return plain


@contextmanager
def force_plain() -> Iterator[None]:
    """Within it everything runs in plain PyTorch, in every thread."""
    global _forced
    _forced += 1
    try:
        yield
    finally:
        _forced -= 1
