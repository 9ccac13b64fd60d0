"""Arguments for every operation on odd shapes and slices of wider buffers, in float64 and converted to other dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.kernels import plain
from tests.support.helpers import F64

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class Call(NamedTuple):
    """Arguments of one operation; ``outputs``: names of those it writes into."""

    args: dict[str, Any]
    outputs: tuple[str, ...]


def rows(M: int, C: int, pitched: bool) -> Tensor:
    """Random rows [M, C]; pitched: a slice of wider rows that starts at an odd column."""
    if not pitched:
        return torch.randn(M, C, dtype=F64)
    return torch.randn(M, C + 8, dtype=F64)[:, 3 : 3 + C]


def norm(C: int, affine: bool = True, prefix: str = "") -> dict[str, Any]:
    values: dict[str, Any] = {"mean": 0.3 * torch.randn(C, dtype=F64), "var": torch.rand(C, dtype=F64) + 0.5}
    values |= {"weight": torch.randn(C, dtype=F64) if affine else None}
    values |= {"bias": torch.randn(C, dtype=F64) if affine else None, "eps": 1e-5}
    return {prefix + name: value for name, value in values.items()}


def vector(C: int) -> Tensor:
    return torch.randn(C, dtype=F64)


SEED = torch.tensor([0x1234_5678_9ABC_DEF])
# M, C, pitched
SHAPES = [(1, 1, False), (1, 5, True), (7, 3, True), (13, 12, True), (64, 33, False), (131, 70, True), (29, 130, False)]
POOLS = [([2, 1, 1, 7], [1, 1, 2]), ([2, 1, 5, 6], [1, 2, 2]), ([1, 4, 5, 3], [2, 2, 2]), ([2, 1, 4, 3], [1, 4, 3])]
POOLS += [([1, 1, 7, 8], [1, 3, 3])]
MAX_POOLS = [
    ([2, 1, 1, 9], [1, 1, 3], [1, 1, 2], [0, 0, 1]),
    ([2, 1, 7, 6], [1, 3, 3], [1, 2, 2], [0, 1, 1]),
    ([1, 5, 4, 6], [3, 3, 3], [2, 2, 2], [1, 1, 1]),
    ([2, 1, 5, 5], [1, 2, 2], [1, 2, 2], [0, 0, 0]),
    ([1, 1, 6, 5], [1, 3, 2], [1, 1, 1], [0, 1, 1]),
    ([2, 1, 7, 8], [1, 2, 2], [1, 3, 3], [0, 1, 0]),
]


def channel_stats(M: int, C: int, pitched: bool) -> list[Call]:
    return [Call({"x": rows(M, C, pitched), "mean": vector(C), "var": vector(C)}, ("mean", "var"))]


def append_features(M: int, C: int, pitched: bool) -> list[Call]:
    src, out = rows(M, C, pitched), rows(M, C, True)
    with_stats = {
        "src": src,
        "out": out,
        "mean": vector(C),
        "var": vector(C),
        "drop_rate": 0.0,
        "seed": None,
        "layer": 0,
        "drop_rows": 1,
    }
    dropped = {**with_stats, "mean": None, "var": None, "drop_rate": 0.3, "seed": SEED, "layer": 5}
    return [
        Call(with_stats, ("out", "mean", "var")),
        Call(dropped, ("out",)),
        Call({**dropped, "drop_rows": 5}, ("out",)),
        Call({**dropped, "drop_rate": 1.0}, ("out",)),
    ]


def feature_grad(M: int, C: int, pitched: bool) -> list[Call]:
    args = {"grad": rows(M, C, pitched), "x": rows(M, C, pitched)}
    args |= {"mean": vector(C), "grad_mean": vector(C), "grad_var": vector(C)}
    args |= {"drop_rate": 0.0, "seed": None, "layer": 0, "out": rows(M, C, False), "drop_rows": 1}
    dropped = {**args, "drop_rate": 0.4, "seed": SEED, "layer": 2}
    return [Call(changed, ("out",)) for changed in (args, dropped, {**dropped, "drop_rows": 5})]


def bn_relu(M: int, C: int, pitched: bool) -> list[Call]:
    return [
        Call({"x": rows(M, C, pitched), **norm(C, affine), "out": rows(M, C, pitched)}, ("out",))
        for affine in (True, False)
    ]


def cat_bn_relu(M: int, C: int, pitched: bool) -> list[Call]:
    features = [rows(M, n, pitched) for n in (C, 1, 2 * C + 1)]
    return [Call({"features": features, **norm(3 * C + 2), "out": rows(M, 3 * C + 2, pitched)}, ("out",))]


def bn_relu_backward_reduce(M: int, C: int, pitched: bool) -> list[Call]:
    sums = {"grad_weight": vector(C), "grad_bias": vector(C)}
    args = {"grad": rows(M, C, pitched), "x": rows(M, C, pitched)}
    activation = {**sums, "out": rows(M, C, pitched)}
    return [
        Call({**args, **norm(C), **sums}, tuple(sums)),
        Call({**args, **norm(C, False), **activation}, tuple(activation)),
    ]


def bn_relu_backward(M: int, C: int, pitched: bool) -> list[Call]:
    args = {"grad": rows(M, C, pitched), "x": rows(M, C, pitched), **norm(C)}
    args |= {"grad_weight": vector(C), "grad_bias": vector(C), "grad_x": rows(M, C, pitched)}
    return [Call(args, ("grad_x",)), Call({**args, "grad_weight": None, "grad_bias": None}, ("grad_x",))]


OUTPUTS = (1, 12, 48, 33)  # of the 1x1 convolution


def bn_relu_conv1x1(M: int, C: int, pitched: bool, outputs: Sequence[int] = OUTPUTS) -> list[Call]:
    calls = []
    for b in outputs:
        affine = b != 12
        args = {"x": rows(M, C, pitched), **norm(C, affine), "conv_weight": torch.randn(b, C, dtype=F64) / C**0.5}
        args |= {"out_bias": None, "out_relu": False, "out": rows(M, b, pitched), "out_mean": None, "out_var": None}
        with_stats = {**args, "out_mean": vector(b), "out_var": vector(b)}
        calls.append(Call(with_stats, ("out", "out_mean", "out_var")))
        calls.append(Call({**args, "out_bias": vector(b), "out_relu": True}, ("out",)))
    return calls


def bn_relu_conv1x1_backward(M: int, C: int, pitched: bool, outputs: Sequence[int] = OUTPUTS) -> list[Call]:
    calls = []
    for b in outputs:
        args = {"x": rows(M, C, pitched), **norm(C), "conv_weight": torch.randn(b, C, dtype=F64) / b**0.5}
        args |= {"grad_out": rows(M, b, False), "z": rows(M, b, False), **norm(b, prefix="z_")}
        args |= {"z_grad_weight": vector(b), "z_grad_bias": vector(b), "grad_in": None, "accumulate": False}
        args |= {"grad_x": rows(M, C, True), "grad_conv_weight": torch.randn(b, C, dtype=F64)}
        args |= {name: vector(C) for name in ("grad_weight", "grad_bias", "grad_mean", "grad_var")}
        outputs = ("grad_x", "grad_conv_weight", "grad_weight", "grad_bias", "grad_mean", "grad_var")
        frozen = {"z_grad_weight": None, "z_grad_bias": None, "grad_mean": None, "grad_var": None}
        no_z = dict.fromkeys(("z", "z_mean", "z_var", "z_weight", "z_bias", "z_grad_weight", "z_grad_bias"))
        calls.append(Call(args, outputs))
        calls.append(Call({**args, "accumulate": True}, outputs))
        calls.append(Call({**args, "grad_in": rows(M, C, pitched), "grad_conv_weight": None}, outputs))
        calls.append(Call({**args, **frozen, "accumulate": True}, outputs))
        calls.append(Call({**args, **no_z, "weight": None, "bias": None}, outputs))
    return calls


# Of the 3x3 convolution: sizes of images with the number of their dimensions, and output channels
IMAGES = [([2, 1, 1, 11], 1), ([1, 1, 1, 1], 2), ([3, 1, 7, 7], 2), ([2, 1, 5, 13], 2), ([2, 3, 4, 5], 3)]
GROWTH = (1, 12, 17, 32, 48)


def bn_relu_conv3x3(
    M: int, C: int, pitched: bool, images: Sequence[tuple[list[int], int]] = tuple(IMAGES)
) -> list[Call]:
    calls = []
    for i, (size, dims) in enumerate(images):
        M, k = _pixels(size), GROWTH[(i + C) % len(GROWTH)]
        args = {"x": rows(M, C, pitched), "size": size, **norm(C, i % 2 == 0)}
        args |= {"conv_weight": _window(k, C, dims, i % 2 == 1), "conv_bias": vector(k)}
        args |= {"drop_rate": 0.0, "seed": None, "layer": 0, "drop_rows": 1}
        args |= {"out": rows(M, k, True), "out_mean": vector(k), "out_var": vector(k)}
        dropped = {"drop_rate": 0.3, "seed": SEED, "layer": 7, "out_mean": None, "out_var": None}
        calls.append(Call(args, ("out", "out_mean", "out_var")))
        calls.append(Call({**args, **dropped}, ("out",)))
        calls.append(Call({**args, **dropped, **NO_NORM, "drop_rows": M // size[0], "conv_bias": None}, ("out",)))
    return calls


NO_NORM = dict.fromkeys(("mean", "var", "weight", "bias"))


def _window(k: int, C: int, dims: int, channels_last: bool) -> Tensor:
    weight = torch.randn(k, *[3] * dims, C, dtype=F64).movedim(-1, 1) / C**0.5
    return weight if channels_last else weight.contiguous()


def bn_relu_conv3x3_backward(
    M: int, C: int, pitched: bool, images: Sequence[tuple[list[int], int]] = tuple(IMAGES)
) -> list[Call]:
    calls = []
    for i, call in enumerate(bn_relu_conv3x3(M, C, pitched, images)[::3]):
        given = {name: call.args[name] for name in list(call.args)[:8]}
        M, k, dims = len(call.args["x"]), call.args["out"].shape[1], call.args["conv_weight"].dim() - 2
        args = {**given, "grad": rows(M, k, pitched), "features": rows(M, k, True), "features_mean": vector(k)}
        args |= {"features_grad_mean": vector(k), "features_grad_var": vector(k)}
        args |= {"drop_rate": 0.0, "seed": None, "layer": 0, "drop_rows": 1, "scaled": True, "grad_in": None}
        args |= {"accumulate": False, "grad_x": rows(M, C, True), "grad_conv_weight": _window(k, C, dims, i % 2 == 0)}
        args |= {"grad_conv_bias": vector(k), **{name: vector(C) for name in SUMS}}
        dropped = {"drop_rate": 0.4, "seed": SEED, "layer": 3}
        no_features = dict.fromkeys(("features", "features_mean", "features_grad_mean", "features_grad_var"))
        for change in (
            {"grad_in": rows(M, C, pitched)},
            {"accumulate": True, **dropped},
            {**dropped, "drop_rows": M // args["size"][0], "scaled": False, "grad_mean": None, "grad_var": None},
            {**no_features, "scaled": False, "grad_weight": None, "grad_bias": None, "grad_conv_bias": None},
            {**NO_NORM, **dict.fromkeys(SUMS), **no_features, "scaled": False, "grad_conv_weight": None},
            {"grad_x": None, "scaled": False},
            {"grad_x": None, "scaled": False, **dict.fromkeys(SUMS)},
            dict.fromkeys(CONV_GRADS),
        ):
            changed = {**args, **change}
            calls.append(Call(changed, tuple(k for k in ("grad_x", *CONV_GRADS, *SUMS) if changed[k] is not None)))
    return calls


SUMS = ("grad_weight", "grad_bias", "grad_mean", "grad_var")
CONV_GRADS = ("grad_conv_weight", "grad_conv_bias")


def bn_relu_avg_pool(M: int, C: int, pitched: bool) -> list[Call]:
    calls = []
    for size, window in POOLS:
        M, Mo = _pixels(size), size[0] * (size[1] // window[0]) * (size[2] // window[1]) * (size[3] // window[2])
        args = {"x": rows(M, C, pitched), "size": size, "window": window, **norm(C), "out": rows(Mo, C, pitched)}
        calls.append(Call(args, ("out",)))
    return calls


def _pixels(size: list[int]) -> int:
    return size[0] * size[1] * size[2] * size[3]


def bn_relu_avg_pool_backward_reduce(M: int, C: int, pitched: bool) -> list[Call]:
    calls = []
    for call in bn_relu_avg_pool(M, C, pitched):
        grad = torch.randn_like(call.args["out"])
        args = {"grad_out": grad, **{k: v for k, v in call.args.items() if k != "out"}, "pooled": call.args["out"]}
        args |= {"grad_weight": vector(C), "grad_bias": vector(C)}
        calls.append(Call(args, ("pooled", "grad_weight", "grad_bias")))
        calls.append(Call({**args, "pooled": None}, ("grad_weight", "grad_bias")))
    return calls


def bn_relu_avg_pool_backward(M: int, C: int, pitched: bool) -> list[Call]:
    calls = []
    for call in bn_relu_avg_pool(M, C, pitched):
        args = {"grad_out": torch.randn_like(call.args["out"])} | {k: v for k, v in call.args.items() if k != "out"}
        args |= {"grad_weight": vector(C), "grad_bias": vector(C), "grad_x": torch.randn_like(call.args["x"])}
        calls.append(Call(args, ("grad_x",)))
        calls.append(Call({**args, "grad_weight": None, "grad_bias": None}, ("grad_x",)))
    return calls


def bn_relu_max_pool(M: int, C: int, pitched: bool) -> list[Call]:
    calls = []
    for size, window, stride, padding in MAX_POOLS:
        out = [(n + 2 * p - w) // s + 1 for n, w, s, p in zip(size[1:], window, stride, padding, strict=True)]
        Mo = _pixels([size[0], *out])
        args = {"x": rows(_pixels(size), C, pitched), "size": size, "window": window, "stride": stride}
        args |= {"padding": padding, **norm(C), "out": rows(Mo, C, pitched)}
        args["index"] = torch.zeros(Mo, C, dtype=torch.uint8)
        calls.append(Call(args, ("out", "index")))
        calls.append(Call({**args, "index": None}, ("out",)))
    return calls


def _max_pool_backward(M: int, C: int, pitched: bool) -> Iterator[dict[str, Any]]:
    for call in bn_relu_max_pool(M, C, pitched):
        index = call.args["index"]
        if index is None:
            continue
        plain.bn_relu_max_pool(*call.args.values())
        args = {"grad_out": torch.randn_like(call.args["out"]), "index": index}
        yield args | {k: v for k, v in call.args.items() if k not in ("out", "index")}


def bn_relu_max_pool_backward_reduce(M: int, C: int, pitched: bool) -> list[Call]:
    outputs = {"grad_weight": vector(C), "grad_bias": vector(C)}
    return [Call({**args, **outputs}, tuple(outputs)) for args in _max_pool_backward(M, C, pitched)]


def bn_relu_max_pool_backward(M: int, C: int, pitched: bool) -> list[Call]:
    calls = []
    for args in _max_pool_backward(M, C, pitched):
        args |= {"grad_weight": vector(C), "grad_bias": vector(C), "grad_x": torch.randn_like(args["x"])}
        calls.append(Call(args, ("grad_x",)))
        calls.append(Call({**args, "grad_weight": None, "grad_bias": None}, ("grad_x",)))
    return calls


MAKERS: dict[str, Callable[[int, int, bool], list[Call]]] = {name: globals()[name] for name in kernels.OPS}
ROWS = frozenset(("x", "src", "out", "grad", "grad_out", "grad_x", "grad_in", "z", "features", "pooled"))


def converted(call: Call, dtype: torch.dtype) -> dict[str, Any]:
    """Fresh copies with rows in ``dtype`` and vectors in its acc dtype, slices still slices of a wider buffer."""

    def copy(name: str, x: Any) -> Any:
        if isinstance(x, list) and x and isinstance(x[0], Tensor):
            return [copy(name, t) for t in x]
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x.clone() if isinstance(x, Tensor) else x
        to = dtype if name in ROWS else kernels.acc_dtype(dtype)
        if x.dim() == 2 and x.stride(0) > x.shape[1]:
            wide = torch.full((x.shape[0], x.stride(0)), 7.0, dtype=to)
            view = wide[:, 3 : 3 + x.shape[1]]
            view.copy_(x)
            return view
        return x.to(to, copy=True)

    return {name: copy(name, x) for name, x in call.args.items()}


# ---- the 1x1 convolution at the sizes of whole networks: tiles of 128 channels, several of them for a block ----------
# N, C: one tile of channels and two, weights that stay in shared memory and such as stream through it
WIDE = [(96, 64), (128, 200), (192, 640), (128, 1000)]


def off_zero(x: Tensor, values: dict[str, Any], prefix: str = "") -> Tensor:
    """``x`` with a few elements moved, so that no ReLU behind the norm hangs on the last digit of its argument."""
    mean, var, weight, bias = (values[prefix + name] for name in ("mean", "var", "weight", "bias"))
    u = (x - mean) * (weight * (var + values[prefix + "eps"]).rsqrt()) + bias
    return torch.where(u.abs() < 1e-3, x + 0.25, x)


def wide_conv1x1(M: int, C: int, N: int, dtype: torch.dtype) -> list[tuple[str, Call]]:
    """Every form of both directions, with its operator; the rows hold numbers of ``dtype``."""

    def stored(columns: int) -> Tensor:
        return rows(M, columns, False).to(dtype).double()

    tf32 = {"tf32": dtype == torch.float32}
    front, behind = norm(C), norm(N, prefix="z_")
    x = off_zero(stored(C), front).to(dtype).double()
    # factors of one size: the sums over columns then keep the digits that single products have
    forward = {"x": x, **front, "conv_weight": torch.randn(N, C, dtype=F64) / C**0.5, "out_bias": None}
    forward |= {"out_relu": False, "out": rows(M, N, False), "out_mean": vector(N), "out_var": vector(N)}
    plain_forward = {**forward, "out_bias": vector(N), "out_relu": True, "out_mean": None, "out_var": None}
    backward = {"x": x, **front, "conv_weight": torch.randn(N, C, dtype=F64) / N**0.5, "grad_out": stored(N)}
    backward |= {"z": off_zero(stored(N), behind, "z_").to(dtype).double(), **behind}
    backward |= {"z_grad_weight": vector(N) * M**0.5, "z_grad_bias": vector(N) * M**0.5, "grad_in": stored(C)}
    backward |= {"accumulate": False, "grad_x": stored(C), "grad_conv_weight": torch.zeros(N, C, dtype=F64)}
    backward |= {name: vector(C) for name in ("grad_weight", "grad_bias", "grad_mean", "grad_var")}
    outputs = ("grad_x", "grad_conv_weight", "grad_weight", "grad_bias", "grad_mean", "grad_var")
    no_z = dict.fromkeys(("z", "z_mean", "z_var", "z_weight", "z_bias", "z_grad_weight", "z_grad_bias"))
    forms: list[dict[str, Any]] = [
        {},  # through norm2, added to grad_in
        {"accumulate": True, "grad_in": None},
        {"grad_in": None, "z_grad_weight": None, "z_grad_bias": None},  # norm2 is frozen
        {"grad_in": None, **no_z},
        {"grad_conv_weight": None},
        {"grad_mean": None, "grad_var": None},  # norm1 is frozen
    ]
    calls = [("bn_relu_conv1x1", Call({**forward, **tf32}, ("out", "out_mean", "out_var")))]
    calls.append(("bn_relu_conv1x1", Call({**plain_forward, **tf32}, ("out",))))
    return calls + [("bn_relu_conv1x1_backward", Call({**backward, **form, **tf32}, outputs)) for form in forms]
