"""Statistics, running statistics and shapes of pooling of the units with one norm."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.layout import pixels
from densenet_ext.algorithm.norm import update_running_stats
from densenet_ext.algorithm.operation import Config
from densenet_ext.algorithm.sync import merge_stats, merge_sums
from densenet_ext.algorithm.values import Norm, Tensors


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
    """``batch_stats``, uninitialised."""
    mean, var = allocate_stats(config, x, x.shape[1])
    return mean, var, mean.new_empty(1 if config.groups[0] else 0)


def batch_stats(config: Config, x: Tensor, rows: Tensor, stats: Tensors = ()) -> tuple[Tensor, Tensor, Tensor]:
    """Mean and variance [C] of x, and the rows [1] behind them when processes share statistics, else [0].

    Mean and variance are ``stats`` where these are given, else taken from x's rows; [0] when the norm is frozen.
    """
    mean, var, count = allocate_shared_stats(config, x)
    if not config.batch_stats[0]:
        return mean, var, count
    known = [x for x in stats if x is not None]
    if known:
        mean.copy_(known[0])
        var.copy_(known[1])
    else:
        kernels.select(rows).channel_stats(rows, mean, var)
    if config.groups[0]:
        count = merge_stats(mean, var, rows.shape[0], config.groups[0])
    return mean, var, count


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


def move(norm: Norm, size: Sequence[int], results: Sequence[Tensor]) -> None:
    """Moves the norm's running statistics by what a batch of ``size`` [N, C, *spatial] had.

    results: a unit's, of which the second and third are mean and variance, and the fourth the count of rows that
    several processes had.
    """
    if norm.update:
        update_running_stats([norm], [results[1]], [results[2]], [results[3] if norm.group else pixels(size)])
