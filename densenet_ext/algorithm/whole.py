"""A unit as one call of a compiled operation (csrc/ops): its arguments in the form of the operation's schema."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from densenet_ext import kernels
from densenet_ext.algorithm.layout import pixels


def operation(name: str, like: Tensor, groups: Sequence[str]) -> Any:
    """The compiled operation for feature maps like ``like``, or None where the unit has to run step by step."""
    return None if any(groups) else getattr(kernels.select(like), name, None)


def has_conv3x3(like: Tensor) -> bool:
    """Returns whether 3x3 convolutions of feature maps like ``like`` are always computed by a kernel of ours.

    They are on a processor. On a GPU, also on an emulated one, the operations choose by shape
    (csrc/cuda/conv3x3_choice.cu) and take the memory for it themselves.
    """
    ops = kernels.select(like)
    return like.is_cpu and ops is not kernels.plain and vars(ops).keys() >= kernels.CPU_OPS


def has_kernel(like: Tensor, weights: Iterable[Tensor]) -> bool:
    """Returns whether the convolutions are computed by a kernel of ours; PyTorch's own does the others."""
    return has_conv3x3(like) and are_of_three(weights)


def are_of_three(weights: Iterable[Tensor]) -> bool:
    """Returns whether all convolutions have windows of 3."""
    return all(size == 3 for W in weights for size in W.shape[2:])


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


_MOST_WAITING = 2**20  # bytes; csrc/ops/taps.h


def copied(like: Tensor, weights: Iterable[Any], waiting: int = 0) -> int:
    """Returns how many elements the copies of convolutions' weights that PyTorch's own read, and their gradients, take
    at most beside memory that is there anyway: one weight, and of gradients what may wait to be written together.

    ``waiting``: columns of the scratch [M, waiting], of which these take half at most; 0 forward.
    """
    own = [W.numel() for W in weights if not has_kernel(like, [W])]
    if not own or not waiting:
        return max(own, default=0)
    most = min(pixels(like.shape) * waiting // 2, _MOST_WAITING // like.element_size())
    return max(own) + min(sum(own), max(most, max(own)))
