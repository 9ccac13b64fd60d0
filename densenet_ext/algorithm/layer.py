"""One dense layer on its own: separate feature maps in, the k new ones out.

    z = relu(bn1(cat(features))) @ W1^T        new = conv3x3(relu(bn2(z)), W2)

The features are gathered into storage that lives as long as the call, unless they are neighbours in one buffer, and
again in the backward pass. Kept are the features, which the layers share, and z ("bottlenecks") or the features only
("features"); both normalised tensors are made again. Dropout is the caller's.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm.concat import checked_size, columns, fill_feature_stats, gather, promoted, split
from densenet_ext.algorithm.conv import conv_same_backward, conv_same_features
from densenet_ext.algorithm.conversions import cast, frozen_norm, grad_like, norm_tensors, norm_values, result_dtype
from densenet_ext.algorithm.folding import scales_shifts
from densenet_ext.algorithm.layout import new_features, pixels, to_rows
from densenet_ext.algorithm.norm import check_count, update_running_stats
from densenet_ext.algorithm.operation import Config, Operation, register, run
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
        z = reference.bottleneck(features, layer.conv1, layer.norm1)
        return reference.conv_same(reference.cat_bn_relu([z], layer.norm2), layer.conv2)
    config = Config(
        batch_stats=tuple(norm.batch_stats for norm in norms),
        eps=tuple(norm.eps for norm in norms),
        dtype=promoted(features),
        features=len(features),
        save=save,
        groups=groups,
    )
    parameters = [*norm_tensors(layer.norm1), layer.conv1, *norm_tensors(layer.norm2), layer.conv2]

    def move(results: Sequence[Tensor]) -> None:
        if any(norm.update for norm in norms):
            mean, var, z_mean, z_var, counts = results[2:]
            rows = [counts[i : i + 1] if groups[i] else pixels(size) for i in (0, 1)]
            update_running_stats(norms, [mean, z_mean], [var, z_var], rows)

    out = run(LAYER, config, [*features, *parameters], move)[0]
    return out.to(result_dtype(out))


def dense_block_by_layers(x: Tensor, layers: Sequence[Layer], save: str, new_first: bool = False) -> Tensor:
    """``dense_block`` without the buffer: for norms that take their statistics over different process groups."""
    features = [x]
    for layer in layers:
        new = dense_layer(features, layer, save)
        new = F.dropout(new, layer.drop_rate) if layer.drop_rate > 0 else new
        features.insert(0 if new_first else len(features), new)
    return torch.cat(features, 1)


def _parts(config: Config, tensors: Tensors) -> tuple[Tensors, Tensor, Tensors, Tensor]:
    """Tensors of norm1, W1, tensors of norm2, W2."""
    n = config.features
    conv1, conv2 = tensors[n + 4], tensors[n + 9]
    assert conv1 is not None and conv2 is not None
    return tensors[n : n + 4], conv1, tensors[n + 5 : n + 9], conv2


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    """The new features; z [M, b]; mean and variance of the features and of z; the rows behind both, if shared."""
    x = tensors[0]
    _, conv1, _, conv2 = _parts(config, tensors)
    assert x is not None
    out = new_features(x, (x.shape[0], conv2.shape[0], *x.shape[2:]), config.dtype)
    return [out, *_kept(config, x, conv1)]


def _kept(config: Config, x: Tensor, conv1: Tensor) -> list[Tensor]:
    b, C = conv1.shape[:2]
    z = x.new_empty(pixels(x.shape) if config.save == "bottlenecks" else 0, b, dtype=config.dtype)
    acc = kernels.acc_dtype(config.dtype)
    stats = [C if config.batch_stats[0] else 0] * 2 + [b if config.batch_stats[1] else 0] * 2
    return [z, *(x.new_empty(n, dtype=acc) for n in (*stats, 2 if any(config.groups) else 0))]


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    features, size = split(config, tensors)
    tensors1, conv1, tensors2, conv2 = _parts(config, tensors)
    kept = _kept(config, features[0], conv1)
    z, mean, var, z_mean, z_var, counts = kept
    (batch1, batch2), (group1, group2) = config.batch_stats, config.groups
    if batch1:
        fill_feature_stats(features, mean, var)
        if group1:
            counts[:1] = merge_stats(mean, var, pixels(size), group1)
    rows = gather(features, size)
    ops, (b, C) = kernels.select(rows), conv1.shape[:2]
    if config.save != "bottlenecks":
        z = rows.new_empty(rows.shape[0], b)
    norm1 = norm_values(tensors1, mean, var, batch1, config.eps[0], mean.dtype)
    W1 = cast(conv1, mean.dtype).view(b, C)
    norm2 = norm_values(tensors2, z_mean, z_var, batch2, config.eps[1], mean.dtype)
    a = z
    if config.save == "nothing" and not batch2:
        (s2,), (t2,) = scales_shifts([norm2])
        ops.bn_relu_conv1x1(rows, *norm1, W1 * s2[:, None], t2, True, a, None, None)
    else:
        m2, v2 = (z_mean, z_var) if batch2 else (None, None)
        ops.bn_relu_conv1x1(rows, *norm1, W1, None, False, z, m2, v2)
        if batch2 and group2:
            counts[1:] = merge_stats(z_mean, z_var, pixels(size), group2)
        if config.save == "bottlenecks":
            a = z.new_empty(z.shape)
        ops.bn_relu(z, *norm2, a)
    del rows
    return [conv_same_features(a, size, conv2.to(config.dtype)), *kept]


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    n, (batch1, batch2), (group1, group2) = config.features, config.batch_stats, config.groups
    z, mean, var, z_mean, z_var, counts = results[1:]
    assert z is not None and mean is not None and var is not None
    assert z_mean is not None and z_var is not None and counts is not None
    features, size = split(config, tensors)
    tensors1, conv1, tensors2, conv2 = _parts(config, tensors)
    b, C = conv1.shape[:2]
    norm1 = norm_values(tensors1, mean, var, batch1, config.eps[0], mean.dtype)
    norm2 = norm_values(tensors2, z_mean, z_var, batch2, config.eps[1], mean.dtype)
    W1 = cast(conv1, mean.dtype).view(b, C)
    rows = gather(features, size)
    ops = kernels.select(rows)
    if config.save == "features":
        z = rows.new_empty(rows.shape[0], b)
        ops.bn_relu_conv1x1(rows, *norm1, W1, None, False, z, None, None)
    grads: list[Tensor | None] = [None] * len(tensors)
    own = needs[n:]
    a = z.new_empty(z.shape)
    if own[9]:
        ops.bn_relu(z, *norm2, a)
    da, dW2 = conv_same_backward(to_rows(grad), a, size, conv2.to(config.dtype), (any(needs[: n + 9]), own[9]))
    del a
    grads[n + 9] = grad_like(dW2, conv2)
    if da is None:
        return grads
    dgamma2, dbeta2 = mean.new_empty(b), mean.new_empty(b)
    if batch2 or own[5] or own[6]:
        ops.bn_relu_backward_reduce(da, z, *norm2, dgamma2, dbeta2)
        grads[n + 5], grads[n + 6] = grad_like(dgamma2, tensors2[0], own[5]), grad_like(dbeta2, tensors2[1], own[6])
    if not any(needs[: n + 5]):
        return grads
    G = rows.new_empty(rows.shape[0], C)
    dW1 = mean.new_empty(b, C) if own[4] else None
    dgamma1, dbeta1 = mean.new_empty(C), mean.new_empty(C)
    gm, gv = gmv = mean.new_zeros(2, C)
    if batch2 and group2:
        dgamma2, dbeta2 = merge_sums(torch.stack([dgamma2, dbeta2]), pixels(size), counts[1], group2)
    sums1, sums2 = (gm, gv) if batch1 else (None, None), (dgamma2, dbeta2) if batch2 else (None, None)
    ops.bn_relu_conv1x1_backward(rows, *norm1, W1, da, z, *norm2, *sums2, None, False, G, dW1, dgamma1, dbeta1, *sums1)
    del rows, z, da
    grads[n], grads[n + 1] = grad_like(dgamma1, tensors1[0], own[0]), grad_like(dbeta1, tensors1[1], own[1])
    grads[n + 4] = grad_like(dW1, conv1)
    if batch1 and group1 and any(needs[:n]):
        gm, gv = merge_sums(gmv, pixels(size), counts[0], group1)
    for i, (x, new) in enumerate(columns(features)):
        if needs[i]:
            dx = new_features(x, x.shape)
            if batch1:
                ops.feature_grad(G[:, new], to_rows(x), mean[new], gm[new], gv[new], 0.0, None, 0, to_rows(dx))
            else:
                to_rows(dx).copy_(G[:, new])
            grads[i] = dx.to(tensors[i].dtype)  # type: ignore[union-attr]
    return grads


def _norms(config: Config) -> tuple[int, int]:
    return config.features, config.features + 5


def _reference(config: Config, tensors: Tensors) -> Tensor:
    tensors1, conv1, tensors2, conv2 = _parts(config, tensors)
    norm1 = frozen_norm(tensors1, config.batch_stats[0], config.eps[0])
    norm2 = frozen_norm(tensors2, config.batch_stats[1], config.eps[1])
    features = [x for x in tensors[: config.features] if x is not None]
    z = reference.bottleneck(features, conv1, norm1, update=False)
    return reference.conv_same(reference.cat_bn_relu([z], norm2, update=False), conv2)


LAYER = register(Operation("layer", _allocate, _forward, _backward, _reference, _norms))
