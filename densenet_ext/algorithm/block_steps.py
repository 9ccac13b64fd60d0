"""The dense block layer by layer: in plain PyTorch, and where several processes share statistics.

Compiled, the same loops are one operation each way (csrc/blocks.h). ``block`` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.columns import layer_columns, within
from densenet_ext.algorithm.conv import conv_same
from densenet_ext.algorithm.dropout import BOTTLENECKS, Dropout, dropout_at
from densenet_ext.algorithm.layout import new_features, pixels, row_pitch, to_rows
from densenet_ext.algorithm.operation import Config
from densenet_ext.algorithm.step import (
    COUNT,
    NORMS,
    Parameters,
    Step,
    first_half,
    first_half_backward,
    first_half_folded,
    folded,
    make_step,
    put,
    second_half_backward,
)
from densenet_ext.algorithm.sync import merge_stats, merge_sums, shared_group
from densenet_ext.algorithm.values import Tensors

FIRST = 2
"""Where the layers' parameters start among the operation's tensors, behind x and the seed."""


class Place(NamedTuple):
    """One layer of a block: its tensors, and which columns it reads and writes."""

    start: int  # of its tensors among the operation's
    tensors: Parameters
    C: int  # features it reads
    b: int  # bottleneck features
    k: int  # features it adds
    read: slice  # its C among the columns of the buffer
    new: slice  # its k
    z: slice  # its b among the bottleneck features of all layers
    drop: Dropout | None
    inner: Dropout | None


def layer_places(config: Config, tensors: Tensors) -> Iterator[Place]:
    """The layers of a block in order."""
    seed = tensors[1]
    starts = range(FIRST, len(tensors), COUNT)
    parameters = [Parameters(*tensors[i : i + COUNT]) for i in starts]
    growth = tuple(own.conv2.shape[0] for own in parameters)
    columns = layer_columns(parameters[0].conv1.shape[1], growth, config.new_first)
    z = 0
    for l, (start, own, (read, new)) in enumerate(zip(starts, parameters, columns, strict=True)):
        b, C = own.conv1.shape[:2]
        drop = dropout_at(config.drop_rates[l], config.drop_channels[l], seed, l)
        inner = dropout_at(config.inner_drop_rates[l], config.inner_drop_channels[l], seed, BOTTLENECKS + l)
        yield Place(start, own, C, b, growth[l], read, new, slice(z, z + b), drop, inner)
        z += b


def columns_group(config: Config) -> str:
    """The process group over which the columns' statistics are taken; "" for this process alone."""
    return shared_group(config.groups[0::2], config.batch_stats[0::2]) or ""


def _scratch(rows: Tensor, columns: int) -> Tensor:
    return rows.new_empty(rows.shape[0] * columns)


def _part(scratch: Tensor, M: int, columns: int, start: int = 0) -> Tensor:
    """Rows [M, columns] of flat storage, after ``start`` columns of such rows."""
    return scratch[M * start : M * (start + columns)].view(M, columns)


def _step(config: Config, l: int, place: Place, out: Tensor, X: Tensor, stats: Sequence[Tensor]) -> Step:
    """stats: mean and variance of the buffer's columns, and of every z."""
    mean, var, z_mean, z_var = stats
    own = mean[place.read], var[place.read], z_mean[place.z], z_var[place.z]
    batch, eps = config.batch_stats[2 * l : 2 * l + 2], config.eps[2 * l : 2 * l + 2]
    group = config.groups[2 * l + 1]
    return make_step(X[:, place.read], out.shape, place.tensors, own, batch, eps, group, place.inner)


def forward_by_steps(config: Config, tensors: Tensors, results: Sequence[Tensor]) -> None:
    """Fills ``results``, which are ``block``'s."""
    x = tensors[0]
    assert x is not None
    out, z_all, mean, var, z_mean, z_var, counts, own_mean, own_var = results
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    layers = list(layer_places(config, tensors))
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    group = columns_group(config)

    def append(rows: Tensor, columns: slice, drop: Dropout | None) -> None:
        stats = (mean[columns], var[columns]) if mean.numel() else (None, None)
        if drop is None:
            ops.append_features(rows, X[:, columns], *stats, 0.0, None, 0)
        else:
            drop.forward(ops, rows, size, X[:, columns], stats)
        if group:
            own_mean[columns], own_var[columns] = mean[columns], var[columns]
            if columns is not layers[-1].new:  # the last ones are for the next unit
                counts[:1] = merge_stats(mean[columns], var[columns], M, group)

    append(to_rows(x.to(out.dtype)), layers[0].read, None)
    scratch = _scratch(X, max(layer.b for layer in layers))
    frozen = [l for l, layer in enumerate(layers) if not config.batch_stats[2 * l + 1] and layer.inner is None]
    fold = {}
    if config.save == "nothing":
        values = folded([(layers[l].tensors, config.eps[2 * l + 1]) for l in frozen], acc)
        fold = dict(zip(frozen, values, strict=True))
    for l, layer in enumerate(layers):
        step = _step(config, l, layer, out, X, (mean, var, z_mean, z_var))
        a = _part(scratch, M, layer.b)
        if l in fold:
            first_half_folded(step, *fold[l], a)
        else:
            z = _part(z_all, M, layer.b, layer.z.start) if config.save == "bottlenecks" else a
            z_stats = (z_mean[layer.z], z_var[layer.z]) if step.batch[1] else (None, None)
            first_half(step, z, z_stats)
            if step.batch[1] and step.group:
                counts[l + 1 : l + 2] = merge_stats(z_mean[layer.z], z_var[layer.z], M, step.group)
            ops.bn_relu(z, *step.norm2, a)
        y = conv_same(a, size, step.W2, step.c2)
        append(y, layer.new, layer.drop)
        del y


def backward_by_steps(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    """One gradient or None per tensor; ``results`` are ``block``'s. ``grad`` is only read."""
    out, z_all, mean, var, z_mean, z_var, counts = results[:7]
    assert out is not None and z_all is not None and mean is not None and var is not None
    assert z_mean is not None and z_var is not None and counts is not None
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    layers = list(layer_places(config, tensors))
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    incoming = to_rows(grad)
    copied = row_pitch(grad) is None  # then it is ours to write into
    stats = mean.numel() > 0
    group = columns_group(config)
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
        b, read, new, start = layer.b, layer.read, layer.new, layer.start
        asked = Parameters(*needs[start : start + COUNT])
        below = any(needs[:start])  # somebody further down asks
        if not below and not any(asked):
            break
        step = _step(config, l, layer, out, X, (mean, var, z_mean, z_var))

        g = incoming[:, new] if G is None else within(G, new, origin)
        consumed = stats and G is not None
        if layer.drop is not None or consumed:
            if group and consumed:
                gmv[:, new] = merge_sums(gmv[:, new], M, counts[0], group)
            source, g = g, _part(g_all, M, layer.k)
            received = m[new], gm[new], gv[new]
            if layer.drop is None:
                ops.feature_grad(source, X[:, new], *received, 0.0, None, 0, g)
            else:
                layer.drop.backward(ops, source, X[:, new], received, size, g)
        if again is None:
            z = _part(z_all, M, b, layer.z.start)
        else:
            z = _part(again, M, b)
            first_half(step, z)
        a = _part(a_all, M, b)
        beneath = below or any(asked[: Parameters._fields.index("conv2")])
        da, found = second_half_backward(step, g, z, a, asked, beneath)
        put(grads, start, found, layer.tensors, asked)
        if da is None or not (below or any(asked[: NORMS[1]])):
            break
        grad_in = None
        if G is None:
            G = incoming
            if not copied:
                grad_in, G, origin = incoming[:, read], X.new_empty(M, layer.C), read.start
        count = counts[l + 1] if step.group else None
        target = grad_in, within(G, read, origin), grad_in is None, (gm[read], gv[read])
        found = first_half_backward(step, da, z, a, found, count, asked, *target)
        put(grads, start, found, layer.tensors, asked)
        del da
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
