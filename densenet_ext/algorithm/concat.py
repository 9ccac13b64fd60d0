"""Concatenation, BN, ReLU of separate feature maps, on its own and with the 1x1 convolution.

``cat_bn_relu`` writes the normalised features into preallocated storage in one pass; its backward pass reads each
feature map for the two sums and once more to write its gradient. ``bottleneck`` gathers the raw features into storage
that lives as long as the call's steps, and again in the backward pass; features that are neighbours in one buffer are
read in place.

Source: Pleiss et al., "Memory-Efficient Implementation of DenseNets", arXiv 1707.06990, section 3.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm.conversions import cast, frozen_norm, grad_like, norm_tensors, norm_values, result_dtype
from densenet_ext.algorithm.layout import joined, new_features, pixels, to_rows
from densenet_ext.algorithm.norm import check_count
from densenet_ext.algorithm.operation import Config, Operation, register, run
from densenet_ext.algorithm.single import SingleNorm, allocate_stats
from densenet_ext.algorithm.sync import merge_stats, merge_sums
from densenet_ext.algorithm.values import Norm, Tensors


def cat_bn_relu(features: Sequence[Tensor], norm: Norm) -> Tensor:
    """relu(bn(cat(features))) [N, sum C_i, *spatial] of feature maps [N, C_i, *spatial], channels_last in memory.

    Raises PyTorch's own ValueError for one value per channel in training.
    """
    size = checked_size(features, norm)
    if pixels(size) == 0:
        return reference.cat_bn_relu(features, norm)
    config = Config((norm.batch_stats,), (norm.eps,), promoted(features), features=len(features))
    tensors = [*features, *norm_tensors(norm)]
    return run(CAT_BN_RELU, config, tensors, lambda results: SingleNorm(norm).move(size, results))


def bottleneck(
    features: Sequence[Tensor], conv_weight: Tensor, norm: Norm, *, conv_bias: Tensor | None = None
) -> Tensor:
    """relu(bn(cat(features))) convolved with conv_weight [b, sum C_i, 1...], plus conv_bias [b]: [N, b, *spatial].

    The result is channels_last in memory.

    Raises PyTorch's own ValueError for one value per channel in training.
    """
    size = checked_size(features, norm)
    if pixels(size) == 0 and not norm.group:
        return reference.bottleneck(features, conv_weight, norm, conv_bias=conv_bias)
    config = Config(
        (norm.batch_stats,),
        (norm.eps,),
        promoted(features),
        features=len(features),
        groups=(norm.group,),
    )
    tensors = [*features, *norm_tensors(norm), conv_weight, conv_bias]
    out = run(BOTTLENECK, config, tensors, lambda results: SingleNorm(norm).move(size, results))
    return out.to(result_dtype(out))


def checked_size(features: Sequence[Tensor], norm: Norm) -> list[int]:
    """The size of the features' concatenation; PyTorch's own ValueError for one value per channel in training."""
    size = list(features[0].shape)
    size[1] = sum(x.shape[1] for x in features)
    check_count(norm, size)
    return size


def promoted(features: Sequence[Tensor]) -> torch.dtype:
    """The dtype of the features' concatenation."""
    return reduce(torch.promote_types, (x.dtype for x in features))


def split(config: Config, tensors: Tensors) -> tuple[list[Tensor], list[int]]:
    """The feature maps in the dtype of their concatenation, and the size of that."""
    features = [x.to(config.dtype) for x in tensors[: config.features] if x is not None]
    size = list(features[0].shape)
    size[1] = sum(x.shape[1] for x in features)
    return features, size


def columns(features: Sequence[Tensor]) -> Iterator[tuple[Tensor, slice]]:
    """Each feature map with its columns in the concatenation."""
    start = 0
    for x in features:
        yield x, slice(start, start + x.shape[1])
        start += x.shape[1]


def _norms(config: Config) -> tuple[int]:
    return (config.features,)


def fill_feature_stats(features: Sequence[Tensor], mean: Tensor, var: Tensor) -> None:
    """Takes mean and variance [sum C_i] of the concatenation."""
    for x, new in columns(features):
        kernels.select(x).channel_stats(to_rows(x), mean[new], var[new])


# ---- concatenation, BN, ReLU -----------------------------------------------------------------------------------------


def _cat_allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    x = tensors[0]
    assert x is not None
    size = list(x.shape)
    size[1] = sum(x.shape[1] for x in tensors[: config.features] if x is not None)
    out = new_features(x, size, config.dtype)
    return [out, *allocate_stats(config, out, size[1])]


def _cat_forward(config: Config, tensors: Tensors) -> list[Tensor]:
    features, _ = split(config, tensors)
    out, mean, var = results = _cat_allocate(config, tensors)
    n, batch = config.features, config.batch_stats[0]
    if batch:
        fill_feature_stats(features, mean, var)
    norm = norm_values(tensors[n : n + 4], mean, var, batch, config.eps[0], mean.dtype)
    ops = kernels.select(out)
    together = joined(features)
    if together is None:
        ops.cat_bn_relu([to_rows(x) for x in features], *norm, to_rows(out))
    else:
        ops.bn_relu(to_rows(together), *norm, to_rows(out))
    return results


def _cat_backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    n, batch = config.features, config.batch_stats[0]
    mean, var = results[1:]
    assert mean is not None and var is not None
    features, size = split(config, tensors)
    ops = kernels.select(features[0])
    m, v, weight, bias, eps = norm_values(tensors[n : n + 4], mean, var, batch, config.eps[0], mean.dtype)
    dgamma, dbeta = mean.new_empty(size[1]), mean.new_empty(size[1])
    grads: list[Tensor | None] = [None] * len(tensors)
    g = to_rows(grad)
    for i, (x, new) in enumerate(columns(features)):
        w, b = (None if t is None else t[new] for t in (weight, bias))
        norm, rows = (m[new], v[new], w, b, eps), to_rows(x)
        if needs[n] or needs[n + 1] or (batch and needs[i]):
            ops.bn_relu_backward_reduce(g[:, new], rows, *norm, dgamma[new], dbeta[new])
        if needs[i]:
            dx = new_features(x, x.shape)
            sums = (dgamma[new], dbeta[new]) if batch else (None, None)
            ops.bn_relu_backward(g[:, new], rows, *norm, *sums, to_rows(dx))
            grads[i] = dx.to(tensors[i].dtype)  # type: ignore[union-attr]
    grads[n], grads[n + 1] = grad_like(dgamma, tensors[n], needs[n]), grad_like(dbeta, tensors[n + 1], needs[n + 1])
    return grads


def _cat_reference(config: Config, tensors: Tensors) -> Tensor:
    n = config.features
    norm = frozen_norm(tensors[n : n + 4], config.batch_stats[0], config.eps[0])
    return reference.cat_bn_relu([x for x in tensors[:n] if x is not None], norm, update=False)


# ---- and the 1x1 convolution -----------------------------------------------------------------------------------------


def gather(features: Sequence[Tensor], size: Sequence[int]) -> Tensor:
    """Rows [M, sum C_i]: in place when the features are neighbours, else in fresh storage."""
    together = joined(features)
    if together is not None:
        return to_rows(together)
    rows = to_rows(new_features(features[0], size))
    ops = kernels.select(rows)
    for x, new in columns(features):
        ops.append_features(to_rows(x), rows[:, new], None, None, 0.0, None, 0)
    return rows


def _bottleneck_allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    x, conv = tensors[0], tensors[-2]
    assert x is not None and conv is not None
    out = new_features(x, (x.shape[0], conv.shape[0], *x.shape[2:]), config.dtype)
    mean, var = allocate_stats(config, out, conv.shape[1])
    return [out, mean, var, mean.new_empty(1 if config.groups[0] else 0)]


def _bottleneck_forward(config: Config, tensors: Tensors) -> list[Tensor]:
    features, size = split(config, tensors)
    out, mean, var, count = _bottleneck_allocate(config, tensors)
    n, batch, (conv, conv_bias) = config.features, config.batch_stats[0], tensors[-2:]
    assert conv is not None
    if batch:
        fill_feature_stats(features, mean, var)
        if config.groups[0]:
            count = merge_stats(mean, var, pixels(size), config.groups[0])
    norm = norm_values(tensors[n : n + 4], mean, var, batch, config.eps[0], mean.dtype)
    W = cast(conv, mean.dtype).view(conv.shape[:2])
    c = None if conv_bias is None else cast(conv_bias, mean.dtype)
    kernels.select(out).bn_relu_conv1x1(gather(features, size), *norm, W, c, False, to_rows(out), None, None)
    return [out, mean, var, count]


def _bottleneck_backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    n, batch, (conv, conv_bias) = config.features, config.batch_stats[0], tensors[-2:]
    mean, var, count = results[1:]
    assert mean is not None and var is not None and count is not None and conv is not None
    features, size = split(config, tensors)
    ops = kernels.select(features[0])
    norm = norm_values(tensors[n : n + 4], mean, var, batch, config.eps[0], mean.dtype)
    b, C = conv.shape[:2]
    g = to_rows(grad.to(features[0].dtype))
    grads: list[Tensor | None] = [None] * len(tensors)
    grads[-1] = grad_like(g.sum(0, dtype=mean.dtype), conv_bias) if needs[-1] else None
    if not any(needs[:-1]):
        return grads
    rows = gather(features, size)
    G = rows.new_empty(rows.shape[0], C)
    dW = mean.new_empty(b, C) if needs[-2] else None
    dgamma, dbeta = mean.new_empty(C), mean.new_empty(C)
    gm, gv = gmv = mean.new_zeros(2, C)
    sums = (gm, gv) if batch else (None, None)
    no_norm2 = (None, None, None, None, None, 0.0, None, None)
    W = cast(conv, mean.dtype).view(b, C)
    ops.bn_relu_conv1x1_backward(rows, *norm, W, g, *no_norm2, None, False, G, dW, dgamma, dbeta, *sums)
    del rows
    grads[n], grads[n + 1] = grad_like(dgamma, tensors[n], needs[n]), grad_like(dbeta, tensors[n + 1], needs[n + 1])
    grads[-2] = grad_like(dW, conv)
    if config.groups[0] and any(needs[:n]):
        gm, gv = merge_sums(gmv, pixels(size), count, config.groups[0])
    for i, (x, new) in enumerate(columns(features)):
        if needs[i]:
            dx = new_features(x, x.shape)
            if batch:
                ops.feature_grad(G[:, new], to_rows(x), mean[new], gm[new], gv[new], 0.0, None, 0, to_rows(dx))
            else:
                to_rows(dx).copy_(G[:, new])
            grads[i] = dx.to(tensors[i].dtype)  # type: ignore[union-attr]
    return grads


def _bottleneck_reference(config: Config, tensors: Tensors) -> Tensor:
    n, (conv, conv_bias) = config.features, tensors[-2:]
    assert conv is not None
    norm = frozen_norm(tensors[n : n + 4], config.batch_stats[0], config.eps[0])
    features = [x for x in tensors[:n] if x is not None]
    return reference.bottleneck(features, conv, norm, conv_bias=conv_bias, update=False)


CAT_BN_RELU = register(Operation("cat_bn_relu", _cat_allocate, _cat_forward, _cat_backward, _cat_reference, _norms))
BOTTLENECK = register(
    Operation(
        "bottleneck", _bottleneck_allocate, _bottleneck_forward, _bottleneck_backward, _bottleneck_reference, _norms
    )
)
