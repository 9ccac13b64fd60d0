"""What the CUDA kernels of the 1x1 convolution do with numbers that are not of the usual size, run by emulation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import densenet_ext  # noqa: F401  (registers the operators)
from tests.cuda.emulation.conv1x1 import (
    F64,
    acc,
    assert_same_kind,
    backward_of,
    check_backward_of_dead_channels,
    forward_of,
    make_norm,
    make_rows,
    ops,
    run_backward,
    run_forward,
    use,
)


@pytest.mark.parametrize("arithmetic", ["double", "float", "tf32", "bf16"])
def test_forward_nan_and_infinity(gpu, arithmetic) -> None:
    """A NaN or infinity reaches the outputs of its row as on the CPU, and no other row."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(1)
    x, norm = make_rows(40, 20, dtype), make_norm(20, dtype)
    x[3, 5], x[7, 19], x[39, 0] = float("nan"), float("inf"), -float("inf")
    weight = torch.randn(10, 20, dtype=acc(dtype))
    got, want = forward_of(gpu, x, norm, weight, tf32), torch.zeros(40, 10, dtype=dtype)
    ops.bn_relu_conv1x1(x, *norm.values(), weight, None, False, want, None, None)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan()[3].all()
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("arithmetic", ["double", "float", "tf32", "bf16", "fp16"])
def test_backward_nan(gpu, arithmetic) -> None:
    """The gradient passes where not (u <= 0), so also at a NaN; a NaN of one column stays in its column."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(2)
    x, norm, weight = make_rows(40, 20, dtype), make_norm(20, dtype), torch.randn(10, 20, dtype=acc(dtype))
    grad = make_rows(40, 10, dtype)
    x[3, 5] = float("nan")
    got = backward_of(gpu, x, norm, weight, grad, tf32)
    want = backward_of(None, x, norm, weight, grad, tf32)
    for name in got:
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "double"])
def test_a_large_mean_costs_no_digits(gpu, arithmetic) -> None:
    """The mean is 1e5 deviations: x * scale + shift would have two digits left in float."""
    torch.manual_seed(6)
    run_forward(gpu, *use(arithmetic), 70, 20, 30, mean_and_deviation=(1e4, 0.1))
    run_backward(gpu, *use(arithmetic), 70, 20, 30, mean_and_deviation=(1e4, 0.1))


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "fp16"])
def test_constant_channels_are_exact(gpu, arithmetic) -> None:
    """x - mean is zero there and the norm's bias all that is left, in the ReLU's mask too."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(7)
    M, C = 100, 37
    x = (torch.linspace(-1e4, 1e4, C) / 3).to(dtype).expand(M, C).contiguous()
    bias = torch.randn(C).bfloat16().float()  # which TF32 holds as well
    bias[::3] = 0
    norm = {"mean": x[0].float(), "var": torch.zeros(C), "weight": torch.randn(C), "bias": bias, "eps": 1e-5}
    out = forward_of(gpu, x, norm, torch.eye(C), tf32)
    assert torch.equal(out, bias.relu().to(dtype).expand(M, C))
    got = backward_of(gpu, x, norm, torch.eye(C), torch.ones_like(x), tf32)
    assert torch.equal(got["grad_bias"], M * (bias > 0).float()) and not got["grad_weight"].any()


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "bf16"])
def test_infinite_channels_are_as_on_the_cpu(gpu, arithmetic) -> None:
    """Infinite values, infinite statistics, and values whose product with the scale alone overflows."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(8)
    inf, nan = float("inf"), float("nan")
    huge = torch.tensor(2e38).to(dtype).float().item()
    x = torch.randn(50, 12).to(dtype)
    x[3, 0], x[4, 1], x[5, 2], x[6, 3], x[:, 6] = inf, -inf, inf, nan, huge
    norm = make_norm(12, dtype)
    norm["mean"][4], norm["mean"][5], norm["mean"][6] = inf, -inf, huge
    norm["var"][5], norm["weight"][2], norm["weight"][6] = nan, 0.0, 100.0
    for columns in range(12):  # each alone with the ordinary last one: a NaN of one row hides nothing of another
        few = torch.tensor([columns, 11])
        own = {name: value[few] if isinstance(value, Tensor) else value for name, value in norm.items()}
        rows, weight = x[:, few].contiguous(), torch.rand(10, 2)
        got, want = forward_of(gpu, rows, own, weight, tf32), torch.empty(50, 10, dtype=dtype)
        ops.bn_relu_conv1x1(rows, *own.values(), weight, None, False, want, None, None)
        assert_same_kind(got, want, f"out of {columns}")
        grad = torch.rand(50, 10).to(dtype)
        got = backward_of(gpu, rows, own, weight, grad, tf32)
        for name, value in backward_of(None, rows, own, weight, grad, tf32).items():
            assert_same_kind(got[name], value, f"{name} of {columns}")


def test_backward_of_dead_channels(gpu) -> None:
    check_backward_of_dead_channels(gpu)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_infinite_bottleneck_is_as_on_the_cpu(gpu, frozen) -> None:
    torch.manual_seed(9)
    x, z, grad, weight = torch.randn(40, 6), torch.randn(40, 5), torch.randn(40, 5), torch.rand(5, 6)
    z[3, 1], z[4, 2], z[5, 3] = float("inf"), -float("inf"), float("nan")
    z_norm = {f"z_{name}": value for name, value in make_norm(5, F64).items()}
    z_norm = {name: value.float() if isinstance(value, Tensor) else value for name, value in z_norm.items()}
    sums = None if frozen else torch.tensor([0.0, 1.0, 0.0, 2.0, 3.0])
    behind = {"z": z, **z_norm, "z_grad_weight": sums, "z_grad_bias": sums}
    norm = make_norm(6, torch.float32)
    got = backward_of(gpu, x, norm, weight, grad, False, **behind)
    for name, value in backward_of(None, x, norm, weight, grad, False, **behind).items():
        assert_same_kind(got[name], value, name)


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "double"])
def test_statistics_of_a_large_mean(gpu, monkeypatch, arithmetic) -> None:
    """Mean 1e4 and deviation 1: E[x^2] - E[x]^2 would have no correct digit in float."""
    dtype, tf32, _ = use(arithmetic)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    torch.manual_seed(4)
    x, norm, weight = make_rows(700, 16, dtype), make_norm(16, dtype), torch.randn(9, 16, dtype=acc(dtype))
    out, mean, var = (
        torch.empty(700, 9, dtype=dtype),
        torch.empty(9, dtype=acc(dtype)),
        torch.empty(9, dtype=acc(dtype)),
    )
    gpu(
        "bn_relu_conv1x1", x=x, **norm, conv_weight=weight, out_bias=torch.full((9,), 1e4, dtype=acc(dtype)),
        out_relu=False, out=out, out_mean=mean, out_var=var, tf32=tf32,
    )  # fmt: skip
    stored = out.double()
    assert ((mean.double() - stored.mean(0)).abs() <= 2e-3).all()
    assert ((var.double() / stored.var(0, unbiased=False) - 1).abs() <= 1e-5).all()


@pytest.mark.parametrize("arithmetic", ["float", "bf16"])
@pytest.mark.parametrize("odd", [30.0, float("inf"), float("nan")])
def test_statistics_of_an_odd_first_row(gpu, monkeypatch, arithmetic, odd) -> None:
    """Distances are taken from one of a block's first rows: one far away costs nothing, infinity its own column."""
    dtype, tf32, _ = use(arithmetic)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    torch.manual_seed(5)
    x, one = torch.randn(700, 1, dtype=F64).abs().to(dtype), torch.ones(1)
    x[0] = odd
    weight = torch.arange(1.0, 41.0)[:, None]
    out, mean, var = torch.empty(700, 40, dtype=dtype), torch.empty(40), torch.empty(40)
    gpu(
        "bn_relu_conv1x1", x=x, mean=0 * one, var=one, weight=one, bias=None, eps=0.0, conv_weight=weight,
        out_bias=None, out_relu=False, out=out, out_mean=mean, out_var=var, tf32=tf32,
    )  # fmt: skip
    stored = out.double()
    if odd == 30.0:
        assert ((mean.double() - stored.mean(0)).abs() <= 3e-7 * stored.std(0)).all()
        assert ((var.double() / stored.var(0, unbiased=False) - 1).abs() <= 1e-6).all()
    else:
        assert var.isnan().all() and not mean.isfinite().any()
