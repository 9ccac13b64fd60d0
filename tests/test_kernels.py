"""Every compiled operation against the same one in plain PyTorch: in every dtype, at each SIMD level, on odd shapes and
slices of wider buffers; and against the dispatcher's rules."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from helpers import DEVICE, F64, assert_as_good
from torch import Tensor

from densenet_ext import _extension, kernels
from densenet_ext.kernels import plain

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
MISSING = kernels.why_plain(DEVICE)
LEVELS = _extension.module.simd_levels() if _extension.module is not None and DEVICE.type == "cpu" else []
compiled_only = pytest.mark.skipif(MISSING is not None, reason=f"no compiled part: {MISSING}")


@pytest.fixture(params=LEVELS or [DEVICE.type])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test at each SIMD level that this processor has; once on a GPU."""
    module = _extension.module
    if MISSING is not None or module is None:
        pytest.skip(f"no compiled part: {MISSING}")
    if not LEVELS:
        yield request.param
        return
    before = module.simd_level()
    module.set_simd_level(request.param)
    yield request.param
    module.set_simd_level(before)


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
    }
    dropped = {**with_stats, "mean": None, "var": None, "drop_rate": 0.3, "seed": SEED, "layer": 5}
    return [
        Call(with_stats, ("out", "mean", "var")),
        Call(dropped, ("out",)),
        Call({**dropped, "drop_rate": 1.0}, ("out",)),
    ]


def feature_grad(M: int, C: int, pitched: bool) -> list[Call]:
    args = {"grad": rows(M, C, pitched), "x": rows(M, C, pitched)}
    args |= {"mean": vector(C), "grad_mean": vector(C), "grad_var": vector(C)}
    args |= {"drop_rate": 0.0, "seed": None, "layer": 0, "out": rows(M, C, False)}
    return [Call(args, ("out",)), Call({**args, "drop_rate": 0.4, "seed": SEED, "layer": 2}, ("out",))]


def bn_relu(M: int, C: int, pitched: bool) -> list[Call]:
    return [
        Call({"x": rows(M, C, pitched), **norm(C, affine), "out": rows(M, C, pitched)}, ("out",))
        for affine in (True, False)
    ]


def cat_bn_relu(M: int, C: int, pitched: bool) -> list[Call]:
    features = [rows(M, n, pitched) for n in (C, 1, 2 * C + 1)]
    return [Call({"features": features, **norm(3 * C + 2), "out": rows(M, 3 * C + 2, pitched)}, ("out",))]


def bn_relu_backward_reduce(M: int, C: int, pitched: bool) -> list[Call]:
    outputs = {"grad_weight": vector(C), "grad_bias": vector(C)}
    return [
        Call({"grad": rows(M, C, pitched), "x": rows(M, C, pitched), **norm(C, affine), **outputs}, tuple(outputs))
        for affine in (True, False)
    ]


def bn_relu_backward(M: int, C: int, pitched: bool) -> list[Call]:
    args = {"grad": rows(M, C, pitched), "x": rows(M, C, pitched), **norm(C)}
    args |= {"grad_weight": vector(C), "grad_bias": vector(C), "grad_x": rows(M, C, pitched)}
    return [Call(args, ("grad_x",)), Call({**args, "grad_weight": None, "grad_bias": None}, ("grad_x",))]


def bn_relu_conv1x1(M: int, C: int, pitched: bool) -> list[Call]:
    calls = []
    for b, affine in ((1, True), (12, False), (48, True), (33, True)):
        args = {"x": rows(M, C, pitched), **norm(C, affine), "conv_weight": torch.randn(b, C, dtype=F64) / C**0.5}
        args |= {"out_bias": None, "out_relu": False, "out": rows(M, b, pitched), "out_mean": None, "out_var": None}
        with_stats = {**args, "out_mean": vector(b), "out_var": vector(b)}
        calls.append(Call(with_stats, ("out", "out_mean", "out_var")))
        calls.append(Call({**args, "out_bias": vector(b), "out_relu": True}, ("out",)))
    return calls


def bn_relu_conv1x1_backward(M: int, C: int, pitched: bool) -> list[Call]:
    calls = []
    for b in (1, 12, 33, 48):
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


def outside_is_untouched(x: Tensor) -> bool:
    base = x._base
    if base is None:
        return True
    return bool((base[:, :3] == 7).all() and (base[:, 3 + x.shape[1] :] == 7).all())


def check(name: str, call: Call, dtype: torch.dtype) -> None:
    compiled = getattr(torch.ops.densenet_ext, name).default
    # what is stored is the starting point of all three: float64 gets the values after rounding to dtype
    got = converted(call, dtype)
    rounded = Call({k: converted(call, dtype)[k] for k in call.args}, call.outputs)
    eager, exact = converted(rounded, dtype), converted(rounded, F64)
    compiled(*got.values())
    getattr(plain, name)(*eager.values())
    getattr(plain, name)(*exact.values())
    results = [[args[k] for k in call.outputs if args[k] is not None] for args in (got, eager, exact)]
    if name == "bn_relu_max_pool" and "index" in call.outputs:
        same = results[0][1] == results[2][1]
        assert same.all() or dtype in (torch.bfloat16, torch.float16)
        results = [[found[0]] for found in results]
    if dtype == F64:
        for a, e in zip(results[0], results[2], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
    else:
        # tensor cores multiply what was rounded to dtype; the processor and plain PyTorch multiply in float32
        rounded_factors = DEVICE.type == "cuda" and "conv1x1" in name
        least = 2 * torch.finfo(dtype).eps if rounded_factors else 0.0
        assert_as_good(*results, factor=3.0, floor=64.0, least=least)
    assert all(outside_is_untouched(args) for args in got.values() if isinstance(args, Tensor))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", kernels.OPS)
def test_compiled_equals_plain(name: str, dtype: torch.dtype, level: str) -> None:
    shapes = [(0, C, i % 2 == 1) for i, C in enumerate((1, 3, 12, 33, 70))] if "pool" in name else SHAPES
    for M, C, pitched in shapes:
        for call in MAKERS[name](M, C, pitched):
            check(name, call, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(dtype: torch.dtype, level: str) -> None:
    """Enough rows for several panels and both threads."""
    for name in ("channel_stats", "append_features", "bn_relu_conv1x1", "bn_relu_conv1x1_backward", "feature_grad"):
        for call in MAKERS[name](4999, 37, True):
            check(name, call, dtype)


@pytest.mark.parametrize("name", kernels.OPS)
def test_no_rows(name: str, backend: str) -> None:
    """What an empty local batch asks for, beside other processes that have one. It has no statistics."""
    statistics = {"channel_stats": ("mean", "var"), "append_features": ("mean", "var")}
    statistics["bn_relu_conv1x1"] = ("out_mean", "out_var")
    for call in MAKERS[name](7, 12, True):
        args = dict(call.args, size=[0, *call.args["size"][1:]]) if "size" in call.args else call.args
        call = Call({k: _without_rows(v) if k in (*ROWS, "index") else v for k, v in args.items()}, call.outputs)
        for dtype in (torch.float64, torch.bfloat16):
            got, expected = converted(call, dtype), converted(call, dtype)
            getattr(kernels.select(torch.empty(0, dtype=dtype)), name)(*got.values())
            getattr(plain, name)(*expected.values())
            for k in set(call.outputs) - set(statistics.get(name, ())):
                if got[k] is not None:
                    torch.testing.assert_close(
                        got[k], expected[k], equal_nan=True, msg=lambda text, k=k: f"{k}: {text}"
                    )


def _without_rows(x: Any) -> Any:
    if isinstance(x, list):
        return [_without_rows(t) for t in x]
    return x[:0] if isinstance(x, Tensor) else x


@compiled_only
@pytest.mark.parametrize("name", kernels.OPS)
def test_the_same_bits_from_run_to_run(name: str) -> None:
    for call in MAKERS[name](1031, 24, True):
        runs = [converted(call, torch.float32) for _ in range(2)]
        for args in runs:
            getattr(torch.ops.densenet_ext, name).default(*args.values())
        for k in call.outputs:
            if runs[0][k] is not None:
                assert torch.equal(runs[0][k], runs[1][k]), k


def test_statistics_do_not_cancel(level: str) -> None:
    x = (torch.randn(4096, 9, dtype=F64) + 1e4).float()
    mean, var = torch.empty(9), torch.empty(9)
    torch.ops.densenet_ext.channel_stats(x, mean, var)
    torch.testing.assert_close(var.double(), x.double().var(0, correction=0), rtol=1e-3, atol=0)
    torch.testing.assert_close(mean.double(), x.double().mean(0), rtol=1e-6, atol=0)


def test_nan_passes_the_relu(level: str) -> None:
    x = torch.randn(33, 21)
    x[3, 4], x[5, 6], x[7, 8] = float("nan"), float("inf"), -float("inf")
    values = (torch.zeros(21), torch.ones(21), None, None, 1e-5)
    out, expected = torch.empty(33, 21), torch.empty(33, 21)
    torch.ops.densenet_ext.bn_relu(x, *values, out)
    plain.bn_relu(x, *values, expected)
    torch.testing.assert_close(out, expected, equal_nan=True)
    grad = torch.ones(33, 21)
    sums = [torch.empty(21) for _ in range(4)]
    torch.ops.densenet_ext.bn_relu_backward_reduce(grad, x, *values, sums[0], sums[1])
    plain.bn_relu_backward_reduce(grad, x, *values, sums[2], sums[3])
    torch.testing.assert_close(sums[:2], sums[2:], equal_nan=True)


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_dropout_is_the_same_hash_everywhere(p: float, level: str) -> None:
    src, out = torch.ones(301, 19), torch.empty(301, 19)
    for seed in (0, 1, -1, 2**40 + 17, -(2**62)):
        tensor = torch.tensor([seed])
        torch.ops.densenet_ext.append_features(src, out, None, None, p, tensor if p else None, 3)
        expected = plain.dropout_factor(tensor, 3, 301, 19, p, torch.float32) if p else src
        torch.testing.assert_close(out, expected)


@compiled_only
def test_results_must_lie_apart_from_arguments() -> None:
    """Other columns of the same buffer are apart, and elementwise operations may work in place; else it is an error."""
    ops, buffer = torch.ops.densenet_ext, torch.randn(9, 20)
    norm = (torch.zeros(8), torch.ones(8), None, None, 1e-5)
    expected = torch.empty(9, 8)
    plain.bn_relu(buffer[:, :8], *norm, expected)
    ops.bn_relu(buffer[:, :8], *norm, buffer[:, 8:16])
    assert torch.equal(buffer[:, 8:16], expected)
    ops.bn_relu(buffer[:, :8], *norm, buffer[:, :8])
    assert torch.equal(buffer[:, :8], expected)
    for out in (buffer[:, 4:12], buffer[1:, :8], buffer.view(-1)[18:162].view(9, 16)[:, :8]):
        with pytest.raises(RuntimeError, match="out: expected storage apart from that of x, got an overlap"):
            ops.bn_relu(buffer[: len(out), :8], *norm, out)
    grad = torch.randn(9, 8)
    with pytest.raises(RuntimeError, match="grad_x: expected storage apart from that of grad_out"):
        ops.bn_relu_conv1x1_backward(
            buffer[:, :8], *norm, torch.randn(8, 8), grad, *(None,) * 5, 0.0, *(None,) * 3, False, grad, None,
            torch.empty(8), torch.empty(8), None, None,
        )  # fmt: skip


@compiled_only
def test_misaligned_storage_is_an_error() -> None:
    x = torch.frombuffer(bytearray(33), dtype=torch.float32, offset=1, count=8).view(2, 4)
    with pytest.raises(RuntimeError, match="x: expected storage aligned to its elements of 4 bytes"):
        torch.ops.densenet_ext.channel_stats(x, torch.empty(4), torch.empty(4))


@compiled_only
@pytest.mark.parametrize("name", kernels.OPS)
def test_opcheck(name: str) -> None:
    call = MAKERS[name](7, 5, False)[0]
    torch.library.opcheck(getattr(torch.ops.densenet_ext, name).default, tuple(converted(call, torch.float32).values()))


@compiled_only
@pytest.mark.parametrize("name", kernels.OPS)
def test_every_schema_has_the_plain_functions_arguments(name: str) -> None:
    """A wrong schema fails without a sound in some versions of torch: names and order have to agree."""
    import inspect

    schema = getattr(torch.ops.densenet_ext, name).default._schema
    assert [a.name for a in schema.arguments] == list(inspect.signature(getattr(plain, name)).parameters)
    written = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    assert written == {k for call in MAKERS[name](7, 5, False) for k in call.outputs}


def test_who_computes() -> None:
    x = torch.zeros(1)
    usable = _extension.has_cpu if DEVICE.type == "cpu" else _extension.has_cuda
    assert kernels.backend(DEVICE, torch.float32) == ("compiled" if usable else "plain")
    assert (kernels.why_plain(DEVICE) is None) == usable
    with kernels.force_plain():
        assert kernels.select(x) is plain and kernels.backend(DEVICE) == "plain"
    assert kernels.backend(DEVICE, torch.complex64) == "plain" and kernels.select(x.to("meta")) is plain
    assert kernels.why_plain("meta")
