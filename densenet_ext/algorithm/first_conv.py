"""A network's first convolution as one operation, without gradients: images have few channels, for which PyTorch's own
convolutions on a processor are slow."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from densenet_ext import kernels
from densenet_ext.algorithm.conversions import cast, is_empty, result_dtype
from densenet_ext.algorithm.inference import Call, Made
from densenet_ext.algorithm.layout import channels_last_stride
from densenet_ext.checks import autocast_enabled

MOST_CHANNELS = 4
"""Of images. With 3 and 4 the kernel takes 0.75 to 1.0 of the time of PyTorch's own convolution of large images, 0.3 to
0.6 of small ones; with 8 and more 0.95 to 1.05 of large ones (one thread of an AVX-512 processor)."""


def first_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Tensor | None:
    """Returns the convolution [N, O, *spatial] of images x [N, C, *spatial] of any layout with ``weight``
    [O, C, *window], channels_last in memory, in the dtype of PyTorch's own, autocast's when it is on.

    None where PyTorch's own has to run: with gradients, in compiled code, of many channels, on other devices, of tensor
    subclasses, and for all that it refuses. Stride and padding have an entry for each spatial dimension.
    """
    call = prepared_conv(x, weight, bias, stride, padding)
    return None if call is None else call(x)


def prepared_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...]
) -> Call | None:
    """Returns the call of ``first_conv`` for images like x, as long as weight and bias have the same form."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not x.is_cpu:
        return None
    if any(t is not None and type(t) not in (Tensor, nn.Parameter) for t in (x, weight, bias)):
        return None
    ops, dtype, size = kernels.select(x), result_dtype(x), _result_size(x, weight, stride, padding)
    if ops is kernels.plain or size is None or not _fit(x, weight, bias, dtype):
        return None
    acc = kernels.acc_dtype(dtype)

    def compute(x: Tensor, out: Tensor) -> None:
        ops.first_conv(x, weight, None if bias is None else cast(bias, acc), stride, padding, out)

    return Call(compute, Made(size, channels_last_stride(size), dtype, x.device))


def _result_size(
    x: Tensor, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...]
) -> tuple[int, ...] | None:
    """The result's size; None where the kernel does not compute it, or is not faster."""
    dims = x.dim() - 2
    if not 1 <= dims <= 3 or weight.dim() != x.dim() or not len(stride) == len(padding) == dims:
        return None
    window = weight.shape[2:]
    if min(stride) < 1 or min(padding) < 0:
        return None
    if x.shape[1] != weight.shape[1] or x.shape[1] > MOST_CHANNELS or window.numel() == 1 or is_empty(x):
        return None
    geometry = zip(x.shape[2:], window, stride, padding, strict=True)
    spatial = [(n + 2 * p - w) // s + 1 for n, w, s, p in geometry]
    return (x.shape[0], weight.shape[0], *spatial) if min(spatial) > 0 else None


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> bool:
    """Whether PyTorch's convolution takes tensors of these dtypes, and the kernel of this memory."""
    if not x.layout == weight.layout == torch.strided or not weight.is_cpu or not (bias is None or bias.is_cpu):
        return False
    given = {x.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype}
    casts = dtype != torch.float64 and autocast_enabled("cpu")
    dtypes = given <= {dtype, torch.float32} if casts else given == {dtype}
    channels_last = weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    return dtypes and (channels_last or weight.is_contiguous())
