"""What the pools treat apart: ties and NaN, every position that a byte holds, windows with gaps between them."""

from __future__ import annotations

import math
import re
from typing import Any

import pytest
import torch

from tests.kernels.test_kernels import compiled_only, level  # noqa: F401  fixture
from tests.support.helpers import F64
from tests.support.kernel_calls import DTYPES


def _identity(C: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, None, None, float]:
    """A norm that changes nothing."""
    acc = F64 if dtype == F64 else torch.float32
    return torch.zeros(C, dtype=acc), torch.ones(C, dtype=acc), None, None, 0.0


@pytest.mark.parametrize("C", [5, 50, 64])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_first_maximum_wins_and_nan_always(dtype: torch.dtype, C: int, level: str) -> None:  # noqa: F811
    """As in PyTorch's own max pooling, bit by bit; many are equal, of NaN the last wins."""
    N, H, W = 2, 9, 12
    x = torch.randint(-2, 3, (N, H, W, C)).to(dtype)
    x[torch.rand(x.shape) < 0.05] = float("nan")
    x[torch.rand(x.shape) < 0.05] = float("inf")
    out_size = [(H - 1) // 2 + 1, (W - 1) // 2 + 1]
    out = torch.empty(N * out_size[0] * out_size[1], C, dtype=dtype)
    index = torch.empty(out.shape, dtype=torch.uint8)
    norm = _identity(C, dtype)
    geometry = ([N, 1, H, W], [1, 3, 3], [1, 2, 2], [0, 1, 1])
    torch.ops.densenet_ext.bn_relu_max_pool(x.view(-1, C), *geometry, *norm, out, index)
    image = x.permute(0, 3, 1, 2).relu()
    expected, flat = torch.nn.functional.max_pool2d(image, 3, 2, 1, return_indices=True)
    h0, w0 = (2 * torch.arange(n) - 1 for n in out_size)
    position = (flat // W - h0[:, None]) * 3 + flat % W - w0
    torch.testing.assert_close(out.view(N, *out_size, C), expected.permute(0, 2, 3, 1), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(index.view(N, *out_size, C).long(), position.permute(0, 2, 3, 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_position_of_a_window(dtype: torch.dtype, level: str) -> None:  # noqa: F811
    """256 positions, the most that a byte can tell: channel c has its maximum at position c."""
    C = side = 256
    x = torch.eye(side, dtype=dtype) + 1
    geometry = ([1, 1, 16, 16], [1, 16, 16], [1, 16, 16], [0, 0, 0])
    norm, ops = _identity(C, dtype), torch.ops.densenet_ext
    out, index = torch.empty(1, C, dtype=dtype), torch.empty(1, C, dtype=torch.uint8)
    ops.bn_relu_max_pool(x, *geometry, *norm, out, index)
    assert torch.equal(index[0].long(), torch.arange(C)) and bool((out == 2).all())
    grad, grad_x = torch.arange(1, C + 1).to(dtype).view(1, C), torch.empty_like(x)
    ops.bn_relu_max_pool_backward(grad, index, x, *geometry, *norm, None, None, grad_x)
    assert torch.equal(grad_x, torch.diag(grad[0]))
    sums = torch.empty_like(norm[0]), torch.empty_like(norm[0])
    ops.bn_relu_max_pool_backward_reduce(grad, index, x, *geometry, *norm, *sums)
    assert torch.equal(sums[1], grad[0].to(sums[1].dtype)) and torch.equal(sums[0], 2 * sums[1])


def check_sides_beyond_32_bits(ops: Any) -> None:
    """Every pool refuses a side that has no number of 32 bits; the rows are those of one element."""

    def refuse(size: list[int], expected: str, padding: int = 0, stride: int = 2**20) -> None:
        x = torch.zeros(1, 1).expand(math.prod(size), 1)
        one, index = torch.zeros(1), torch.zeros(1, 1, dtype=torch.uint8)
        norm, strides, paddings = (one, one + 1, None, None, 0.0), [1, 1, stride], [0, 0, padding]
        place = (size, [1, 1, 2], strides, paddings)
        calls = [
            lambda: ops.bn_relu_max_pool(x, *place, *norm, x, None),
            lambda: ops.bn_relu_max_pool_backward_reduce(x, index, x, *place, *norm, one, one),
            lambda: ops.bn_relu_max_pool_backward(x, index, x, *place, *norm, None, None, x),
        ]
        if padding == 0 and stride < 2**31:  # an average has the whole side as its window
            window = (size, [1, 1, size[3]])
            calls += [
                lambda: ops.bn_relu_avg_pool(x, *window, *norm, x),
                lambda: ops.bn_relu_avg_pool_backward_reduce(x, x, *window, *norm, None, one, one),
                lambda: ops.bn_relu_avg_pool_backward(x, x, *window, *norm, None, None, x),
            ]
        for call in calls:
            with pytest.raises(RuntimeError, match=expected):
                call()

    sides = "densenet_ext: size: expected sides of at most 2147483647 pixels with their padding, got "
    refuse([1, 1, 1, 2**31], sides + re.escape("[1, 1, 1, 2147483648]"))
    refuse([0, 1, 1, 2**40], sides)
    refuse([1, 1, 1, 2**31 - 2], sides, padding=1)
    refuse([1, 1, 1, 2**31 - 1], "densenet_ext: (x|out|grad_out|grad_x|index): ")  # of another size than told
    refuse([1, 1, 1, 2**31 - 3], "densenet_ext: (x|out|grad_out|grad_x|index): ", padding=1)
    refuse([1, 1, 1, 4], "densenet_ext: stride: expected at most 2147483647, got .*2147483648", stride=2**31)


@compiled_only
def test_sides_beyond_32_bits_are_refused() -> None:
    check_sides_beyond_32_bits(torch.ops.densenet_ext)
