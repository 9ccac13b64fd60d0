"""The pooling operations in plain PyTorch: BatchNorm, ReLU and average or maximum over windows.

size = [N, D, H, W] of the input, window = [wd, wh, ww], with ones in front for 1-D and 2-D; otherwise as in ``plain``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext.kernels.plain_rows import acc, affine, bn_relu_backward, bn_relu_backward_reduce


def _pooled_size(size: Sequence[int], window: Sequence[int]) -> list[int]:
    return [n // w for n, w in zip(size[1:], window, strict=True)]


def bn_relu_avg_pool(
    x: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """out [N Do Ho Wo, C] = average over windows (stride = window, what does not fill one is left out) of
    relu(bn(x))."""
    y = affine(x, mean, var, weight, bias, eps).relu_().view(*size, x.shape[1])
    (d, h, w), (do, ho, wo) = window, _pooled_size(size, window)
    y = y[:, : do * d, : ho * h, : wo * w].reshape(size[0], do, d, ho, h, wo, w, x.shape[1])
    out.copy_(y.mean((2, 4, 6)).view(out.shape))


def _unpooled(grad_out: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """The gradient of the average's input, rows [N D H W, C] in acc."""
    (d, h, w), (do, ho, wo) = window, _pooled_size(size, window)
    C = grad_out.shape[1]
    g = acc(grad_out).reshape(size[0], do, 1, ho, 1, wo, 1, C).expand(-1, -1, d, -1, h, -1, w, -1)
    dy = g.new_zeros(*size, C)
    dy[:, : do * d, : ho * h, : wo * w] = g.reshape(size[0], do * d, ho * h, wo * w, C) / (d * h * w)
    return dy.flatten(0, 3)


def bn_relu_avg_pool_backward_reduce(
    grad_out: Tensor,
    x: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    pooled: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """The two sums over dy [M, C], and the forward pass's result once more when ``pooled`` is given."""
    bn_relu_backward_reduce(_unpooled(grad_out, size, window), x, mean, var, weight, bias, eps, grad_weight, grad_bias)
    if pooled is not None:
        bn_relu_avg_pool(x, size, window, mean, var, weight, bias, eps, pooled)


def bn_relu_avg_pool_backward(
    grad_out: Tensor,
    x: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_x: Tensor,
) -> None:
    """grad_x [M, C] from the two sums, or s dy when both are None."""
    bn_relu_backward(_unpooled(grad_out, size, window), x, mean, var, weight, bias, eps, grad_weight, grad_bias, grad_x)


def _window_corner(
    out_size: Sequence[int], stride: Sequence[int], padding: Sequence[int], device: torch.device
) -> list[Tensor]:
    """Where each window starts along D, H, W, shaped to broadcast over [N, Do, Ho, Wo, C]."""
    shapes = ((1, -1, 1, 1, 1), (1, 1, -1, 1, 1), (1, 1, 1, -1, 1))
    return [
        (torch.arange(o, device=device) * s - p).view(shape)
        for o, s, p, shape in zip(out_size, stride, padding, shapes, strict=True)
    ]


def bn_relu_max_pool(
    x: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
    index: Tensor | None,
) -> None:
    """out [N Do Ho Wo, C] = maximum over windows of relu(bn(x)); index uint8: the maximum's position in its window."""
    y = affine(x, mean, var, weight, bias, eps).relu_().view(*size, x.shape[1]).movedim(-1, 1)
    pooled, flat = F.max_pool3d(y, tuple(window), tuple(stride), tuple(padding), return_indices=True)
    flat = flat.movedim(1, -1)
    out.copy_(pooled.movedim(1, -1).reshape(out.shape))
    if index is not None:
        H, W = size[2:]
        d0, h0, w0 = _window_corner(pooled.shape[2:], stride, padding, x.device)
        d, h, w = flat // (H * W) - d0, flat // W % H - h0, flat % W - w0
        index.copy_(((d * window[1] + h) * window[2] + w).reshape(index.shape))


def _unpooled_max(
    grad_out: Tensor,
    index: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """The gradient of the maximum's input, rows [N D H W, C] in acc."""
    (N, D, H, W), (_, wh, ww) = size, window
    out_size = [(n + 2 * p - w) // s + 1 for n, p, w, s in zip(size[1:], padding, window, stride, strict=True)]
    C = grad_out.shape[1]
    d0, h0, w0 = _window_corner(out_size, stride, padding, index.device)
    i = index.to(torch.int64).reshape(N, *out_size, C)
    flat = ((i // (wh * ww) + d0) * H + i // ww % wh + h0) * W + i % ww + w0
    g = acc(grad_out).reshape(flat.shape)
    dy = g.new_zeros(N, D * H * W, C).scatter_add_(1, flat.flatten(1, 3), g.flatten(1, 3))
    return dy.flatten(0, 1)


def bn_relu_max_pool_backward_reduce(
    grad_out: Tensor,
    index: Tensor,
    x: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """The two sums over dy [M, C]."""
    dy = _unpooled_max(grad_out, index, size, window, stride, padding)
    bn_relu_backward_reduce(dy, x, mean, var, weight, bias, eps, grad_weight, grad_bias)


def bn_relu_max_pool_backward(
    grad_out: Tensor,
    index: Tensor,
    x: Tensor,
    size: Sequence[int],
    window: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_x: Tensor,
) -> None:
    """grad_x [M, C] from the two sums, or s dy when both are None."""
    dy = _unpooled_max(grad_out, index, size, window, stride, padding)
    bn_relu_backward(dy, x, mean, var, weight, bias, eps, grad_weight, grad_bias, grad_x)
