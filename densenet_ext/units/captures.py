"""Tells when a fused unit must not run: something sees the single operations, or wants a derivative only they have."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import Parameter
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_PROXY_MODE = torch._C._TorchDispatchModeKey.PROXY
_FAKE_MODE = torch._C._TorchDispatchModeKey.FAKE


def reason(*tensors: Any) -> str | None:
    """Returns in words why the usual formulation has to run on ``tensors``, or None when the fused one may.

    That is: ``torch.export``, ONNX export, TorchScript tracing, FX tracing, ``torch.func`` transforms, forward-mode
    differentiation, modes that see operations, patched classes of PyTorch, and tensor subclasses.
    """
    # not torch.compiler.is_exporting(): under torch 2.11 compiled code takes that for true, and would never run fused
    if torch.compiler._is_exporting_flag:
        return "torch.export captures the single operations"
    if _patched():
        return patched()
    if torch.compiler.is_compiling():
        return None
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return "a trace records the single operations"
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a torch.func transform differentiates or batches the single operations"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation needs the single operations"
    if torch._C._get_dispatch_mode(_PROXY_MODE) is not None:
        return "a proxy mode records the single operations"
    if torch._C._len_torch_function_stack() > 0 or torch._C._len_torch_dispatch_stack() > 0:
        mode = _mode_that_sees()
        if mode is not None:
            return f"{type(mode).__name__} sees the single operations"
    for x in tensors:
        if type(x) is not torch.Tensor and type(x) is not Parameter and type(x) is not FakeTensor:
            if isinstance(x, Proxy):
                return "FX traces the single operations"
            if not isinstance(x, torch.Tensor):
                continue  # which the unit refuses
            return f"the tensor subclass {type(x).__name__} may give operations another meaning"
    return None


def patched() -> str | None:
    """Returns in words that code of PyTorch is not what it was when this was imported, or None."""
    return "a class or function of PyTorch was replaced, which may see or change the operations" if _patched() else None


def _mode_that_sees() -> Any:
    """Returns the innermost mode that is neither PyTorch's default device nor a bookkeeper of tensors without data."""
    modes = [*_get_current_function_mode_stack(), *_get_current_dispatch_mode_stack()]
    return next((mode for mode in reversed(modes) if not _is_blind(mode)), None)


def _is_blind(mode: Any) -> bool:
    if isinstance(mode, DeviceContext) or type(mode).__module__.startswith("densenet_ext."):
        return True
    return mode is torch._C._get_dispatch_mode(_FAKE_MODE)


def _code() -> tuple[object, ...]:
    """Returns what runs when PyTorch's modules are called, which tools that count or quantise replace."""
    return (
        nn.Module.__call__,
        nn.Sequential.forward,
        _BatchNorm.forward,
        nn.BatchNorm1d.forward,
        nn.BatchNorm2d.forward,
        nn.BatchNorm3d.forward,
        nn.SyncBatchNorm.forward,
        nn.Conv1d.forward,
        nn.Conv2d.forward,
        nn.Conv3d.forward,
        nn.Conv1d._conv_forward,
        nn.Conv2d._conv_forward,
        nn.Conv3d._conv_forward,
        nn.ReLU.forward,
        nn.Dropout.forward,
        nn.Dropout1d.forward,
        nn.Dropout2d.forward,
        nn.Dropout3d.forward,
        nn.AvgPool1d.forward,
        nn.AvgPool2d.forward,
        nn.AvgPool3d.forward,
        nn.MaxPool1d.forward,
        nn.MaxPool2d.forward,
        nn.MaxPool3d.forward,
        nn.AdaptiveAvgPool1d.forward,
        nn.AdaptiveAvgPool2d.forward,
        nn.AdaptiveAvgPool3d.forward,
        nn.Flatten.forward,
        F.batch_norm,
        F.relu,
        F.dropout,
        F.conv1d,
        F.conv2d,
        F.conv3d,
        F.avg_pool2d,
        F.max_pool2d,
        F.adaptive_avg_pool2d,
        torch.cat,
        torch.relu,
        torch.flatten,
    )


_PYTORCH = _code()
_FOREIGN = tuple(f for f in _PYTORCH if not (getattr(f, "__module__", "torch") or "torch").startswith("torch"))


@torch.compiler.assume_constant_result
def _patched() -> bool:
    return _code() != _PYTORCH or bool(_FOREIGN)
