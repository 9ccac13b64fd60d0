"""Every compiled operation against the same one in plain PyTorch: in every dtype, at each SIMD level, on odd shapes and
slices of wider buffers; and against the dispatcher's rules."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from densenet_ext import _extension, kernels
from densenet_ext.kernels import plain
from tests.support import kernel_calls
from tests.support.helpers import DEVICE, F64, assert_as_good, error
from tests.support.kernel_calls import DTYPES, MAKERS, ROWS, SHAPES, Call, converted

MISSING = kernels.why_plain(DEVICE)
LEVELS = _extension.module.simd_levels() if _extension.module is not None and DEVICE.type == "cpu" else []
OPS = [name for name in kernels.OPS if DEVICE.type == "cpu" or name not in kernels.CPU_OPS]
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


# On top of other parameters: the runs of a test that differ in the level alone come one after another.
each_level = pytest.mark.parametrize("level", LEVELS or [DEVICE.type], indirect=True)


def outside_is_untouched(x: Tensor) -> bool:
    base = x._base
    if base is None:
        return True
    return bool((base[:, :3] == 7).all() and (base[:, 3 + x.shape[1] :] == 7).all())


class Reference(NamedTuple):
    """A call as it is stored in a dtype, and the arguments of plain PyTorch's in that dtype and in float64, done."""

    call: Call
    eager: dict[str, Any]
    exact: dict[str, Any]


@functools.lru_cache(maxsize=16)  # a test's, which its runs at the other SIMD levels find: they come next (each_level)
def references(name: str, dtype: torch.dtype, *size: Any) -> list[Reference]:
    found = []
    for call in MAKERS[name](*size):
        # what is stored is the starting point of all three: float64 gets the values after rounding to dtype
        rounded = Call(converted(call, dtype), call.outputs)
        eager, exact = converted(rounded, dtype), converted(rounded, F64)
        getattr(plain, name)(*eager.values())
        getattr(plain, name)(*exact.values())
        found.append(Reference(rounded, eager, exact))
    return found


def check(name: str, dtype: torch.dtype, *size: Any) -> None:
    """Every call of the operator at this size: its arguments in kernel_calls.py."""
    for reference in references(name, dtype, *size):
        compare(name, dtype, reference)


def compare(name: str, dtype: torch.dtype, reference: Reference) -> None:
    compiled = getattr(torch.ops.densenet_ext, name).default
    call, eager, exact = reference
    got = converted(call, dtype)
    compiled(*got.values())
    if name in ("bn_relu_conv1x1", "bn_relu_conv3x3") and got["out_mean"] is not None:
        # of the values as stored: where they nearly cancel, those of another rounding are of another mean
        for args in (eager, exact):
            plain.channel_stats(got["out"].to(args["out"].dtype), args["out_mean"], args["out_var"])
    results = [[args[k] for k in call.outputs if args[k] is not None] for args in (got, eager, exact)]
    if name == "bn_relu_max_pool" and "index" in call.outputs:
        same = results[0][1] == results[2][1]
        assert same.all() or dtype in (torch.bfloat16, torch.float16)
        results = [[found[0]] for found in results]
    if dtype == F64:
        for a, e in zip(results[0], results[2], strict=True):
            torch.testing.assert_close(a, e, rtol=1e-11, atol=1e-11)
    else:
        # a GPU's tensor cores and the processor's dot products multiply what was rounded to dtype, as eager does; plain
        # PyTorch multiplies in float32
        rounded_factors = "conv" in name and (DEVICE.type == "cuda" or dtype == torch.bfloat16)
        # sums of few channels, of what was rounded, may cancel; test_conv3x3.py judges them by eager's own error
        roundings = 32 if "conv3x3" in name and got["x"].shape[1] < 4 else 4
        least = roundings * torch.finfo(dtype).eps if rounded_factors else 0.0
        assert_as_good(*results, factor=3.0, floor=64.0, least=least)
    assert all(outside_is_untouched(args) for args in got.values() if isinstance(args, Tensor))


@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_compiled_equals_plain(name: str, dtype: torch.dtype, level: str) -> None:
    shapes = SHAPES
    if "pool" in name or "conv3x3" in name:
        # the sums of a single channel may cancel, and there is none beside it to measure their error by
        channels = (1, 3, 12, 33, 50, 70) if "pool" in name else (3, 12, 33, 70)
        shapes = [(0, C, i % 2 == 1) for i, C in enumerate(channels)]
    for size in shapes:
        check(name, dtype, *size)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_rows(dtype: torch.dtype, level: str) -> None:
    """Enough rows for several panels and both threads."""
    for name in ("channel_stats", "append_features", "bn_relu_conv1x1", "bn_relu_conv1x1_backward", "feature_grad"):
        check(name, dtype, 4999, 37, True)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_sums_of_many_columns(dtype: torch.dtype, level: str) -> None:
    """Sums are taken over stretches of eight vectors of columns, then of four and fewer, and of a part of one."""
    for name in ("channel_stats", "append_features", "bn_relu_backward_reduce"):
        check(name, dtype, 67, 277, True)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of PyTorch's threads for a test."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


# Every shape of tile with whole and partial blocks of columns: 16 columns are a vector of AVX-512, 48 three of them.
@each_level
@pytest.mark.parametrize("outputs", [(7, 16), (17, 31, 32), (48, 50), (64, 77), (95, 96), (128, 130)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_products_of_every_tile(
    dtype: torch.dtype, outputs: tuple[int, ...], level: str, threads: Callable[[int], None]
) -> None:
    threads(1)
    for M, C, pitched in ((1, 1, False), (9, 13, True), (49, 47, True), (97, 65, False)):
        for name in ("bn_relu_conv1x1", "bn_relu_conv1x1_backward"):
            check(name, dtype, M, C, pitched, outputs)


@pytest.mark.parametrize(("count", "M"), [(2, 1), (2, 49), (6, 49), (3, 500)])
@pytest.mark.parametrize("name", ["bn_relu_conv1x1", "bn_relu_conv1x1_backward"])
def test_products_are_split_over_channels_too(
    name: str, count: int, M: int, level: str, threads: Callable[[int], None]
) -> None:
    """Few rows are shared by columns: results of one thread but for the order of sums, always the same bits."""
    compiled = getattr(torch.ops.densenet_ext, name).default
    for dtype in (torch.float32, torch.bfloat16):
        for call in getattr(kernel_calls, name)(M, 270, True, (130,)):
            runs = [converted(call, dtype) for _ in range(3)]
            for number, args in zip((1, count, count), runs, strict=True):
                threads(number)
                compiled(*args.values())
            for k in call.outputs:
                if runs[0][k] is not None:
                    assert torch.equal(runs[1][k], runs[2][k]), k
                    assert error(runs[1][k], runs[0][k]) <= 64 * torch.finfo(runs[0][k].dtype).eps, k
            assert all(outside_is_untouched(args) for args in runs[1].values() if isinstance(args, Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_weights_are_packed_once(dtype: torch.dtype, threads: Callable[[int], None]) -> None:
    """Beyond 2 MiB tasks share what each packs for itself otherwise."""
    threads(3)
    for name in ("bn_relu_conv1x1", "bn_relu_conv1x1_backward"):
        check(name, dtype, 67, 2100, True, (530,))


@pytest.mark.parametrize("N", [48, 128])
def test_bf16_products_are_as_good_as_eager(N: int, level: str) -> None:
    """Judged against PyTorch's own BatchNorm, ReLU and convolution under autocast, gradients included."""
    M, C = 777, 250
    x, weight = torch.randn(M, C).bfloat16(), torch.randn(N, C) / C**0.5
    gamma, beta, grad = torch.rand(C) + 0.5, torch.randn(C), torch.randn(M, N).bfloat16()

    def usual(dtype: torch.dtype) -> list[Tensor]:
        leaves = [t.to(dtype if dtype == F64 else t.dtype).requires_grad_() for t in (x, weight, gamma, beta)]
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype != F64):
            y = torch.nn.functional.batch_norm(leaves[0], None, None, leaves[2], leaves[3], True).relu()
            z = torch.nn.functional.linear(y, leaves[1])
        return [z.detach(), *torch.autograd.grad(z, leaves[1:], grad.to(z.dtype))]

    eager, exact = usual(torch.bfloat16), usual(F64)
    mean, var = x.float().mean(0), x.float().var(0, correction=0)
    out, dx, dw, dgamma, dbeta = (
        torch.empty_like(grad),
        torch.empty_like(x),
        *map(torch.empty_like, (weight, gamma, beta)),
    )
    values = (x, mean, var, gamma, beta, 1e-5, weight)
    torch.ops.densenet_ext.bn_relu_conv1x1(*values, None, False, out, None, None)
    torch.ops.densenet_ext.bn_relu_conv1x1_backward(
        *values, grad, *(None,) * 5, 0.0, *(None,) * 3, False, dx, dw, dgamma, dbeta, None, None
    )
    assert_as_good([out, dw, dgamma, dbeta], eager, exact, factor=1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_constant_channels_are_exact(dtype: torch.dtype, level: str) -> None:
    """x - mean is zero there and the norm's bias all that is left: at a mean of 1e4, too, and in the ReLU's mask."""
    M, C = 100, 37
    x = (torch.linspace(-1e4, 1e4, C) / 3).to(dtype).expand(M, C).contiguous()
    bias = torch.randn(C)
    bias[::3] = 0
    norm = (x[0].float(), torch.zeros(C), torch.randn(C), bias, 1e-5)
    ops, expected = torch.ops.densenet_ext, bias.relu().to(dtype).expand(M, C)
    out, z = torch.empty_like(x), torch.empty_like(x)
    ops.bn_relu(x, *norm, out)
    assert torch.equal(out, expected)
    ops.bn_relu_conv1x1(x, *norm, torch.eye(C), None, False, z, None, None)
    assert torch.equal(z, expected)
    plain.bn_relu(x, *norm, out)
    assert torch.equal(out, expected)
    grad_weight, grad_bias, passed = torch.empty(C), torch.empty(C), M * (bias > 0).float()
    for reduce in (ops.bn_relu_backward_reduce, plain.bn_relu_backward_reduce):
        reduce(torch.ones_like(x), x, *norm, grad_weight, grad_bias)
        assert torch.equal(grad_bias, passed) and not grad_weight.any()
    ops.bn_relu_conv1x1_backward(
        x, *norm, torch.eye(C), torch.ones_like(x), *(None,) * 5, 0.0, *(None,) * 3, False, out, None,
        grad_weight, grad_bias, None, None,
    )  # fmt: skip
    assert torch.equal(grad_bias, passed) and not grad_weight.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_features_are_appended_bit_by_bit(dtype: torch.dtype, level: str) -> None:
    """Numbers below the normal ones too, which instructions may take for zero."""
    src = (torch.randn(9, 37) * torch.finfo(dtype).tiny).to(dtype)
    out = torch.empty_like(src)
    torch.ops.densenet_ext.append_features(src, out, None, None, 0.0, None, 0)
    assert torch.equal(out.view(torch.uint8), src.view(torch.uint8))


def _infinities(M: int) -> Tensor:
    """Rows [M, 6]: infinity first, last, negative, of both signs, NaN; and none."""
    x = torch.randn(M, 6)
    inf = float("inf")
    x[0, 0], x[-1, 1], x[M // 2, 2], x[0, 3], x[-1, 3], x[M // 3, 4] = inf, inf, -inf, inf, -inf, float("nan")
    return x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("M", [2, 67, 9001])
def test_statistics_of_infinity(M: int, dtype: torch.dtype, level: str) -> None:
    """As BatchNorm takes them: the mean is infinite, or NaN where both signs or NaN are there; the variance is NaN."""
    x = _infinities(M).to(dtype)
    # the processor's: a GPU's BatchNorm makes NaN of one infinity among several rows of a thread
    usual = torch.nn.BatchNorm1d(6, momentum=1.0, dtype=kernels.acc_dtype(dtype), device="cpu")
    usual(x.to("cpu", kernels.acc_dtype(dtype)))
    expected_mean, expected_var = (t.to(DEVICE) for t in (usual.running_mean, usual.running_var))
    mean, var = torch.empty_like(expected_mean), torch.empty_like(expected_var)
    out = torch.empty_like(x)
    ops = torch.ops.densenet_ext
    for take in (
        lambda: ops.channel_stats(x, mean, var),
        lambda: plain.channel_stats(x, mean, var),
        lambda: ops.append_features(x, out, mean, var, 0.0, None, 0),
    ):
        take()
        torch.testing.assert_close(mean, expected_mean, equal_nan=True, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(var * M / (M - 1), expected_var, equal_nan=True, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", OPS)
def test_no_rows(name: str, backend: str) -> None:
    """What an empty local batch asks for, beside other processes that have one. It has no statistics."""
    if backend == "emulated" and name in kernels.CPU_OPS:
        pytest.skip("no kernel for GPUs")
    statistics = {"channel_stats": ("mean", "var"), "append_features": ("mean", "var")}
    statistics["bn_relu_conv1x1"] = statistics["bn_relu_conv3x3"] = ("out_mean", "out_var")
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
@pytest.mark.parametrize("name", OPS)
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.999, 1.0])
def test_dropout_is_the_same_hash_everywhere(p: float, dtype: torch.dtype, level: str) -> None:
    src, out = torch.ones(301, 19, dtype=dtype), torch.empty(301, 19, dtype=dtype)
    for seed in (0, 1, -1, 2**40 + 17, -(2**62)):
        tensor = torch.tensor([seed])
        torch.ops.densenet_ext.append_features(src, out, None, None, p, tensor if p else None, 3)
        expected = plain.dropout_factor(tensor, 3, 301, 19, p, dtype) if p else src
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
@pytest.mark.parametrize("name", OPS)
def test_opcheck(name: str) -> None:
    call = MAKERS[name](7, 5, False)[0]
    torch.library.opcheck(getattr(torch.ops.densenet_ext, name).default, tuple(converted(call, torch.float32).values()))


@compiled_only
@pytest.mark.parametrize("name", OPS)
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
