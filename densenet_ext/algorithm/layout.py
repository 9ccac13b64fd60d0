"""Feature maps [N, C, *spatial] as rows [M, C]: pixels of the whole batch, channels contiguous (channels_last)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format as _suggest_memory_format
from torch._subclasses.fake_tensor import FakeTensor


def channels_last_stride(size: Sequence[int], pitch: int | None = None) -> list[int]:
    """Strides in elements of [N, C, *spatial] with channels fastest; rows lie ``pitch`` apart, C if None."""
    if len(size) == 4:  # the usual case, without a loop
        _, C, H, W = size
        step = max(1, C if pitch is None else pitch)
        line = step * max(1, W)
        return [line * max(1, H), 1, line, step]
    stride = [0] * len(size)
    stride[1] = 1
    step = max(1, size[1] if pitch is None else pitch)
    for d in (*range(len(size) - 1, 1, -1), 0):
        stride[d] = step
        step *= max(1, size[d])
    return stride


def new_features(like: Tensor, size: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
    """An uninitialised feature map of ``size`` [N, C, *spatial], channels_last in memory, on the device of ``like``."""
    # not a permuted view: what a Function returns has to be its own base
    return torch.empty_strided(size, channels_last_stride(size), dtype=dtype or like.dtype, device=like.device)


def row_pitch(x: Tensor) -> int | None:
    """The distance of two rows in elements when x [N, C, *spatial] can be read as rows without a copy, else None."""
    size, stride = x.shape, x.stride()
    if size[1] > 1 and stride[1] != 1:
        return None
    pitch = expected = 0
    for d in (*range(len(size) - 1, 1, -1), 0):
        if size[d] == 1:
            continue
        if pitch == 0:
            pitch = expected = stride[d]
            if pitch < size[1]:
                return None
        elif stride[d] != expected:
            return None
        expected *= size[d]
    return pitch or size[1]


def is_readable(x: Tensor) -> bool:
    """Returns whether x [N, C, *spatial] can be read as rows without a copy."""
    # the usual case, without a look at strides
    return (x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)) or row_pitch(x) is not None


def readable(x: Tensor) -> Tensor:
    """x [N, C, *spatial] as the compiled operations of whole units take it: itself where it can be read as rows, else a
    channels_last copy."""
    return x if is_readable(x) else new_features(x, x.shape).copy_(x)


def to_rows(x: Tensor) -> Tensor:
    """x [N, C, *spatial] as rows [M, C]: a view when its memory allows it, else of a channels_last copy."""
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):  # the usual case, without a look at strides
        C = x.shape[1]
        return x.as_strided((x.numel() // C, C), (C, 1))
    pitch = row_pitch(x)
    if pitch is None:
        x = new_features(x, x.shape).copy_(x)
        pitch = x.shape[1]
    M = x.shape[0]
    for n in x.shape[2:]:
        M *= n
    return x.as_strided((M, x.shape[1]), (pitch, 1))


def from_rows(rows: Tensor, size: Sequence[int]) -> Tensor:
    """Rows [M, C] as [N, C, *spatial], a view; ``size`` gives N and the spatial sizes, its channel entry is not
    read."""
    return rows.as_strided(*_image(tuple(size), rows.shape[1], rows.stride(0)))


@lru_cache(maxsize=1024)
def _image(size: tuple[int, ...], channels: int, pitch: int) -> tuple[tuple[int, ...], list[int]]:
    """Shape and strides of rows seen as an image; a network asks for the same few again and again."""
    shape = (size[0], channels, *size[2:])
    return shape, channels_last_stride(shape, pitch)


def pixels(size: Sequence[int]) -> int:
    """M of a feature map of ``size`` [N, C, *spatial]."""
    M = size[0]
    for n in size[2:]:
        M *= n
    return M


def joined(features: Sequence[Tensor]) -> Tensor | None:
    """The features as one tensor without a copy, when they lie side by side in one buffer; else None."""
    first = features[0]
    if len(features) == 1:
        return first
    pitch = row_pitch(first)
    channels = 0
    for x in features:
        if (
            pitch is None
            or x.data_ptr() != first.data_ptr() + channels * first.element_size()
            or x.untyped_storage().data_ptr() != first.untyped_storage().data_ptr()
            or x.dtype != first.dtype
            or row_pitch(x) != pitch
        ):
            return None
        channels += x.shape[1]
    if pitch is None or channels > pitch:
        return None
    size = (first.shape[0], channels, *first.shape[2:])
    return first.as_strided(size, channels_last_stride(size, pitch))


def suggest_memory_format(x: Tensor) -> torch.memory_format:
    """The memory format that PyTorch's operations give their results for x: PyTorch's own rule, without its cost."""
    if torch.compiler.is_compiling() or isinstance(x, FakeTensor):  # whose sizes may be symbols
        return _suggest_memory_format(x)
    if x.dim() == 4:
        usual = x.is_contiguous()
        if usual != x.is_contiguous(memory_format=torch.channels_last):  # both where sizes of 1 leave it open
            return torch.contiguous_format if usual else torch.channels_last
    return _format_of(tuple(x.shape), x.stride())


@lru_cache(maxsize=1024)
def _format_of(size: tuple[int, ...], stride: tuple[int, ...]) -> torch.memory_format:
    """As above, by what alone it depends on: 1x1 weights leave it open, too, and the rule takes 8 us."""
    return _suggest_memory_format(torch.empty_strided(size, stride, device="meta"))


def concatenation_format(features: Sequence[Tensor]) -> torch.memory_format:
    """The memory format of what torch.cat makes of feature maps: channels_last when all of them are."""
    formats = {suggest_memory_format(x) for x in features}
    return formats.pop() if len(formats) == 1 else torch.contiguous_format


def convolution_format(given: torch.memory_format, weight: Tensor) -> torch.memory_format:
    """The memory format of what PyTorch's convolution makes of features of the format ``given``.

    It is channels_last when the features or the weight are; of float64 only in 2-D on the CPU.
    """
    if weight.dtype == torch.float64 and not (weight.is_cpu and weight.dim() == 4):
        return torch.contiguous_format
    return suggest_memory_format(weight) if given == torch.contiguous_format else given
