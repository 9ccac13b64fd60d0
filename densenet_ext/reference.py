"""The fused units in the usual formulation: concatenation, BatchNorm, ReLU, convolution, pooling as PyTorch has them.

Same signatures and same parameters as in ``densenet_ext.algorithm``. Every test compares with this; what cannot be
fused runs it; and a gradient of a gradient is taken through it. ``update=False`` leaves the running statistics where
they are.

Source: Huang, Liu, van der Maaten & Weinberger, "Densely Connected Convolutional Networks" (CVPR 2017), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext.algorithm.values import BasicLayer, Layer, Norm

_CONV = {3: F.conv1d, 4: F.conv2d, 5: F.conv3d}
_AVG_POOL = {3: F.avg_pool1d, 4: F.avg_pool2d, 5: F.avg_pool3d}
_MAX_POOL = {3: F.max_pool1d, 4: F.max_pool2d, 5: F.max_pool3d}


def batch_norm(x: Tensor, norm: Norm, update: bool = True) -> Tensor:
    """Computes what ``nn.BatchNorm`` does on x [N, C, *spatial], running statistics included; of this process alone."""
    if norm.group:
        raise RuntimeError("SyncBatchNorm over several processes has no plain formulation here: unfuse the model first")
    moves = update and norm.update and norm.batch_stats
    momentum = norm.momentum
    if moves and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    if momentum is None:
        counted = moves and norm.num_batches_tracked is not None
        momentum = 1.0 / float(norm.num_batches_tracked) if counted else 0.0  # type: ignore[arg-type]
    keeps = moves or not norm.batch_stats
    mean = norm.running_mean if keeps else None
    var = norm.running_var if keeps else None
    return F.batch_norm(x, mean, var, norm.weight, norm.bias, norm.batch_stats, momentum, norm.eps)


def conv_same(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Computes the convolution of stride 1 that keeps the size: 1x1, or 3x3 with padding 1."""
    return _CONV[x.dim()](x, weight, bias, padding=[n // 2 for n in weight.shape[2:]])


def dense_block(
    x: Tensor,
    layers: Sequence[Layer],
    save: str = "bottlenecks",
    new_first: bool = False,
    *,
    factors: Sequence[Tensor | None] | None = None,
    inner_factors: Sequence[Tensor | None] | None = None,
    update: bool = True,
) -> Tensor:
    """Returns [N, C_0 + sum k, *spatial] of x [N, C_0, *spatial].

    ``factors``, ``inner_factors``: per layer what dropout multiplies the new features and the bottleneck features with,
    or None for nothing; else both are drawn. ``new_first``: concatenated as [new, x]. ``save`` has no meaning here.
    """
    features = [x]
    for i, layer in enumerate(layers):
        inner = layer.inner_drop_rate if inner_factors is None else inner_factors[i]
        new = dense_layer(features, layer, inner, update=update)
        new = dropout(new, layer.drop_rate if factors is None else factors[i], layer.drop_channels)
        features.insert(0 if new_first else i + 1, new)
    return torch.cat(features, 1)


def dense_layer(
    features: Sequence[Tensor], layer: Layer, inner: float | Tensor | None = None, *, update: bool = True
) -> Tensor:
    """Returns the new features [N, k, *spatial] of feature maps [N, C_i, *spatial], before dropout.

    ``inner``: the rate of dropout of the bottleneck features, or what it multiplies them with, or None for nothing.
    """
    z = bottleneck(features, layer.conv1, layer.norm1, conv_bias=layer.conv1_bias, update=update)
    z = dropout(z, inner, layer.inner_drop_channels)
    return conv_same(F.relu(batch_norm(z, layer.norm2, update)), layer.conv2, layer.conv2_bias)


def basic_block(
    x: Tensor,
    layers: Sequence[BasicLayer],
    new_first: bool = False,
    *,
    factors: Sequence[Tensor | None] | None = None,
    update: bool = True,
) -> Tensor:
    """Does as `dense_block`, of layers without a bottleneck."""
    features = [x]
    for i, layer in enumerate(layers):
        y = F.relu(batch_norm(torch.cat(features, 1), layer.norm, update))
        new = conv_same(y, layer.conv, layer.bias)
        new = dropout(new, layer.drop_rate if factors is None else factors[i], layer.drop_channels)
        features.insert(0 if new_first else i + 1, new)
    return torch.cat(features, 1)


def dropout(x: Tensor, drop: float | Tensor | None, channels: bool = False) -> Tensor:
    """Returns x with values, or ``channels``, dropped at the rate ``drop``; or times that factor; or x for None."""
    if isinstance(drop, Tensor):
        return x * drop
    if drop is None or drop <= 0:
        return x
    return torch.feature_dropout(x, drop, True) if channels else F.dropout(x, drop, training=True)


def transition(
    x: Tensor,
    norm: Norm,
    conv_weight: Tensor,
    window: int | tuple[int, ...] = 2,
    *,
    conv_bias: Tensor | None = None,
    update: bool = True,
) -> Tensor:
    """Computes BN, ReLU, 1x1 convolution, average pooling of ``window``: [N, C_out, *spatial // window]."""
    return _AVG_POOL[x.dim()](conv_same(F.relu(batch_norm(x, norm, update)), conv_weight, conv_bias), window)


def stem(
    x: Tensor,
    norm: Norm,
    kernel_size: int | tuple[int, ...] = 3,
    stride: int | tuple[int, ...] = 2,
    padding: int | tuple[int, ...] = 1,
    *,
    update: bool = True,
) -> Tensor:
    """Computes BN, ReLU, max-pooling of the first convolution's output."""
    return _MAX_POOL[x.dim()](F.relu(batch_norm(x, norm, update)), kernel_size, stride, padding)


def head(x: Tensor, norm: Norm, *, update: bool = True) -> Tensor:
    """Computes BN, ReLU, global average: [N, C]."""
    return F.relu(batch_norm(x, norm, update)).flatten(2).mean(2)


def cat_bn_relu(features: Sequence[Tensor], norm: Norm, *, update: bool = True) -> Tensor:
    """Computes concatenation, BN, ReLU: [N, sum C_i, *spatial]."""
    return F.relu(batch_norm(torch.cat(list(features), 1), norm, update))


def bottleneck(
    features: Sequence[Tensor],
    conv_weight: Tensor,
    norm: Norm,
    *,
    conv_bias: Tensor | None = None,
    update: bool = True,
) -> Tensor:
    """Computes concatenation, BN, ReLU, 1x1 convolution: [N, b, *spatial]."""
    return conv_same(cat_bn_relu(features, norm, update=update), conv_weight, conv_bias)
