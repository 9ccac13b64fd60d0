"""What the CUDA kernels do with numbers that are not of the usual size, run by emulation: against eager and the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.cuda.emulation.compare import acc_dtype, check, random_norm, random_rows, sliced
from tests.cuda.emulation.library import Library

INFINITY, NAN = float("inf"), float("nan")


def infinities(M: int) -> Tensor:
    """Rows [M, 8]: infinity first, last, negative, of both signs; NaN first, within; the largest numbers; none."""
    x = torch.randn(M, 8)
    x[0, 0], x[-1, 1], x[M // 2, 2], x[0, 3], x[-1, 3] = INFINITY, INFINITY, -INFINITY, INFINITY, -INFINITY
    x[0, 4], x[M // 3, 5] = NAN, NAN
    x[:, 6] = 1e30
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("M", [2, 67, 9001])
def test_statistics_of_infinity(gpu: Library, M: int, offset: int, dtype: torch.dtype) -> None:
    """As BatchNorm takes them: the mean is infinite, or NaN where both signs or NaN are there; the variance is NaN."""
    x, out = sliced(infinities(M).to(dtype), offset, 8 - offset), torch.empty(M, 8, dtype=dtype)
    acc = acc_dtype(dtype)
    exact = x.double()
    mean, var = torch.empty(8, dtype=acc), torch.empty(8, dtype=acc)
    statistics = {"mean": mean, "var": var}
    dropout = {"drop_rate": 0.0, "seed": None, "layer": 0, "drop_rows": 1}
    for take in (
        lambda: gpu("channel_stats", x=x, **statistics),
        lambda: gpu("append_features", src=x, out=out, **statistics, **dropout),
    ):
        take()
        torch.testing.assert_close(mean, exact.mean(0).to(acc), equal_nan=True, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var, exact.var(0, correction=0).to(acc), equal_nan=True, rtol=1e-4, atol=1e-6)


def constant_channels(dtype: torch.dtype, M: int = 36, C: int = 36) -> tuple[Tensor, dict[str, object]]:
    """Channels of one value each, up to 1e4, and their BatchNorm, of which nothing but the bias is left."""
    x = (torch.linspace(-1e4, 1e4, C) / 3).to(dtype).expand(M, C).contiguous()
    bias = torch.randn(C)
    bias[::3] = 0
    acc = acc_dtype(dtype)
    norm = {"mean": x[0].to(acc), "var": torch.zeros(C).to(acc), "weight": torch.randn(C).to(acc)}
    return x, {**norm, "bias": bias.to(acc), "eps": 1e-5}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_constant_channels_are_exact(gpu: Library, dtype: torch.dtype) -> None:
    x, norm = constant_channels(dtype)
    bias, out, grad = norm["bias"], torch.empty_like(x), torch.ones_like(x)
    expected = bias.relu().to(dtype).expand_as(x)
    sums = {name: torch.empty_like(bias) for name in ("grad_weight", "grad_bias")}
    gpu("bn_relu", x=x, **norm, out=out)
    assert torch.equal(out, expected)
    gpu("bn_relu_backward_reduce", grad=grad, x=x, **norm, **sums)
    assert torch.equal(sums["grad_bias"], 36 * (bias > 0).to(bias.dtype)) and not sums["grad_weight"].any()
    pooled = torch.empty(9, 36, dtype=dtype)
    one = {"size": (1, 1, 6, 6), "window": (1, 2, 2)}
    gpu("bn_relu_avg_pool", x=x, **one, **norm, out=pooled)
    assert torch.equal(pooled, expected[:9])
    gpu("bn_relu_avg_pool_backward_reduce", grad_out=grad[:9].clone(), x=x, **one, **norm, pooled=pooled, **sums)
    assert torch.equal(pooled, expected[:9]) and not sums["grad_weight"].any()
    gpu("bn_relu_max_pool", x=x, **one, stride=(1, 2, 2), padding=(0, 0, 0), **norm, out=pooled, index=None)
    assert torch.equal(pooled, expected[:9])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_large_mean_costs_no_digits(gpu: Library, dtype: torch.dtype) -> None:
    """Mean 1e4 and deviation 1 (100 in bfloat16, which has no less there)."""
    M, C = 130, 36
    deviation = 100.0 if dtype == torch.bfloat16 else 1.0
    x = (torch.randn(M, C, dtype=torch.float64) * deviation + 1e4).to(dtype)
    weight, bias, grad = torch.randn(C), torch.randn(C), torch.randn(M, C).to(dtype)
    var, mean = (t.float() for t in torch.var_mean(x.double(), 0, correction=0))
    norm = {"mean": mean, "var": var, "weight": weight, "bias": bias, "eps": 1e-5}
    values = (value.double() for value in (mean, var, weight, bias))
    exact = torch.nn.functional.batch_norm(x.double(), *values, False, 0.0, 1e-5)
    out, sums = torch.empty_like(x), {"grad_weight": torch.empty(C), "grad_bias": torch.empty(C)}
    gpu("bn_relu", x=x, **norm, out=out)
    error = (out.double() - exact.relu()).abs().max().item()
    assert error <= 2 * torch.finfo(dtype).eps * exact.max().item()
    gpu("bn_relu_backward_reduce", grad=grad, x=x, **norm, **sums)
    passed = torch.where(exact > 0, grad.double(), 0)
    torch.testing.assert_close(sums["grad_bias"].double(), passed.sum(0), rtol=1e-5, atol=1e-4)
    xhat = (x.double() - mean.double()) * (var.double() + 1e-5).rsqrt()
    torch.testing.assert_close(sums["grad_weight"].double(), (passed * xhat).sum(0), rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_infinite_features_without_a_slope(gpu: Library, dtype: torch.dtype) -> None:
    """Where no gradient comes back through the statistics, an infinite feature's gradient is finite, as the CPU's."""
    M, C = 36, 12
    x, grad = random_rows(M, C, dtype), random_rows(M, C, dtype)
    norm = random_norm(x)
    x[3, 0], x[4, 1], x[5, 2], x[6, 3] = INFINITY, -INFINITY, NAN, INFINITY
    slope = torch.randn(C)
    slope[:3] = 0
    sums = {"grad_weight": slope, "grad_bias": torch.randn(C)}
    got = check(gpu, "bn_relu_backward", grad=grad, x=x, **norm, **sums, grad_x=torch.zeros_like(x))["grad_x"]
    assert got[:, :2].isfinite().all() and not got[6, 3].isfinite()
    incoming = {"mean": norm["mean"], "grad_mean": torch.randn(C), "grad_var": slope}
    dropout = {"drop_rate": 0.0, "seed": None, "layer": 0}
    got = check(gpu, "feature_grad", grad=grad, x=x, **incoming, **dropout, out=torch.zeros_like(x), drop_rows=1)["out"]
    assert got[:, :3].isfinite().all() and not got[6, 3].isfinite()
    place = {"size": (1, 1, 6, 6), "window": (1, 2, 2)}
    pooled = grad[:9].clone()
    check(gpu, "bn_relu_avg_pool_backward", grad_out=pooled, x=x, **place, **norm, **sums, grad_x=torch.zeros_like(x))


@pytest.mark.parametrize("tf32", [False, True], ids=["bfloat16", "tf32"])
def test_sums_that_tensor_cores_cut_off(gpu: Library, monkeypatch: pytest.MonkeyPatch, tf32: bool) -> None:
    """dW over all rows of one block, where no term differs in sign: what is cut off adds up, and stays far below what
    the operands' rounding costs (2^-9 and 2^-11 a number)."""
    M, C, N = 2048, 12, 16  # two blocks share the rows
    dtype = torch.float32 if tf32 else torch.bfloat16
    # numbers that are operands as they are: what differs from exact sums is what was cut off
    x, grad = (torch.rand(M, n).add(0.5).to(torch.float16 if tf32 else dtype).to(dtype) for n in (C, N))
    norm = {"mean": torch.zeros(C), "var": torch.ones(C), "weight": None, "bias": None, "eps": 0.0}
    values = {"x": x, **norm, "conv_weight": torch.randn(N, C), "grad_out": grad, "grad_in": None, "accumulate": False}
    through = dict.fromkeys(("z", "z_mean", "z_var", "z_weight", "z_bias", "z_grad_weight", "z_grad_bias"))
    sums = {name: torch.empty(C) for name in ("grad_weight", "grad_bias")}
    dW, none = torch.empty(N, C), {"grad_mean": None, "grad_var": None}
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "1")
    call = {**values, **through, "z_eps": 0.0, "grad_x": torch.empty_like(x), "grad_conv_weight": dW, **sums, **none}
    gpu("bn_relu_conv1x1_backward", **call, tf32=tf32)
    exact = grad.double().T @ x.double()
    lost = ((exact - dW) / exact).max().item()
    additions = M / (4 if tf32 else 8)
    assert 1e-6 < lost < additions * (M / additions + 1) * 2**-24
