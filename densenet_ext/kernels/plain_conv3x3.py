"""BatchNorm, ReLU and the 3x3 convolution in plain PyTorch, forward and backward.

size = [N, D, H, W] of the images, with ones in front for 1-D and 2-D. conv_weight [k, C, 3, ...] has a 3 for each
dimension of the convolution: windows are 1 along the others. mean and var None: x is normalised and rectified already.
Otherwise as in ``plain``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext.kernels.plain_rows import (
    acc,
    affine,
    bn_relu_backward,
    bn_relu_backward_reduce,
    channel_stats,
    dropped,
    rstd_scale,
)


def _images(rows: Tensor, size: Sequence[int]) -> Tensor:
    """[N, C, D, H, W] of rows."""
    return rows.reshape(*size, rows.shape[1]).movedim(-1, 1)


def _rows(images: Tensor) -> Tensor:
    return images.movedim(1, -1).flatten(0, 3)


def _window(weight: Tensor) -> Tensor:
    """The weight of a 3-D convolution."""
    return weight[(..., *[None] * (5 - weight.dim()), *[slice(None)] * (weight.dim() - 2))]


def _padding(window: Tensor) -> list[int]:
    return [n // 2 for n in window.shape[2:]]


def _normalised(
    x: Tensor, mean: Tensor | None, var: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> Tensor:
    return acc(x) if mean is None or var is None else affine(x, mean, var, weight, bias, eps).relu_()


def bn_relu_conv3x3(
    x: Tensor,
    size: Sequence[int],
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    drop_rate: float,
    seed: Tensor | None,
    layer: int,
    drop_rows: int,
    out: Tensor,
    out_mean: Tensor | None,
    out_var: Tensor | None,
    tf32: bool = False,
    bf16: bool = False,
) -> None:
    """out [M, k] = dropout(conv3x3(relu(bn(x [M, C]))) + conv_bias [k]); its statistics as stored.

    ``drop_rows``: so many rows after each other share their factors: 1, or the pixels of a sample. ``tf32``: a GPU may
    multiply float32 as TF32; here PyTorch's setting for convolutions decides. ``bf16``: a processor may multiply
    float32 as bfloat16; here it does not.
    """
    y = _images(_normalised(x, mean, var, weight, bias, eps), size)
    window = _window(conv_weight)
    z = _rows(torch.conv3d(y, window, conv_bias, 1, _padding(window)))
    out.copy_(dropped(z, drop_rate, seed, layer, drop_rows))
    if out_mean is not None and out_var is not None:
        channel_stats(out, out_mean, out_var)


def bn_relu_conv3x3_backward(
    x: Tensor,
    size: Sequence[int],
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    grad: Tensor,
    features: Tensor | None,
    features_mean: Tensor | None,
    features_grad_mean: Tensor | None,
    features_grad_var: Tensor | None,
    drop_rate: float,
    seed: Tensor | None,
    layer: int,
    drop_rows: int,
    scaled: bool,
    grad_in: Tensor | None,
    accumulate: bool,
    grad_x: Tensor | None,
    grad_conv_weight: Tensor | None,
    grad_conv_bias: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
    tf32: bool = False,
    bf16: bool = False,
) -> None:
    """The backward pass of ``bn_relu_conv3x3``.

    g [M, k] = dropout_backward(grad), where ``features`` [M, k] are given with what their statistics receive:
    dropout_backward(grad + (features_grad_mean + 2 (features - features_mean) features_grad_var) / M). Then
    grad_conv_weight, grad_conv_bias [k] = sum g and da [M, C], the gradient of relu(bn(x)), from the convolution; and
    dy = da where bn(x) > 0, grad_bias [C] = sum dy, grad_weight [C] = r sum dy (x - mean), and grad_mean, grad_var [C]
    collect -s sum dy and -s r^2 / 2 sum dy (x - mean).

    grad_x [M, C] = da; ``scaled``: s dy + (grad_in, else the old grad_x if ``accumulate``). What is None is not asked.
    """
    g = acc(grad)
    if features is not None:
        assert features_mean is not None and features_grad_mean is not None and features_grad_var is not None
        share = (acc(features) - features_mean) * (2 * features_grad_var) + features_grad_mean
        g = g + share / grad.shape[0]
    g = dropped(g, drop_rate, seed, layer, drop_rows)
    y = _images(_normalised(x, mean, var, weight, bias, eps), size)
    window, ones = _window(conv_weight), [1, 1, 1]
    da, dw, _ = torch.ops.aten.convolution_backward(
        _images(g, size), y, window, None, ones, _padding(window), ones, False, [0, 0, 0], 1, [True, True, False]
    )
    da = _rows(da)
    if grad_conv_weight is not None:
        grad_conv_weight.copy_(dw.view(grad_conv_weight.shape))
    if grad_conv_bias is not None:
        grad_conv_bias.copy_(g.sum(0))
    if mean is not None and var is not None:
        sums = da.new_empty(2, x.shape[1])
        bn_relu_backward_reduce(da, x, mean, var, weight, bias, eps, sums[0], sums[1])
        r, s = rstd_scale(var, weight, eps)
        if grad_weight is not None and grad_bias is not None:
            grad_weight.copy_(sums[0])
            grad_bias.copy_(sums[1])
        if grad_mean is not None and grad_var is not None:
            grad_mean.sub_(s * sums[1])
            grad_var.sub_(s * r * sums[0] / 2)
        if scaled:
            bn_relu_backward(da, x, mean, var, weight, bias, eps, None, None, da)
    if grad_x is None:
        return
    if grad_in is not None:
        da += grad_in
    elif accumulate:
        da += grad_x
    grad_x.copy_(da)
