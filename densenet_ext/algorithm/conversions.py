"""Norms, dtypes and gradients in the form in which the kernels take and give them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from densenet_ext.algorithm.layout import pixels
from densenet_ext.algorithm.values import Norm, Tensors
from densenet_ext.checks import autocast_enabled


def norm_tensors(norm: Norm) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias, and the running statistics if it normalises with them."""
    if norm.batch_stats:
        return norm.weight, norm.bias, None, None
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def frozen_norm(tensors: Tensors, batch_stats: bool, eps: float) -> Norm:
    """The norm of four ``norm_tensors`` once more, with running statistics that do not move."""
    weight, bias, mean, var = tensors
    return Norm(weight, bias, mean, var, None, batch_stats, False, 0.0, eps)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x contiguous in ``dtype``; x itself when it is so."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def norm_values(
    tensors: Tensors, mean: Tensor, var: Tensor, batch_stats: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """The five arguments of a norm as the kernels take them; mean and var are the batch's."""
    weight, bias, running_mean, running_var = tensors
    if not batch_stats:
        assert running_mean is not None and running_var is not None
        mean, var = cast(running_mean, dtype), cast(running_var, dtype)
    return (
        mean,
        var,
        None if weight is None else cast(weight, dtype),
        None if bias is None else cast(bias, dtype),
        eps,
    )


def grad_like(grad: Tensor | None, x: Tensor | None, needed: bool = True) -> Tensor | None:
    """A parameter's gradient in its shape, dtype and layout (which autograd and DDP want, and else copy to)."""
    if grad is None or x is None or not needed:
        return None
    if grad.dtype == x.dtype and grad.shape == x.shape and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad.view(x.shape))


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a convolution's result on x: autocast's when it is on."""
    kind = x.device.type
    if x.dtype != torch.float64 and autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def is_lowered(x: Tensor, dtype: torch.dtype) -> bool:
    """Returns whether features of ``dtype`` float32 are multiplied as bfloat16 by eager's convolutions.

    They are where float32 comes in under autocast on the CPU, as behind the pooling of volumes: a concatenation with it
    is float32 again.
    """
    return x.is_cpu and dtype == torch.float32 and result_dtype(x) == torch.bfloat16


def as_pooled(out: Tensor) -> Tensor:
    """A pooling's result in the dtype that PyTorch gives it: autocast on the CPU pools volumes in float32."""
    kind = out.device.type
    if out.dtype != torch.float64 and kind == "cpu" and autocast_enabled(kind):
        return out.float()
    return out


def is_empty(x: Tensor) -> bool:
    """Returns whether x [N, C, *spatial] has no pixel: the usual formulation runs then, as PyTorch's does."""
    return pixels(x.shape) == 0 or x.shape[1] == 0


class _WithoutAutocast:
    """Switches autocast off, as ``torch.autocast(kind, enabled=False)`` at a tenth of its time."""

    def __init__(self, kind: str) -> None:
        self._kind = kind

    def __enter__(self) -> None:
        torch.set_autocast_enabled(self._kind, False)

    def __exit__(self, *_: object) -> None:
        torch.set_autocast_enabled(self._kind, True)


def without_autocast(kind: str) -> AbstractContextManager[Any]:
    """Returns a context in which autocast is off for a device type: units choose their dtypes themselves."""
    return _WithoutAutocast(kind) if autocast_enabled(kind) else _AS_IT_IS


_AS_IT_IS = nullcontext()
