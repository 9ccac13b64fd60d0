"""What the compiled operations of a unit are given once and keep: hundreds of tensors, named by a number from then on.

To hand them over at every call takes longer than a small unit computes (csrc/ops/kept.h). Kept is which tensors they
are, not what they hold: parameters change, and their memory may be another at every call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from densenet_ext import kernels
from densenet_ext.algorithm.conversions import grad_like
from densenet_ext.algorithm.operation import Config, Present
from densenet_ext.algorithm.values import Tensors


class Kept:
    """Tensors that operations have kept, until this is freed."""

    def __init__(self, ops: Any, number: int) -> None:
        self.number = number
        """What the operations know them by."""
        self._hold, self._drop = ops.kept_hold, ops.drop_kept

    def hold(self) -> bool:
        """Returns whether all have the dtype, the device, the sizes and the strides that they had."""
        return bool(self._hold(self.number))

    def __del__(self) -> None:
        self._drop(self.number)


class KeptLayers:
    """The layers of a block, kept by the operations for feature maps like ``like``.

    parameters: ``per_layer`` of each, None for those that are not there. Tensors without data are not handed over:
    operations do nothing to them.
    """

    def __init__(self, like: Tensor, config: Config, parameters: Tensors, per_layer: int) -> None:
        self.parameters, self.per_layer = parameters, per_layer
        present = [x for x in parameters if x is not None]
        self._kept: Kept | None = None
        if not isinstance(like, FakeTensor):
            ops, given = kernels.select(like), _bits(tuple([x is not None for x in parameters]), per_layer)
            options = config.batch_stats, config.eps, config.drop_rates, config.drop_channels
            inner = config.inner_drop_rates, config.inner_drop_channels
            self._kept = Kept(ops, ops.keep_layers(present, given, *options, *inner, config.new_first))
        dtypes = {x.dtype for x in present}
        self.dtype = dtypes.pop() if len(dtypes) == 1 and all(map(is_dense, present)) else None
        """That of all parameters, where their gradients can be laid out as they are; else None."""

    @property
    def number(self) -> int:
        """What the operations know them by."""
        return 0 if self._kept is None else self._kept.number

    def hold(self) -> bool | None:
        """Returns whether all parameters have the dtype, the device, the sizes and the strides that they had.

        None: they have no data, and nobody keeps them.
        """
        return None if self._kept is None else self._kept.hold()

    def are(self, parameters: Tensors) -> bool:
        """Returns whether ``parameters`` are these."""
        return len(parameters) == len(self.parameters) and all(map(is_, parameters, self.parameters))


class Wanted:
    """The gradients of a block's parameters that are asked for."""

    bits: list[int]
    """Per layer, a bit for each parameter."""

    def __init__(self, layers: KeptLayers, like: Tensor, needs: Sequence[bool]) -> None:
        """like: the block's buffer."""
        self._parameters = layers.parameters
        self.bits, self._places, self._there = _wanted(tuple(needs), layers.per_layer)
        acc = kernels.acc_dtype(like.dtype)
        self._alike = layers.dtype == acc
        self._without_data: list[Any] = []
        if isinstance(like, FakeTensor):  # the operation does nothing, and somebody counts memory
            self._without_data = [new_gradient(self._parameters[i], acc) for i in self._places]

    def gradients(self, found: Sequence[Tensor]) -> Tensors:
        """Returns one gradient or None per parameter, in its dtype and layout; ``found``: the operation's."""
        grads: Sequence[Any] = self._without_data or found
        if not self._alike:
            grads = [grad_like(grad, self._parameters[i]) for i, grad in zip(self._places, grads, strict=True)]
        return self._there.among_all(grads, None)


@lru_cache(maxsize=256)
def _wanted(needs: tuple[bool, ...], per_layer: int) -> tuple[list[int], list[int], Present]:
    return _bits(needs, per_layer), [i for i, need in enumerate(needs) if need], Present(needs)


@lru_cache(maxsize=256)
def _bits(there: tuple[bool, ...], per_layer: int) -> list[int]:
    layers = range(0, len(there), per_layer)
    return [sum(1 << i for i in range(per_layer) if there[start + i]) for start in layers]


def is_dense(x: Tensor) -> bool:
    """Returns whether x is contiguous or channels_last, as kernels write gradients."""
    return x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last))


def new_gradient(x: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """A parameter's gradient, uninitialised: in the dtype of sums, in the parameter's layout or contiguous."""
    if x is None:
        return None
    if is_dense(x):
        return torch.empty_like(x, dtype=acc)
    return torch.empty(x.shape, dtype=acc, device=x.device)
