"""The dense block of layers without a bottleneck, over one buffer: the original DenseNet's, and FC-DenseNet's.

The buffer, the statistics of its columns and their gradients G, gm, gv are those of ``block``. A layer is

    X[:, new] = dropout(conv3x3(relu(x s + t), W) + c)        x = X[:, read]     s = gamma r     r = (v + eps)^-1/2

A 3x3 convolution reads every normalised value nine times, so relu(x s + t) is written once: into one scratch that all
layers share, and again in the backward pass. Kept is the buffer only. Backward, layers in reverse:

    g  = G[:, new] + (gm + 2 (x - m) gv) / M                 # complete: every consumer has contributed
    da, dW, dc = sum g from g through dropout and conv3x3
    dy = da where x s + t > 0
    dbeta = sum dy     dgamma = r sum dy (x - m)
    G[:, read] += s dy  gm[read] -= s dbeta  gv[read] -= s r / 2 dgamma

Statistics over several processes (``sync``) are merged as those of ``block``'s columns: forward when features are
appended, backward when a feature's gradient is complete.

Source: Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017), section 3, "Composite function".
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm import whole
from densenet_ext.algorithm.columns import Columns, layer_columns, within
from densenet_ext.algorithm.conv import conv_same, conv_same_backward
from densenet_ext.algorithm.conversions import (
    frozen_norm,
    grad_like,
    is_empty,
    is_lowered,
    norm_tensors,
    norm_values,
    result_dtype,
)
from densenet_ext.algorithm.dropout import Dropout, dropout_at, new_seed
from densenet_ext.algorithm.inference import Call
from densenet_ext.algorithm.kept import Wanted
from densenet_ext.algorithm.layout import is_readable, new_features, pixels, readable, to_rows
from densenet_ext.algorithm.norm import Movement, check_count
from densenet_ext.algorithm.operation import Config, Operation, register, run
from densenet_ext.algorithm.repeated import BlockCalls, Repeated
from densenet_ext.algorithm.sync import merge_stats, merge_sums, shared_group
from densenet_ext.algorithm.values import BasicLayer, Stats, Tensors


class BasicLayers:
    """The layers of a block, and all that follows from them alone: made once, used by every call until they change."""

    def __init__(self, layers: Sequence[BasicLayer], new_first: bool = False) -> None:
        self.layers = layers
        groups = tuple(layer.norm.group for layer in layers)
        self.synced = any(groups)
        self.one_group = shared_group(groups, (layer.norm.batch_stats for layer in layers)) is not None
        self.norms = [layer.norm for layer in layers]
        growth = tuple(layer.conv.shape[0] for layer in layers)
        columns = layer_columns(layers[0].conv.shape[1], growth, new_first) if layers else []
        self.movement = Movement(self.norms, [0] * len(layers), [own.read for own in columns])
        self.config = Config(
            batch_stats=tuple(norm.batch_stats for norm in self.norms),
            eps=tuple(norm.eps for norm in self.norms),
            dtype=torch.float32,
            drop_rates=tuple(layer.drop_rate for layer in layers),
            groups=groups,
            new_first=new_first,
            drop_channels=tuple(layer.drop_channels for layer in layers),
        )
        self.parameters = [x for layer in layers for x in (*norm_tensors(layer.norm), layer.conv, layer.bias)]
        self.repeated = Repeated(BASIC_BLOCK, _Calls(self.parameters))

    def check_counts(self, size: Sequence[int]) -> None:
        """Raises PyTorch's own ValueError where a norm in training sees one value per channel of images of ``size``."""
        if pixels(size) == 1:
            for layer in self.layers:
                check_count(layer.norm, (size[0], layer.conv.shape[1], *size[2:]))


def basic_block(
    x: Tensor, layers: Sequence[BasicLayer] | BasicLayers, new_first: bool = False
) -> tuple[Tensor, Stats | None]:
    """All features [N, C_0 + sum k, *spatial] of x [N, C_0, *spatial], channels_last in memory, and their statistics.

    ``new_first``: a layer's new features come before those that it read. The dtype is that of eager's concatenation:
    promote(x, a convolution's result). There are no statistics where no norm uses the batch's own,
    and in compiled code. Raises PyTorch's own ValueError for one value per channel in training.
    """
    own = layers if isinstance(layers, BasicLayers) else BasicLayers(layers, new_first)
    again = own.repeated.inferences.run(x)
    if again is not None:
        return again, None
    if not own.layers or (is_empty(x) and not own.synced):
        return reference.basic_block(x, own.layers, new_first), None
    if not own.one_group:
        stats = None
        for layer in own.layers:  # each a block of its own, whose statistics are of one group
            x, stats = basic_block(x, [layer], new_first)
        return x, stats
    own.check_counts(x.shape)
    dtype = torch.promote_types(x.dtype, result_dtype(x))
    config = own.config._replace(dtype=dtype, lowered=is_lowered(x, dtype))
    tensors = [x, new_seed(config.drop_rates, x.device), *own.parameters]

    taken: list[Tensor] = []  # mean and variance of the columns in this process

    def move(results: Sequence[Tensor]) -> None:
        mean, var, count, own_mean, own_var = results[1:]
        taken[:] = (own_mean, own_var) if own_mean.numel() else (mean, var)
        M = pixels(x.shape)
        rows = [count if group else M for group in config.groups] if own.synced else M
        own.movement.move([mean], [var], rows)

    out = run(own.repeated.operation, config, tensors, move, own.repeated.present(tensors))
    if own is layers:
        own.repeated.keep(config, x)
    return out, None if torch.compiler.is_compiling() or not taken[0].numel() else Stats(*taken)


# ---- the functions of the unit ---------------------------------------------------------------------------------------


class _Parameters(NamedTuple):
    """One entry for each tensor of a layer: tensors, gradients, or whether these are asked for."""

    gamma: Any  # [C]
    beta: Any
    mean: Any  # running statistics, where the norm is frozen
    var: Any
    conv: Any  # [k, C, 3...]
    bias: Any  # [k]

    @property
    def norm(self) -> Tensors:
        """The four tensors of the norm."""
        return self[0:4]


_FIRST, _COUNT = 2, len(_Parameters._fields)  # x and the seed come before the layers' parameters


def _parameters(tensors: Tensors) -> list[_Parameters]:
    return [_Parameters(*tensors[i : i + _COUNT]) for i in range(_FIRST, len(tensors), _COUNT)]


def _dropouts(config: Config, tensors: Tensors) -> list[Dropout | None]:
    """Each layer's."""
    sites = zip(config.drop_rates, config.drop_channels, strict=True)
    return [dropout_at(rate, channels, tensors[1], l) for l, (rate, channels) in enumerate(sites)]


def _layer_columns(config: Config, tensors: Tensors) -> list[Columns]:
    weights = [own.conv for own in _parameters(tensors)]
    return layer_columns(weights[0].shape[1], tuple(W.shape[0] for W in weights), config.new_first)


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    """The buffer; mean and variance of its columns.

    With processes that share statistics also: how many rows these have, and mean and variance in this process alone.
    What is not there is empty, and may be one tensor for all.
    """
    x = tensors[0]
    assert x is not None
    C_total = x.shape[1] + sum(own.conv.shape[0] for own in _parameters(tensors))
    out = new_features(x, (x.shape[0], C_total, *x.shape[2:]), config.dtype)
    counts = [C_total if any(config.batch_stats) else 0] * 2
    counts += [1, C_total, C_total] if any(config.groups) else [0] * 3
    acc = kernels.acc_dtype(config.dtype)
    nothing = out.new_empty(0, dtype=acc)
    return [out, *(out.new_empty(n, dtype=acc) if n else nothing for n in counts)]


def _group(config: Config) -> str:
    """The process group over which the statistics are taken; "" for this process alone."""
    return shared_group(config.groups, config.batch_stats) or ""


def _prefix(scratch: Tensor, M: int, C: int) -> Tensor:
    """Rows [M, C] of flat storage."""
    return scratch[: M * C].view(M, C)


class _Calls(BlockCalls):
    """The calls of a block over the same parameters."""

    per_layer, convolutions = _COUNT, (_Parameters._fields.index("conv"),)

    def forward(self, config: Config, tensors: Tensors) -> list[Tensor]:
        """The results, as ``_allocate`` lays them out."""
        results = _allocate(config, tensors)
        out = results[0]
        run_whole = whole.operation("basic_layers", out, config.groups)
        if run_whole is None:
            _forward_by_layers(config, tensors, results)
            return results
        assert tensors[0] is not None
        a, g, _ = _scratch_sizes(tensors, out)
        scratch = whole.scratch(out, a)
        held = whole.results(out, g, elements=whole.copied(out, _weights(tensors)))
        x, layers = readable(tensors[0].to(config.dtype)), self.layers(config, out)
        packed = self.held.any()
        run_whole(x, layers.number, *_arguments(tensors, results), scratch, bf16=config.lowered, packed_weights=packed)
        del held
        return results

    def prepared(self, config: Config, x: Tensor) -> Call | None:
        """``forward`` on features like ``x`` in evaluation without gradients; None where it runs layer by layer."""
        tensors = [x, None, *self.parameters]
        out = _allocate(config, tensors)[0]
        run_whole = whole.operation("basic_layers", out, config.groups)
        if run_whole is None:
            return None
        return self.repeat(run_whole, config, x, out, whole.scratch(out, _scratch_sizes(tensors, out)[0]), statistics=2)

    def backward(
        self, config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """One gradient or None per tensor. ``grad`` is only read."""
        out = results[0]
        assert out is not None
        run_whole = whole.operation("basic_layers_backward", out, config.groups)
        if run_whole is None:
            return _backward_by_layers(config, grad, tensors, results, needs)
        incoming, writable = readable(grad), not is_readable(grad)  # a copy is ours to write into
        layers = self.layers_again(config, out, tensors[_FIRST:])
        wanted = Wanted(layers, out, needs[_FIRST:])
        x_grad = None
        if needs[0]:
            C = _Parameters(*tensors[_FIRST : _FIRST + _COUNT]).conv.shape[1]
            x_grad = new_features(out, (out.shape[0], C, *out.shape[2:]))
        a, g, last = _scratch_sizes(tensors, out)
        scratch = whole.scratch(out, a, g, 0 if writable else last)
        held = whole.results(out, a, elements=whole.copied(out, _weights(tensors), a))
        found = run_whole(
            incoming,
            writable,
            layers.number,
            *_arguments(tensors, results),
            x_grad,
            wanted.bits,
            scratch,
            bf16=config.lowered,
        )
        del held
        return [x_grad, None, *wanted.gradients(found)]


def _forward(config: Config, tensors: Tensors) -> list[Tensor]:
    return _Calls(tensors[_FIRST:]).forward(config, tensors)


def _backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    return _Calls(tensors[_FIRST:]).backward(config, grad, tensors, results, needs)


def _weights(tensors: Tensors) -> list[Tensor]:
    return [own.conv for own in _parameters(tensors)]


def _arguments(tensors: Tensors, results: Tensors) -> tuple[Any, ...]:
    """The arguments between the layers and the scratch that the operations of both directions take."""
    out, mean, var = results[:3]
    assert out is not None and mean is not None
    stats = (mean, var) if mean.numel() else (None, None)
    return [out.shape[0], *out.shape[2:]], tensors[1], out, *stats


def _scratch_sizes(tensors: Tensors, out: Tensor) -> tuple[int, int, int]:
    """Columns of the scratch for PyTorch's own convolution, before and behind it, and of what the last layer reads."""
    weights: Any = tensors[_FIRST + _Parameters._fields.index("conv") :: _COUNT]
    last = weights[-1].shape[1]
    return (0, 0, last) if whole.has_kernel(out, weights) else (last, max(W.shape[0] for W in weights), last)


def _forward_by_layers(config: Config, tensors: Tensors, results: Sequence[Tensor]) -> None:
    x = tensors[0]
    assert x is not None
    out, mean, var, count, own_mean, own_var = results
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    layers, columns, group = _parameters(tensors), _layer_columns(config, tensors), _group(config)
    drops = _dropouts(config, tensors)

    def append(src: Tensor, new: slice, drop: Dropout | None) -> None:
        stats = (mean[new], var[new]) if mean.numel() else (None, None)
        if drop is None:
            ops.append_features(src, X[:, new], *stats, 0.0, None, 0)
        else:
            drop.forward(ops, src, size, X[:, new], stats)
        if group:
            own_mean[new], own_var[new] = mean[new], var[new]
            if new is not columns[-1].new:  # the last ones are for the next unit
                count.copy_(merge_stats(mean[new], var[new], M, group))

    append(to_rows(x.to(out.dtype)), columns[0].read, None)
    scratch = X.new_empty(M * layers[-1].conv.shape[1])
    for l, (own, (read, new)) in enumerate(zip(layers, columns, strict=True)):
        norm = norm_values(own.norm, mean[read], var[read], config.batch_stats[l], config.eps[l], acc)
        a = _prefix(scratch, M, own.conv.shape[1])
        ops.bn_relu(X[:, read], *norm, a)
        bias = None if own.bias is None else own.bias.to(out.dtype)
        append(conv_same(a, size, own.conv.to(out.dtype), bias), new, drops[l])


def _backward_by_layers(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    out, mean, var, count = results[:4]
    assert out is not None and mean is not None and var is not None and count is not None
    ops, acc = kernels.select(out), kernels.acc_dtype(out.dtype)
    X, M, size = to_rows(out), pixels(out.shape), out.shape
    layers, columns, drops = _parameters(tensors), _layer_columns(config, tensors), _dropouts(config, tensors)
    stats, group = mean.numel() > 0, _group(config)
    G, start = to_rows(grad), 0  # the gradient of X's columns from `start` on
    ours = G.data_ptr() != grad.data_ptr()  # a copy, to write into
    gm, gv = gmv = torch.zeros(2, size[1], dtype=acc, device=out.device)
    grads: list[Tensor | None] = [None] * len(tensors)
    scratch = X.new_empty(M * layers[-1].conv.shape[1])
    for l in reversed(range(len(layers))):
        own, (read, new), drop = layers[l], columns[l], drops[l]
        W, first = own.conv, _FIRST + l * _COUNT
        asked = _Parameters(*needs[first : first + _COUNT])
        below = any(needs[:first])  # somebody further down asks
        if not below and not any(asked):
            break
        batch = config.batch_stats[l]
        norm = norm_values(own.norm, mean[read], var[read], batch, config.eps[l], acc)
        g = within(G, new, start)
        consumed = stats and l + 1 < len(layers)
        if consumed and group:
            gmv[:, new] = merge_sums(gmv[:, new], M, count, group)
        if drop is not None or consumed:
            source, g = g, X.new_empty(M, W.shape[0])
            m = mean[new] if stats else gm[new]  # without statistics gm and gv stay zero, and so may m
            if drop is None:
                ops.feature_grad(source, X[:, new], m, gm[new], gv[new], 0.0, None, 0, g)
            else:
                drop.backward(ops, source, X[:, new], (m, gm[new], gv[new]), size, g)
        a = _prefix(scratch, M, W.shape[1])
        if asked.bias:
            grads[first + 5] = grad_like(g.sum(0, dtype=acc), own.bias)
        beneath, W_stored = below or asked.gamma or asked.beta, W.to(out.dtype)
        da, _ = conv_same_backward(g, a, size, W_stored, (True, False)) if beneath else (None, None)
        dgamma, dbeta = mean.new_empty(W.shape[1]), mean.new_empty(W.shape[1])
        if beneath and (batch or asked.gamma or asked.beta):
            # a, which dW needs, and the two sums, which need da: x is read once for both
            ops.bn_relu_backward_reduce(da, X[:, read], *norm, dgamma, dbeta, a if asked.conv else None)
            grads[first] = grad_like(dgamma, own.gamma, asked.gamma)
            grads[first + 1] = grad_like(dbeta, own.beta, asked.beta)
        elif asked.conv:
            ops.bn_relu(X[:, read], *norm, a)
        if asked.conv:
            grads[first + 4] = grad_like(conv_same_backward(g, a, size, W_stored, (False, True))[1], W)
        if not beneath:
            break
        assert da is not None
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
    x = tensors[0]
    assert x is not None
    layers, factors = [], []
    for l, (own, drop) in enumerate(zip(_parameters(tensors), _dropouts(config, tensors), strict=True)):
        norm = frozen_norm(own.norm, config.batch_stats[l], config.eps[l])
        layers.append(BasicLayer(norm, own.conv, 0.0, own.bias))
        factors.append(None if drop is None else drop.factors(x.shape, own.conv.shape[0], x.dtype))
    return reference.basic_block(x, layers, config.new_first, factors=factors, update=False)


def _norms(config: Config) -> range:
    return range(_FIRST, _FIRST + len(config.drop_rates) * _COUNT, _COUNT)


def _restore(config: Config, tensors: Tensors, out: Tensor) -> Tensor:
    """The block's input, from its result: what the first layer reads."""
    return out[:, _layer_columns(config, tensors)[0].read]


BASIC_BLOCK = register(Operation("basic_block", _allocate, _forward, _backward, _reference, _norms, _restore))
