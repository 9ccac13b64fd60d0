"""Feature maps on their way from one unit to the next, and the memory layout that eager mode would give them.

A unit writes channels_last memory. Whoever sees its result gets eager's layout: contiguous unless input or weights are
channels_last. Only from one unit straight to the next may features stay as they are, and only there do the statistics
of a result travel with it: nobody can have touched it in between.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from densenet_ext.algorithm.layout import convolution_format, suggest_memory_format
from densenet_ext.algorithm.values import Stats

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class Flow(NamedTuple):
    """Feature maps between two units."""

    x: Tensor  # [N, C, *spatial] in any layout
    layout: torch.memory_format  # that eager's x would have
    stats: Stats | None = None  # of x as it is now
    scored: bool = False  # x [N, K] is a head's features behind the linear layer that follows it

    def shown(self) -> Tensor:
        """Returns the feature maps in eager's layout."""
        return self.x.contiguous(memory_format=self.layout)

    def behind(self, weight: Tensor) -> torch.memory_format:
        """Returns the layout that eager's convolution of x with ``weight`` would have."""
        return convolution_format(self.layout, weight)


def incoming(x: Tensor) -> Flow:
    """Returns feature maps that came from somebody else."""
    return Flow(x, suggest_memory_format(x))


def to_channels_last(x: Tensor) -> Tensor:
    """Returns x in channels_last memory, where there is such a layout."""
    layout = _CHANNELS_LAST.get(x.dim())
    return x if layout is None else x.contiguous(memory_format=layout)
