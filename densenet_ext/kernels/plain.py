"""The compiled operations once more, in plain PyTorch: for devices without compiled kernels, and to test those that
are.

Every function writes into the arguments that come last and returns nothing. Words: *rows* are the pixels of the whole
batch, [M, C], channels contiguous and any row pitch; *acc* is float64 for float64 rows, else float32, and is the dtype
of everything per channel and of 1x1 weights. The five arguments ``mean, var, weight, bias, eps`` are one BatchNorm as
values: with r = (var + eps)^-1/2, s = weight * r, t = bias - mean * s it computes x * s + t.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and per-channel vectors for feature maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _acc(x: Tensor) -> Tensor:
    return x.to(acc_dtype(x.dtype))


def _rstd_scale(var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    r = (var + eps).rsqrt()
    return r, r if weight is None else weight * r


def _affine(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """x * s + t in acc; written (x - mean) * s + bias, which does not cancel at a large mean."""
    _, s = _rstd_scale(var, weight, eps)
    u = (_acc(x) - mean).mul_(s)
    return u if bias is None else u.add_(bias)


def _masked(dy: Tensor, u: Tensor) -> Tensor:
    """ReLU's gradient as PyTorch has it: passed unless u <= 0, so that NaN passes."""
    return dy.masked_fill(u <= 0, 0)


# ---- statistics, dropout ---------------------------------------------------------------------------------------------


def channel_stats(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and biased variance of x [M, C] into mean, var [C]."""
    v, m = torch.var_mean(_acc(x), dim=0, correction=0)
    mean.copy_(m)
    var.copy_(v)


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def dropout_factor(seed: Tensor, layer: int, M: int, k: int, p: float, dtype: torch.dtype) -> Tensor:
    """What dropout multiplies the new features [M, k] of ``layer`` with: 0, or 1 / (1 - p). seed: int64 [1]."""
    low, high = seed & _MASK, (seed >> 32) & _MASK
    base = _mix(low ^ _mix((high + _GOLDEN * (layer + 1)) & _MASK))
    row = torch.arange(M, device=seed.device)
    row_key = _mix(base ^ _mix(((row & _MASK) + 0x85EBCA6B * (row >> 32)) & _MASK))
    col = _GOLDEN * torch.arange(1, k + 1, device=seed.device)
    h = _mix((row_key[:, None] + col) & _MASK)
    keep = h >= min(int(p * 2**32), _MASK)
    return keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def append_features(
    src: Tensor, out: Tensor, mean: Tensor | None, var: Tensor | None, drop_rate: float, seed: Tensor | None, layer: int
) -> None:
    """out [M, k] = dropout(src); statistics of out as stored into mean, var [k]."""
    if seed is not None and drop_rate > 0:
        M, k = src.shape
        out.copy_(_acc(src) * dropout_factor(seed, layer, M, k, drop_rate, acc_dtype(src.dtype)))
    else:
        out.copy_(src)
    if mean is not None and var is not None:
        channel_stats(out, mean, var)


def feature_grad(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    grad_mean: Tensor,
    grad_var: Tensor,
    drop_rate: float,
    seed: Tensor | None,
    layer: int,
    out: Tensor,
) -> None:
    """out [M, k] = dropout_backward(grad + (grad_mean + 2 (x - mean) grad_var) / M)."""
    M, k = grad.shape
    g = _acc(grad) + ((_acc(x) - mean) * (2 * grad_var) + grad_mean) / M
    if seed is not None and drop_rate > 0:
        g = g * dropout_factor(seed, layer, M, k, drop_rate, g.dtype)
    out.copy_(g)


# ---- BatchNorm and ReLU ----------------------------------------------------------------------------------------------


def bn_relu(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    """out [M, C] = relu(bn(x [M, C]))."""
    out.copy_(_affine(x, mean, var, weight, bias, eps).relu_())


def cat_bn_relu(
    features: Sequence[Tensor],
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    out: Tensor,
) -> None:
    """out [M, sum C_i] = relu(bn(cat(features))), features: rows [M, C_i]."""
    start = 0
    for x in features:
        new = slice(start, start + x.shape[1])
        w = None if weight is None else weight[new]
        b = None if bias is None else bias[new]
        bn_relu(x, mean[new], var[new], w, b, eps, out[:, new])
        start = new.stop


def _reduce(dy: Tensor, x: Tensor, mean: Tensor, r: Tensor, grad_weight: Tensor, grad_bias: Tensor) -> None:
    grad_bias.copy_(dy.sum(0))
    grad_weight.copy_(r * (dy * (_acc(x) - mean)).sum(0))


def _input_grad(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    r: Tensor,
    s: Tensor,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> Tensor:
    """s (dy - grad_bias / M - (x - mean) r grad_weight / M); both sums None: s dy."""
    if grad_weight is None or grad_bias is None:
        return s * dy
    M = x.shape[0]
    return s * (dy - grad_bias / M - (_acc(x) - mean) * (r * grad_weight / M))


def bn_relu_backward_reduce(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_weight: Tensor,
    grad_bias: Tensor,
) -> None:
    """With dy = grad where bn(x) > 0: grad_bias [C] = sum dy, grad_weight [C] = r sum dy (x - mean)."""
    dy = _masked(_acc(grad), _affine(x, mean, var, weight, bias, eps))
    _reduce(dy, x, mean, _rstd_scale(var, weight, eps)[0], grad_weight, grad_bias)


def bn_relu_backward(
    grad: Tensor,
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_x: Tensor,
) -> None:
    """grad_x [M, C] from the two sums, or s dy when both are None (the norm is frozen)."""
    r, s = _rstd_scale(var, weight, eps)
    dy = _masked(_acc(grad), _affine(x, mean, var, weight, bias, eps))
    grad_x.copy_(_input_grad(dy, x, mean, r, s, grad_weight, grad_bias))


# ---- BatchNorm, ReLU and the 1x1 convolution -------------------------------------------------------------------------


def bn_relu_conv1x1(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    out_bias: Tensor | None,
    out_relu: bool,
    out: Tensor,
    out_mean: Tensor | None,
    out_var: Tensor | None,
) -> None:
    """out [M, b] = relu(bn(x [M, C])) @ conv_weight [b, C]^T (+ out_bias [b], then ReLU); its statistics as stored."""
    z = _affine(x, mean, var, weight, bias, eps).relu_() @ conv_weight.t()
    if out_bias is not None:
        z += out_bias
    if out_relu:
        z.relu_()
    out.copy_(z)
    if out_mean is not None and out_var is not None:
        channel_stats(out, out_mean, out_var)


def bn_relu_conv1x1_backward(
    x: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    conv_weight: Tensor,
    grad_out: Tensor,
    z: Tensor | None,
    z_mean: Tensor | None,
    z_var: Tensor | None,
    z_weight: Tensor | None,
    z_bias: Tensor | None,
    z_eps: float,
    z_grad_weight: Tensor | None,
    z_grad_bias: Tensor | None,
    grad_in: Tensor | None,
    accumulate: bool,
    grad_x: Tensor,
    grad_conv_weight: Tensor | None,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_mean: Tensor | None,
    grad_var: Tensor | None,
) -> None:
    """The backward pass of ``bn_relu_conv1x1``, and of the BatchNorm and ReLU on its output when ``z`` [M, b] is given.

    Without z, dz = grad_out [M, b]; with it, grad_out is the gradient of relu(bn2(z)). Then dy = (dz @ conv_weight)
    where bn(x) > 0, grad_x [M, C] = s dy + (grad_in, else the old grad_x if ``accumulate``), grad_conv_weight [b, C] =
    dz^T @ relu(bn(x)), grad_bias [C] = sum dy, grad_weight [C] = r sum dy (x - mean), and grad_mean, grad_var [C]
    collect what the statistics receive: -s sum dy and -s r^2 / 2 sum dy (x - mean).
    """
    dz = _acc(grad_out)
    if z is not None:
        assert z_mean is not None and z_var is not None
        r2, s2 = _rstd_scale(z_var, z_weight, z_eps)
        dz = _masked(dz, _affine(z, z_mean, z_var, z_weight, z_bias, z_eps))
        dz = _input_grad(dz, z, z_mean, r2, s2, z_grad_weight, z_grad_bias)
    r, s = _rstd_scale(var, weight, eps)
    u = _affine(x, mean, var, weight, bias, eps)
    dy = _masked(dz @ conv_weight, u)
    if grad_conv_weight is not None:
        grad_conv_weight.copy_(dz.t() @ u.relu_())
    _reduce(dy, x, mean, r, grad_weight, grad_bias)
    if grad_mean is not None and grad_var is not None:
        grad_mean.sub_(s * grad_bias)
        grad_var.sub_(s * r * grad_weight / 2)
    dy.mul_(s)
    if grad_in is not None:
        dy += grad_in
    elif accumulate:
        dy += grad_x
    grad_x.copy_(dy)


# ---- BatchNorm, ReLU and pooling: size = [N, D, H, W], window = [wd, wh, ww] (ones in front for 1-D and 2-D) ---------


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
    y = _affine(x, mean, var, weight, bias, eps).relu_().view(*size, -1)
    (d, h, w), (do, ho, wo) = window, _pooled_size(size, window)
    y = y[:, : do * d, : ho * h, : wo * w].reshape(size[0], do, d, ho, h, wo, w, -1)
    out.copy_(y.mean((2, 4, 6)).view(out.shape))


def _unpooled(grad_out: Tensor, size: Sequence[int], window: Sequence[int]) -> Tensor:
    """The gradient of the average's input, rows [N D H W, C] in acc."""
    (d, h, w), (do, ho, wo) = window, _pooled_size(size, window)
    C = grad_out.shape[1]
    g = _acc(grad_out).reshape(size[0], do, 1, ho, 1, wo, 1, C).expand(-1, -1, d, -1, h, -1, w, -1)
    dy = g.new_zeros(*size, C)
    dy[:, : do * d, : ho * h, : wo * w] = g.reshape(size[0], do * d, ho * h, wo * w, C) / (d * h * w)
    return dy.view(-1, C)


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
    y = _affine(x, mean, var, weight, bias, eps).relu_().view(*size, -1).movedim(-1, 1)
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
    g = _acc(grad_out)
    dy = g.new_zeros(N, D * H * W, C).scatter_add_(1, flat.view(N, -1, C), g.reshape(N, -1, C))
    return dy.view(-1, C)


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
