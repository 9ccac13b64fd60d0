"""Dropout by a counter hash of (seed, site, row, column): the factors are computed again, never stored.

A row is a pixel where single values are dropped, and a sample where whole channels are. The site of layer l's new
features is l; that of its bottleneck features lies far behind all of these.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.layout import from_rows, pixels

BOTTLENECKS = 1 << 20
"""Added to a layer's number, it gives the site of its bottleneck features."""


class Dropout(NamedTuple):
    """One dropout: a factor of 0 or 1 / (1 - rate) for every value, or for every channel of a sample."""

    rate: float
    channels: bool
    seed: Tensor  # [1] int64
    site: int

    def factors(self, size: Sequence[int], columns: int, dtype: torch.dtype) -> Tensor:
        """The factors of features [N, columns, *spatial] of ``size`` [N, any, *spatial]; ones as spatial sizes for
        channels."""
        if self.channels:
            size = [size[0], columns, *[1] * (len(size) - 2)]
        found = kernels.plain.dropout_factor(self.seed, self.site, pixels(size), columns, self.rate, dtype)
        return from_rows(found, size)

    def forward(self, ops: Any, src: Tensor, size: Sequence[int], out: Tensor, stats: Any) -> None:
        """out [M, k] = dropout(src), and its statistics (mean and variance [k], or two None)."""
        ops.append_features(src, out, *stats, self.rate, self.seed, self.site, self._rows(size))

    def backward(self, ops: Any, grad: Tensor, x: Tensor, stats: Any, size: Sequence[int], out: Tensor) -> None:
        """out [M, k] = dropout_backward(grad + what the features x receive through their statistics).

        stats: the features' means and the gradients of their means and variances, [k] each.
        """
        ops.feature_grad(grad, x, *stats, self.rate, self.seed, self.site, out, self._rows(size))

    def _rows(self, size: Sequence[int]) -> int:
        """So many rows after each other share their factors."""
        return pixels((1, *size[1:])) if self.channels else 1


def dropout_at(rate: float, channels: bool, seed: Tensor | None, site: int) -> Dropout | None:
    """The dropout of one site, or None where nothing is dropped."""
    return None if seed is None or rate <= 0 else Dropout(rate, channels, seed, site)


def new_seed(rates: Sequence[float], device: torch.device) -> Tensor | None:
    """One seed for all dropouts of a call, from torch's generator; None where nothing is dropped."""
    if not any(rates):
        return None
    return torch.randint(2**62, (1,), dtype=torch.int64, device=device)
