"""Where a network's first convolution runs as one operation, and that it gives what PyTorch's own gives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.first_conv import MOST_CHANNELS, first_conv, prepared_conv
from tests.support.helpers import DEVICE, assert_as_good

pytestmark = pytest.mark.skipif(
    kernels.backend("cpu") != "compiled" or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)


@pytest.fixture(autouse=True)
def without_gradients() -> Any:
    with torch.no_grad():
        yield


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, 14, 11).to(dtype), (torch.randn(20, 3, 5, 5) / 9).to(dtype), torch.randn(20).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("lowered", [None, torch.bfloat16, torch.float16], ids=str)
def test_gives_the_dtype_and_values_of_pytorchs_own(dtype: torch.dtype, lowered: torch.dtype | None) -> None:
    x, weight, bias = tensors(dtype)
    geometry = (2, 1), (1, 3)
    with torch.autocast("cpu", lowered or torch.bfloat16, enabled=lowered is not None):
        got = first_conv(x, weight, bias, *geometry)
        eager = F.conv2d(x, weight, bias, *geometry)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), *geometry)
    if lowered not in (None, dtype) and dtype in (torch.bfloat16, torch.float16):
        assert got is None  # from one type of 16 bits to the other, by PyTorch's own
        return
    assert got is not None and got.is_contiguous(memory_format=torch.channels_last)
    assert_as_good([got], [eager], [exact])


def test_autocast_takes_parameters_of_either_dtype() -> None:
    x, weight, bias = tensors()
    with torch.autocast("cpu", torch.bfloat16):
        for images, w in ((x.bfloat16(), weight), (x, weight.bfloat16())):
            got, eager = first_conv(images, w, bias, (1, 1), (2, 2)), F.conv2d(images, w, bias, 1, 2)
            assert got is not None
            assert_as_good([got], [eager], [F.conv2d(images.double(), w.double(), bias.double(), 1, 2)])


@pytest.mark.parametrize("dims", [1, 3])
def test_lines_and_volumes(dims: int) -> None:
    x, weight = torch.randn(2, 2, *[9] * dims), torch.randn(7, 2, *[3] * dims)
    got = first_conv(x, weight, None, (2,) * dims, (1,) * dims)
    convolution = F.conv1d if dims == 1 else F.conv3d
    assert got is not None
    torch.testing.assert_close(got, convolution(x, weight, None, 2, 1))


def test_pytorchs_own_runs_elsewhere() -> None:
    x, weight, bias = tensors()

    def runs(x: Any = x, weight: Any = weight, bias: Any = bias, stride: Any = (1, 1), padding: Any = (2, 2)) -> bool:
        return first_conv(x, weight, bias, stride, padding) is not None

    many = MOST_CHANNELS + 1

    class Other(Tensor):
        pass

    assert runs() and runs(bias=None) and runs(weight=torch.nn.Parameter(weight))
    assert runs(weight=weight.contiguous(memory_format=torch.channels_last))
    assert not runs(torch.randn(2, many, 9, 9), torch.randn(20, many, 5, 5))  # where it is no faster
    assert not runs(weight=torch.randn(20, 3, 1, 1))
    assert not runs(x.to("meta")) and not runs(x, weight.to("meta")) and not runs(bias=bias.to("meta"))
    assert not runs(x.as_subclass(Other)) and not runs(weight=weight.as_subclass(Other))
    assert not runs(x.double()) and not runs(bias=bias.bfloat16()) and not runs(x.int(), weight.int(), bias.int())
    assert not runs(weight=weight.transpose(2, 3)) and not runs(x.to_sparse()) and not runs(x.to_mkldnn())
    # what PyTorch's own refuses, or has a code of its own for
    assert not runs(x[0]) and not runs(x[:, :2]) and not runs(x[:0]) and not runs(x[..., :0])
    assert not runs(weight=torch.randn(20, 3, 5)) and not runs(weight=torch.randn(20, 3, 5, 19))
    assert not runs(stride=(0, 1)) and not runs(padding=(-1, 0)) and not runs(stride=(1,)) and not runs(padding=(1,))
    with torch.enable_grad():
        assert not runs()
    with kernels.force_plain():
        assert not runs()


def test_a_prepared_call_takes_other_images() -> None:
    x, weight, bias = tensors()
    call = prepared_conv(x, weight, bias, (1, 1), (2, 2))
    assert call is not None and prepared_conv(x, weight, bias, (0, 1), (2, 2)) is None
    for images in (x, x + 1):
        assert torch.equal(call(images), first_conv(images, weight, bias, (1, 1), (2, 2)))  # type: ignore[arg-type]
