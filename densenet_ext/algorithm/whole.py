"""A unit as one call of a compiled operation (csrc/ops): its arguments in the form of the operation's schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from densenet_ext import kernels
from densenet_ext.algorithm.conversions import grad_like
from densenet_ext.algorithm.layout import pixels
from densenet_ext.algorithm.values import Tensors


def operation(name: str, like: Tensor, groups: Sequence[str]) -> Any:
    """The compiled operation for feature maps like ``like``, or None where the unit has to run step by step."""
    return None if any(groups) else getattr(kernels.select(like), name, None)


def present(tensors: Tensors, per_layer: int) -> tuple[list[Tensor], Sequence[int]]:
    """The tensors that are there, and for each layer a number with a bit for each of its tensors that is."""
    bits = _bits(tuple([x is None for x in tensors]), per_layer)
    return [x for x in tensors if x is not None], bits


@lru_cache(maxsize=256)
def _bits(absent: tuple[bool, ...], per_layer: int) -> list[int]:
    layers = range(0, len(absent), per_layer)
    return [sum(1 << i for i in range(per_layer) if not absent[start + i]) for start in layers]


def has_conv3x3(like: Tensor) -> bool:
    """Returns whether there is a kernel of ours for 3x3 convolutions of feature maps like ``like``."""
    ops = kernels.select(like)
    return like.is_cpu and ops is not kernels.plain and hasattr(ops, "bn_relu_conv3x3")


def has_kernel(like: Tensor, weights: Iterable[Tensor]) -> bool:
    """Returns whether the convolutions are computed by a kernel of ours; PyTorch's own does the others."""
    return has_conv3x3(like) and all(size == 3 for W in weights for size in W.shape[2:])


def scratch(out: Tensor, *columns: int) -> Tensor:
    """Memory of one call: pieces of [M, columns] for the buffer ``out`` [N, C, *spatial], as the operations lay them
    out: each begins on a cache line."""
    line = 64 // out.element_size()
    M = pixels(out.shape)
    return out.new_empty(sum(-(-M * count // line) * line for count in columns))


def results(out: Tensor, *columns: int, elements: int = 0) -> list[Tensor]:
    """What PyTorch's own convolutions take inside an operation, for who counts memory without data: pieces of
    [M, columns], and so many ``elements``."""
    if not isinstance(out, FakeTensor):
        return []
    return [out.new_empty(pixels(out.shape) * count) for count in columns] + [out.new_empty(elements)]


def copied(like: Tensor, weights: Iterable[Any]) -> int:
    """Returns how many elements of convolutions' weights are copied for PyTorch's own, of a whole block at once."""
    return sum(W.numel() for W in weights if not has_kernel(like, [W]))


class Gradients:
    """The gradients of a block's parameters that are asked for, to be filled by its operation."""

    found: list[Tensor]
    """Uninitialised, in the dtype of sums."""
    bits: Sequence[int]
    """As of :func:`present`."""

    def __init__(self, tensors: Tensors, needs: Sequence[bool], per_layer: int, acc: torch.dtype) -> None:
        self._tensors = tensors
        asked = [new_gradient(x, acc) if need else None for x, need in zip(tensors, needs, strict=True)]
        self._asked = asked
        self.found, self.bits = present(asked, per_layer)

    def gradients(self) -> list[Tensor | None]:
        """One gradient or None per tensor, in the dtype and the layout of that tensor."""
        return [grad_like(grad, x) for grad, x in zip(self._asked, self._tensors, strict=True)]


def new_gradient(x: Tensor | None, acc: torch.dtype) -> Tensor | None:
    """A parameter's gradient, uninitialised: in the dtype of sums, in the parameter's layout or contiguous."""
    if x is None:
        return None
    if x.is_contiguous() or (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return torch.empty_like(x, dtype=acc)
    return torch.empty(x.shape, dtype=acc, device=x.device)
