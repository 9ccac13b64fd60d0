"""The CUDA kernels, executed by an emulation of the GPU (tests/cuda/emulation), against the CPU backend.

The emulation checks bounds, alignment, races and barriers of every access that a kernel makes.
"""

from __future__ import annotations

import pytest
import torch

from tests.cuda.emulation import library as emulation
from tests.cuda.emulation.compare import (
    acc_dtype,
    assert_close,
    check,
    exact_norm,
    exact_rows,
    random_norm,
    random_rows,
    sliced,
)

DTYPES = emulation.DTYPES
# Rows, columns, columns in front of them and behind them in their buffer: one pixel, primes, k = 12 (8 bytes in the
# short types), odd offsets (single elements), more columns than a block is wide, several slabs.
SHAPES = [(1, 1, 0, 0), (37, 12, 12, 40), (130, 33, 3, 4), (130, 64, 0, 64), (37, 20, 4, 8), (7, 530, 0, 6)]
shapes = pytest.mark.parametrize("M, C, offset, behind", SHAPES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def empty(M: int, C: int, dtype: torch.dtype, offset: int = 0, behind: int = 0) -> torch.Tensor:
    return sliced(torch.full((M, C), 55, dtype=dtype), offset, behind)


def vector(C: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.full((C,), 55.0, dtype=acc_dtype(dtype))


# ---- statistics ------------------------------------------------------------------------------------------------------
@dtypes
@shapes
def test_channel_stats(gpu: emulation.Library, dtype: torch.dtype, M: int, C: int, offset: int, behind: int) -> None:
    x = random_rows(M, C, dtype, offset, behind)
    check(gpu, "channel_stats", M, (0, 1, 5), x=x, mean=vector(C, dtype), var=vector(C, dtype))


@pytest.mark.parametrize("M", [9, 700])
def test_statistics_with_a_large_mean(gpu: emulation.Library, M: int) -> None:
    x = (torch.randn(M, 36, dtype=torch.float64) + 1e4).float()
    mean, var = torch.zeros(36), torch.zeros(36)
    gpu("channel_stats", x=x, mean=mean, var=var)
    exact = x.double()
    assert ((mean - exact.mean(0)).abs() < 1e-3).all()
    assert ((var / exact.var(0, unbiased=False) - 1).abs() < 1e-5).all()


@dtypes
@pytest.mark.parametrize("drop_rate", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("statistics", [True, False])
@pytest.mark.parametrize("M, k, offset, behind", [(1, 1, 0, 0), (37, 12, 24, 4), (130, 33, 1, 0), (600, 32, 64, 32)])
def test_append_features(
    gpu: emulation.Library,
    dtype: torch.dtype,
    drop_rate: float,
    statistics: bool,
    M: int,
    k: int,
    offset: int,
    behind: int,
) -> None:
    check(
        gpu,
        "append_features",
        M,
        (0, 5),
        src=random_rows(M, k, dtype),
        out=empty(M, k, dtype, offset, behind),
        mean=vector(k, dtype) if statistics else None,
        var=vector(k, dtype) if statistics else None,
        drop_rate=drop_rate,
        seed=torch.tensor([2**40 + 12345]) if drop_rate > 0 else None,
        layer=3,
        drop_rows=1 if statistics else 5,
    )


@dtypes
def test_sums_of_one_slab_take_one_launch(gpu: emulation.Library, dtype: torch.dtype) -> None:
    """Fewer rows than a block takes at a time: its sums are all there is to merge, and no workspace is asked for."""
    for M, launches in ((17, 1), (900, 2)):
        x, grad = random_rows(M, 64, dtype), random_rows(M, 64, dtype)
        sums = {"grad_weight": vector(64, dtype), "grad_bias": vector(64, dtype)}
        before = gpu.c.dx_launches()
        check(gpu, "channel_stats", M, x=x, mean=vector(64, dtype), var=vector(64, dtype))
        assert gpu.c.dx_launches() - before == launches
        check(gpu, "bn_relu_backward_reduce", M, grad=grad, x=x, **random_norm(x), **sums)
        assert gpu.c.dx_launches() - before == 2 * launches


# ---- BatchNorm and ReLU ----------------------------------------------------------------------------------------------
@dtypes
@shapes
@pytest.mark.parametrize("affine", [True, False])
def test_bn_relu(
    gpu: emulation.Library, dtype: torch.dtype, affine: bool, M: int, C: int, offset: int, behind: int
) -> None:
    x = random_rows(M, C, dtype, offset, behind)
    # Into the columns of a wider result, as the concatenation does.
    check(gpu, "bn_relu", 1, (0, 5), x=x, **random_norm(x, affine), out=empty(M, C, dtype, behind, offset))


def test_bn_relu_with_nan_and_infinity(gpu: emulation.Library) -> None:
    x = torch.randn(9, 8)
    x[3, 1], x[4, 2], x[5, 3] = float("nan"), float("inf"), float("-inf")
    norm = random_norm(torch.randn(9, 8))
    got = check(gpu, "bn_relu", x=x, **norm, out=empty(9, 8, torch.float32))["out"]
    assert got.isnan().sum() == 1


def test_a_frozen_norm_has_finite_gradients(gpu: emulation.Library) -> None:
    x, grad, grad_x = torch.randn(9, 8), torch.randn(9, 8), torch.zeros(9, 8)
    norm = random_norm(x)
    x[4, 2], x[5, 3] = float("inf"), float("-inf")
    gpu("bn_relu_backward", grad=grad, x=x, **norm, grad_weight=None, grad_bias=None, grad_x=grad_x)
    scale = norm["weight"] * (norm["var"] + norm["eps"]).rsqrt()
    expected = torch.where(x * scale + (norm["bias"] - norm["mean"] * scale) > 0, grad * scale, 0.0)
    assert_close(grad_x, expected, 1, "grad_x")


@dtypes
@shapes
@pytest.mark.parametrize("drop_rate", [0.0, 0.4])
def test_feature_grad(
    gpu: emulation.Library, dtype: torch.dtype, drop_rate: float, M: int, C: int, offset: int, behind: int
) -> None:
    x = random_rows(M, C, dtype, offset, behind)
    A = acc_dtype(dtype)
    check(
        gpu,
        "feature_grad",
        1,
        (0, 5),
        grad=random_rows(M, C, dtype, behind, offset),
        x=x,
        mean=random_norm(x)["mean"],
        grad_mean=torch.randn(C).to(A),
        grad_var=torch.randn(C).to(A),
        drop_rate=drop_rate,
        seed=torch.tensor([-5]) if drop_rate > 0 else None,
        layer=0,
        out=empty(M, C, dtype, 0, behind),
        drop_rows=1 if offset else 7,
    )


@dtypes
@shapes
def test_bn_relu_backward(gpu: emulation.Library, dtype: torch.dtype, M: int, C: int, offset: int, behind: int) -> None:
    x = random_rows(M, C, dtype, offset, behind)
    grad, norm = random_rows(M, C, dtype, behind), random_norm(x)
    sums = {"grad_weight": vector(C, dtype), "grad_bias": vector(C, dtype)}
    got = check(gpu, "bn_relu_backward_reduce", M, (0, 1, 5), grad=grad, x=x, **norm, **sums)
    sums = {name: got[name] for name in sums}
    # with the forward pass's result, bit by bit
    again = {name: vector(C, dtype) for name in sums}
    common = {"grad": grad, "x": x, **norm}
    got = check(gpu, "bn_relu_backward_reduce", M, (0, 5), **common, **again, out=empty(M, C, dtype, behind, offset))
    out = empty(M, C, dtype, behind, offset)
    gpu("bn_relu", x=x, **norm, out=out)
    assert torch.equal(got["out"], out)
    target = empty(M, C, dtype, offset, behind)
    check(gpu, "bn_relu_backward", M, (0, 5), grad=grad, x=x, **norm, **sums, grad_x=target)
    check(gpu, "bn_relu_backward", 1, grad=grad, x=x, **norm, grad_weight=None, grad_bias=None, grad_x=target)


@dtypes
def test_gradients_in_place(gpu: emulation.Library, dtype: torch.dtype) -> None:
    x, grad, out = random_rows(130, 20, dtype), random_rows(130, 20, dtype), empty(130, 20, dtype)
    common = {"x": x, **random_norm(x), "grad_weight": None, "grad_bias": None}
    gpu("bn_relu_backward", grad=grad, **common, grad_x=out)
    gpu("bn_relu_backward", grad=grad, **common, grad_x=grad)
    assert torch.equal(grad, out)


# ---- pooling ---------------------------------------------------------------------------------------------------------
# Size, window, stride, padding, columns, columns in front: a transition (with a line and a column left over), the
# head, 3-D, the stem, a window wider than its stride by far, 1-D, gaps between windows.
AVERAGE = [
    ((2, 1, 7, 5), (1, 2, 2), 12, 4),
    ((3, 1, 7, 7), (1, 7, 7), 33, 0),
    ((1, 4, 5, 6), (2, 2, 2), 64, 8),
    ((2, 1, 1, 9), (1, 1, 3), 20, 1),
    ((1, 1, 1, 1), (1, 1, 1), 1, 0),
]
MAXIMUM = [
    ((2, 1, 9, 7), (1, 3, 3), (1, 2, 2), (0, 1, 1), 12, 4),
    ((1, 5, 6, 4), (3, 3, 3), (2, 2, 2), (1, 1, 1), 64, 8),
    ((1, 1, 8, 8), (1, 5, 5), (1, 1, 1), (0, 2, 2), 33, 3),
    ((2, 1, 1, 11), (1, 1, 2), (1, 1, 4), (0, 0, 0), 8, 0),
    ((1, 1, 1, 1), (1, 1, 1), (1, 1, 1), (0, 0, 0), 1, 0),
]


def rows_of(size: tuple[int, ...]) -> int:
    return size[0] * size[1] * size[2] * size[3]


def out_rows_of(size, window, stride, padding=(0, 0, 0)) -> int:
    out = [(n + 2 * p - w) // s + 1 for n, w, s, p in zip(size[1:], window, stride, padding, strict=True)]
    return size[0] * out[0] * out[1] * out[2]


@dtypes
@pytest.mark.parametrize("size, window, C, offset", AVERAGE)
def test_bn_relu_avg_pool(gpu: emulation.Library, dtype: torch.dtype, size, window, C: int, offset: int) -> None:
    M, pooled_rows = rows_of(size), out_rows_of(size, window, window)
    x = random_rows(M, C, dtype, offset, 8 - offset)
    norm, place = random_norm(x), {"size": size, "window": window}
    pixels = window[0] * window[1] * window[2]
    check(gpu, "bn_relu_avg_pool", pixels, (0, 5), x=x, **place, **norm, out=empty(pooled_rows, C, dtype, offset))
    grad = random_rows(pooled_rows, C, dtype, 0, offset)
    sums = {"grad_weight": vector(C, dtype), "grad_bias": vector(C, dtype)}
    for pooled in (None, empty(pooled_rows, C, dtype, offset)):
        got = check(
            gpu,
            "bn_relu_avg_pool_backward_reduce",
            M,
            (0, 1, 5),
            grad_out=grad,
            x=x,
            **place,
            **norm,
            pooled=pooled,
            **sums,
        )
    sums = {name: got[name] for name in sums}
    target = empty(M, C, dtype, 0, offset)
    check(gpu, "bn_relu_avg_pool_backward", M, (0, 5), grad_out=grad, x=x, **place, **norm, **sums, grad_x=target)


@dtypes
@pytest.mark.parametrize("size, window, stride, padding, C, offset", MAXIMUM)
def test_bn_relu_max_pool(
    gpu: emulation.Library, dtype: torch.dtype, size, window, stride, padding, C: int, offset: int
) -> None:
    M, pooled_rows = rows_of(size), out_rows_of(size, window, stride, padding)
    x = exact_rows(M, C, dtype, offset, 8 - offset)
    norm, place = exact_norm(x), {"size": size, "window": window, "stride": stride, "padding": padding}
    out, index = empty(pooled_rows, C, dtype, offset), empty(pooled_rows, C, torch.uint8)
    got = check(gpu, "bn_relu_max_pool", 1, (0, 5), x=x, **place, **norm, out=out, index=index)
    check(gpu, "bn_relu_max_pool", 1, x=x, **place, **norm, out=out, index=None)
    grad = random_rows(pooled_rows, C, dtype, 0, offset)
    common = {"grad_out": grad, "index": got["index"], "x": x, **place, **norm}
    sums = {"grad_weight": vector(C, dtype), "grad_bias": vector(C, dtype)}
    got = check(gpu, "bn_relu_max_pool_backward_reduce", M, (0, 1, 5), **common, **sums)
    sums = {name: got[name] for name in sums}
    check(gpu, "bn_relu_max_pool_backward", M, (0, 5), **common, **sums, grad_x=empty(M, C, dtype, 0, offset))


def test_max_pool_takes_nan(gpu: emulation.Library) -> None:
    x = exact_rows(36, 4, torch.float32)
    norm = exact_norm(x)
    x[7, 1] = x[8, 1] = x[20, 2] = float("nan")
    place = {"size": (1, 1, 6, 6), "window": (1, 3, 3), "stride": (1, 2, 2), "padding": (0, 1, 1)}
    got = check(gpu, "bn_relu_max_pool", x=x, **place, **norm, out=empty(9, 4, x.dtype), index=empty(9, 4, torch.uint8))
    assert got["out"].isnan().any()


# ---- weights of convolutions -----------------------------------------------------------------------------------------
@dtypes
def test_weights_into_another_layout_and_back(gpu: emulation.Library, dtype: torch.dtype) -> None:
    """Contiguous to channels_last in the features' dtype, rounded as PyTorch rounds; more than a launch takes."""
    weights = [torch.randn(3, 1 + i % 7, 9, dtype=acc_dtype(dtype)) for i in range(83)]
    weights[1], weights[2] = torch.randn(40, 48, 9, dtype=weights[0].dtype), weights[2].mT.contiguous().mT
    stored = [torch.full((N, taps, C), 55, dtype=dtype).mT for N, C, taps in (w.shape for w in weights)]
    gpu.copy_taps(weights, stored)
    for weight, got in zip(weights, stored, strict=True):
        assert torch.equal(got, weight.to(dtype))
    back = [torch.full_like(weight, 55) for weight in weights]
    gpu.copy_taps(stored, back)
    for got, expected in zip(back, stored, strict=True):
        assert torch.equal(got, expected.to(got.dtype))


# ---- sizes -----------------------------------------------------------------------------------------------------------
def test_slabs_of_several_steps(gpu: emulation.Library) -> None:
    """More rows than all blocks take in one step each, at single elements across several blocks."""
    M, C = 8000, 131
    x, grad = random_rows(M, C, torch.bfloat16), random_rows(M, C, torch.bfloat16)
    norm, sums = random_norm(x), {"grad_weight": vector(C, x.dtype), "grad_bias": vector(C, x.dtype)}
    check(gpu, "channel_stats", M, x=x, mean=vector(C, x.dtype), var=vector(C, x.dtype))
    check(gpu, "bn_relu_backward_reduce", M, grad=grad, x=x, **norm, **sums)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_offsets_beyond_32_bits(gpu: emulation.Library, dtype: torch.dtype) -> None:
    M, C, pitch = 3, 8, 2**31 + 8
    try:  # nothing but the rows is ever touched
        far = torch.empty(2 * pitch + C, dtype=dtype).as_strided((M, C), (pitch, 1))
    except RuntimeError:
        pytest.skip("no address space")
    near = random_rows(M, C, dtype)
    far.copy_(near)
    norm, out = random_norm(near), empty(M, C, dtype)
    results = []
    for x in (near, far):
        mean, var = vector(C, dtype), vector(C, dtype)
        gpu("channel_stats", x=x, mean=mean, var=var)
        gpu("bn_relu", x=x, **norm, out=out)
        results.append((mean, var, out.clone()))
    gpu("bn_relu", x=near, **norm, out=far)
    assert torch.equal(far, out)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_nothing_to_do(gpu: emulation.Library) -> None:
    x, none = torch.randn(0, 8), torch.zeros(8)
    gpu("bn_relu", x=x, **random_norm(x), out=torch.empty(0, 8))
    gpu("bn_relu_backward_reduce", grad=x, x=x, **random_norm(x), grad_weight=none + 1, grad_bias=none)
    assert not none.any()
