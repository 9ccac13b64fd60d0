"""Decides whether a fused unit may run: not when something looks at the single operations, or differentiates them."""

from __future__ import annotations

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from torch.fx import Proxy
from torch.nn import Parameter

_PROXY_MODE = torch._C._TorchDispatchModeKey.PROXY


def plain_reason(*tensors: Any) -> str | None:
    """Returns why the usual formulation has to run on ``tensors``, in words, or None when the fused one may.

    That is: ``torch.export``, ONNX export, TorchScript tracing, FX tracing, ``torch.func`` transforms, forward-mode
    differentiation, and tensor subclasses.
    """
    # not torch.compiler.is_exporting(): under torch 2.11 compiled code takes that for true, and would never run fused
    if torch.compiler._is_exporting_flag:
        return "torch.export captures the single operations"
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
    for x in tensors:
        if type(x) is not torch.Tensor and type(x) is not Parameter and type(x) is not FakeTensor:
            if isinstance(x, Proxy):
                return "FX traces the single operations"
            return f"the tensor subclass {type(x).__name__} may give operations another meaning"
    return None
