"""The CUDA kernels of the 3x3 convolution, run by emulation, against float64 and the CPU backend.

Every case is executed thread by thread with the emulator's checks on (bounds, alignment, races, barriers, asynchronous
copies, shared memory that nobody wrote); a result is compared with the same operator in float64 on the values as
stored.
"""

from __future__ import annotations

import shutil

import pytest
import torch

import densenet_ext  # noqa: F401  (registers the operators)
from tests.cuda.emulation.conv1x1 import ARITHMETIC, BF16, F32, assert_same_kind, use
from tests.cuda.emulation.conv3x3 import SUMS, forward_of, make_window, run_backward, run_forward
from tests.cuda.emulation.library import Library, compile_library
from tests.support.helpers import error

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def kernels() -> Library:
    return Library(compile_library(("DX_CONV3X3",)))


# size [N, D, H, W], C, N, dimensions: images smaller than a tile, odd sizes, of one pixel, of a line, of planes
SHAPES = [
    ([2, 1, 7, 7], 48, 12, 2),
    ([3, 1, 5, 13], 70, 32, 2),
    ([1, 1, 1, 1], 40, 17, 2),
    ([2, 1, 1, 11], 12, 5, 1),
    ([2, 3, 4, 5], 33, 48, 3),
    ([1, 1, 3, 61], 8, 24, 2),
]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("size", "C", "N", "dims"), SHAPES, ids=str)
def test_forward(kernels, arithmetic, size, C, N, dims) -> None:
    torch.manual_seed(C + N)
    run_forward(kernels, *use(arithmetic), size, C, N, dims, channels_last=C % 2 == 0)


@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize(("pitch", "offset"), [(48, 0), (45, 1), (44, 2), (44, 4), (48, 8)])
def test_forward_reads_any_alignment(kernels, arithmetic, pitch, offset) -> None:
    torch.manual_seed(pitch + offset)
    run_forward(kernels, *use(arithmetic), [1, 1, 5, 6], 36, 22, 2, pitch, offset)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(
    "case",
    [
        {"bias": True, "stats": False},
        {"drop": 0.3},
        {"drop": 0.3, "drop_rows": 42, "bias": True},
        {"drop": 1.0, "stats": False},
        {"normed": False},
    ],
    ids=str,
)
def test_forward_cases(kernels, arithmetic, case) -> None:
    torch.manual_seed(9)
    if case.get("drop") == 1.0:
        assert not run_forward(kernels, *use(arithmetic), [2, 1, 6, 7], 40, 30, compared=False, **case).any()
    else:
        run_forward(kernels, *use(arithmetic), [2, 1, 6, 7], 40, 30, **case)


# 512 rows with two multiprocessors; several tiles for each block; weights that stay in shared memory or stream
@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shared", [227, 120])
def test_forward_with_several_tiles_in_a_block(kernels, monkeypatch, arithmetic, shared) -> None:
    torch.manual_seed(shared)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    size, C = ([5, 1, 15, 17], 40) if arithmetic in ("bf16", "fp16", "tf32") else ([3, 1, 9, 13], 24)
    run_forward(kernels, *use(arithmetic), size, C, 24 if shared > 200 else 44, drop=0.2, orders=(1, 5))


@pytest.mark.parametrize(("C", "N"), [(48, 12), (128, 32), (192, 48)])
def test_forward_of_whole_networks(kernels, C, N) -> None:
    torch.manual_seed(C)
    run_forward(kernels, *use("bf16"), [3, 1, 7, 7], C, N)


def test_forward_of_wide_channels(kernels) -> None:
    """Beyond a tile of output channels, and weights that no block's shared memory has room for."""
    torch.manual_seed(1)
    run_forward(kernels, *use("bf16"), [1, 1, 4, 5], 712, 100)


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "bf16"])
def test_a_large_mean_costs_no_digits(kernels, arithmetic) -> None:
    torch.manual_seed(2)
    dtype, tf32, tolerance = use(arithmetic)
    mean = 300.0 if dtype == F32 else 20.0
    run_forward(kernels, dtype, tf32, tolerance, [2, 1, 6, 7], 40, 12, mean_and_deviation=(mean, 1.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_forward_is_as_good_as_eager(kernels, dtype) -> None:
    """By eager's own error: PyTorch's BatchNorm, ReLU and convolution in the same dtype, on the same values."""
    torch.manual_seed(4)
    size, C, N = [3, 1, 9, 11], 128, 32
    x, weight = torch.randn(297, C).to(dtype), make_window(N, C, 2, False, F32) / 3
    norm = {"mean": x.float().mean(0), "var": x.float().var(0), "weight": torch.rand(C) + 0.5, "bias": torch.randn(C)}
    ours = forward_of(kernels, x, size, norm, weight)

    def eager(to: torch.dtype) -> torch.Tensor:
        image = x.view(3, 9, 11, C).permute(0, 3, 1, 2).to(to)
        of_norm = [norm[name].to(to if to == torch.float64 else F32) for name in ("mean", "var", "weight", "bias")]
        y = torch.nn.functional.batch_norm(image, *of_norm, eps=1e-5).relu()
        return torch.nn.functional.conv2d(y, weight.to(to), padding=1).permute(0, 2, 3, 1).reshape(297, N)

    exact = eager(torch.float64)
    assert error(ours, exact) <= 1.1 * error(eager(dtype), exact) + torch.finfo(dtype).eps / 4


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_infinite_and_missing_values_stay_where_they_are(kernels, dtype) -> None:
    """As PyTorch has them: only the windows over a pixel see it; padding meets the weights as zeros."""
    torch.manual_seed(6)
    size, C, N = [2, 1, 6, 7], 40, 12
    x, weight = torch.randn(84, C).to(dtype), make_window(N, C, 2, False, F32)
    weight[:, 11] = weight[:, 11].abs()
    x[0, 11], x[30, 11], x[60, 3] = float("inf"), float("-inf"), float("nan")
    norm = {"mean": torch.zeros(C), "var": torch.ones(C), "weight": torch.ones(C), "bias": torch.zeros(C)}
    got = forward_of(kernels, x, size, norm, weight)
    want = forward_of(None, x.double(), size, {name: v.double() for name, v in norm.items()}, weight.double())
    assert_same_kind(got, want, "out")
    assert got.isfinite().any() and got.isnan().any() and got.isinf().any()


def test_a_line_can_be_too_long(kernels) -> None:
    """Which the callers of the launchers ask before they launch anything."""
    assert kernels.has_room_for_conv3x3([1, 1, 2, 56], 128, 32) and kernels.has_room_for_conv3x3(
        [1, 1, 2, 250], 128, 32
    )
    assert kernels.has_room_for_conv3x3([1, 1, 1, 10**6], 128, 32, dims=1)
    assert not kernels.has_room_for_conv3x3([1, 1, 2, 2000], 128, 32)


@pytest.mark.parametrize("pixels", [2**24, 2**27, 2**28, 2**31 - 2, 2**31, 2**32])
def test_no_line_is_so_long_that_it_seems_short(kernels, pixels: int) -> None:
    """Lengths of which 32 bits would not hold the line, or the bytes of its rows."""
    assert not kernels.has_room_for_conv3x3([1, 1, 2, pixels], 128, 32)
    assert kernels.has_room_for_conv3x3([1, 1, 1, pixels], 128, 32, dims=1) == (pixels < 2**31)
    assert not kernels.has_room_for_conv3x3([1, 2**31, 1, 56], 128, 32)


# ---- backward --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("size", "C", "N", "dims"), SHAPES, ids=str)
def test_backward(kernels, arithmetic, size, C, N, dims) -> None:
    torch.manual_seed(C * N)
    run_backward(kernels, *use(arithmetic), size, C, N, dims, channels_last=C % 2 == 0)


@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize(("pitch", "offset"), [(48, 0), (45, 1), (44, 2), (44, 4), (48, 8)])
def test_backward_reads_any_alignment(kernels, arithmetic, pitch, offset) -> None:
    torch.manual_seed(pitch + offset)
    run_backward(kernels, *use(arithmetic), [1, 1, 5, 6], 36, 22, 2, pitch, offset, into="accumulate")


@pytest.mark.parametrize("arithmetic", ["float", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        {"into": "nothing", "drop": 0.3},
        {"into": "da", "features": False},
        {"into": "da", "features": False, "drop": 0.4, "drop_rows": 30},
        {"into": "da", "normed": False, "want": ("grad_x", "grad_conv_weight")},
        {"into": "accumulate", "want": ("grad_x", "grad_mean", "grad_var")},
        {"into": "da", "want": ("grad_conv_weight", "grad_conv_bias")},
        {"into": "da", "want": SUMS},
    ],
    ids=str,
)
def test_backward_cases(kernels, arithmetic, case) -> None:
    torch.manual_seed(9)
    run_backward(kernels, *use(arithmetic), [2, 1, 5, 6], 20, 18, **case)


# Tiles of 256 rows with two multiprocessors, several for each block; weights that stay in shared memory or stream; a
# ring that is gone around several times
@pytest.mark.parametrize("arithmetic", ["bf16", "tf32", "double"])
@pytest.mark.parametrize(("shared", "N"), [(227, 10), (150, 44)])
def test_backward_with_several_tiles_in_a_block(kernels, monkeypatch, arithmetic, shared, N) -> None:
    torch.manual_seed(shared)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    size = [7, 1, 9, 11] if arithmetic == "bf16" else [4, 1, 7, 9]
    run_backward(kernels, *use(arithmetic), size, 20, N, drop=0.2, orders=(5,))


@pytest.mark.parametrize(("C", "N"), [(48, 12), (128, 32), (192, 48)])
def test_backward_of_whole_networks(kernels, C, N) -> None:
    torch.manual_seed(C)
    run_backward(kernels, *use("bf16"), [1, 1, 7, 7], C, N, into="da", want=("grad_x", "grad_conv_weight", *SUMS[:2]))


def test_backward_of_wide_channels(kernels) -> None:
    torch.manual_seed(1)
    run_backward(kernels, *use("bf16"), [1, 1, 3, 4], 300, 100)


@pytest.mark.parametrize("arithmetic", ["float", "bf16"])
def test_a_large_mean_costs_no_digits_of_the_sums(kernels, arithmetic) -> None:
    torch.manual_seed(2)
    dtype, tf32, tolerance = use(arithmetic)
    mean = 300.0 if dtype == F32 else 20.0
    run_backward(kernels, dtype, tf32, tolerance, [2, 1, 4, 5], 24, 12, mean_and_deviation=(mean, 1.0))
