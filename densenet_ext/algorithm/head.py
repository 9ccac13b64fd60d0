"""Head: BN, ReLU, global average, in one read of x; the backward pass reads x twice, as the transition's does."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm.conversions import (
    as_pooled,
    cast,
    frozen_norm,
    grad_like,
    is_empty,
    norm_tensors,
    norm_values,
)
from densenet_ext.algorithm.layout import new_features, to_rows
from densenet_ext.algorithm.norm import check_count
from densenet_ext.algorithm.operation import Config, Operation, register, run
from densenet_ext.algorithm.single import allocate_shared_stats, batch_stats, input_sums, move, rows_size
from densenet_ext.algorithm.values import Norm, Stats, Tensors


def head(x: Tensor, norm: Norm, *, stats: Stats | None = None) -> Tensor:
    """[N, C], the average over the pixels of relu(bn(x)), of x [N, C, *spatial].

    ``stats``: those of x, given by who knows that x has not changed since they were taken; None: they are taken from x.

    Raises PyTorch's own ValueError for one value per channel in training.
    """
    check_count(norm, x.shape)
    if is_empty(x) and not norm.group:
        return reference.head(x, norm)
    config = Config((norm.batch_stats,), (norm.eps,), x.dtype, groups=(norm.group,))
    tensors = [x, *norm_tensors(norm), *(stats or (None, None))]
    out = run(HEAD, config, tensors, lambda results: move(norm, x.shape, results))[0]
    return as_pooled(out) if x.dim() == 5 else out


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    x = tensors[0]
    assert x is not None
    return [x.new_empty(x.shape[:2]), *allocate_shared_stats(config, x)]


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    x = tensors[0]
    assert x is not None
    rows, size, out = to_rows(x), rows_size(x), x.new_empty(x.shape[:2])
    mean, var, count = batch_stats(config, x, rows, tensors[5:])
    norm = norm_values(tensors[1:5], mean, var, config.batch_stats[0], config.eps[0], mean.dtype)
    kernels.select(x).bn_relu_avg_pool(rows, size, size[1:], *norm, out)
    return [out, mean, var, count]


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    x, mean, var, count = tensors[0], *results[1:]
    assert x is not None and mean is not None and var is not None and count is not None
    ops, batch, C = kernels.select(x), config.batch_stats[0], x.shape[1]
    norm = norm_values(tensors[1:5], mean, var, batch, config.eps[0], mean.dtype)
    rows, size, g = to_rows(x), rows_size(x), cast(grad, x.dtype)
    dgamma, dbeta = mean.new_empty(C), mean.new_empty(C)
    grads: list[Tensor | None] = [None] * len(tensors)
    if batch or needs[1] or needs[2]:
        ops.bn_relu_avg_pool_backward_reduce(g, rows, size, size[1:], *norm, None, dgamma, dbeta)
        grads[1], grads[2] = grad_like(dgamma, tensors[1], needs[1]), grad_like(dbeta, tensors[2], needs[2])
    if needs[0]:
        grads[0] = dx = new_features(x, x.shape)
        sums = input_sums(config, dgamma, dbeta, count, rows)
        ops.bn_relu_avg_pool_backward(g, rows, size, size[1:], *norm, *sums, to_rows(dx))
    return grads


def _norms(config: Config) -> tuple[int]:
    return (1,)


def _reference(config: Config, tensors: Tensors) -> Tensor:
    x = tensors[0]
    assert x is not None
    return reference.head(x, frozen_norm(tensors[1:5], config.batch_stats[0], config.eps[0]), update=False)


HEAD = register(Operation("head", _allocate, _forward, _backward, _reference, _norms, values=2))
