"""Calls of the 1x1 convolution on the emulated GPU, held against the CPU backend in float64 on the values as stored."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import densenet_ext  # noqa: F401  (registers the operators)

from .library import Library

ops = torch.ops.densenet_ext
F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
# A product's relative error by the type of its operands; TF32 has 10 bits of fraction.
TOLERANCE = {F64: 1e-13, F32: 1e-6, BF16: 4e-3, F16: 5e-4, "tf32": 5e-4}
# name: storage type, TF32 allowed
ARITHMETIC = {"double": (F64, False), "float": (F32, False), "tf32": (F32, True), "bf16": (BF16, False)}
ARITHMETIC |= {"fp16": (F16, False)}


def acc(dtype: torch.dtype) -> torch.dtype:
    return F64 if dtype == F64 else F32


def make_rows(M: int, C: int, dtype: torch.dtype, pitch: int = 0, offset: int = 0, scale: float = 1.0) -> Tensor:
    """Rows [M, C] at ``offset`` of wider ones; what lies around them is NaN."""
    wide = torch.full((M, max(C + offset, pitch)), float("nan"), dtype=dtype)
    wide[:, offset : offset + C] = (torch.randn(M, C, dtype=F64) * scale).to(dtype)
    return wide[:, offset : offset + C]


def make_norm(C: int, dtype: torch.dtype) -> dict[str, object]:
    values = {
        "mean": torch.randn(C, dtype=F64) * 0.3,
        "var": torch.rand(C, dtype=F64) + 0.5,
        "weight": torch.rand(C, dtype=F64) + 0.5,
        "bias": torch.randn(C, dtype=F64) * 0.5,
    }
    return {name: value.to(acc(dtype)) for name, value in values.items()} | {"eps": 1e-5}


def move(x: Tensor, norm: dict[str, object], mean: float, deviation: float) -> None:
    """Makes the features' mean and deviation about these, and the norm's statistics with them."""
    x.copy_(x.double() * deviation + mean)
    norm["mean"], norm["var"] = norm["mean"] * deviation + mean, norm["var"] * deviation**2


def wide(value: object) -> object:
    return value.double() if isinstance(value, Tensor) else value


def compare(name: str, got: Tensor, want: Tensor, tolerance: float) -> None:
    """Each element against the size of its column's (and the whole result's) values."""
    assert torch.isfinite(got).all(), name
    error = (got.double() - want).norm() / want.norm().clamp_min(1e-30)
    assert error <= tolerance, f"{name}: relative error {error:.2e}, allowed {tolerance:.1e}"
    worst = (got.double() - want).abs().max() / want.abs().max().clamp_min(1e-30)
    assert worst <= 4 * tolerance, (
        f"{name}: largest error {worst:.2e} of the largest value, allowed {4 * tolerance:.1e}"
    )


def assert_same_in_any_order(kernels: Library, results: dict, run: Callable[[], None], orders: Sequence[int]) -> None:
    """The bits of what was computed must not depend on the order in which a block's threads run."""
    first = {name: value.clone() for name, value in results.items() if value is not None}
    for order in orders:
        kernels.set_order(order)
        run()
        kernels.set_order(0)
        for name, value in first.items():
            assert torch.equal(value, results[name]), f"{name} depends on the order of the threads"


def use(arithmetic: str) -> tuple[torch.dtype, bool, float]:
    dtype, tf32 = ARITHMETIC[arithmetic]
    return dtype, tf32, TOLERANCE["tf32" if tf32 else dtype]


def run_forward(
    kernels: Library, dtype, tf32, tolerance, M, C, N, pitch=0, offset=0, *, bias=False, stats=True, orders=(),
    mean_and_deviation=(0.0, 1.0),
) -> Tensor:  # fmt: skip
    x = make_rows(M, C, dtype, pitch, offset)
    norm = make_norm(C, dtype)
    move(x, norm, *mean_and_deviation)
    conv_weight = (torch.randn(N, C, dtype=F64) / C**0.5).to(acc(dtype))
    out = make_rows(M, N, dtype, N + (5 if offset else 0), 3 if offset else 0)
    out_bias = torch.randn(N, dtype=F64).to(acc(dtype)) if bias else None
    mean, var = (torch.full((N,), float("nan"), dtype=acc(dtype)) if stats else None for _ in range(2))
    around = torch.isnan(out.untyped_storage() and out._base).sum() if out._base is not None else 0

    def run() -> None:
        kernels(
            "bn_relu_conv1x1", x=x, **norm, conv_weight=conv_weight, out_bias=out_bias, out_relu=bias, out=out,
            out_mean=mean, out_var=var, tf32=tf32,
        )  # fmt: skip

    run()
    assert_same_in_any_order(kernels, {"out": out, "out_mean": mean, "out_var": var}, run, orders)
    want = torch.empty(M, N, dtype=F64)
    ops.bn_relu_conv1x1(
        x.double(), *(wide(v) for v in norm.values()), conv_weight.double(), wide(out_bias), bias, want, None, None
    )
    compare("out", out, want, tolerance)
    if out._base is not None:
        assert torch.isnan(out._base).sum() == around
    if stats:
        stored = out.double()
        compare("mean", mean, stored.mean(0), 1e-5 if dtype != F64 else 1e-12)
        assert (
            (var.double() - stored.var(0, unbiased=False)).abs() <= 1e-5 * stored.var(0, unbiased=False) + 1e-12
        ).all()
    return out


def run_backward(
    kernels: Library, dtype, tf32, tolerance, M, C, N, pitch=0, offset=0, *, through_norm=True, frozen_z=False,
    into="grad_in", wgrad=True, frozen=False, orders=(), mean_and_deviation=(0.0, 1.0),
) -> None:  # fmt: skip
    A = acc(dtype)
    x, grad_out = make_rows(M, C, dtype, pitch, offset), make_rows(M, N, dtype, N + offset % 2, offset % 2)
    norm = make_norm(C, dtype)
    move(x, norm, *mean_and_deviation)
    weight = (torch.randn(N, C, dtype=F64) / N**0.5).to(A)
    arguments: dict[str, object] = {"x": x, **norm, "conv_weight": weight, "grad_out": grad_out}
    z, z_norm = make_rows(M, N, dtype, N + offset, offset), make_norm(N, dtype)
    move(z, z_norm, *mean_and_deviation)
    z_norm = {f"z_{name}": value for name, value in z_norm.items()}
    arguments["z"] = z if through_norm else None
    arguments |= z_norm if through_norm else dict.fromkeys(z_norm, None) | {"z_eps": 0.0}
    with_sums = through_norm and not frozen_z
    arguments["z_grad_weight"] = torch.randn(N, dtype=A) * M**0.5 if with_sums else None
    arguments["z_grad_bias"] = torch.randn(N, dtype=A) * M**0.5 if with_sums else None
    arguments["grad_in"] = make_rows(M, C, dtype, C + offset, offset) if into == "grad_in" else None
    arguments["accumulate"] = into == "accumulate"
    results: dict[str, Tensor | None] = {
        "grad_x": make_rows(M, C, dtype, pitch, offset),
        "grad_conv_weight": torch.full((N, C), float("nan"), dtype=A) if wgrad else None,
        "grad_weight": torch.full((C,), float("nan"), dtype=A),
        "grad_bias": torch.full((C,), float("nan"), dtype=A),
        "grad_mean": None if frozen else torch.randn(C, dtype=A),
        "grad_var": None if frozen else torch.randn(C, dtype=A),
    }
    wanted = {name: wide(value.clone()) if value is not None else None for name, value in results.items()}
    ops.bn_relu_conv1x1_backward(*(wide(v) for v in arguments.values()), *wanted.values())
    old = {name: value.clone() for name, value in results.items() if value is not None}

    def run() -> None:
        for name, value in old.items():
            results[name].copy_(value)  # what is accumulated into
        kernels("bn_relu_conv1x1_backward", **arguments, **results, tf32=tf32)

    run()
    assert_same_in_any_order(kernels, results, run, orders)
    for name, value in results.items():
        if value is not None:
            compare(name, value, wanted[name], tolerance * (1 if name == "grad_x" else 2))


def forward_of(kernels: Library, x: Tensor, norm: dict[str, object], weight: Tensor, tf32: bool) -> Tensor:
    """The kernel's result, without statistics."""
    out = x.new_full((len(x), len(weight)), float("nan"))
    kernels(
        "bn_relu_conv1x1", x=x, **norm, conv_weight=weight, out_bias=None, out_relu=False, out=out, out_mean=None,
        out_var=None, tf32=tf32,
    )  # fmt: skip
    return out


def backward_of(
    kernels: Library | None, x: Tensor, norm: dict[str, object], weight: Tensor, grad: Tensor, tf32: bool, **behind
) -> dict[str, Tensor]:
    """All results of the kernel, or of the CPU backend; ``behind``: z, its norm and the norm's two sums."""
    nothing = dict.fromkeys(("z", "z_mean", "z_var", "z_weight", "z_bias"), None) | {"z_eps": 0.0}
    arguments = {"x": x, **norm, "conv_weight": weight, "grad_out": grad} | nothing
    arguments |= {"z_grad_weight": None, "z_grad_bias": None, **behind, "grad_in": None, "accumulate": False}
    sums = {name: weight.new_zeros(x.shape[1]) for name in ("grad_weight", "grad_bias", "grad_mean", "grad_var")}
    results = {"grad_x": torch.zeros_like(x), "grad_conv_weight": torch.zeros_like(weight), **sums}
    if kernels is None:
        ops.bn_relu_conv1x1_backward(*arguments.values(), *results.values())
    else:
        kernels("bn_relu_conv1x1_backward", **arguments, **results, tf32=tf32)
    return results


def assert_same_kind(got: Tensor, want: Tensor, name: str) -> None:
    """NaN, infinity of either sign, or finite in the same places."""
    assert torch.equal(got.isnan(), want.isnan()), f"{name}: NaN elsewhere"
    assert torch.equal(got.isposinf(), want.isposinf()) and torch.equal(got.isneginf(), want.isneginf()), name


def check_many_blocks(kernels: Library) -> None:
    """More than a warp has lanes forward, and than a column has threads backward: each of these adds several."""
    run_forward(kernels, *use("double"), 33 * 64, 3, 5)
    run_backward(kernels, *use("double"), 17 * 16, 3, 5)


def check_backward_of_no_rows(kernels: Library) -> None:
    """An empty batch: all sums are zero, nothing is left in flight."""
    norm, weight = make_norm(20, F32), torch.randn(10, 20)
    got = backward_of(kernels, torch.empty(0, 20), norm, weight, torch.empty(0, 10), False)
    assert not any(value.any() for value in got.values())


def check_backward_of_dead_channels(kernels: Library) -> None:
    """Where no row passes the ReLU nothing of an infinite weight comes back, of rows beyond the last one either."""
    x, norm, weight = -torch.ones(33, 4), make_norm(4, F32), torch.full((10, 4), float("inf"))
    norm["mean"], norm["bias"] = torch.full((4,), -0.5), torch.zeros(4)  # the zeros beyond the last row would pass
    got = backward_of(kernels, x, norm, weight, torch.rand(33, 10), False)
    assert not got["grad_x"].any() and not got["grad_bias"].any() and not got["grad_weight"].any()
