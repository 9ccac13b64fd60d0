"""Calls of the 3x3 convolution on images of odd sizes, the same in PyTorch's own steps, and the two held together."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext import _extension
from densenet_ext.kernels import plain
from tests.kernels.test_kernels import outside_is_untouched
from tests.support import kernel_calls
from tests.support.helpers import F64, assert_as_good
from tests.support.kernel_calls import CONV_GRADS, SEED, SUMS, Call, converted, rows, vector

ops = torch.ops.densenet_ext

# Sizes with the convolution's dimensions, input and output channels: primes, k = 12, one pixel, one line, one column;
# lines longer than a band, images of more lines than a stripe.
SHAPES = [
    ([3, 1, 7, 7], 2, 31, 12),
    ([2, 1, 13, 11], 2, 48, 12),
    ([1, 1, 1, 1], 2, 17, 5),
    ([5, 1, 1, 1], 3, 16, 32),
    ([2, 1, 1, 3], 1, 7, 1),
    ([1, 1, 9, 1], 2, 1, 33),
    ([2, 1, 1, 4999], 1, 5, 3),
    ([1, 1, 101, 5], 2, 20, 24),
    ([2, 5, 3, 4], 3, 40, 48),
    ([1, 1, 14, 28], 2, 130, 64),
    # pixels in the lanes, where these are 16
    ([3, 1, 5, 16], 2, 19, 12),
    ([2, 1, 3, 31], 2, 37, 8),
    ([1, 1, 6, 32], 2, 48, 24),
    ([2, 2, 3, 16], 3, 17, 10),
    ([2, 1, 1, 61], 1, 16, 11),
]


@pytest.fixture
def winograd() -> Iterator[Callable[[str], None]]:
    """Says for a test where convolutions take Winograd's products: "faster", "always" or "never"."""
    module = _extension.module
    assert module is not None
    yield module.set_winograd
    module.set_winograd("faster")


def calls(size: list[int], dims: int, C: int, k: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of both directions, with all that can be given and asked for."""
    M = size[0] * size[1] * size[2] * size[3]
    weight = torch.randn(k, C, *[3] * dims, dtype=F64) / (C * 3**dims) ** 0.5
    norm = kernel_calls.norm(C)
    forward = {"x": rows(M, C, True), "size": size, **norm, "conv_weight": weight, "conv_bias": vector(k)}
    forward |= {"drop_rate": 0.3, "seed": SEED, "layer": 3, "drop_rows": 1}
    forward |= {"out": rows(M, k, True), "out_mean": vector(k), "out_var": vector(k)}
    backward = {name: forward[name] for name in list(forward)[:8]}
    backward |= {"grad": rows(M, k, True), "features": rows(M, k, True), "features_mean": vector(k)}
    backward |= {"features_grad_mean": vector(k), "features_grad_var": vector(k)}
    backward |= {name: forward[name] for name in ("drop_rate", "seed", "layer", "drop_rows")}
    backward |= {"scaled": True, "grad_in": None, "accumulate": True, "grad_x": rows(M, C, True)}
    backward |= {"grad_conv_weight": torch.zeros_like(weight), "grad_conv_bias": vector(k)}
    return forward, {**backward, **{name: vector(C) for name in SUMS}}


def written(name: str, args: dict[str, Any], outputs: tuple[str, ...], plainly: bool = False) -> list[Tensor]:
    """The results of one call."""
    (getattr(plain, name) if plainly else getattr(ops, name).default)(*args.values())
    return [args[output] for output in outputs if args[output] is not None]


FORWARD, BACKWARD = ("out", "out_mean", "out_var"), ("grad_x", *CONV_GRADS, *SUMS)


def conv(x: Tensor, size: list[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of torch's own convolution of rows."""
    dims = weight.dim() - 2
    image = x.view(*([size[0] * size[1], size[2]] if dims == 1 else [size[0]]), *size[4 - dims :], x.shape[1])
    image = image.flatten(0, 1) if dims == 1 else image
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolution(image.movedim(-1, 1), weight, bias, padding=1).movedim(1, -1).reshape(-1, weight.shape[0])


def eager_forward(args: dict[str, Any]) -> list[Tensor]:
    """The same in PyTorch's own steps, each of which stores its result in the dtype of x."""
    x, out, size = args["x"], args["out"], args["size"]
    y = torch.empty_like(x)
    plain.bn_relu(x, *(args[name] for name in ("mean", "var", "weight", "bias", "eps")), y)
    z = conv(y, size, args["conv_weight"].to(x.dtype), args["conv_bias"].to(x.dtype))
    drop = (args["drop_rate"], args["seed"], args["layer"], args["drop_rows"])
    plain.append_features(z, out, args["out_mean"], args["out_var"], *drop)
    return [args[name] for name in FORWARD]


def eager_backward(args: dict[str, Any]) -> list[Tensor]:
    x, g = args["x"], torch.empty_like(args["grad"])
    norm = [args[name] for name in ("mean", "var", "weight", "bias", "eps")]
    features = [args[name] for name in ("features", "features_mean", "features_grad_mean", "features_grad_var")]
    plain.feature_grad(args["grad"], *features, args["drop_rate"], args["seed"], args["layer"], g, args["drop_rows"])
    y = torch.empty_like(x)
    plain.bn_relu(x, *norm, y)
    y.requires_grad_()
    weight = args["conv_weight"].to(x.dtype).requires_grad_()
    with torch.enable_grad():
        da, dW = torch.autograd.grad(conv(y, args["size"], weight), [y, weight], g)
    args["grad_conv_weight"].copy_(dW)
    args["grad_conv_bias"].copy_(g.sum(0, dtype=args["grad_conv_bias"].dtype))
    plain.bn_relu_backward_reduce(da, x, *norm, args["grad_weight"], args["grad_bias"])
    r, s = plain.rstd_scale(args["var"], args["weight"], args["eps"])
    args["grad_mean"].sub_(s * args["grad_bias"])
    args["grad_var"].sub_(s * r * args["grad_weight"] / 2)
    plain.bn_relu_backward(da, x, *norm, None, None, da)
    args["grad_x"].add_(da)
    return [args[name] for name in BACKWARD]


class Reference(NamedTuple):
    """A call as it is stored in a dtype, and PyTorch's results in that dtype and, of the plain form, in float64."""

    name: str
    call: Call
    eager: list[Tensor]
    exact: list[Tensor]


@functools.lru_cache(maxsize=1)  # for the runs at the other SIMD levels, which come next
def references(size: tuple[int, ...], dims: int, C: int, k: int, dtype: torch.dtype) -> list[Reference]:
    found = []
    for name, args, outputs, usual in zip(
        ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"),
        calls(list(size), dims, C, k),
        (FORWARD, BACKWARD),
        (eager_forward, eager_backward),
        strict=True,
    ):
        stored = Call(converted(Call(args, outputs), dtype), outputs)
        eager, exact = converted(stored, dtype), converted(stored, F64)
        found.append(Reference(name, stored, usual(eager), written(name, exact, outputs, plainly=True)))
    return found


def check_as_good_as_eager(size: list[int], dims: int, C: int, k: int, dtype: torch.dtype) -> None:
    for name, call, theirs, right in references(tuple(size), dims, C, k, dtype):
        got = converted(call, dtype)
        found = written(name, got, call.outputs)
        if call.outputs is FORWARD:  # statistics are of the stored values, their errors no matter of the convolution
            mean, var = torch.empty(k, dtype=F64), torch.empty(k, dtype=F64)
            plain.channel_stats(found[0].double(), mean, var)
            torch.testing.assert_close(found[1].double(), mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[2].double(), var, rtol=1e-4, atol=1e-5)
            found, theirs, right = found[:1], theirs[:1], right[:1]
        # sums over few rows and channels may cancel: one of eager's may be right by chance; numbers of 16 bits round
        # but once, when they are stored
        roundings = 64.0 if torch.finfo(dtype).eps < 1e-4 else 1.0
        few = 10 if C < 8 or len(got["x"]) < 50 else 1
        least = 0.0 if dtype == F64 else 0.625 * roundings * torch.finfo(dtype).eps * few
        assert_as_good(found, theirs, right, factor=2.0, floor=roundings, least=least)
        assert all(
            outside_is_untouched(value) for value in got.values() if isinstance(value, Tensor) and value.dim() == 2
        )
