"""Calls of the 3x3 convolution on the emulated GPU, held against the plain form in float64 on the values as stored."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext.kernels import plain

from .conv1x1 import F64, acc, assert_same_in_any_order, compare, make_norm, make_rows, move
from .library import Library

SEED = torch.tensor([0x1234_5678_9ABC_DEF])


def make_window(N: int, C: int, dims: int, channels_last: bool, dtype: torch.dtype) -> Tensor:
    """A weight [N, C, 3, ...] of ``dims`` dimensions, contiguous or channels_last."""
    weight = torch.randn(N, *[3] * dims, C, dtype=F64).movedim(-1, 1) / C**0.5
    return weight.to(dtype) if channels_last else weight.to(dtype).contiguous()


def wide(value: object) -> object:
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def rows_of(size: Sequence[int]) -> int:
    return size[0] * size[1] * size[2] * size[3]


def run_forward(
    kernels: Library, dtype, tf32, tolerance, size, C, N, dims=2, pitch=0, offset=0, *, normed=True, bias=False,
    drop=0.0, drop_rows=1, stats=True, orders=(), channels_last=False, mean_and_deviation=(0.0, 1.0), compared=True,
) -> Tensor:  # fmt: skip
    """Checks all results for images of ``size`` [N, D, H, W]; returns out, a slice of wider rows. ``compared``: with
    the plain form, not only for what lies around the results."""
    A, M = acc(dtype), rows_of(size)
    x, norm = make_rows(M, C, dtype, pitch, offset), make_norm(C, dtype)
    move(x, norm, *mean_and_deviation)
    arguments: dict[str, object] = {"x": x, "size": list(size), **norm}
    if not normed:
        arguments |= dict.fromkeys(("mean", "var", "weight", "bias"))
    arguments["conv_weight"] = make_window(N, C, dims, channels_last, A)
    arguments["conv_bias"] = torch.randn(N, dtype=F64).to(A) if bias else None
    arguments |= {"drop_rate": drop, "seed": SEED if drop else None, "layer": 7, "drop_rows": drop_rows}
    out = make_rows(M, N, dtype, N + 9, 4)
    base = out._base
    assert base is not None
    around = int(base.isnan().sum())
    mean, var = (torch.full((N,), float("nan"), dtype=A) if stats else None for _ in range(2))

    def run() -> None:
        kernels("bn_relu_conv3x3", **arguments, out=out, out_mean=mean, out_var=var, tf32=tf32)

    run()
    assert_same_in_any_order(kernels, {"out": out, "out_mean": mean, "out_var": var}, run, orders)
    assert int(base.isnan().sum()) == around
    if compared:
        want = torch.empty(M, N, dtype=F64)
        plain.bn_relu_conv3x3(*(wide(v) for v in arguments.values()), want, None, None)
        compare("out", out, want, tolerance)
    if mean is not None and var is not None:
        check_statistics(out, mean, var)
    return out


def check_statistics(out: Tensor, mean: Tensor, var: Tensor) -> None:
    """Mean and variance are those of the values as stored."""
    stored, rounding = out.double(), 1e-5 if mean.dtype != F64 else 1e-12
    exact = stored.var(0, unbiased=False)
    assert ((mean.double() - stored.mean(0)).abs() <= rounding * (exact.sqrt() + stored.mean(0).abs())).all()
    assert ((var.double() - exact).abs() <= rounding * exact + 1e-12).all()


def forward_of(
    kernels: Library | None, x: Tensor, size: Sequence[int], norm: dict[str, Tensor], weight: Tensor
) -> Tensor:
    """The kernel's result, or the plain form's, without statistics."""
    out = x.new_full((len(x), len(weight)), float("nan"))
    dropout = {"drop_rate": 0.0, "seed": None, "layer": 0, "drop_rows": 1}
    arguments = {"x": x, "size": list(size), **norm, "eps": 1e-5, "conv_weight": weight, "conv_bias": None, **dropout}
    results = {"out": out, "out_mean": None, "out_var": None}
    if kernels is None:
        plain.bn_relu_conv3x3(*arguments.values(), *results.values())
    else:
        kernels("bn_relu_conv3x3", **arguments, **results, tf32=False)
    return out


SUMS = ("grad_weight", "grad_bias", "grad_mean", "grad_var")


def run_backward(
    kernels: Library, dtype, tf32, tolerance, size, C, N, dims=2, pitch=0, offset=0, *, normed=True, features=True,
    drop=0.0, drop_rows=1, into="grad_in", want=("grad_x", "grad_conv_weight", "grad_conv_bias", *SUMS), orders=(),
    channels_last=False, mean_and_deviation=(0.0, 1.0),
) -> None:  # fmt: skip
    """Checks all results for images of ``size`` [N, D, H, W]. ``into``: what s dy is added to ("grad_in", "accumulate",
    "nothing"), or "da": grad_x is the gradient of relu(bn(x)). ``want``: the results that are asked for."""
    A, M = acc(dtype), rows_of(size)
    x, norm = make_rows(M, C, dtype, pitch, offset), make_norm(C, dtype)
    move(x, norm, *mean_and_deviation)
    arguments: dict[str, object] = {"x": x, "size": list(size), **norm}
    if not normed:
        arguments |= dict.fromkeys(("mean", "var", "weight", "bias"))
    arguments["conv_weight"] = make_window(N, C, dims, channels_last, A)
    arguments["grad"] = make_rows(M, N, dtype, N + offset, offset)
    arguments["features"] = make_rows(M, N, dtype, N + offset, offset) if features else None
    for name in ("features_mean", "features_grad_mean", "features_grad_var"):
        arguments[name] = torch.randn(N, dtype=A) * (1 if name == "features_mean" else M) if features else None
    arguments |= {"drop_rate": drop, "seed": SEED if drop else None, "layer": 3, "drop_rows": drop_rows}
    arguments["scaled"] = into != "da"
    arguments["grad_in"] = make_rows(M, C, dtype, C + offset, offset) if into == "grad_in" else None
    arguments["accumulate"] = into == "accumulate"
    makers = {
        "grad_x": lambda: make_rows(M, C, dtype, pitch, offset),
        "grad_conv_weight": lambda: make_window(N, C, dims, not channels_last, A) * float("nan"),
        "grad_conv_bias": lambda: torch.full((N,), float("nan"), dtype=A),
    }
    results: dict[str, Tensor | None] = {}
    for name in ("grad_x", "grad_conv_weight", "grad_conv_bias", *SUMS):
        results[name] = makers.get(name, lambda: torch.randn(C, dtype=A))() if name in want else None
    wanted = {name: wide(value.clone()) if value is not None else None for name, value in results.items()}
    plain.bn_relu_conv3x3_backward(*(wide(v) for v in arguments.values()), *wanted.values())
    old = {name: value.clone() for name, value in results.items() if value is not None}
    base = None if results["grad_x"] is None else results["grad_x"]._base
    around = 0 if base is None else int(base.isnan().sum())

    def run() -> None:
        for name, value in old.items():
            results[name].copy_(value)  # what is accumulated into
        kernels("bn_relu_conv3x3_backward", **arguments, **results, tf32=tf32)

    run()
    assert_same_in_any_order(kernels, results, run, orders)
    assert base is None or int(base.isnan().sum()) == around
    for name, value in results.items():
        if value is not None:
            # da is rounded on its way, as PyTorch's own is
            compare(name, value, wanted[name], tolerance * (1.5 if name == "grad_x" else 2))
