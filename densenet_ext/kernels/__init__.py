"""Picks who computes: the compiled operations (``torch.ops.densenet_ext``) or the same ones in plain PyTorch.

``select(x)`` gives the operations for a tensor as one namespace, so that a unit asks once and then calls
``ops.bn_relu(...)``, ``ops.channel_stats(...)`` and so on; ``plain`` documents them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from densenet_ext import _extension
from densenet_ext.kernels import fakes, plain
from densenet_ext.kernels.plain import acc_dtype

__all__ = [
    "CPU_OPS",
    "KEPT_OPS",
    "OPS",
    "UNIT_OPS",
    "acc_dtype",
    "backend",
    "force_plain",
    "plain",
    "select",
    "tf32",
    "why_plain",
]

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
    "bn_relu_conv3x3",
    "bn_relu_conv3x3_backward",
    "bn_relu_avg_pool",
    "bn_relu_avg_pool_backward_reduce",
    "bn_relu_avg_pool_backward",
    "bn_relu_max_pool",
    "bn_relu_max_pool_backward_reduce",
    "bn_relu_max_pool_backward",
)
"""The names of the operations over rows, which ``plain`` has, too."""

UNIT_OPS = (
    "move_running_stats",
    "first_conv",
    "dense_layers",
    "dense_layers_backward",
    "basic_layers",
    "basic_layers_backward",
    "whole_transition",
    "whole_transition_backward",
    "whole_stem",
    "whole_stem_backward",
)
"""The operations that run a whole unit; what they compute stands, in plain PyTorch, in ``algorithm``, and
``first_conv`` is PyTorch's own convolution."""

KEPT_OPS = ("keep_layers", "keep_norms", "keep_packed", "keep_tensors", "kept_hold", "drop_kept")
"""Those that have others keep tensors from call to call; they compute nothing, on any device."""

CPU_OPS = frozenset(("move_running_stats", "first_conv"))
"""Those that have no kernel for GPUs."""

_DTYPES = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
# Overloads rather than packets: resolving the overload would cost a microsecond at every call.
_compiled: Any = None
# The same, with the products of float32 numbers on a GPU's tensor cores.
_compiled_tf32: Any = None
if _extension.module is not None:
    try:
        _compiled = SimpleNamespace(
            **{name: getattr(torch.ops.densenet_ext, name).default for name in (*OPS, *UNIT_OPS, *KEPT_OPS)}
        )
    except AttributeError as error:  # an installation in place whose sources went on
        raise ImportError(f"the compiled part is of another version ({error}); build densenet_ext again") from None
    _compiled.kept_hold = _extension.module.kept_hold  # asked at every call, and no tensors for a dispatcher
    _compiled_tf32 = SimpleNamespace(**vars(_compiled))
    for _name in ("bn_relu_conv1x1", "bn_relu_conv1x1_backward", "bn_relu_conv3x3", "bn_relu_conv3x3_backward"):
        setattr(_compiled_tf32, _name, partial(getattr(_compiled, _name), tf32=True))
    for _name in (*OPS, *UNIT_OPS):
        fakes.register((_name,), ("cpu", "cuda") if _extension.has_cuda and _name not in CPU_OPS else ("cpu",))
_forced = 0


@cache
def _why_not_on_gpu(index: int) -> str | None:
    """Returns why the compiled kernels do not run on this GPU, or None when they do; asks the driver once."""
    module = _extension.module
    if module is None or not _extension.has_cuda:
        return f"the compiled part has no kernels for cuda ({_extension.why_no_cuda})"
    major, minor = torch.cuda.get_device_capability(index)
    with torch.cuda.device(index):
        error = module.why_no_kernel()
    if error is None:
        return None
    built = f"built for {', '.join(_extension.build_info()['cuda_architectures'])}"
    return f"no compiled kernel runs on this GPU of compute capability {major}.{minor} ({error}; {built})"


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


def backend(device: torch.device | str, dtype: torch.dtype = torch.float32) -> str:
    """ "compiled" or "plain": who computes on feature maps of this device and dtype."""
    return "compiled" if dtype in _DTYPES and why_plain(device) is None else "plain"


def why_plain(device: torch.device | str) -> str | None:
    """Returns why nothing compiled runs on ``device``, in words, or None when it does."""
    device = torch.device(device)
    if _extension.module is None:
        return _extension.why_missing
    if device.type not in ("cpu", "cuda"):
        return f"the compiled part has no kernels for {device.type}"
    if device.type == "cuda":
        if not torch.cuda.is_available():
            return "there is no GPU here"
        reason = _why_not_on_gpu(_index(device))
        if reason is not None:
            return reason
    return "plain PyTorch is forced" if _forced else None


def select(x: Tensor) -> Any:
    """The namespace of operations for feature maps like ``x``.

    float32 on a GPU is multiplied as TF32 where PyTorch's convolutions are (``torch.backends.cudnn``).
    """
    if x.dtype not in _DTYPES or _forced:
        return plain
    if x.is_cpu:
        return plain if _compiled is None else _compiled
    if not x.is_cuda or _why_not_on_gpu(_index(x.device)) is not None:
        return plain
    return _compiled_tf32 if tf32(x) else _compiled


def tf32(x: Tensor) -> bool:
    """Returns whether float32 on a GPU is multiplied as TF32: where PyTorch's convolutions are."""
    if not x.is_cuda or x.dtype != torch.float32:
        return False
    cudnn: Any = torch.backends.cudnn
    return bool(cudnn.conv.fp32_precision == "tf32")


@contextmanager
def force_plain() -> Iterator[None]:
    """Within it everything runs in plain PyTorch, in every thread."""
    global _forced
    _forced += 1
    try:
        yield
    finally:
        _forced -= 1
