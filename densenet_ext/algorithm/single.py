"""Statistics, running statistics and shapes of pooling of the units with one norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.conversions import grad_like, norm_tensors
from densenet_ext.algorithm.inference import Inferences
from densenet_ext.algorithm.layout import pixels
from densenet_ext.algorithm.norm import Movement
from densenet_ext.algorithm.operation import Config
from densenet_ext.algorithm.sync import merge_stats, merge_sums
from densenet_ext.algorithm.values import Norm, Stats, Tensors


class Inputs(NamedTuple):
    """One entry for each tensor of transition, stem and head: tensors, gradients, or whether these are asked for."""

    x: Any = None  # [N, C, *spatial]
    gamma: Any = None  # [C]
    beta: Any = None  # [C]
    running_mean: Any = None  # [C] of a frozen norm
    running_var: Any = None  # [C]
    conv: Any = None  # [C_out, C, 1...]
    conv_bias: Any = None  # [C_out]
    mean: Any = None  # [C] of x, where they are given
    var: Any = None

    @property
    def norm(self) -> Tensors:
        """The four tensors of the norm."""
        return self[1:5]


NORM = Inputs._fields.index("gamma")
"""Where the norm's four tensors start."""
GIVEN_STATS = 2
"""How many of the last tensors are statistics of x."""


def inputs_of(x: Tensor, norm: Norm, stats: Stats | None = None, *conv: Tensor | None) -> Inputs:
    """The tensors of a call; ``conv``: the convolution's weight and bias."""
    weight, bias = conv or (None, None)
    return Inputs(x, *norm_tensors(norm), weight, bias, *(stats or (None, None)))


def norms_of(config: Config) -> tuple[int]:
    """Where the one norm's tensors start, as an Operation says it."""
    return (NORM,)


def volume(dims: int, value: int | tuple[int, ...], front: int) -> tuple[int, ...]:
    """A pooling's window, stride or padding as three numbers, ``front`` in front for 1-D and 2-D."""
    sizes = tuple(value) if isinstance(value, tuple) else (value,)
    if len(sizes) == 1:
        sizes *= dims
    return (*(front,) * (3 - dims), *sizes)


def rows_size(x: Tensor) -> list[int]:
    """[N, D, H, W] of x [N, C, *spatial], ones in front for 1-D and 2-D."""
    return [x.shape[0], *[1] * (5 - x.dim()), *x.shape[2:]]


def allocate_stats(config: Config, x: Tensor, channels: int) -> tuple[Tensor, Tensor]:
    """Mean and variance [channels] of the batch, or [0] when the norm is frozen."""
    count = channels if config.batch_stats[0] else 0
    dtype = kernels.acc_dtype(x.dtype)
    return x.new_empty(count, dtype=dtype), x.new_empty(count, dtype=dtype)


def allocate_shared_stats(config: Config, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """``batch_stats``, uninitialised; one tensor for all that is empty where nothing is kept."""
    if config.save == "nothing" and not config.batch_stats[0]:
        nothing = x.new_empty(0, dtype=kernels.acc_dtype(x.dtype))
        return nothing, nothing, nothing
    mean, var = allocate_stats(config, x, x.shape[1])
    return mean, var, mean.new_empty(1 if config.groups[0] else 0)


def batch_stats(config: Config, inputs: Inputs, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [C] of x, and the rows [1] behind them when processes share statistics, else [0].

    Mean and variance are the given ones, else taken from x's rows; [0] when the norm is frozen.
    """
    mean, var, count = allocate_shared_stats(config, inputs.x)
    if not config.batch_stats[0]:
        return mean, var, count
    if inputs.mean is not None:
        mean.copy_(inputs.mean)
        var.copy_(inputs.var)
    else:
        kernels.select(rows).channel_stats(rows, mean, var)
    if config.groups[0]:
        count = merge_stats(mean, var, rows.shape[0], config.groups[0])
    return mean, var, count


class NormCall(NamedTuple):
    """The norm of a unit as its compiled operation takes it: by given statistics, or by those that it is to take."""

    mean: Tensor | None  # [C]
    var: Tensor | None
    taken_mean: Tensor | None
    taken_var: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    eps: float


def norm_call(config: Config, inputs: Inputs, mean: Tensor | None, var: Tensor | None) -> NormCall:
    """The norm's arguments; ``mean`` and ``var`` become those of x where it normalises by the batch's."""
    if not config.batch_stats[0]:
        return NormCall(inputs.running_mean, inputs.running_var, None, None, inputs.gamma, inputs.beta, config.eps[0])
    assert mean is not None and var is not None
    if inputs.mean is None:
        return NormCall(None, None, mean, var, inputs.gamma, inputs.beta, config.eps[0])
    mean.copy_(inputs.mean)
    var.copy_(inputs.var)
    return NormCall(mean, var, None, None, inputs.gamma, inputs.beta, config.eps[0])


def norm_again(config: Config, inputs: Inputs, mean: Tensor, var: Tensor) -> tuple[Any, ...]:
    """The norm's arguments for the backward pass: statistics, weight, bias, eps and whether they are the batch's."""
    batch = config.batch_stats[0]
    stats = (mean, var) if batch else (inputs.running_mean, inputs.running_var)
    return (*stats, inputs.gamma, inputs.beta, config.eps[0], batch)


def needs_sums(config: Config, asked: Inputs) -> bool:
    """Returns whether the backward pass takes dgamma and dbeta: they are asked for, or a batch's dx needs them."""
    return bool((config.batch_stats[0] and asked.x) or asked.gamma or asked.beta)


def input_sums(
    config: Config, dgamma: Tensor, dbeta: Tensor, count: Tensor, rows: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """The two sums as the gradient of the input takes them: those of all processes; None for a frozen norm."""
    if not config.batch_stats[0]:
        return None, None
    if not config.groups[0]:
        return dgamma, dbeta
    dgamma, dbeta = merge_sums(torch.stack([dgamma, dbeta]), rows.shape[0], count, config.groups[0])
    return dgamma, dbeta


def found(own: Inputs, asked: Inputs, *, x: Tensor | None, **grads: Tensor | None) -> list[Tensor | None]:
    """The gradients that are asked for, in the operation's order; those of parameters in the parameters' form."""
    for name, grad in grads.items():
        grads[name] = grad_like(grad, getattr(own, name), getattr(asked, name))
    return list(Inputs(x=x, **grads))


class SingleNorm:
    """The norm of a unit, and what follows from it alone: made once, used by every call until it changes."""

    def __init__(self, norm: Norm) -> None:
        self.norm = norm
        self.inferences = Inferences()
        self._movement = Movement([norm], [0], [slice(0, None)])

    def move(self, size: Sequence[int], results: Sequence[Tensor]) -> None:
        """Moves the running statistics by what a batch of ``size`` [N, C, *spatial] had.

        results: a unit's, of which the second and third are mean and variance, and the fourth the count of rows that
        several processes had.
        """
        counts = [results[3]] if self.norm.group else pixels(size)
        self._movement.move([results[1]], [results[2]], counts)


def single(norm: Norm | SingleNorm) -> SingleNorm:
    """Returns the norm with what follows from it."""
    return norm if isinstance(norm, SingleNorm) else SingleNorm(norm)
