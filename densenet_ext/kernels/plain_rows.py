"""The compiled operations once more, in plain PyTorch: for devices without compiled kernels, and to test those that
are.

Every function writes into the arguments that come last and returns nothing. Words: *rows* are the pixels of the whole
batch, [M, C], channels contiguous and any row pitch; *acc* is float64 for float64 rows, else float32, and is the dtype
of everything per channel and of 1x1 weights. The five arguments ``mean, var, weight, bias, eps`` are one BatchNorm as
values: with r = (var + eps)^-1/2 and s = weight * r it computes (x - mean) * s + bias, which is bias itself where a
channel is constant.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_GOLDEN = 0x9E3779B9


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, statistics and per-channel vectors for feature maps of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def acc(x: Tensor) -> Tensor:
    """x in the dtype of sums."""
    return x.to(acc_dtype(x.dtype))


def rstd_scale(var: Tensor, weight: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """Returns r and s [C]."""
    r = (var + eps).rsqrt()
    return r, r if weight is None else weight * r


def affine(x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Computes (x - mean) * s + bias in acc: unlike x * s + t, with t rounded, it does not cancel at a large mean."""
    _, s = rstd_scale(var, weight, eps)
    u = (acc(x) - mean).mul_(s)
    return u if bias is None else u.add_(bias)


def _masked(dy: Tensor, u: Tensor) -> Tensor:
    """ReLU's gradient as PyTorch has it: passed unless u <= 0, so that NaN passes."""
    return dy.masked_fill(u <= 0, 0)


# ---- statistics, dropout ---------------------------------------------------------------------------------------------


def channel_stats(x: Tensor, mean: Tensor, var: Tensor) -> None:
    """Takes the mean and the biased variance of x [M, C] into mean, var [C]; without rows they mean nothing.

    A channel that holds infinity has that mean (NaN where it holds both), as in BatchNorm, and NaN as its variance.
    """
    if x.shape[0] == 0:
        return
    x = acc(x)
    v, m = torch.var_mean(x, dim=0, correction=0)
    # merging parts subtracts their means, which gives NaN where both are infinite; a plain sum does not
    mean.copy_(torch.where(v.isnan(), x.mean(0), m))
    var.copy_(v)


def _mix(h: Tensor) -> Tensor:
    h = h ^ (h >> 16)
    h = (h * 0x7FEB352D) & _MASK
    h = h ^ (h >> 15)
    h = (h * 0x846CA68B) & _MASK
    return h ^ (h >> 16)


def dropout_factor(seed: Tensor, layer: int, M: int, k: int, p: float, dtype: torch.dtype) -> Tensor:
    """Returns the factors [M, k] of dropout: 0, or 1 / (1 - p), by a hash of (seed, layer, row, column).

    seed: int64 [1]. Rows are pixels, or samples where whole channels are dropped; ``layer`` is any number from 0 on.
    """
    low, high = seed & _MASK, (seed >> 32) & _MASK
    base = _mix(low ^ _mix((high + _GOLDEN * (layer + 1)) & _MASK))
    row = torch.arange(M, device=seed.device)
    row_key = _mix(base ^ _mix(((row & _MASK) + 0x85EBCA6B * (row >> 32)) & _MASK))
    col = _GOLDEN * torch.arange(1, k + 1, device=seed.device)
    h = _mix((row_key[:, None] + col) & _MASK)
    keep = h >= min(int(p * 2**32), _MASK)
    return keep.to(dtype) * (1 / (1 - p) if p < 1 else 0.0)


def dropped(x: Tensor, drop_rate: float, seed: Tensor | None, layer: int, drop_rows: int) -> Tensor:
    """Returns x [M, k] in acc times its dropout factors, which ``drop_rows`` rows after each other share."""
    if seed is None or drop_rate <= 0:
        return acc(x)
    M, k = x.shape
    factors = dropout_factor(seed, layer, -(-M // drop_rows), k, drop_rate, acc_dtype(x.dtype))
    return acc(x) * (factors if drop_rows == 1 else factors.repeat_interleave(drop_rows, 0)[:M])


def append_features(
    src: Tensor,
    out: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    drop_rate: float,
    seed: Tensor | None,
    layer: int,
    drop_rows: int = 1,
) -> None:
    """out [M, k] = dropout(src); statistics of out as stored into mean, var [k].

    ``drop_rows``: so many rows after each other share their factors: 1, or the pixels of a sample.
    """
    out.copy_(src if seed is None or drop_rate <= 0 else dropped(src, drop_rate, seed, layer, drop_rows))
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
    drop_rows: int = 1,
) -> None:
    """out [M, k] = dropout_backward(grad + (grad_mean + 2 (x - mean) grad_var) / M); drop_rows: ``append_features``."""
    g = acc(grad) + ((acc(x) - mean) * (2 * grad_var) + grad_mean) / grad.shape[0]
    out.copy_(dropped(g, drop_rate, seed, layer, drop_rows))


# ---- BatchNorm and ReLU ----------------------------------------------------------------------------------------------


def bn_relu(
    x: Tensor, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, out: Tensor
) -> None:
    """out [M, C] = relu(bn(x [M, C]))."""
    out.copy_(affine(x, mean, var, weight, bias, eps).relu_())


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
    grad_weight.copy_(r * (dy * (acc(x) - mean)).sum(0))


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
    return s * (dy - grad_bias / M - (acc(x) - mean) * (r * grad_weight / M))


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
    out: Tensor | None = None,
) -> None:
    """With dy = grad where bn(x) > 0: grad_bias [C] = sum dy, grad_weight [C] = r sum dy (x - mean).

    out [M, C], where given: relu(bn(x)), of the same reading of x.
    """
    y = affine(x, mean, var, weight, bias, eps)
    _reduce(_masked(acc(grad), y), x, mean, rstd_scale(var, weight, eps)[0], grad_weight, grad_bias)
    if out is not None:
        out.copy_(y.relu())


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
    r, s = rstd_scale(var, weight, eps)
    dy = _masked(acc(grad), affine(x, mean, var, weight, bias, eps))
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
    tf32: bool = False,
    bf16: bool = False,
) -> None:
    """out [M, b] = relu(bn(x [M, C])) @ conv_weight [b, C]^T (+ out_bias [b], then ReLU); its statistics as stored.

    conv_weight and its gradient may be given as the convolution has them, [b, C, 1, ...].

    ``tf32``: a GPU may multiply float32 as TF32; here PyTorch's setting for matrix products decides. ``bf16``: a
    processor may multiply float32 as bfloat16; here it does not.
    """
    z = affine(x, mean, var, weight, bias, eps).relu_() @ conv_weight.flatten(1).t()
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
    tf32: bool = False,
    bf16: bool = False,
) -> None:
    """The backward pass of ``bn_relu_conv1x1``, and of the BatchNorm and ReLU on its output when ``z`` [M, b] is given.

    Without z, dz = grad_out [M, b]; with it, grad_out is the gradient of relu(bn2(z)). Then dy = (dz @ conv_weight)
    where bn(x) > 0, grad_x [M, C] = s dy + (grad_in, else the old grad_x if ``accumulate``), grad_conv_weight [b, C] =
    dz^T @ relu(bn(x)), grad_bias [C] = sum dy, grad_weight [C] = r sum dy (x - mean), and grad_mean, grad_var [C]
    collect what the statistics receive: -s sum dy and -s r^2 / 2 sum dy (x - mean).
    """
    dz = acc(grad_out)
    if z is not None:
        assert z_mean is not None and z_var is not None
        r2, s2 = rstd_scale(z_var, z_weight, z_eps)
        dz = _masked(dz, affine(z, z_mean, z_var, z_weight, z_bias, z_eps))
        dz = _input_grad(dz, z, z_mean, r2, s2, z_grad_weight, z_grad_bias)
    r, s = rstd_scale(var, weight, eps)
    u = affine(x, mean, var, weight, bias, eps)
    dy = _masked(dz @ conv_weight.flatten(1), u)
    if grad_conv_weight is not None:
        grad_conv_weight.copy_((dz.t() @ u.relu_()).view(grad_conv_weight.shape))
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
