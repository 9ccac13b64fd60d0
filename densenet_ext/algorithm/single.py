"""What the units with one norm (transition, stem, head, concatenation) share: statistics and the shapes of pooling."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.layout import pixels, recall_stats, remember_stats
from densenet_ext.algorithm.norm import Norm, update_running_stats
from densenet_ext.algorithm.unit import Config


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
    """Mean and variance [channels], or [0] when the norm is frozen."""
    count = channels if config.batch_stats[0] else 0
    dtype = kernels.acc_dtype(x.dtype)
    return x.new_empty(count, dtype=dtype), x.new_empty(count, dtype=dtype)


def fill_stats(config: Config, x: Tensor, rows: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and variance [C] of x: what the unit that wrote x noted beside it, else from its rows."""
    known = recall_stats(x) if config.cached else None
    if known is not None:
        mean.copy_(known[0])
        var.copy_(known[1])
        return
    kernels.select(rows).channel_stats(rows, mean, var)
    if config.cached:
        remember_stats(x, mean, var)


def move(norm: Norm, size: Sequence[int], mean: Tensor, var: Tensor) -> None:
    """Moves the norm's running statistics by what a batch of ``size`` [N, C, *spatial] had."""
    if norm.update:
        update_running_stats([norm], [mean], [var], pixels(size))
