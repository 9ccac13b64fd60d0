"""The dense block over one buffer.

Layer l reads the first C_l columns of the buffer X [M, C_total] and writes the next k (``columns`` has the other
order). Mean m and variance v of a column are taken once, of its values as stored, and serve every later norm. With
r = (v + eps)^-1/2, s = gamma1 r, t = beta1 - m s:

    z = dropout(relu(x s + t) @ W1^T + c1)        x = X[:, :C_l]
    X[:, C_l : C_l + k] = dropout(conv3x3(relu(z s2 + t2), W2) + c2)

Backward, layers in reverse; G is the gradient of X, and gm, gv collect those of m and v:

    g  = G[:, new] + (gm + 2 (x - m) gv) / M                 # complete: every consumer has contributed
    dz, dW2, dc2, dgamma2, dbeta2 from g through dropout, conv3x3 and BN2-ReLU      (``step``, dc1 as well)
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
from densenet_ext.algorithm.conv import conv_same
from densenet_ext.algorithm.conversions import is_empty, result_dtype
from densenet_ext.algorithm.dropout import BOTTLENECKS, Dropout, dropout_at, new_seed
from densenet_ext.algorithm.layer import dense_block_by_layers
from densenet_ext.algorithm.layout import new_features, pixels, row_pitch, to_rows
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
        drop_channels=tuple(layer.drop_channels for layer in layers),
        inner_drop_rates=tuple(layer.inner_drop_rate for layer in layers),
        inner_drop_channels=tuple(layer.inner_drop_channels for layer in layers),
    )
    tensors: list[Tensor | None] = [x, new_seed((*config.drop_rates, *config.inner_drop_rates), x.device)]
    for layer in layers:
        tensors += parameters_of(layer)

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

_FIRST = 2  # where the layers' parameters start, behind x and the seed


class _Place(NamedTuple):
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


def _layers(config: Config, tensors: Tensors) -> Iterator[_Place]:
    seed = tensors[1]
    starts = range(_FIRST, len(tensors), COUNT)
    parameters = [Parameters(*tensors[i : i + COUNT]) for i in starts]
    growth = tuple(own.conv2.shape[0] for own in parameters)
    columns = layer_columns(parameters[0].conv1.shape[1], growth, config.new_first)
    z = 0
    for l, (start, own, (read, new)) in enumerate(zip(starts, parameters, columns, strict=True)):
        b, C = own.conv1.shape[:2]
        drop = dropout_at(config.drop_rates[l], config.drop_channels[l], seed, l)
        inner = dropout_at(config.inner_drop_rates[l], config.inner_drop_channels[l], seed, BOTTLENECKS + l)
        yield _Place(start, own, C, b, growth[l], read, new, slice(z, z + b), drop, inner)
        z += b


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


def _step(config: Config, l: int, place: _Place, out: Tensor, X: Tensor, stats: Sequence[Tensor]) -> Step:
    """stats: mean and variance of the buffer's columns, and of every z."""
    mean, var, z_mean, z_var = stats
    own = mean[place.read], var[place.read], z_mean[place.z], z_var[place.z]
    batch, eps = config.batch_stats[2 * l : 2 * l + 2], config.eps[2 * l : 2 * l + 2]
    group = config.groups[2 * l + 1]
    return make_step(X[:, place.read], out.shape, place.tensors, own, batch, eps, group, place.inner)


def block_forward(config: Config, tensors: Tensors) -> list[Tensor]:
    """The buffer [N, C_total, *spatial], then the other results as ``_allocate`` lays them out."""
    x = tensors[0]
    assert x is not None
    results = _allocate(config, tensors)
    out, z_all, mean, var, z_mean, z_var, counts, own_mean, own_var = results
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    layers = list(_layers(config, tensors))
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    group = _columns_group(config)

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
    return results


def block_backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    """One gradient or None per tensor; ``results`` as of ``block_forward``. ``grad`` is only read."""
    out, z_all, mean, var, z_mean, z_var, counts = results[:7]
    assert out is not None and z_all is not None and mean is not None and var is not None
    assert z_mean is not None and z_var is not None and counts is not None
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


def _reference(config: Config, tensors: Tensors) -> Tensor:
    x = tensors[0]
    assert x is not None
    layers, factors, inner_factors = [], [], []
    for l, place in enumerate(_layers(config, tensors)):
        layers.append(layer_of(place.tensors, config.batch_stats[2 * l : 2 * l + 2], config.eps[2 * l : 2 * l + 2]))
        factors.append(None if place.drop is None else place.drop.factors(x.shape, place.k, x.dtype))
        inner_factors.append(None if place.inner is None else place.inner.factors(x.shape, place.b, x.dtype))
    return reference.dense_block(
        x, layers, new_first=config.new_first, factors=factors, inner_factors=inner_factors, update=False
    )


def _norms(config: Config) -> list[int]:
    starts = range(_FIRST, _FIRST + len(config.drop_rates) * COUNT, COUNT)
    return [start + norm for start in starts for norm in NORMS]


def _restore(config: Config, tensors: Tensors, out: Tensor) -> Tensor:
    """The block's input, from its result: what the first layer reads."""
    return out[:, next(_layers(config, tensors)).read]


BLOCK = register(Operation("block", _allocate, block_forward, block_backward, _reference, _norms, _restore))
