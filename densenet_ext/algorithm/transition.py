"""Transition: BN, ReLU, 1x1 convolution, average pooling.

Pooling is linear and acts per channel, so it goes first: one read of x gives pooled = pool(relu(x s + t)), and the
convolution is as many times smaller as a window has pixels. The backward pass reads x twice: for the two sums (pooled
is recomputed on the way), and to write

    dx = s (dy - sum(dy) / M - (x - m) r^2 sum(dy (x - m)) / M)         dy: the pooled gradient spread, where x s + t >
    0
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm import whole
from densenet_ext.algorithm.conv import conv_same_backward, conv_same_features
from densenet_ext.algorithm.conversions import (
    as_pooled,
    frozen_norm,
    is_empty,
    norm_values,
    result_dtype,
)
from densenet_ext.algorithm.inference import Call, Made
from densenet_ext.algorithm.kept import new_gradient
from densenet_ext.algorithm.layout import channels_last_stride, is_readable, new_features, readable, to_rows
from densenet_ext.algorithm.norm import check_count
from densenet_ext.algorithm.operation import Config, Operation, kept_level, register, run
from densenet_ext.algorithm.packed import Held, are_held
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
from densenet_ext.algorithm.values import Norm, Stats, Tensors


def transition(
    x: Tensor,
    norm: Norm | SingleNorm,
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
    moving = single(norm)
    key = key_of(conv_weight, window, conv_bias)
    again = moving.inferences.run(x, key)
    if again is not None:
        return as_pooled(again) if x.dim() == 5 else again
    repeats, norm = norm is moving, moving.norm
    check_count(norm, x.shape)
    if is_empty(x) and not norm.group:
        return reference.transition(x, norm, conv_weight, window, conv_bias=conv_bias)
    size = volume(x.dim() - 2, window, 1)
    config = Config(
        (norm.batch_stats,),
        (norm.eps,),
        result_dtype(x),
        window=size,
        save=kept_level("features"),
        groups=(norm.group,),
    )
    tensors = inputs_of(x, norm, stats, conv_weight, conv_bias)
    out = run(TRANSITION, config, tensors, lambda results: moving.move(x.shape, results))
    if repeats and not norm.batch_stats:
        moving.inferences.keep(x, lambda: _prepared(config, tensors), key)
    return as_pooled(out) if x.dim() == 5 else out


def key_of(conv_weight: Tensor, window: int | tuple[int, ...], conv_bias: Tensor | None) -> Hashable:
    """Returns what a prepared call of a norm's transition depends on beside the form of its features.

    The call keeps the tensors, so that no others get their numbers.
    """
    # not id(None), which torch 2.11 does not compile
    return window, id(conv_weight), conv_weight.shape, None if conv_bias is None else id(conv_bias)


def _pooled_size(config: Config, x: Tensor) -> list[int]:
    spatial = [n // w for n, w in zip(x.shape[2:], config.window[5 - x.dim() :], strict=True)]
    return [x.shape[0], x.shape[1], *spatial]


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    own = Inputs(*tensors)
    size = _pooled_size(config, own.x)
    size[1] = own.conv.shape[0]
    return [new_features(own.x, size, config.dtype), *allocate_shared_stats(config, own.x)]


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    own = Inputs(*tensors)
    x = own.x
    run_whole = whole.operation("whole_transition", x, config.groups) if x.dtype == config.dtype else None
    if run_whole is None:
        return _forward_by_steps(config, own)
    results = _allocate(config, tensors)
    norm = norm_call(config, own, results[1], results[2])
    run_whole(
        readable(x),
        rows_size(x),
        config.window,
        *norm,
        own.conv,
        own.conv_bias,
        new_features(x, _pooled_size(config, x)),
        results[0],
        tf32=kernels.tf32(x),
        packed_weights=are_held([own.conv]),
    )
    return results


def _prepared(config: Config, own: Inputs) -> Call | None:
    """``_forward`` in evaluation without gradients, on features like those of ``own``; None where it goes by steps."""
    x = own.x
    run_whole = whole.operation("whole_transition", x, config.groups) if x.dtype == config.dtype else None
    if run_whole is None:
        return None
    size, of_pooled = rows_size(x), _pooled_size(config, x)
    of_out = [of_pooled[0], own.conv.shape[0], *of_pooled[2:]]
    norm, held, reads = norm_call(config, own, None, None), Held([own.conv]), is_readable(x)
    conv, bias, window = own.conv, own.conv_bias, config.window

    def compute(x: Tensor, out: Tensor, pooled: Tensor) -> None:
        x, packed = x if reads else readable(x), held.any()
        run_whole(x, size, window, *norm, conv, bias, pooled, out, tf32=kernels.tf32(x), packed_weights=packed)

    makes = [Made(size, channels_last_stride(size), x.dtype, x.device) for size in (of_out, of_pooled)]
    return Call(compute, *makes, held=held)


def _forward_by_steps(config: Config, own: Inputs) -> list[Tensor]:
    x, rows = own.x, to_rows(own.x)
    mean, var, count = batch_stats(config, own, rows)
    norm = norm_values(own.norm, mean, var, config.batch_stats[0], config.eps[0], mean.dtype)
    size = _pooled_size(config, x)
    pooled = to_rows(new_features(x, size))
    kernels.select(x).bn_relu_avg_pool(rows, rows_size(x), config.window, *norm, pooled)
    W, c = own.conv.to(config.dtype), None if own.conv_bias is None else own.conv_bias.to(config.dtype)
    return [conv_same_features(pooled.to(config.dtype), size, W, c), mean, var, count]


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    own, asked = Inputs(*tensors), Inputs(*needs)
    x = own.x
    run_whole = whole.operation("whole_transition_backward", x, config.groups) if x.dtype == config.dtype else None
    if run_whole is None:
        return _backward_by_steps(config, grad, own, results, asked)
    mean, var = results[1:3]
    assert mean is not None and var is not None
    pooled, C = new_features(x, _pooled_size(config, x)), x.shape[1]
    dgamma, dbeta = mean.new_empty(C), mean.new_empty(C)
    dx = new_features(x, x.shape) if asked.x else None
    dW = new_gradient(own.conv, mean.dtype) if asked.conv else None
    dc = mean.new_empty(own.conv.shape[0]) if asked.conv_bias else None
    sums = needs_sums(config, asked)
    norm = norm_again(config, own, mean, var)
    grads = dgamma, dbeta, dx, dW, dc
    held = whole.results(pooled, x.shape[1])  # the convolution's gradient of what it read
    run_whole(readable(grad), readable(x), rows_size(x), config.window, *norm, sums, own.conv, pooled, *grads)
    del held
    return found(own, asked, x=dx, gamma=dgamma, beta=dbeta, conv=dW, conv_bias=dc)


def _backward_by_steps(config: Config, grad: Tensor, own: Inputs, results: Tensors, asked: Inputs) -> list[Any]:
    mean, var, count = results[1:]
    assert mean is not None and var is not None and count is not None
    x, batch = own.x, config.batch_stats[0]
    ops, C = kernels.select(x), x.shape[1]
    norm = norm_values(own.norm, mean, var, batch, config.eps[0], mean.dtype)
    size, window = rows_size(x), config.window
    rows, g, W = to_rows(x), to_rows(grad), own.conv.to(config.dtype)
    pooled = to_rows(new_features(x, _pooled_size(config, x)))
    dgamma, dbeta = mean.new_empty(C), mean.new_empty(C)
    dW = dc = dx = None
    if asked.x or asked.gamma or asked.beta:
        # the dgrad looks at the shape of `pooled` only; the next step fills it
        dpooled, _ = conv_same_backward(g, pooled.to(config.dtype), grad.shape, W, (True, False))
        assert dpooled is not None
        dpooled = dpooled.to(x.dtype)
        again = pooled if asked.conv else None
        ops.bn_relu_avg_pool_backward_reduce(dpooled, rows, size, window, *norm, again, dgamma, dbeta)
    elif asked.conv:
        ops.bn_relu_avg_pool(rows, size, window, *norm, pooled)
    if asked.conv:
        dW = conv_same_backward(g, pooled.to(config.dtype), grad.shape, W, (False, True))[1]
    if asked.conv_bias:
        dc = g.sum(0, dtype=mean.dtype)
    del pooled
    if asked.x:
        dx = new_features(x, x.shape)
        sums = input_sums(config, dgamma, dbeta, count, rows)
        ops.bn_relu_avg_pool_backward(dpooled, rows, size, window, *norm, *sums, to_rows(dx))
    return found(own, asked, x=dx, gamma=dgamma, beta=dbeta, conv=dW, conv_bias=dc)


def _reference(config: Config, tensors: Tensors) -> Tensor:
    own = Inputs(*tensors)
    norm = frozen_norm(own.norm, config.batch_stats[0], config.eps[0])
    window = config.window[5 - own.x.dim() :]
    return reference.transition(own.x, norm, own.conv, window, conv_bias=own.conv_bias, update=False)


TRANSITION = register(Operation("transition", _allocate, _forward, _backward, _reference, norms_of, values=GIVEN_STATS))
