"""Head: BN, ReLU, global average, in one read of x; the backward pass reads x twice, as the transition's does."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm import whole
from densenet_ext.algorithm.conversions import (
    as_pooled,
    cast,
    frozen_norm,
    is_empty,
    norm_values,
)
from densenet_ext.algorithm.inference import Call, Made
from densenet_ext.algorithm.layout import new_features, readable, to_rows
from densenet_ext.algorithm.norm import check_count
from densenet_ext.algorithm.operation import Config, Operation, kept_level, register, run
from densenet_ext.algorithm.packed import Held
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
)
from densenet_ext.algorithm.values import Norm, Stats, Tensors


def head(x: Tensor, norm: Norm | SingleNorm, *, stats: Stats | None = None) -> Tensor:
    """[N, C], the average over the pixels of relu(bn(x)), of x [N, C, *spatial].

    ``stats``: those of x, given by who knows that x has not changed since they were taken; None: they are taken from x.

    Raises PyTorch's own ValueError for one value per channel in training.
    """
    moving = single(norm)
    again = moving.inferences.run(x)
    if again is not None:
        return as_pooled(again) if x.dim() == 5 else again
    repeats, norm = norm is moving, moving.norm
    check_count(norm, x.shape)
    if is_empty(x) and not norm.group:
        return reference.head(x, norm)
    config = Config((norm.batch_stats,), (norm.eps,), x.dtype, save=kept_level("features"), groups=(norm.group,))
    tensors = inputs_of(x, norm, stats)
    out = run(HEAD, config, tensors, lambda results: moving.move(x.shape, results))
    if repeats and not norm.batch_stats:
        moving.inferences.keep(x, lambda: _prepared(config, tensors))
    return as_pooled(out) if x.dim() == 5 else out


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    x = Inputs(*tensors).x
    return [x.new_empty(x.shape[:2]), *allocate_shared_stats(config, x)]


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    own = Inputs(*tensors)
    size = rows_size(own.x)
    run_whole = whole.operation("whole_transition", own.x, config.groups)
    if run_whole is not None:
        results = _allocate(config, tensors)
        norm = norm_call(config, own, results[1], results[2])
        run_whole(readable(own.x), size, size[1:], *norm, None, None, results[0], None)
        return results
    rows = to_rows(own.x)
    out = own.x.new_empty(own.x.shape[:2])
    mean, var, count = batch_stats(config, own, rows)
    values = norm_values(own.norm, mean, var, config.batch_stats[0], config.eps[0], mean.dtype)
    kernels.select(rows).bn_relu_avg_pool(rows, size, size[1:], *values, out)
    return [out, mean, var, count]


def prepared_scores(x: Tensor, norm: SingleNorm, weight: Tensor, bias: Tensor | None) -> Call | None:
    """Returns a call on features like x, in evaluation without gradients, that gives the result [N, K] of a linear
    layer on that of `head`; None where this is not done.

    A classifier takes longer to be called than a small one takes to compute. weight: [K, C]; bias: [K].
    """
    same = x.is_cpu and all(t.dtype == x.dtype == torch.float32 for t in (weight, bias) if t is not None)
    if not same or norm.norm.batch_stats or weight.numel() > _MOST_WEIGHTS:
        return None
    config = Config((False,), (norm.norm.eps,), x.dtype, save="nothing", groups=(norm.norm.group,))
    return _prepared(config, inputs_of(x, norm.norm, None, weight, bias))


_MOST_WEIGHTS = 2**16  # of a linear layer: packed at every call, more of them take longer than the call


def _prepared(config: Config, own: Inputs) -> Call | None:
    """``_forward`` in evaluation without gradients, on features like those of ``own``, then the linear layer whose
    weight and bias are in the place of a convolution's; None where it goes by steps."""
    run_whole = whole.operation("whole_transition", own.x, config.groups)
    if run_whole is None:
        return None
    size, norm = rows_size(own.x), norm_call(config, own, None, None)
    window, weight, bias, held = size[1:], own.conv, own.conv_bias, Held([own.conv])

    def average(x: Tensor, out: Tensor) -> None:
        run_whole(readable(x), size, window, *norm, None, None, out, None)

    def score(x: Tensor, out: Tensor, pooled: Tensor) -> None:
        run_whole(readable(x), size, window, *norm, weight, bias, pooled, out, packed_weights=held.any())

    N, C = own.x.shape[:2]
    pooled = Made((N, C), (C, 1), own.x.dtype, own.x.device)
    if weight is None:
        return Call(average, pooled)
    K = weight.shape[0]
    return Call(score, pooled._replace(size=(N, K), stride=(K, 1)), pooled, held=held)


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    own, asked = Inputs(*tensors), Inputs(*needs)
    mean, var, count = results[1:]
    assert mean is not None and var is not None and count is not None
    x, batch = own.x, config.batch_stats[0]
    ops, C = kernels.select(x), x.shape[1]
    size, g = rows_size(x), cast(grad, x.dtype)
    dgamma, dbeta, dx = mean.new_empty(C), mean.new_empty(C), None
    run_whole = whole.operation("whole_transition_backward", x, config.groups)
    if run_whole is not None:
        dx = new_features(x, x.shape) if asked.x else None
        again, grads = norm_again(config, own, mean, var), (dgamma, dbeta, dx)
        run_whole(g, readable(x), size, size[1:], *again, needs_sums(config, asked), None, None, *grads, None, None)
        return found(own, asked, x=dx, gamma=dgamma, beta=dbeta)
    rows = to_rows(x)
    norm = norm_values(own.norm, mean, var, batch, config.eps[0], mean.dtype)
    if batch or asked.gamma or asked.beta:
        ops.bn_relu_avg_pool_backward_reduce(g, rows, size, size[1:], *norm, None, dgamma, dbeta)
    if asked.x:
        dx = new_features(x, x.shape)
        sums = input_sums(config, dgamma, dbeta, count, rows)
        ops.bn_relu_avg_pool_backward(g, rows, size, size[1:], *norm, *sums, to_rows(dx))
    return found(own, asked, x=dx, gamma=dgamma, beta=dbeta)


def _reference(config: Config, tensors: Tensors) -> Tensor:
    own = Inputs(*tensors)
    return reference.head(own.x, frozen_norm(own.norm, config.batch_stats[0], config.eps[0]), update=False)


HEAD = register(Operation("head", _allocate, _forward, _backward, _reference, norms_of, values=GIVEN_STATS))
