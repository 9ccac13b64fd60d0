"""Stem: BN, ReLU and max-pooling of the first convolution's output, in one read of it.

Kept for the backward pass: x, and per result one byte, the position of the maximum in its window.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm import whole
from densenet_ext.algorithm.conversions import as_pooled, frozen_norm, is_empty, norm_values
from densenet_ext.algorithm.inference import Call, Made
from densenet_ext.algorithm.layout import channels_last_stride, new_features, readable, to_rows
from densenet_ext.algorithm.norm import check_count
from densenet_ext.algorithm.operation import Config, Operation, kept_level, register, run
from densenet_ext.algorithm.single import (
    GIVEN_STATS,
    Inputs,
    SingleNorm,
    allocate_shared_stats,
    batch_stats,
    found,
    input_sums,
    inputs_of,
    needs_sums,
    norm_again,
    norm_call,
    norms_of,
    rows_size,
    single,
    volume,
)
from densenet_ext.algorithm.values import Norm, Tensors


def stem(
    x: Tensor,
    norm: Norm | SingleNorm,
    kernel_size: int | tuple[int, ...] = 3,
    stride: int | tuple[int, ...] = 2,
    padding: int | tuple[int, ...] = 1,
) -> Tensor:
    """[N, C, *pooled] of x [N, C, *spatial], channels_last in memory; ties and NaN as PyTorch's max-pooling.

    Raises PyTorch's own ValueError for one value per channel in training.
    """
    moving = single(norm)
    key = (kernel_size, stride, padding)
    again = moving.inferences.run(x, key)
    if again is not None:
        return as_pooled(again) if x.dim() == 5 else again
    repeats, norm = norm is moving, moving.norm
    check_count(norm, x.shape)
    dims = x.dim() - 2
    window = volume(dims, kernel_size, 1)
    if (is_empty(x) and not norm.group) or prod(window) > 256:  # the position has one byte
        return reference.stem(x, norm, kernel_size, stride, padding)
    config = Config(
        (norm.batch_stats,),
        (norm.eps,),
        x.dtype,
        window=window,
        stride=volume(dims, stride, 1),
        padding=volume(dims, padding, 0),
        save=kept_level("features"),
        groups=(norm.group,),
    )
    tensors = inputs_of(x, norm)
    out = run(STEM, config, tensors, lambda results: moving.move(x.shape, results))
    if repeats and not norm.batch_stats:
        moving.inferences.keep(x, lambda: _prepared(config, tensors), key)
    return as_pooled(out) if x.dim() == 5 else out


def _pooled_size(config: Config, x: Tensor) -> tuple[int, ...]:
    front = 5 - x.dim()
    geometry = zip(x.shape[2:], config.window[front:], config.stride[front:], config.padding[front:], strict=True)
    return (x.shape[0], x.shape[1], *((n + 2 * p - w) // s + 1 for n, w, s, p in geometry))


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    x = Inputs(*tensors).x
    size = _pooled_size(config, x)
    index = x.new_empty(0, dtype=torch.uint8) if config.save == "nothing" else new_features(x, size, torch.uint8)
    return [new_features(x, size), *allocate_shared_stats(config, x), index]


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    own = Inputs(*tensors)
    results = _allocate(config, tensors)
    out, index = results[0], None if config.save == "nothing" else results[4]
    geometry = (rows_size(own.x), config.window, config.stride, config.padding)
    run_whole = whole.operation("whole_stem", own.x, config.groups)
    if run_whole is not None:
        run_whole(readable(own.x), *geometry, *norm_call(config, own, results[1], results[2]), out, index)
        return results
    rows, positions = to_rows(own.x), None if index is None else to_rows(index)
    mean, var, _ = results[1:4] = batch_stats(config, own, rows)
    norm = norm_values(own.norm, mean, var, config.batch_stats[0], config.eps[0], mean.dtype)
    kernels.select(rows).bn_relu_max_pool(rows, *geometry, *norm, to_rows(out), positions)
    return results


def _prepared(config: Config, own: Inputs) -> Call | None:
    """``_forward`` in evaluation without gradients, on features like those of ``own``; None where it goes by steps."""
    run_whole = whole.operation("whole_stem", own.x, config.groups)
    if run_whole is None:
        return None
    size, norm = _pooled_size(config, own.x), norm_call(config, own, None, None)
    geometry = (rows_size(own.x), config.window, config.stride, config.padding)

    def compute(x: Tensor, out: Tensor) -> None:
        run_whole(readable(x), *geometry, *norm, out, None)

    return Call(compute, Made(size, channels_last_stride(size), own.x.dtype, own.x.device))


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    own, asked = Inputs(*tensors), Inputs(*needs)
    mean, var, count, index = results[1:]
    assert mean is not None and var is not None and count is not None and index is not None
    x, batch = own.x, config.batch_stats[0]
    ops, C = kernels.select(x), x.shape[1]
    geometry = (rows_size(x), config.window, config.stride, config.padding)
    dgamma, dbeta, dx = mean.new_empty(C), mean.new_empty(C), None
    run_whole = whole.operation("whole_stem_backward", x, config.groups)
    if run_whole is not None:
        dx = new_features(x, x.shape) if asked.x else None
        again, sums = norm_again(config, own, mean, var), needs_sums(config, asked)
        run_whole(readable(grad), readable(index), readable(x), *geometry, *again, sums, dgamma, dbeta, dx)
        return found(own, asked, x=dx, gamma=dgamma, beta=dbeta)
    rows, g, positions = to_rows(x), to_rows(grad), to_rows(index)
    norm = norm_values(own.norm, mean, var, batch, config.eps[0], mean.dtype)
    if batch or asked.gamma or asked.beta:
        ops.bn_relu_max_pool_backward_reduce(g, positions, rows, *geometry, *norm, dgamma, dbeta)
    if asked.x:
        dx = new_features(x, x.shape)
        merged = input_sums(config, dgamma, dbeta, count, rows)
        ops.bn_relu_max_pool_backward(g, positions, rows, *geometry, *norm, *merged, to_rows(dx))
    return found(own, asked, x=dx, gamma=dgamma, beta=dbeta)


def _reference(config: Config, tensors: Tensors) -> Tensor:
    own = Inputs(*tensors)
    front, norm = 5 - own.x.dim(), frozen_norm(own.norm, config.batch_stats[0], config.eps[0])
    geometry = config.window[front:], config.stride[front:], config.padding[front:]
    return reference.stem(own.x, norm, *geometry, update=False)


STEM = register(Operation("stem", _allocate, _forward, _backward, _reference, norms_of, values=GIVEN_STATS))
