"""Sums that the 1x1 convolution's first kernel merges, on the emulated GPU: the bits that two separate calls give."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .conv1x1 import acc, make_norm, make_rows
from .library import Library


def check_moments(kernels: Library, dtype: torch.dtype, M: int, first: int, orders: Sequence[int] = (0,)) -> None:
    """Statistics of new columns, from number ``first`` of 33 on, which the convolution's norm reads with the others."""
    C, k, N = 33, 13, 10
    X, src, norm = make_rows(M, C, dtype), make_rows(M, k, dtype), make_norm(C, acc(dtype))
    norm["mean"][first : first + k] = norm["var"][first : first + k] = float("nan")  # type: ignore[index]
    product = {"conv_weight": torch.randn(N, C, dtype=acc(dtype)), "out_bias": None, "out_relu": False}

    def run(call: Callable[..., None]) -> list[Tensor]:
        x, mean, var = X.clone(), norm["mean"].clone(), norm["var"].clone()  # type: ignore[attr-defined]
        new = slice(first, first + k)
        out, of_out = x.new_zeros(M, N), (mean.new_zeros(N), mean.new_zeros(N))
        append = {"src": src, "out": x[:, new], "mean": mean[new], "var": var[new], "drop_rate": 0.0, "seed": None}
        reads = norm | {"mean": mean, "var": var} | product
        results = {"out": out, "out_mean": of_out[0], "out_var": of_out[1], "tf32": False}
        call("append_features", append | {"layer": 0, "drop_rows": 1}, "bn_relu_conv1x1", {"x": x} | reads | results)
        return [mean, var, x, out, *of_out]

    _check(kernels, run, orders)


def check_sums(kernels: Library, dtype: torch.dtype, M: int, N: int, orders: Sequence[int] = (0,)) -> None:
    """Both sums of the norm behind the convolution, which its backward pass reads."""
    C, A = 9, acc(dtype)
    x, z, da = make_rows(M, C, dtype), make_rows(M, N, dtype), make_rows(M, N, dtype)
    norm, z_norm = make_norm(C, A), make_norm(N, A)
    weight = torch.randn(N, C, dtype=A)

    def run(call: Callable[..., None]) -> list[Tensor]:
        sums = [weight.new_full((N,), float("nan")) for _ in range(2)]
        grads = {name: weight.new_zeros(C) for name in ("grad_weight", "grad_bias", "grad_mean", "grad_var")}
        results = {"grad_x": torch.zeros_like(x), "grad_conv_weight": torch.zeros_like(weight), **grads}
        reduce = {"grad": da, "x": z, **z_norm, "grad_weight": sums[0], "grad_bias": sums[1], "out": None}
        reads = {"x": x, **norm, "conv_weight": weight, "grad_out": da, "z": z, "grad_in": None, "accumulate": False}
        reads |= {f"z_{name}": value for name, value in z_norm.items()}
        reads |= {"z_grad_weight": sums[0], "z_grad_bias": sums[1], "tf32": False}
        call("bn_relu_backward_reduce", reduce, "bn_relu_conv1x1_backward", reads | results)
        return [*sums, *results.values()]

    _check(kernels, run, orders)


def _check(kernels: Library, run: Callable[[Callable[..., None]], list[Tensor]], orders: Sequence[int]) -> None:
    def separately(first: str, of_first: dict[str, object], second: str, of_second: dict[str, object]) -> None:
        kernels(first, **of_first)
        kernels(second, **of_second)

    before = kernels.c.dx_launches()
    expected = run(separately)
    between = kernels.c.dx_launches()
    for order in orders:
        kernels.set_order(order)
        got = run(kernels.run_unmerged)
        kernels.set_order(0)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
    saved = (between - before) * len(orders) - (kernels.c.dx_launches() - between)
    assert saved == len(orders), f"{saved} launches less in {len(orders)} calls"
