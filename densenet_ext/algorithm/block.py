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

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext import checks, kernels, reference
from densenet_ext.algorithm import whole
from densenet_ext.algorithm.block_steps import FIRST, backward_by_steps, columns_group, forward_by_steps, layer_places
from densenet_ext.algorithm.columns import layer_columns
from densenet_ext.algorithm.conversions import is_empty, is_lowered, result_dtype
from densenet_ext.algorithm.dropout import new_seed
from densenet_ext.algorithm.inference import Call
from densenet_ext.algorithm.kept import KeptLayers, Wanted
from densenet_ext.algorithm.layer import dense_block_by_layers
from densenet_ext.algorithm.layout import is_readable, new_features, pixels, readable
from densenet_ext.algorithm.norm import Movement, check_count
from densenet_ext.algorithm.operation import Config, Operation, kept_level, register, run
from densenet_ext.algorithm.repeated import BlockCalls, Repeated
from densenet_ext.algorithm.step import (
    CONV1,
    CONV2,
    COUNT,
    NORMS,
    Parameters,
    folded,
    layer_of,
    parameters_of,
)
from densenet_ext.algorithm.sync import shared_group
from densenet_ext.algorithm.values import Layer, Stats, Tensors


class Layers:
    """The layers of a block, and all that follows from them alone: made once, used by every call until they change."""

    def __init__(self, layers: Sequence[Layer], new_first: bool = False) -> None:
        self.layers = layers
        self.norms = [norm for layer in layers for norm in (layer.norm1, layer.norm2)]
        groups = tuple(norm.group for norm in self.norms)
        self.synced = any(groups)
        self.one_group = shared_group(groups[0::2], (norm.batch_stats for norm in self.norms[0::2])) is not None
        growth = tuple(layer.conv2.shape[0] for layer in layers)
        columns = layer_columns(layers[0].conv1.shape[1], growth, new_first) if layers else []
        stops = list(accumulate(layer.conv1.shape[0] for layer in layers))
        parts = [
            part
            for own, stop, layer in zip(columns, stops, layers, strict=True)
            for part in (own.read, slice(stop - layer.conv1.shape[0], stop))
        ]
        self.movement = Movement(self.norms, [0, 1] * len(layers), parts)
        drop_rates = tuple(layer.drop_rate for layer in layers)
        inner_drop_rates = tuple(layer.inner_drop_rate for layer in layers)
        self.all_drop_rates = (*drop_rates, *inner_drop_rates)
        self.config = Config(
            batch_stats=tuple(norm.batch_stats for norm in self.norms),
            eps=tuple(norm.eps for norm in self.norms),
            dtype=torch.float32,
            drop_rates=drop_rates,
            groups=groups,
            new_first=new_first,
            drop_channels=tuple(layer.drop_channels for layer in layers),
            inner_drop_rates=inner_drop_rates,
            inner_drop_channels=tuple(layer.inner_drop_channels for layer in layers),
        )
        self.parameters = [x for layer in layers for x in parameters_of(layer)]
        self._configs: dict[tuple[torch.dtype, str, bool], Config] = {}
        self.repeated = Repeated(BLOCK, _Calls(self.parameters))

    def config_of(self, dtype: torch.dtype, save: str, lowered: bool) -> Config:
        """Returns the config of a call: three values come in few combinations, and the rest is long."""
        found = self._configs.get((dtype, save, lowered))
        if found is None:
            found = self.config._replace(dtype=dtype, save=save, lowered=lowered)
            self._configs[dtype, save, lowered] = found
        return found

    def check_counts(self, size: Sequence[int]) -> None:
        """Raises PyTorch's own ValueError where a norm in training sees one value per channel of images of ``size``."""
        if pixels(size) == 1:
            for layer in self.layers:
                check_count(layer.norm1, (size[0], layer.conv1.shape[1], *size[2:]))
                check_count(layer.norm2, (size[0], layer.conv1.shape[0], *size[2:]))


def dense_block(
    x: Tensor, layers: Sequence[Layer] | Layers, save: str = "bottlenecks", new_first: bool = False
) -> tuple[Tensor, Stats | None]:
    """All features [N, C_0 + sum k, *spatial] of x [N, C_0, *spatial], channels_last in memory, and their statistics.

    ``save``: what is kept for the backward pass, "bottlenecks" (the result and every z) or "features" (the result; z is
    computed again). ``new_first``: a layer's new features come before those that it read. The dtype is that of eager's
    concatenation: promote(x, a convolution's result). There are no statistics where no norm1 uses the batch's own, and
    in compiled code. Raises PyTorch's own ValueError for one value per channel in
    training.
    """
    checks.choice("save", save, checks.LEVELS)
    own = layers if isinstance(layers, Layers) else Layers(layers, new_first)
    again = own.repeated.inferences.run(x)
    if again is not None:
        return again, None
    if not own.layers or (is_empty(x) and not own.synced):
        return reference.dense_block(x, own.layers, new_first=new_first), None
    if not own.one_group:
        return dense_block_by_layers(x, own.layers, save, new_first), None
    own.check_counts(x.shape)
    dtype = torch.promote_types(x.dtype, result_dtype(x))
    config = own.config_of(dtype, kept_level(save), is_lowered(x, dtype))
    tensors = [x, new_seed(own.all_drop_rates, x.device), *own.parameters]

    taken: list[Tensor] = []  # mean and variance of the columns in this process

    def move(results: Sequence[Tensor]) -> None:
        mean, var, z_mean, z_var, counts, own_mean, own_var = results[2:]
        taken[:] = (own_mean, own_var) if own_mean.numel() else (mean, var)
        M = pixels(x.shape)
        rows: int | list[int | Tensor] = M
        if own.synced:
            at = [
                place for l in range(len(own.layers)) for place in (0, l + 1)
            ]  # norm1's are the columns', z has its own
            rows = [counts[i : i + 1] if group else M for i, group in zip(at, config.groups, strict=True)]
        own.movement.move([mean, z_mean], [var, z_var], rows)

    out = run(own.repeated.operation, config, tensors, move, own.repeated.present(tensors))
    if own is layers:
        own.repeated.keep(config, x)
    return out, None if torch.compiler.is_compiling() or not taken[0].numel() else Stats(*taken)


# ---- the functions of the unit ---------------------------------------------------------------------------------------


def _allocate(config: Config, tensors: Tensors) -> list[Tensor]:
    """The buffer; every z, one after the other, each [M, b]; mean and variance of the columns and of every z.

    With processes that share statistics also: how many rows the columns' have, and each z's; and mean and variance of
    the columns in this process alone. What is not there is empty, and may be one tensor for all.
    """
    assert tensors[0] is not None
    return _results(config, tensors[0], _sizes_of(tensors[FIRST:]))


class _Sizes(NamedTuple):
    """What follows from the shapes of a block's parameters."""

    C: int  # features of the input
    C_total: int
    b_total: int  # bottleneck features of all layers
    widest: int  # the most of one
    growth: int  # the most features that a layer adds
    last: int  # what the last layer reads
    of_three: bool  # all second convolutions are as wide as our kernel's


def _sizes_of(parameters: Tensors) -> _Sizes:
    conv1: Any = parameters[CONV1::COUNT]
    conv2: Any = parameters[CONV2::COUNT]
    b, last = [W.shape[0] for W in conv1], conv1[-1].shape[1]
    return _Sizes(
        conv1[0].shape[1],
        last + conv2[-1].shape[0],
        sum(b),
        max(b),
        max(W.shape[0] for W in conv2),
        last,
        whole.are_of_three(conv2),
    )


def _results(config: Config, x: Tensor, sizes: _Sizes) -> list[Tensor]:
    out = new_features(x, (x.shape[0], sizes.C_total, *x.shape[2:]), config.dtype)
    acc = kernels.acc_dtype(config.dtype)
    counts = [sizes.C_total if any(config.batch_stats[0::2]) else 0] * 2
    counts += [sizes.b_total if any(config.batch_stats[1::2]) else 0] * 2
    synced = any(config.groups)
    counts += [len(config.drop_rates) + 1 if synced else 0]
    counts += [counts[0] if synced and columns_group(config) else 0] * 2
    nothing = out.new_empty(0, dtype=acc)
    z = out.new_empty(pixels(x.shape) * sizes.b_total) if config.save == "bottlenecks" else nothing
    return [out, z, *(out.new_empty(n, dtype=acc) if n else nothing for n in counts)]


class _Calls(BlockCalls):
    """The calls of a block over the same parameters."""

    per_layer, convolutions = COUNT, (CONV1, CONV2)

    def __init__(self, parameters: Tensors) -> None:
        super().__init__(parameters)
        self._sizes: _Sizes | None = None

    @property
    def sizes(self) -> _Sizes:
        """What follows from the parameters' shapes."""
        if self._sizes is None:
            self._sizes = _sizes_of(self.parameters)
        return self._sizes

    def forward(self, config: Config, tensors: Tensors) -> list[Tensor]:
        """The buffer [N, C_total, *spatial], then the other results as ``_allocate`` lays them out."""
        x, sizes = tensors[0], self.sizes
        assert x is not None
        results = _results(config, x, sizes)
        out = results[0]
        run_whole = whole.operation("dense_layers", out, config.groups)
        if run_whole is None:
            forward_by_steps(config, tensors, results)
            return results
        ours = sizes.of_three and whole.has_conv3x3(out)
        x = readable(x.to(config.dtype))
        z = 0 if config.save == "bottlenecks" else sizes.widest
        a = 0 if ours and not any(config.inner_drop_rates) else sizes.widest
        scratch = whole.scratch(out, z, a)
        held = whole.results(out, 0 if ours else sizes.growth, elements=self._copied(out, ours))
        folded = _folded(config, tensors)
        layers = self.layers(config, out) if folded is tensors else KeptLayers(out, config, folded[FIRST:], COUNT)
        run_whole(
            x,
            layers.number,
            *_arguments(tensors, results),
            scratch,
            tf32=kernels.tf32(x),
            bf16=config.lowered,
            packed_weights=self.held.any(),
        )
        del held
        return results

    def prepared(self, config: Config, x: Tensor) -> Call | None:
        """``forward`` on features like ``x`` in evaluation without gradients; None where it runs step by step, or folds
        norms."""
        out, sizes = _results(config, x, self.sizes)[0], self.sizes
        run_whole = whole.operation("dense_layers", out, config.groups)
        if run_whole is None or not whole.has_conv3x3(out):
            return None
        scratch = whole.scratch(out, sizes.widest, 0 if sizes.of_three else sizes.widest)
        return self.repeat(run_whole, config, x, out, scratch, statistics=5)

    def backward(
        self, config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """One gradient or None per tensor; ``results`` as of ``forward``. ``grad`` is only read."""
        out = results[0]
        assert out is not None
        run_whole = whole.operation("dense_layers_backward", out, config.groups)
        if run_whole is None:
            return backward_by_steps(config, grad, tensors, results, needs)
        incoming, writable = readable(grad), not is_readable(grad)  # a copy is ours to write into
        sizes, layers = self.sizes, self.layers_again(config, out, tensors[FIRST:])
        wanted = Wanted(layers, out, needs[FIRST:])
        x_grad = new_features(out, (out.shape[0], sizes.C, *out.shape[2:])) if needs[0] else None
        kernel = whole.has_conv3x3(out)
        ours = sizes.of_three and kernel
        z = 0 if config.save == "bottlenecks" else sizes.widest
        a, g = 0 if ours and not any(config.inner_drop_rates) else sizes.widest, 0 if ours else sizes.growth
        scratch = whole.scratch(out, z, a, g, sizes.widest if kernel else 0, 0 if writable else sizes.last)
        held = whole.results(out, sizes.widest if g else 0, elements=self._copied(out, ours, a))
        found = run_whole(
            incoming,
            writable,
            layers.number,
            *_arguments(tensors, results),
            x_grad,
            wanted.bits,
            scratch,
            tf32=kernels.tf32(out),
            bf16=config.lowered,
        )
        del held
        return [x_grad, None, *wanted.gradients(found)]

    def _copied(self, out: Tensor, ours: bool, waiting: int = 0) -> int:
        """How many elements of the second convolutions are copied for PyTorch's own; ``waiting`` as of ``copied``."""
        return 0 if ours else whole.copied(out, self.parameters[CONV2::COUNT], waiting)


def block_forward(config: Config, tensors: Tensors) -> list[Tensor]:
    """The buffer [N, C_total, *spatial], then the other results as ``_allocate`` lays them out."""
    return _Calls(tensors[FIRST:]).forward(config, tensors)


def block_backward(
    config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
) -> list[Tensor | None]:
    """One gradient or None per tensor; ``results`` as of ``block_forward``. ``grad`` is only read."""
    return _Calls(tensors[FIRST:]).backward(config, grad, tensors, results, needs)


def _arguments(tensors: Tensors, results: Tensors) -> tuple[Any, ...]:
    """The arguments between the layers and the scratch that the operations of both directions take."""
    out, *others = results[:6]
    assert out is not None
    z, mean, var, z_mean, z_var = [x if x is not None and x.numel() else None for x in others]
    return [out.shape[0], *out.shape[2:]], tensors[1], out, z, mean, var, z_mean, z_var


def _folded(config: Config, tensors: Tensors) -> Tensors:
    """``tensors`` with frozen second norms folded into the 1x1 convolutions before them, where no gradients are asked.

    A 3x3 convolution of ours normalises what it reads, which costs less than to fold at every call.
    """
    if config.save != "nothing" or tensors[0] is None or whole.has_conv3x3(tensors[0]):
        return tensors
    fold = [l for l, rate in enumerate(config.inner_drop_rates) if not config.batch_stats[2 * l + 1] and rate == 0]
    if not fold:
        return tensors
    acc, tensors = kernels.acc_dtype(config.dtype), list(tensors)
    starts = [FIRST + l * COUNT for l in fold]
    own = [Parameters(*tensors[start : start + COUNT]) for start in starts]
    pairs = folded([(layer, config.eps[2 * l + 1]) for l, layer in zip(fold, own, strict=True)], acc)
    for start, layer, (s2, t2) in zip(starts, own, pairs, strict=True):
        # the operation scales the weights, one layer's at a time
        tensors[start : start + COUNT] = layer._replace(bias1=t2, gamma2=s2, beta2=None, mean2=None, var2=None)
    return tensors


def _reference(config: Config, tensors: Tensors) -> Tensor:
    x = tensors[0]
    assert x is not None
    layers, factors, inner_factors = [], [], []
    for l, place in enumerate(layer_places(config, tensors)):
        layers.append(layer_of(place.tensors, config.batch_stats[2 * l : 2 * l + 2], config.eps[2 * l : 2 * l + 2]))
        factors.append(None if place.drop is None else place.drop.factors(x.shape, place.k, x.dtype))
        inner_factors.append(None if place.inner is None else place.inner.factors(x.shape, place.b, x.dtype))
    return reference.dense_block(
        x, layers, new_first=config.new_first, factors=factors, inner_factors=inner_factors, update=False
    )


def _norms(config: Config) -> list[int]:
    starts = range(FIRST, FIRST + len(config.drop_rates) * COUNT, COUNT)
    return [start + norm for start in starts for norm in NORMS]


def _restore(config: Config, tensors: Tensors, out: Tensor) -> Tensor:
    """The block's input, from its result: what the first layer reads."""
    return out[:, next(layer_places(config, tensors)).read]


BLOCK = register(Operation("block", _allocate, block_forward, block_backward, _reference, _norms, _restore))
