"""The operators on a GPU: the same bits in every run, the numbers of the processor, sizes beyond 32 bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import operators
from densenet_ext import kernels
from tests.cuda.emulation.compare import assert_close
from tests.support.helpers import DEVICE, F64, error, vector_error
from tests.support.kernel_calls import DTYPES, MAKERS, ROWS, WIDE, Call, converted, wide_conv1x1

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(DEVICE.type != "cuda", reason="runs with --device cuda")]
GPU_OPS = [name for name in kernels.OPS if name not in kernels.CPU_OPS]
# Several slabs of rows, more columns than a block is wide and not a multiple of anything; k = 12 and pitched slices.
SHAPES = [(9001, 12, True), (2309, 137, True), (4096, 128, False)]


def operator(name: str) -> Any:
    return getattr(torch.ops.densenet_ext, name).default


def written(call: Call, args: dict[str, Any]) -> dict[str, Tensor]:
    return {name: args[name] for name in call.outputs if args[name] is not None}


def moved(value: Any, device: str) -> Any:
    if isinstance(value, list):
        return [moved(x, device) for x in value]
    return value.to(device, copy=True) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GPU_OPS)
def test_the_same_bits_in_every_run(name: str, dtype: torch.dtype) -> None:
    for shape in SHAPES:
        for call in MAKERS[name](*shape):
            runs = [converted(call, dtype) for _ in range(3)]
            for args in runs:
                operator(name)(*args.values())
            for key, value in written(call, runs[0]).items():
                assert all(torch.equal(value, again[key]) for again in runs[1:]), key


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", GPU_OPS)
def test_the_numbers_of_the_processor(name: str, dtype: torch.dtype) -> None:
    for M, C, pitched in [(1, 5, True), *SHAPES]:
        for call in MAKERS[name](M, C, pitched):
            here = converted(call, dtype)
            there = {key: moved(value, "cpu") for key, value in here.items()}
            operator(name)(*here.values())
            operator(name)(*there.values())
            for key, expected in written(call, there).items():
                assert_same(name, key, here[key].cpu(), expected, M, dtype)


def assert_same(name: str, key: str, got: Tensor, expected: Tensor, rows: int, dtype: torch.dtype) -> None:
    if got.dtype == torch.uint8:
        # the window's first maximum: rounding may decide between two nearly equal ones, seldom
        assert (got != expected).double().mean() <= (0 if dtype == torch.float64 else 0.01), key
    elif "conv" in name:
        # tensor cores multiply factors rounded to dtype, the processor does not; and sums are taken in another order
        rounding, order = torch.finfo(dtype).eps, torch.finfo(kernels.acc_dtype(dtype)).eps * (rows + 256) ** 0.5
        assert error(got, expected) <= 2 * rounding + 8 * order, key
    else:
        terms = rows if key not in ROWS else 64
        assert_close(got, expected, terms, f"{name}: {key}")


# The relative error of a product by the type of its factors (of float32 as TF32), as in emulation.
PRODUCT = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 5e-4}


@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("dtype", PRODUCT, ids=str)
@pytest.mark.parametrize("M", [70_001, 140_001])
@pytest.mark.parametrize(("N", "C"), WIDE)
def test_the_convolution_of_whole_networks_in_float64(N: int, C: int, M: int, dtype: torch.dtype) -> None:
    """Tiles of 128 channels, several tiles for a block, weights that stay and weights that stream, every form."""
    for name, call in wide_conv1x1(M, C, N, dtype):
        args = converted(call, dtype)
        exact = {
            key: value.double() if isinstance(value, Tensor) else value for key, value in converted(call, F64).items()
        }
        operator(name)(*args.values())
        getattr(kernels.plain, name)(*(value for key, value in exact.items() if key != "tf32"))
        for key, got in written(call, args).items():
            # a sum over all rows has twice the error of its terms, statistics only that of their own sum
            allowed = 2e-5 if key == "out_mean" or key == "out_var" else PRODUCT[dtype] * (1 if key in ROWS else 2)
            expected = exact[key]
            if key in ("out_mean", "out_var"):
                values = args["out"].double()
                expected = values.mean(0) if key == "out_mean" else values.var(0, correction=0)
            assert vector_error(got, expected) <= allowed, key
            assert error(got, expected) <= 4 * allowed, key


@pytest.mark.slow
@pytest.mark.xdist_group("memory")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_beyond_32_bits(dtype: torch.dtype) -> None:
    M, C, pitch = 3, 8, 2**31 + 8
    needed = (2 * pitch + C) * dtype.itemsize
    if torch.cuda.mem_get_info()[0] < 2 * needed:
        pytest.skip(f"needs {2 * needed / 2**30:.0f} GiB of free memory")
    far = torch.empty(2 * pitch + C, dtype=dtype).as_strided((M, C), (pitch, 1))
    near = torch.randn(M, C).to(dtype)
    far.copy_(near)
    norm = (torch.zeros(C), torch.ones(C), None, None, 1e-5)
    weight, results = torch.randn(4, C), []
    for x in (near, far):
        mean, var, out, z = torch.empty(C), torch.empty(C), torch.empty_like(near), torch.empty(M, 4, dtype=dtype)
        operator("channel_stats")(x, mean, var)
        operator("bn_relu")(x, *norm, out)
        conv1x1 = operator("bn_relu_conv1x1")
        conv1x1(x, *norm, weight, None, False, z, None, None, **operators.arithmetic(conv1x1))
        results.append((mean, var, out, z))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)
    operator("append_features")(near, far, None, None, 0.0, None, 0)
    assert torch.equal(far, near)


def test_more_rows_than_a_grid_has_blocks() -> None:
    """A grid's second and third dimension end at 65535 blocks."""
    M, C = 5_000_011, 4
    x, mean, var = torch.randn(M, C), torch.empty(C), torch.empty(C)
    out = torch.empty_like(x)
    operator("channel_stats")(x, mean, var)
    operator("bn_relu")(x, mean, var, None, None, 1e-5, out)
    exact = x.double()
    assert_close(mean.cpu(), exact.mean(0).float().cpu(), M, "mean")
    expected = ((exact - exact.mean(0)) * (exact.var(0, correction=0) + 1e-5).rsqrt()).relu()
    assert error(out, expected) < 1e-5


def test_more_columns_than_a_block_is_wide() -> None:
    for name in ("channel_stats", "bn_relu", "bn_relu_backward_reduce", "bn_relu_backward", "feature_grad"):
        for call in MAKERS[name](33, 70_003, False):
            here = converted(call, torch.float32)
            there = {key: moved(value, "cpu") for key, value in here.items()}
            operator(name)(*here.values())
            operator(name)(*there.values())
            for key, expected in written(call, there).items():
                assert_close(here[key].cpu(), expected, 64, f"{name}: {key}")
