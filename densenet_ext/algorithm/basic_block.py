"""The dense block of layers without a bottleneck, over one buffer: the original DenseNet's, and FC-DenseNet's.

The buffer, the statistics of its columns and their gradients G, gm, gv are those of ``block``. A layer is

    X[:, new] = dropout(conv3x3(relu(x s + t), W))        x = X[:, read]     s = gamma r     r = (v + eps)^-1/2

A 3x3 convolution reads every normalised value nine times, so relu(x s + t) is written once: into one scratch that all
layers share, and again in the backward pass. Kept is the buffer only. Backward, layers in reverse:

    g  = G[:, new] + (gm + 2 (x - m) gv) / M                 # complete: every consumer has contributed
    da, dW from g through dropout and conv3x3
    dy = da where x s + t > 0
    dbeta = sum dy     dgamma = r sum dy (x - m)
    G[:, read] += s dy  gm[read] -= s dbeta  gv[read] -= s r / 2 dgamma

Statistics over several processes (``sync``) are merged as those of ``block``'s columns: forward when features are
appended, backward when a feature's gradient is complete.

Source: Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017), section 3, "Composite function".
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm.columns import Columns, layer_columns, within
from densenet_ext.algorithm.conv import conv_same, conv_same_backward
from densenet_ext.algorithm.conversions import frozen_norm, grad_like, is_empty, norm_tensors, norm_values, result_dtype
from densenet_ext.algorithm.layout import from_rows, new_features, pixels, to_rows
from densenet_ext.algorithm.norm import check_count, update_running_stats
from densenet_ext.algorithm.operation import Config, Operation, register, run
from densenet_ext.algorithm.sync import merge_stats, merge_sums, shared_group
from densenet_ext.algorithm.values import BasicLayer, Stats, Tensors


def basic_block(x: Tensor, layers: Sequence[BasicLayer], new_first: bool = False) -> tuple[Tensor, Stats | None]:
    """All features [N, C_0 + sum k, *spatial] of x [N, C_0, *spatial], channels_last in memory, and their statistics.

    ``new_first``: a layer's new features come before those that it read. The dtype is that of eager's concatenation:
    promote(x, a convolution's result). There are no statistics where no norm uses the batch's own,
    and in compiled code. Raises PyTorch's own ValueError for one value per channel in training.
    """
    groups = tuple(layer.norm.group for layer in layers)
    if not layers or (is_empty(x) and not any(groups)):
        return reference.basic_block(x, layers, new_first), None
    if shared_group(groups, (layer.norm.batch_stats for layer in layers)) is None:
        stats = None
        for layer in layers:  # each a block of its own, whose statistics are of one group
            x, stats = basic_block(x, [layer], new_first)
        return x, stats
    for layer in layers:
        check_count(layer.norm, (x.shape[0], layer.conv.shape[1], *x.shape[2:]))
    config = Config(
        batch_stats=tuple(layer.norm.batch_stats for layer in layers),
        eps=tuple(layer.norm.eps for layer in layers),
        dtype=torch.promote_types(x.dtype, result_dtype(x)),
        drop_rates=tuple(layer.drop_rate for layer in layers),
        groups=groups,
        new_first=new_first,
    )
    seed = None
    if any(p > 0 for p in config.drop_rates):
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    tensors: list[Tensor | None] = [x, seed]
    for layer in layers:
        tensors += (*norm_tensors(layer.norm), layer.conv)

    def move(results: Sequence[Tensor]) -> None:
        if any(layer.norm.update for layer in layers):
            mean, var, count = results[1:4]
            read = [columns.read for columns in _layer_columns(config, tensors)]
            norms = [layer.norm for layer in layers]
            rows = [count if group else pixels(x.shape) for group in groups]
            update_running_stats(norms, [mean[c] for c in read], [var[c] for c in read], rows)

    out, mean, var, _, own_mean, own_var = run(BASIC_BLOCK, config, tensors, move)
    if not mean.numel() or torch.compiler.is_compiling():
        return out, None
    return out, Stats(own_mean, own_var) if own_mean.numel() else Stats(mean, var)


# ---- the functions of the unit ---------------------------------------------------------------------------------------

_PER_LAYER = 5  # weight, bias, running mean and variance; conv


def _parameters(tensors: Tensors) -> list[tuple[Tensors, Tensor]]:
    """Each layer's norm and weight."""
    layers = []
    for i in range(2, len(tensors), _PER_LAYER):
        conv = tensors[i + 4]
        assert conv is not None
        layers.append((tensors[i : i + 4], conv))
    return layers


def _layer_columns(config: Config, tensors: Tensors) -> list[Columns]:
    weights = [conv for _, conv in _parameters(tensors)]
    return layer_columns(weights[0].shape[1], tuple(W.shape[0] for W in weights), config.new_first)


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    """The buffer; mean and variance of its columns.

    With processes that share statistics also: how many rows these have, and mean and variance in this process alone.
    """
    x = tensors[0]
    assert x is not None
    C_total = x.shape[1] + sum(W.shape[0] for _, W in _parameters(tensors))
    out = new_features(x, (x.shape[0], C_total, *x.shape[2:]), config.dtype)
    counts = [C_total if any(config.batch_stats) else 0] * 2
    counts += [1, C_total, C_total] if any(config.groups) else [0] * 3
    acc = kernels.acc_dtype(config.dtype)
    return [out, *(out.new_empty(n, dtype=acc) for n in counts)]


def _group(config: Config) -> str:
    """The process group over which the statistics are taken; "" for this process alone."""
    return shared_group(config.groups, config.batch_stats) or ""


def _prefix(scratch: Tensor, M: int, C: int) -> Tensor:
    """Rows [M, C] of flat storage."""
    return scratch[: M * C].view(M, C)


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    x, seed = tensors[:2]
    assert x is not None
    out, mean, var, count, own_mean, own_var = results = _allocate(config, tensors)
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    layers, columns, group = _parameters(tensors), _layer_columns(config, tensors), _group(config)

    def append(src: Tensor, new: slice, drop_rate: float, l: int) -> None:
        m, v = (mean[new], var[new]) if mean.numel() else (None, None)
        ops.append_features(src, X[:, new], m, v, drop_rate, seed, l)
        if group:
            own_mean[new], own_var[new] = mean[new], var[new]
            if new is not columns[-1].new:  # the last ones are for the next unit
                count.copy_(merge_stats(mean[new], var[new], M, group))

    append(to_rows(x.to(out.dtype)), columns[0].read, 0.0, 0)
    scratch = X.new_empty(M * layers[-1][1].shape[1])
    for l, ((tensors_l, W), (read, new)) in enumerate(zip(layers, columns, strict=True)):
        norm = norm_values(tensors_l, mean[read], var[read], config.batch_stats[l], config.eps[l], acc)
        a = _prefix(scratch, M, W.shape[1])
        ops.bn_relu(X[:, read], *norm, a)
        append(conv_same(a, size, W.to(out.dtype)), new, config.drop_rates[l], l)
    return results


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    """``grad`` is only read."""
    out, mean, var, count = results[:4]
    assert out is not None and mean is not None and var is not None and count is not None
    seed = tensors[1]
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    layers, columns = _parameters(tensors), _layer_columns(config, tensors)
    stats, group = mean.numel() > 0, _group(config)
    G, start = to_rows(grad), 0  # the gradient of X's columns from `start` on
    ours = G.data_ptr() != grad.data_ptr()  # a copy, to write into
    gm, gv = gmv = torch.zeros(2, size[1], dtype=acc, device=out.device)
    grads: list[Tensor | None] = [None] * len(tensors)
    scratch = X.new_empty(M * layers[-1][1].shape[1])
    for l in reversed(range(len(layers))):
        (tensors_l, W), (read, new) = layers[l], columns[l]
        first = 2 + l * _PER_LAYER
        own = needs[first : first + _PER_LAYER]
        below = any(needs[:first])  # somebody further down asks
        if not below and not any(own):
            break
        batch = config.batch_stats[l]
        norm = norm_values(tensors_l, mean[read], var[read], batch, config.eps[l], acc)
        g = within(G, new, start)
        p = config.drop_rates[l]
        consumed = stats and l + 1 < len(layers)
        if consumed and group:
            gmv[:, new] = merge_sums(gmv[:, new], M, count, group)
        if p > 0 or consumed:
            source, g = g, X.new_empty(M, W.shape[0])
            m = mean[new] if stats else gm[new]  # without statistics gm and gv stay zero, and so may m
            ops.feature_grad(source, X[:, new], m, gm[new], gv[new], p, seed, l, g)
        a = _prefix(scratch, M, W.shape[1])
        if own[4]:
            ops.bn_relu(X[:, read], *norm, a)
        beneath = below or any(own[:4])
        da, dW = conv_same_backward(g, a, size, W.to(out.dtype), (beneath, own[4]))
        grads[first + 4] = grad_like(dW, W)
        if not beneath:
            break
        assert da is not None
        dgamma, dbeta = mean.new_empty(W.shape[1]), mean.new_empty(W.shape[1])
        if batch or own[0] or own[1]:
            ops.bn_relu_backward_reduce(da, X[:, read], *norm, dgamma, dbeta)
            grads[first] = grad_like(dgamma, tensors_l[0], own[0])
            grads[first + 1] = grad_like(dbeta, tensors_l[1], own[1])
        if not below:
            break
        ops.bn_relu_backward(da, X[:, read], *norm, None, None, da)  # s dy
        if ours:
            within(G, read, start).add_(da)
        else:
            G, start, ours = da.add_(G[:, read]), read.start, True
        if batch:
            _, v, gamma, _, eps = norm
            r = (v + eps).rsqrt()
            s = r if gamma is None else gamma * r
            gm[read].sub_(s * dbeta)
            gv[read].sub_(s * r * dgamma / 2)
        del da
    if needs[0]:
        del scratch
        read = columns[0].read
        G = within(G, read, start)
        grads[0] = x_grad = new_features(out, (size[0], G.shape[1], *size[2:]))
        dx = to_rows(x_grad)
        if group:
            gmv[:, read] = merge_sums(gmv[:, read], M, count, group)
        if stats:
            ops.feature_grad(G, X[:, read], mean[read], gm[read], gv[read], 0.0, None, 0, dx)
        else:
            dx.copy_(G)
    return grads


def _reference(config: Config, tensors: Tensors) -> Tensor:
    x, seed = tensors[:2]
    assert x is not None
    layers, factors = [], []
    for l, (tensors_l, W) in enumerate(_parameters(tensors)):
        p, factor = config.drop_rates[l], None
        if p > 0:
            assert seed is not None
            rows = kernels.plain.dropout_factor(seed, l, pixels(x.shape), W.shape[0], p, x.dtype)
            factor = from_rows(rows, x.shape)
        layers.append(BasicLayer(frozen_norm(tensors_l, config.batch_stats[l], config.eps[l]), W, p))
        factors.append(factor)
    return reference.basic_block(x, layers, config.new_first, factors=factors, update=False)


def _norms(config: Config) -> range:
    return range(2, 2 + len(config.drop_rates) * _PER_LAYER, _PER_LAYER)


def _restore(config: Config, tensors: Tensors, out: Tensor) -> Tensor:
    """The block's input, from its result: what the first layer reads."""
    return out[:, _layer_columns(config, tensors)[0].read]


BASIC_BLOCK = register(Operation("basic_block", _allocate, _forward, _backward, _reference, _norms, _restore))
