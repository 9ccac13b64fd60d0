"""The values that the operations take and give: norms, layers and statistics. Nothing is computed here."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

Tensors = Sequence[Tensor | None]


class Norm(NamedTuple):
    """One BatchNorm over C channels, as it stands at this call.

    ``batch_stats``: it normalises with the batch's own statistics, else with the running ones. ``update``: the running
    statistics move. ``momentum`` None: they are the plain average over all batches. ``group``: the process group whose
    processes together make the batch; "" when this one alone does.
    """

    weight: Tensor | None  # [C]
    bias: Tensor | None  # [C]
    running_mean: Tensor | None  # [C]
    running_var: Tensor | None  # [C]
    num_batches_tracked: Tensor | None  # [] int64
    batch_stats: bool
    update: bool
    momentum: float | None
    eps: float
    group: str = ""


class Layer(NamedTuple):
    """One dense layer: BN, ReLU, 1x1 convolution to b features, dropout, BN, ReLU, 3x3 convolution to k, dropout.

    Drop rates are those in force, 0 when not training. Dropout is of single values, or of whole channels of a sample
    where ``drop_channels`` (of the new features) and ``inner_drop_channels`` (of the bottleneck features) say so.
    """

    norm1: Norm
    conv1: Tensor  # [b, C, 1...]
    norm2: Norm
    conv2: Tensor  # [k, b, 3...]
    drop_rate: float  # of the new features
    conv1_bias: Tensor | None = None  # [b]
    conv2_bias: Tensor | None = None  # [k]
    drop_channels: bool = False
    inner_drop_rate: float = 0.0  # of the 1x1 convolution's result, before norm2
    inner_drop_channels: bool = False


class BasicLayer(NamedTuple):
    """One dense layer without a bottleneck: BN, ReLU, 3x3 convolution to k, dropout (as in :class:`Layer`)."""

    norm: Norm
    conv: Tensor  # [k, C, 3...]
    drop_rate: float  # 0 when not training
    bias: Tensor | None = None  # [k]
    drop_channels: bool = False


class Stats(NamedTuple):
    """Mean and biased variance of a tensor's channels, of this process alone, in the dtype of sums."""

    mean: Tensor  # [C]
    var: Tensor  # [C]
