"""Feature maps as operations of whole units take them: as rows, or as images whose memory is that of rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.layout import is_readable, new_features, readable, to_rows

pytestmark = pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")

SIZES = [(2, 3, 5), (2, 3, 4, 6), (1, 3, 4, 6), (3, 3, 1, 1), (1, 3, 1, 1), (2, 1, 4, 2), (2, 3, 2, 4, 3)]


def _head(x: Tensor, size: tuple[int, ...]) -> Tensor:
    """relu(bn(x)) of the images of ``size``, averaged."""
    C, front = size[1], [1] * (5 - len(size))
    mean, var, out = torch.full((C,), 0.1), torch.full((C,), 2.0), torch.empty(size[0], C)
    geometry = [size[0], *front, *size[2:]], [*front, *size[2:]]
    torch.ops.densenet_ext.whole_transition(
        x, *geometry, mean, var, None, None, None, None, 1e-5, *[None] * 2, out, None
    )
    return out


@pytest.mark.parametrize("size", SIZES)
def test_images_are_their_rows(size: tuple[int, ...]) -> None:
    x = new_features(torch.empty(0), size).normal_()
    assert torch.equal(_head(x, size), _head(to_rows(x), size))


@pytest.mark.parametrize("size", SIZES)
def test_some_columns_of_a_buffer(size: tuple[int, ...]) -> None:
    x = new_features(torch.empty(0), (size[0], size[1] + 2, *size[2:])).normal_()[:, 1 : size[1] + 1]
    assert is_readable(x) and readable(x) is x
    assert torch.equal(_head(x, size), _head(to_rows(x), size))


def test_images_in_other_memory_are_copied_or_refused() -> None:
    x = torch.randn(2, 3, 4, 6)
    assert not is_readable(x)
    copy = readable(x)
    assert torch.equal(copy, x) and copy.is_contiguous(memory_format=torch.channels_last)
    for other in (x, copy[:, :, ::2], copy[:, :, :, 1:], copy.flip(1).transpose(2, 3), copy[:1].expand(2, 3, 4, 6)):
        size = tuple(other.shape)
        with pytest.raises(RuntimeError, match="x: expected images in channels_last memory"):
            _head(other, size)
        assert torch.equal(_head(readable(other), size), _head(to_rows(other), size))


@pytest.mark.parametrize("size", [(2, 3, 4, 5), (3, 3, 4, 6)])
def test_images_of_other_sizes_are_refused(size: tuple[int, ...]) -> None:
    x = new_features(torch.empty(0), size)
    with pytest.raises(RuntimeError, match=r"densenet_ext: x: expected shape \[N, 3, ...\] of 48 pixels"):
        _head(x, (2, 3, 4, 6))


def test_what_is_neither_is_refused() -> None:
    for x in (torch.empty(3), torch.empty(1, 1, 1, 1, 1, 1)):
        with pytest.raises(RuntimeError, match=r"x: expected rows \[M, C\] or images \[N, C, \*spatial\]"):
            _head(x, (1, 3, 1, 1))
