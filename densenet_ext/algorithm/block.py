"""The dense block over one buffer.

Layer l reads the first C_l columns of the buffer X [M, C_total] and writes the next k (``columns`` has the other
order). Mean m and variance v of a column are taken once, of its values as stored, and serve every later norm. With
r = (v + eps)^-1/2, s = gamma1 r, t = beta1 - m s:

    z = relu(x s + t) @ W1^T        x = X[:, :C_l]
    X[:, C_l : C_l + k] = dropout(conv3x3(relu(z s2 + t2), W2))

Backward, layers in reverse; G is the gradient of X, and gm, gv collect those of m and v:

    g  = G[:, new] + (gm + 2 (x - m) gv) / M                 # complete: every consumer has contributed
    dz, dW2, dgamma2, dbeta2 from g through dropout, conv3x3 and BN2-ReLU
    dW1 = dz^T @ relu(x s + t)
    dy  = (dz @ W1) where x s + t > 0                        # recomputed, never stored
    dbeta1 = sum dy     dgamma1 = r sum dy (x - m)
    G[:, :C_l] += s dy  gm[:C_l] -= s sum dy  gv[:C_l] -= s r^2 / 2 sum dy (x - m)

Where a norm takes its statistics over several processes (``sync``), those of the columns and of z are merged as soon as
they are taken, and in the backward pass gm, gv of a feature and the two sums of norm2. Recomputation exchanges nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_ext import checks, kernels, reference
from densenet_ext.algorithm.columns import layer_columns, within
from densenet_ext.algorithm.conv import conv_same, conv_same_backward
from densenet_ext.algorithm.conversions import (
    cast,
    frozen_norm,
    grad_like,
    is_empty,
    norm_tensors,
    norm_values,
    result_dtype,
)
from densenet_ext.algorithm.folding import scales_shifts
from densenet_ext.algorithm.layer import dense_block_by_layers
from densenet_ext.algorithm.layout import from_rows, new_features, pixels, row_pitch, to_rows
from densenet_ext.algorithm.norm import check_count, update_running_stats
from densenet_ext.algorithm.operation import Config, Operation, register, run
from densenet_ext.algorithm.sync import merge_stats, merge_sums, shared_group
from densenet_ext.algorithm.values import Layer, Stats, Tensors


def dense_block(
    x: Tensor, layers: Sequence[Layer], save: str = "bottlenecks", new_first: bool = False
) -> tuple[Tensor, Stats | None]:
    """All features [N, C_0 + sum k, *spatial] of x [N, C_0, *spatial], channels_last in memory, and their statistics.

    ``save``: what is kept for the backward pass, "bottlenecks" (the result and every z) or "features" (the result; z is
    computed again). ``new_first``: a layer's new features come before those that it read. The dtype is that of eager's
    concatenation: promote(x, a convolution's result). There are no statistics where no norm1 uses the batch's own, and
    in compiled code. Raises PyTorch's own ValueError for one value per channel in
    training.
    """
    checks.choice("save", save, checks.LEVELS)
    norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
    groups = tuple(norm.group for norm in norms)
    if not layers or (is_empty(x) and not any(groups)):
        return reference.dense_block(x, layers, new_first=new_first), None
    if shared_group(groups[0::2], (norm.batch_stats for norm in norms[0::2])) is None:
        return dense_block_by_layers(x, layers, save, new_first), None
    N, *spatial = x.shape[0], *x.shape[2:]
    for layer in layers:
        check_count(layer.norm1, (N, layer.conv1.shape[1], *spatial))
        check_count(layer.norm2, (N, layer.conv1.shape[0], *spatial))
    config = Config(
        batch_stats=tuple(norm.batch_stats for norm in norms),
        eps=tuple(norm.eps for norm in norms),
        dtype=torch.promote_types(x.dtype, result_dtype(x)),
        drop_rates=tuple(layer.drop_rate for layer in layers),
        save=save,
        groups=groups,
        new_first=new_first,
    )
    seed = None
    if any(p > 0 for p in config.drop_rates):
        seed = torch.randint(2**62, (1,), dtype=torch.int64, device=x.device)
    tensors: list[Tensor | None] = [x, seed]
    for layer in layers:
        tensors += (*norm_tensors(layer.norm1), layer.conv1, *norm_tensors(layer.norm2), layer.conv2)

    def move(results: Sequence[Tensor]) -> None:
        if not any(norm.update for norm in norms):
            return
        mean, var, z_mean, z_var, counts = results[2:7]
        means, vars, rows = [], [], []
        for l, place in enumerate(_layers(config, tensors)):
            means += [mean[place.read], z_mean[place.z]]
            vars += [var[place.read], z_var[place.z]]
            rows += [counts[:1] if groups[2 * l] else pixels(x.shape)]
            rows += [counts[l + 1 : l + 2] if groups[2 * l + 1] else pixels(x.shape)]
        update_running_stats(norms, means, vars, rows)

    out, _, mean, var, _, _, _, own_mean, own_var = run(BLOCK, config, tensors, move)
    if not mean.numel() or torch.compiler.is_compiling():
        return out, None
    return out, Stats(own_mean, own_var) if own_mean.numel() else Stats(mean, var)


# ---- the plain functions ---------------------------------------------------------------------------------------------

_PER_LAYER = 10  # norm1: weight, bias, running mean and variance; conv1; norm2: the same four; conv2


class _LayerTensors(NamedTuple):
    norm1: Tensors
    conv1: Tensor
    norm2: Tensors
    conv2: Tensor
    C: int  # features it reads
    b: int  # bottleneck features
    k: int  # features it adds
    read: slice  # its C among the columns of the buffer
    new: slice  # its k
    z: slice  # its b among the bottleneck features of all layers


def _layers(config: Config, tensors: Tensors) -> Iterator[_LayerTensors]:
    weights = [(tensors[i + 4], tensors[i + 9]) for i in range(2, len(tensors), _PER_LAYER)]
    growth = tuple(conv2.shape[0] for _, conv2 in weights if conv2 is not None)
    x_channels = next(conv1.shape[1] for conv1, _ in weights if conv1 is not None)
    start = 0
    for l, (read, new) in enumerate(layer_columns(x_channels, growth, config.new_first)):
        i = 2 + l * _PER_LAYER
        conv1, conv2 = weights[l]
        assert conv1 is not None and conv2 is not None
        b, C = conv1.shape[:2]
        z = slice(start, start + b)
        yield _LayerTensors(tensors[i : i + 4], conv1, tensors[i + 5 : i + 9], conv2, C, b, growth[l], read, new, z)
        start += b


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    """The buffer; every z, one after the other, each [M, b]; mean and variance of the columns and of every z.

    With processes that share statistics also: how many rows the columns' have, and each z's; and mean and variance of
    the columns in this process alone.
    """
    x = tensors[0]
    assert x is not None
    layers = list(_layers(config, tensors))
    C_total, b_total = layers[-1].C + layers[-1].k, layers[-1].z.stop
    out = new_features(x, (x.shape[0], C_total, *x.shape[2:]), config.dtype)
    z = out.new_empty(pixels(x.shape) * b_total if config.save == "bottlenecks" else 0)
    acc = kernels.acc_dtype(config.dtype)
    counts = [C_total if any(config.batch_stats[0::2]) else 0] * 2 + [
        b_total if any(config.batch_stats[1::2]) else 0
    ] * 2
    counts += [len(layers) + 1 if any(config.groups) else 0] + [counts[0] if _columns_group(config) else 0] * 2
    return [out, z, *(out.new_empty(n, dtype=acc) for n in counts)]


def _columns_group(config: Config) -> str:
    """The process group over which the columns' statistics are taken; "" for this process alone."""
    return shared_group(config.groups[0::2], config.batch_stats[0::2]) or ""


def _scratch(rows: Tensor, columns: int) -> Tensor:
    return rows.new_empty(rows.shape[0] * columns)


def _part(scratch: Tensor, M: int, columns: int, start: int = 0) -> Tensor:
    """Rows [M, columns] of flat storage, after ``start`` columns of such rows."""
    return scratch[M * start : M * (start + columns)].view(M, columns)


def _folded(config: Config, layers: Sequence[_LayerTensors], acc: torch.dtype) -> tuple[dict[int, Tensor], ...]:
    """s and t of every frozen norm2, by layer."""
    frozen = [l for l in range(len(layers)) if not config.batch_stats[2 * l + 1]]
    none = torch.empty(0)  # in the place of a batch's statistics, which frozen norms do not have
    values = [norm_values(layers[l].norm2, none, none, False, config.eps[2 * l + 1], acc) for l in frozen]
    return tuple(dict(zip(frozen, found, strict=True)) for found in scales_shifts(values))


def block_forward(config: Config, tensors: Tensors) -> list[Tensor]:
    """The buffer [N, C_total, *spatial], then the other results as ``_allocate`` lays them out."""
    x, seed = tensors[:2]
    assert x is not None
    results = _allocate(config, tensors)
    out, z_all, mean, var, z_mean, z_var, counts, own_mean, own_var = results
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    layers = list(_layers(config, tensors))
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    stats, group = mean.numel() > 0, _columns_group(config)

    def append(rows: Tensor, columns: slice, drop_rate: float, l: int) -> None:
        m, v = (mean[columns], var[columns]) if stats else (None, None)
        ops.append_features(rows, X[:, columns], m, v, drop_rate, seed, l)
        if group:
            own_mean[columns], own_var[columns] = mean[columns], var[columns]
            if columns is not layers[-1].new:  # the last ones are for the next unit
                counts[:1] = merge_stats(mean[columns], var[columns], M, group)

    append(to_rows(x.to(out.dtype)), layers[0].read, 0.0, 0)
    scratch = _scratch(X, max(layer.b for layer in layers))
    s2, t2 = _folded(config, layers, acc) if config.save == "nothing" else ({}, {})
    for l, layer in enumerate(layers):
        b, read, new = layer.b, layer.read, layer.new
        batch1, batch2 = config.batch_stats[2 * l : 2 * l + 2]
        prefix = X[:, read]
        norm1 = norm_values(layer.norm1, mean[read], var[read], batch1, config.eps[2 * l], acc)
        W1 = cast(layer.conv1, acc)
        a = _part(scratch, M, b)
        if config.save == "nothing" and not batch2:
            ops.bn_relu_conv1x1(prefix, *norm1, W1 * s2[l].view(-1, *[1] * (W1.dim() - 1)), t2[l], True, a, None, None)
        else:
            m2, v2 = (z_mean[layer.z], z_var[layer.z]) if batch2 else (None, None)
            norm2 = norm_values(layer.norm2, m2, v2, batch2, config.eps[2 * l + 1], acc)  # type: ignore[arg-type]
            z = _part(z_all, M, b, layer.z.start) if config.save == "bottlenecks" else a
            ops.bn_relu_conv1x1(prefix, *norm1, W1, None, False, z, m2, v2)
            if m2 is not None and v2 is not None and config.groups[2 * l + 1]:
                counts[l + 1 : l + 2] = merge_stats(m2, v2, M, config.groups[2 * l + 1])
            ops.bn_relu(z, *norm2, a)
        y = conv_same(a, size, layer.conv2.to(out.dtype))
        append(y, new, config.drop_rates[l], l)
        del y
    return results


def block_backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    """One gradient or None per tensor; ``results`` as of ``block_forward``. ``grad`` is only read."""
    out, z_all, mean, var, z_mean, z_var, counts = results[:7]
    assert out is not None and z_all is not None and mean is not None and var is not None
    assert z_mean is not None and z_var is not None and counts is not None
    seed = tensors[1]
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    layers = list(_layers(config, tensors))
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    incoming = to_rows(grad)
    copied = row_pitch(grad) is None  # then it is ours to write into
    stats = mean.numel() > 0
    group = _columns_group(config)
    gmv = torch.zeros(2, size[1], dtype=acc, device=out.device)
    gm, gv = gmv.unbind(0)
    m = mean if stats else gm  # without statistics gm and gv stay zero, and so may m
    grads: list[Tensor | None] = [None] * len(tensors)
    wide, growth = max(layer.b for layer in layers), max(layer.k for layer in layers)
    a_all = _scratch(X, wide)
    again = _scratch(X, wide) if config.save == "features" else None  # z, computed again
    g_all = _scratch(X, growth)
    G: Tensor | None = None
    origin = 0  # G's first column in the buffer
    for l in reversed(range(len(layers))):
        layer = layers[l]
        C, b, k, read, new = layer.C, layer.b, layer.k, layer.read, layer.new
        first = 2 + l * _PER_LAYER
        own = needs[first : first + _PER_LAYER]
        below = any(needs[:first])  # somebody further down asks
        if not below and not any(own):
            break
        batch1, batch2 = config.batch_stats[2 * l : 2 * l + 2]
        prefix = X[:, read]
        norm1 = norm_values(layer.norm1, mean[read], var[read], batch1, config.eps[2 * l], acc)
        norm2 = norm_values(layer.norm2, z_mean[layer.z], z_var[layer.z], batch2, config.eps[2 * l + 1], acc)
        W1 = cast(layer.conv1, acc)

        g = incoming[:, new] if G is None else within(G, new, origin)
        p = config.drop_rates[l]
        if p > 0 or (stats and G is not None):
            if group and G is not None:
                gmv[:, new] = merge_sums(gmv[:, new], M, counts[0], group)
            source, g = g, _part(g_all, M, k)
            ops.feature_grad(source, X[:, new], m[new], gm[new], gv[new], p, seed, l, g)
        if again is None:
            z = _part(z_all, M, b, layer.z.start)
        else:
            z = _part(again, M, b)
            ops.bn_relu_conv1x1(prefix, *norm1, W1, None, False, z, None, None)
        a = _part(a_all, M, b)
        if own[9]:
            ops.bn_relu(z, *norm2, a)
        beneath = below or any(own[:9])
        da, dW2 = conv_same_backward(g, a, size, layer.conv2.to(out.dtype), (beneath, own[9]))
        grads[first + 9] = grad_like(dW2, layer.conv2)
        if not beneath:
            break
        dgamma2 = dbeta2 = None
        if batch2 or own[5] or own[6]:
            dgamma2, dbeta2 = mean.new_empty(b), mean.new_empty(b)
            ops.bn_relu_backward_reduce(da, z, *norm2, dgamma2, dbeta2)
            grads[first + 5] = grad_like(dgamma2, layer.norm2[0], own[5])
            grads[first + 6] = grad_like(dbeta2, layer.norm2[1], own[6])
        if not below and not any(own[:5]):
            break
        if batch2 and config.groups[2 * l + 1]:
            assert dgamma2 is not None and dbeta2 is not None
            dgamma2, dbeta2 = merge_sums(torch.stack([dgamma2, dbeta2]), M, counts[l + 1], config.groups[2 * l + 1])
        sums2 = (dgamma2, dbeta2) if batch2 else (None, None)
        grad_in = None
        if G is None:
            G = incoming
            if not copied:
                grad_in, G, origin = incoming[:, read], X.new_empty(M, C), read.start
        dW1 = torch.empty_like(W1) if own[4] else None
        dgamma1, dbeta1 = mean.new_empty(C), mean.new_empty(C)
        sums = (gm[read], gv[read]) if batch1 else (None, None)
        grad_x = within(G, read, origin)
        ops.bn_relu_conv1x1_backward(
            prefix, *norm1, W1, da, z, *norm2, *sums2, grad_in, grad_in is None, grad_x, dW1, dgamma1, dbeta1, *sums
        )
        del da
        grads[first] = grad_like(dgamma1, layer.norm1[0], own[0])
        grads[first + 1] = grad_like(dbeta1, layer.norm1[1], own[1])
        grads[first + 4] = grad_like(dW1, layer.conv1)
    if needs[0]:
        assert G is not None
        del a_all, again, g_all
        read = layers[0].read
        G = within(G, read, origin)
        grads[0] = x_grad = new_features(out, (size[0], layers[0].C, *size[2:]))
        dx = to_rows(x_grad)
        if group:
            gmv[:, read] = merge_sums(gmv[:, read], M, counts[0], group)
        if stats:
            ops.feature_grad(G, X[:, read], mean[read], gm[read], gv[read], 0.0, None, 0, dx)
        else:
            dx.copy_(G)
    return grads


def _reference(config: Config, tensors: Tensors) -> Tensor:
    x, seed = tensors[:2]
    assert x is not None
    layers, factors = [], []
    for l, t in enumerate(_layers(config, tensors)):
        norm1 = frozen_norm(t.norm1, config.batch_stats[2 * l], config.eps[2 * l])
        norm2 = frozen_norm(t.norm2, config.batch_stats[2 * l + 1], config.eps[2 * l + 1])
        p, factor = config.drop_rates[l], None
        if p > 0:
            assert seed is not None
            factor = from_rows(kernels.plain.dropout_factor(seed, l, pixels(x.shape), t.k, p, x.dtype), x.shape)
        layers.append(Layer(norm1, t.conv1, norm2, t.conv2, p))
        factors.append(factor)
    return reference.dense_block(x, layers, new_first=config.new_first, factors=factors, update=False)


def _norms(config: Config) -> list[int]:
    starts = range(2, 2 + len(config.drop_rates) * _PER_LAYER, _PER_LAYER)
    return [norm for start in starts for norm in (start, start + 5)]


def _restore(config: Config, tensors: Tensors, out: Tensor) -> Tensor:
    """The block's input, from its result: what the first layer reads."""
    return out[:, next(_layers(config, tensors)).read]


BLOCK = register(Operation("block", _allocate, block_forward, block_backward, _reference, _norms, _restore))
