"""One dense layer on its own: separate feature maps in, the k new ones out.

The features are gathered into storage that lives as long as the call, unless they are neighbours in one buffer, and
again in the backward pass. Kept are the features, which the layers share, and z ("bottlenecks") or the features only
("features"); both normalised tensors are made again. Dropout of the new features is the caller's. ``step`` has the
formulas.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm.concat import checked_size, columns, fill_feature_stats, gather, promoted, split
from densenet_ext.algorithm.conv import conv_same_features
from densenet_ext.algorithm.conversions import result_dtype
from densenet_ext.algorithm.dropout import BOTTLENECKS, dropout_at, new_seed
from densenet_ext.algorithm.layout import new_features, pixels, to_rows
from densenet_ext.algorithm.norm import check_count, update_running_stats
from densenet_ext.algorithm.operation import Config, Operation, register, run
from densenet_ext.algorithm.step import (
    COUNT,
    NORMS,
    Parameters,
    Step,
    first_half,
    first_half_backward,
    first_half_folded,
    folded,
    layer_of,
    make_step,
    parameters_of,
    put,
    second_half_backward,
)
from densenet_ext.algorithm.sync import merge_stats, merge_sums
from densenet_ext.algorithm.values import Layer, Tensors


def dense_layer(features: Sequence[Tensor], layer: Layer, save: str = "bottlenecks") -> Tensor:
    """The new features [N, k, *spatial] of feature maps [N, C_i, *spatial], channels_last in memory, before dropout.

    Raises PyTorch's own ValueError for one value per channel in training.
    """
    size = checked_size(features, layer.norm1)
    check_count(layer.norm2, (size[0], layer.conv1.shape[0], *size[2:]))
    norms = (layer.norm1, layer.norm2)
    groups = tuple(norm.group for norm in norms)
    if pixels(size) == 0 and not any(groups):
        return reference.dense_layer(features, layer, layer.inner_drop_rate)
    config = Config(
        batch_stats=tuple(norm.batch_stats for norm in norms),
        eps=tuple(norm.eps for norm in norms),
        dtype=promoted(features),
        features=len(features),
        save=save,
        groups=groups,
        inner_drop_rates=(layer.inner_drop_rate,),
        inner_drop_channels=(layer.inner_drop_channels,),
    )
    tensors = [*features, *parameters_of(layer), new_seed(config.inner_drop_rates, features[0].device)]

    def move(results: Sequence[Tensor]) -> None:
        if any(norm.update for norm in norms):
            mean, var, z_mean, z_var, counts = results[2:]
            rows = [counts[i : i + 1] if groups[i] else pixels(size) for i in (0, 1)]
            update_running_stats(norms, [mean, z_mean], [var, z_var], rows)

    out = run(LAYER, config, tensors, move)
    return out.to(result_dtype(out))


def dense_block_by_layers(x: Tensor, layers: Sequence[Layer], save: str, new_first: bool = False) -> Tensor:
    """``dense_block`` without the buffer: for norms that take their statistics over different process groups."""
    features = [x]
    for layer in layers:
        new = reference.dropout(dense_layer(features, layer, save), layer.drop_rate, layer.drop_channels)
        features.insert(0 if new_first else len(features), new)
    return torch.cat(features, 1)


def _parameters(config: Config, tensors: Tensors) -> Parameters:
    return Parameters(*tensors[config.features : config.features + COUNT])


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    """The new features; z [M, b]; mean and variance of the features and of z; the rows behind both, if shared."""
    x, own = tensors[0], _parameters(config, tensors)
    assert x is not None
    out = new_features(x, (x.shape[0], own.conv2.shape[0], *x.shape[2:]), config.dtype)
    return [out, *_kept(config, x, own.conv1)]


def _kept(config: Config, x: Tensor, conv1: Tensor) -> list[Tensor]:
    b, C = conv1.shape[:2]
    z = x.new_empty(pixels(x.shape) if config.save == "bottlenecks" else 0, b, dtype=config.dtype)
    acc = kernels.acc_dtype(config.dtype)
    stats = [C if config.batch_stats[0] else 0] * 2 + [b if config.batch_stats[1] else 0] * 2
    return [z, *(x.new_empty(n, dtype=acc) for n in (*stats, 2 if any(config.groups) else 0))]


def _step(config: Config, tensors: Tensors, rows: Tensor, size: Sequence[int], stats: Sequence[Tensor]) -> Step:
    inner = dropout_at(config.inner_drop_rates[0], config.inner_drop_channels[0], tensors[-1], BOTTLENECKS)
    own, batch, eps = _parameters(config, tensors), config.batch_stats, config.eps
    return make_step(rows, size, own, stats, batch, eps, config.groups[1], inner)


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    features, size = split(config, tensors)
    own = _parameters(config, tensors)
    kept = _kept(config, features[0], own.conv1)
    z, mean, var, z_mean, z_var, counts = kept
    if config.batch_stats[0]:
        fill_feature_stats(features, mean, var)
        if config.groups[0]:
            counts[:1] = merge_stats(mean, var, pixels(size), config.groups[0])
    rows = gather(features, size)
    step = _step(config, tensors, rows, size, (mean, var, z_mean, z_var))
    if config.save != "bottlenecks":
        z = rows.new_empty(rows.shape[0], z.shape[1])
    a = z
    if config.save == "nothing" and not step.batch[1] and step.inner is None:
        ((s2, t2),) = folded([(own, config.eps[1])], mean.dtype)
        first_half_folded(step, s2, t2, a)
    else:
        first_half(step, z, (z_mean, z_var) if step.batch[1] else (None, None))
        if step.batch[1] and step.group:
            counts[1:] = merge_stats(z_mean, z_var, pixels(size), step.group)
        if config.save == "bottlenecks":
            a = z.new_empty(z.shape)
        step.ops.bn_relu(z, *step.norm2, a)
    del rows
    W2, c2 = step.W2, step.c2
    del step  # which holds the gathered rows
    return [conv_same_features(a, size, W2, c2), *kept]


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    n = config.features
    z, mean, var, z_mean, z_var, counts = results[1:]
    assert z is not None and mean is not None and var is not None
    assert z_mean is not None and z_var is not None and counts is not None
    features, size = split(config, tensors)
    own, asked = _parameters(config, tensors), Parameters(*needs[n : n + COUNT])
    rows = gather(features, size)
    step = _step(config, tensors, rows, size, (mean, var, z_mean, z_var))
    if config.save == "features":
        z = rows.new_empty(rows.shape[0], z.shape[1])
        first_half(step, z)
    grads: list[Tensor | None] = [None] * len(tensors)
    a = z.new_empty(z.shape)
    below = any(needs[:n])
    beneath = below or any(asked[: Parameters._fields.index("conv2")])
    da, found = second_half_backward(step, to_rows(grad), z, a, asked, beneath)
    put(grads, n, found, own, asked)
    if da is None or not (below or any(asked[: NORMS[1]])):
        return grads
    if step.inner is None:
        a = z  # no scratch is needed any more
    G = rows.new_empty(rows.shape)
    gm, gv = gmv = mean.new_zeros(2, G.shape[1])
    count = counts[1] if step.group else None
    found = first_half_backward(step, da, z, a, found, count, asked, None, G, False, (gm, gv))
    put(grads, n, found, own, asked)
    del rows, step, z, a, da
    if config.batch_stats[0] and config.groups[0] and below:
        gm, gv = merge_sums(gmv, pixels(size), counts[0], config.groups[0])
    for i, (x, new) in enumerate(columns(features)):
        if needs[i]:
            dx = new_features(x, x.shape)
            if config.batch_stats[0]:
                ops = kernels.select(x)
                ops.feature_grad(G[:, new], to_rows(x), mean[new], gm[new], gv[new], 0.0, None, 0, to_rows(dx))
            else:
                to_rows(dx).copy_(G[:, new])
            grads[i] = dx.to(tensors[i].dtype)  # type: ignore[union-attr]
    return grads


def _norms(config: Config) -> list[int]:
    return [config.features + norm for norm in NORMS]


def _reference(config: Config, tensors: Tensors) -> Tensor:
    features = [x for x in tensors[: config.features] if x is not None]
    own, size = _parameters(config, tensors), features[0].shape
    inner = dropout_at(config.inner_drop_rates[0], config.inner_drop_channels[0], tensors[-1], BOTTLENECKS)
    factor = None if inner is None else inner.factors(size, own.conv1.shape[0], config.dtype)
    layer = layer_of(own, config.batch_stats, config.eps)
    return reference.dense_layer(features, layer, factor, update=False)


LAYER = register(Operation("layer", _allocate, _forward, _backward, _reference, _norms))
