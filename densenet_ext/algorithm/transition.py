"""Transition: BN, ReLU, 1x1 convolution, average pooling.

Pooling is linear and acts per channel, so it goes first: one read of x gives pooled = pool(relu(x s + t)), and the
convolution is as many times smaller as a window has pixels. The backward pass reads x twice: for the two sums (pooled
is recomputed on the way), and to write

    dx = s (dy - sum(dy) / M - (x - m) r^2 sum(dy (x - m)) / M)         dy: the pooled gradient spread, where x s + t >
    0
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm.conv import conv_same_backward, conv_same_features
from densenet_ext.algorithm.conversions import (
    as_pooled,
    frozen_norm,
    grad_like,
    is_empty,
    norm_tensors,
    norm_values,
    result_dtype,
)
from densenet_ext.algorithm.layout import new_features, to_rows
from densenet_ext.algorithm.norm import check_count
from densenet_ext.algorithm.operation import Config, Operation, register, run
from densenet_ext.algorithm.single import allocate_shared_stats, batch_stats, input_sums, move, rows_size, volume
from densenet_ext.algorithm.values import Norm, Stats, Tensors


def transition(
    x: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    window: int | tuple[int, ...] = 2,
    *,
    conv_bias: Tensor | None = None,
    stats: Stats | None = None,
) -> Tensor:
    """[N, C_out, *spatial // window] of x [N, C, *spatial], conv_weight [C_out, C, 1...] and conv_bias [C_out].

    The result is channels_last in memory. ``stats``: those of x, given by who knows that x has not changed since they
    were taken; None: they are taken from x.

    Raises PyTorch's own ValueError for one value per channel in training.
    """
    check_count(norm, x.shape)
    if is_empty(x) and not norm.group:
        return reference.transition(x, norm, conv_weight, window, conv_bias=conv_bias)
    size = volume(x.dim() - 2, window, 1)
    config = Config((norm.batch_stats,), (norm.eps,), result_dtype(x), window=size, groups=(norm.group,))
    tensors = [x, *norm_tensors(norm), conv_weight, conv_bias, *(stats or (None, None))]
    out = run(TRANSITION, config, tensors, lambda results: move(norm, x.shape, results))[0]
    return as_pooled(out) if x.dim() == 5 else out


def _pooled_size(config: Config, x: Tensor) -> list[int]:
    spatial = [n // w for n, w in zip(x.shape[2:], config.window[5 - x.dim() :], strict=True)]
    return [x.shape[0], x.shape[1], *spatial]


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    x, conv = tensors[0], tensors[5]
    assert x is not None and conv is not None
    size = _pooled_size(config, x)
    size[1] = conv.shape[0]
    return [new_features(x, size, config.dtype), *allocate_shared_stats(config, x)]


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    x, conv, conv_bias = tensors[0], *tensors[5:7]
    assert x is not None and conv is not None
    rows = to_rows(x)
    mean, var, count = batch_stats(config, x, rows, tensors[7:])
    norm = norm_values(tensors[1:5], mean, var, config.batch_stats[0], config.eps[0], mean.dtype)
    size = _pooled_size(config, x)
    pooled = to_rows(new_features(x, size))
    kernels.select(x).bn_relu_avg_pool(rows, rows_size(x), config.window, *norm, pooled)
    W, c = conv.to(config.dtype), None if conv_bias is None else conv_bias.to(config.dtype)
    return [conv_same_features(pooled.to(config.dtype), size, W, c), mean, var, count]


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    x, conv, mean, var, count = tensors[0], tensors[5], *results[1:]
    assert x is not None and conv is not None and mean is not None and var is not None and count is not None
    ops, batch, C = kernels.select(x), config.batch_stats[0], x.shape[1]
    norm = norm_values(tensors[1:5], mean, var, batch, config.eps[0], mean.dtype)
    size, window = rows_size(x), config.window
    rows, g, W = to_rows(x), to_rows(grad), conv.to(config.dtype)
    pooled = to_rows(new_features(x, _pooled_size(config, x)))
    dgamma, dbeta = mean.new_empty(C), mean.new_empty(C)
    grads: list[Tensor | None] = [None] * len(tensors)
    if any(needs[:3]):
        # the dgrad looks at the shape of `pooled` only; the next step fills it
        dpooled, _ = conv_same_backward(g, pooled.to(config.dtype), grad.shape, W, (True, False))
        assert dpooled is not None
        dpooled = dpooled.to(x.dtype)
        again = pooled if needs[5] else None
        ops.bn_relu_avg_pool_backward_reduce(dpooled, rows, size, window, *norm, again, dgamma, dbeta)
        grads[1], grads[2] = grad_like(dgamma, tensors[1], needs[1]), grad_like(dbeta, tensors[2], needs[2])
    elif needs[5]:
        ops.bn_relu_avg_pool(rows, size, window, *norm, pooled)
    if needs[5]:
        grads[5] = grad_like(conv_same_backward(g, pooled.to(config.dtype), grad.shape, W, (False, True))[1], conv)
    if needs[6]:
        grads[6] = grad_like(g.sum(0, dtype=mean.dtype), tensors[6])
    del pooled
    if needs[0]:
        grads[0] = dx = new_features(x, x.shape)
        sums = input_sums(config, dgamma, dbeta, count, rows)
        ops.bn_relu_avg_pool_backward(dpooled, rows, size, window, *norm, *sums, to_rows(dx))
    return grads


def _norms(config: Config) -> tuple[int]:
    return (1,)


def _reference(config: Config, tensors: Tensors) -> Tensor:
    x, conv = tensors[0], tensors[5]
    assert x is not None and conv is not None
    norm = frozen_norm(tensors[1:5], config.batch_stats[0], config.eps[0])
    window = config.window[5 - x.dim() :]
    return reference.transition(x, norm, conv, window, conv_bias=tensors[6], update=False)


TRANSITION = register(Operation("transition", _allocate, _forward, _backward, _reference, _norms, values=2))
