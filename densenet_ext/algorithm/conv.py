"""PyTorch's own convolutions of stride 1 over rows, and their gradients.

They run some hundred times a step, so that what Python adds to each counts: shapes are worked out once
(``layout.from_rows``), and the bindings of ``torch`` are called, which cost less than those of ``torch.ops``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext.algorithm.layout import channels_last_stride, from_rows, new_features, to_rows

_convolution_backward = torch.ops.aten.convolution_backward.default


def _image(rows: Tensor, size: Sequence[int], weight: Tensor) -> tuple[Tensor, Tensor]:
    # 1-D runs as 2-D of height 1: only then does PyTorch keep channels_last
    if len(size) == 3:
        size, weight = (size[0], size[1], 1, size[2]), weight.unsqueeze(2)
    return from_rows(rows, size), weight


def _padding(weight: Tensor) -> list[int]:
    return [n // 2 for n in weight.shape[2:]]


def _conv(rows: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None) -> Tensor:
    x, weight = _image(rows, size, weight)
    convolution = torch.conv3d if weight.dim() == 5 else torch.conv2d
    return convolution(x, weight, bias, 1, _padding(weight))


def conv_same(rows: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows [M, C_out] of the convolution that keeps the size, of rows [M, C]; size: [N, any, *spatial]."""
    return to_rows(_conv(rows, size, weight, bias))


def conv_same_features(rows: Tensor, size: Sequence[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as a feature map [N, C_out, *spatial], channels_last in memory and no view."""
    out = _conv(rows, size, weight, bias)
    shape = (size[0], weight.shape[0], *size[2:])
    if out.shape == shape and list(out.stride()) == channels_last_stride(shape):
        return out
    return new_features(out, shape).copy_(out.view(shape) if out.dim() != len(shape) else out)


def conv_same_backward(
    grad: Tensor, rows: Tensor, size: Sequence[int], weight: Tensor, wants: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows [M, C] (as rows) and of the weight (in its shape), each None unless wanted.

    grad: rows [M, C_out]. The values of ``rows`` are read for the weight's gradient only.
    """
    shape = weight.shape
    x, weight = _image(rows, size, weight)
    g = from_rows(grad, x.shape)
    ones = [1] * (weight.dim() - 2)
    zeros = [0] * len(ones)
    mask = [wants[0], wants[1], False]
    dx, dw, _ = _convolution_backward(g, x, weight, None, ones, _padding(weight), ones, False, zeros, 1, mask)
    if wants[1] and dw.shape != shape:
        dw = dw.reshape(shape)
    return to_rows(dx) if wants[0] else None, dw if wants[1] else None
