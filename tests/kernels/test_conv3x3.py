"""BatchNorm, ReLU and the 3x3 convolution in one operator each way: against autograd, against the plain form by eager's
own error, on images of odd sizes, over threads, with what is not asked left out. Winograd's own: test_winograd.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import conv3x3
from densenet_ext import _extension
from densenet_ext.kernels import plain
from tests.kernels.conv3x3_calls import (  # noqa: F401  one is a fixture
    BACKWARD,
    FORWARD,
    SHAPES,
    calls,
    check_as_good_as_eager,
    conv,
    eager_backward,
    eager_forward,
    ops,
    winograd,
    written,
)
from tests.kernels.test_kernels import each_level, level, outside_is_untouched, threads  # noqa: F401  fixtures
from tests.support.helpers import DEVICE, F64, error
from tests.support.kernel_calls import CONV_GRADS, DTYPES, SEED, SUMS, Call, converted

pytestmark = pytest.mark.skipif(
    _extension.module is None or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)
shapes = pytest.mark.parametrize(("size", "dims", "C", "k"), SHAPES, ids=str)


@pytest.fixture(params=["direct", "winograd"])
def products(request: pytest.FixtureRequest, winograd: Callable[[str], None]) -> str:  # noqa: F811
    """Runs the test with either kind of products; where numbers are not multiplied as float they stay direct ones."""
    winograd("always" if request.param == "winograd" else "never")
    return str(request.param)


# ---- the formulas ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("drop_rows", [1, None])
@pytest.mark.parametrize("compiled", [True, False])
@shapes
def test_gradients_are_autograds(size: list[int], dims: int, C: int, k: int, compiled: bool, drop_rows: int) -> None:
    """Of x, of the norm's four values and of the convolution, through dropout and the features' statistics."""
    forward, backward = calls(size, dims, C, k)
    M = len(forward["x"])
    forward["drop_rows"] = backward["drop_rows"] = drop_rows or M // size[0]
    leaves = {name: forward[name].clone().requires_grad_() for name in ("x", "mean", "var", "weight", "bias")}
    leaves |= {name: forward[name].clone().requires_grad_() for name in ("conv_weight", "conv_bias")}
    x, mean, var, weight, bias, window, c = leaves.values()
    y = ((x - mean) * (weight * (var + 1e-5).rsqrt()) + bias).relu()
    samples = plain.dropout_factor(SEED, 3, -(-M // forward["drop_rows"]), k, 0.3, F64)
    out = conv(y, size, window, c) * samples.repeat_interleave(forward["drop_rows"], 0)
    out_mean, out_var = out.mean(0), out.var(0, correction=0)
    results = written("bn_relu_conv3x3", forward, FORWARD, not compiled)
    torch.testing.assert_close(results, [out.detach(), out_mean.detach(), out_var.detach()], rtol=1e-9, atol=1e-9)

    grad, grad_mean, grad_var = backward["grad"], backward["features_grad_mean"], backward["features_grad_var"]
    loss = (out * grad).sum() + (out_mean * grad_mean).sum() + (out_var * grad_var).sum()
    expected = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    old = {name: backward[name].clone() for name in ("grad_x", "grad_mean", "grad_var")}
    backward |= {"features": out.detach(), "features_mean": out_mean.detach()}
    found = dict(zip(BACKWARD, written("bn_relu_conv3x3_backward", backward, BACKWARD, not compiled), strict=True))
    pairs = {"x": found["grad_x"] - old["grad_x"], "mean": found["grad_mean"] - old["grad_mean"]}
    pairs |= {"var": found["grad_var"] - old["grad_var"], "weight": found["grad_weight"], "bias": found["grad_bias"]}
    pairs |= {"conv_weight": found["grad_conv_weight"], "conv_bias": found["grad_conv_bias"]}
    for name, value in pairs.items():
        torch.testing.assert_close(value, expected[name], rtol=1e-8, atol=1e-8, msg=lambda text, name=name: name + text)


# ---- every dtype, by eager's own error -------------------------------------------------------------------------------
@each_level
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shapes
def test_as_good_as_eager(size: list[int], dims: int, C: int, k: int, dtype: torch.dtype, level: str) -> None:  # noqa: F811
    check_as_good_as_eager(size, dims, C, k, dtype)


# ---- what is asked ---------------------------------------------------------------------------------------------------
LEFT_OUT: dict[str, dict[str, Any]] = {
    "x's gradient": {"grad_x": None, "scaled": False, "accumulate": False},
    "the weight's gradient": {"grad_conv_weight": None},
    "the bias's gradient": {"grad_conv_bias": None},
    "sums": {"grad_weight": None, "grad_bias": None},
    "gradients of statistics": {"grad_mean": None, "grad_var": None},
    "both": dict.fromkeys(SUMS),
    "all but the weight's gradient": {
        **dict.fromkeys((*SUMS, "grad_x", "grad_conv_bias")),
        "scaled": False,
        "accumulate": False,
    },
    "everything": {**dict.fromkeys((*SUMS, "grad_x", *CONV_GRADS)), "scaled": False, "accumulate": False},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("what", LEFT_OUT)
def test_what_is_not_asked_changes_nothing_else(what: str, dtype: torch.dtype, level: str, products: str) -> None:  # noqa: F811
    _, args = calls([3, 1, 7, 9], 2, 21, 12)
    whole, part = converted(Call(args, BACKWARD), dtype), converted(Call({**args, **LEFT_OUT[what]}, BACKWARD), dtype)
    written("bn_relu_conv3x3_backward", whole, BACKWARD)
    written("bn_relu_conv3x3_backward", part, BACKWARD)
    for name in BACKWARD:
        if part[name] is not None:
            assert torch.equal(part[name], whole[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_weights_in_channels_last_give_the_same_bits(dtype: torch.dtype, level: str, products: str) -> None:  # noqa: F811
    for size, dims, C, k in (([3, 1, 7, 9], 2, 21, 12), ([1, 3, 4, 5], 3, 16, 7)):
        layout = torch.channels_last if dims == 2 else torch.channels_last_3d
        for name, args, outputs in zip(
            ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"), calls(size, dims, C, k), (FORWARD, BACKWARD), strict=True
        ):
            runs = [converted(Call(args, outputs), dtype) for _ in range(2)]
            for key in ("conv_weight", "grad_conv_weight"):
                if key in args:
                    runs[1][key] = runs[1][key].to(memory_format=layout)
            for a, b in zip(*(written(name, run, outputs) for run in runs), strict=True):
                assert torch.equal(a, b)


# ---- threads ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("count", [2, 3, 7])
@shapes
def test_threads_share_the_work(
    size: list[int],
    dims: int,
    C: int,
    k: int,
    count: int,
    threads: Callable[[int], None],  # noqa: F811
    winograd: Callable[[str], None],  # noqa: F811
) -> None:
    """One thread's results but for the order of sums, and always the same bits."""
    winograd("always")
    for name, args, outputs in zip(
        ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"), calls(size, dims, C, k), (FORWARD, BACKWARD), strict=True
    ):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            results = []
            for number in (1, count, count):
                threads(number)
                results.append(written(name, converted(Call(args, outputs), dtype), outputs))
            for a, b, c in zip(*results, strict=True):
                assert torch.equal(b, c)
                assert error(b, a) <= 256 * torch.finfo(a.dtype).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_large_weights_are_packed_once(dtype: torch.dtype, products: str, threads: Callable[[int], None]) -> None:  # noqa: F811
    """Beyond 2 MiB tasks share what each packs for itself otherwise."""
    threads(3)
    check_as_good_as_eager([1, 1, 5, 7], 2, 400, 300, dtype)


def test_calls_at_once_do_not_share_memory(products: str) -> None:
    """One of them has the memory that tasks keep from call to call, the others have their own."""
    jobs, alone = [], []
    for C in (24, 40, 64, 72):
        forward, _ = calls([2, 1, 30, 34], 2, C, 16)
        jobs.append(converted(Call(forward, FORWARD), torch.float32))
        alone.append([result.clone() for result in written("bn_relu_conv3x3", jobs[-1], FORWARD)])

    def repeat(job: dict[str, Any]) -> list[Tensor]:
        for _ in range(20):
            results = written("bn_relu_conv3x3", job, FORWARD)
        return results

    with ThreadPoolExecutor(len(jobs)) as pool:
        for results, expected in zip(pool.map(repeat, jobs), alone, strict=True):
            for a, b in zip(results, expected, strict=True):
                assert torch.equal(a, b)


# ---- numbers that are none -------------------------------------------------------------------------------------------
@pytest.fixture
def spoiled() -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A call both ways, all of whose rows lie in memory that holds NaN and infinity around them."""
    both = calls([2, 1, 5, 7], 2, 11, 9)
    for args in both:
        for name, value in args.items():
            if isinstance(value, Tensor) and value.dim() == 2:
                wide = torch.full((len(value), value.shape[1] + 20), float("nan"), dtype=F64)
                wide[:, ::2] = float("inf")
                args[name] = wide[:, 9 : 9 + value.shape[1]].copy_(value)
    yield both


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_around_the_rows_stays_outside(spoiled: Any, dtype: torch.dtype, level: str, products: str) -> None:  # noqa: F811
    for name, args, outputs in zip(
        ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"), spoiled, (FORWARD, BACKWARD), strict=True
    ):
        for key, value in args.items():
            if isinstance(value, Tensor) and value.is_floating_point():
                to = dtype if value.dim() == 2 else plain.acc_dtype(dtype)
                args[key] = value.to(to) if value._base is None else value._base.to(to)[:, 9 : 9 + value.shape[1]]
        assert all(result.isfinite().all() for result in written(name, args, outputs))


def test_nan_reaches_its_neighbours_only(level: str, products: str) -> None:  # noqa: F811
    forward, backward = calls([1, 1, 6, 9], 2, 5, 4)
    x, grad = torch.randn(54, 5, dtype=F64), torch.randn(54, 4, dtype=F64)
    x[0, 2] = float("nan")  # the first pixel: neighbours are those to the right and below
    for dtype in (torch.float32, torch.bfloat16):
        args = converted(Call({**forward, "x": x, "drop_rate": 0.0}, FORWARD), dtype)
        reached = written("bn_relu_conv3x3", args, FORWARD)[0].isnan().any(1).nonzero().flatten().tolist()
        assert reached == [0, 1, 9, 10]
        grad[53, 1] = float("nan")  # the last one
        clean = {**backward, "x": torch.randn(54, 5, dtype=F64), "grad": grad, "drop_rate": 0.0, "features": None}
        clean |= dict.fromkeys(("features_mean", "features_grad_mean", "features_grad_var"))
        clean |= {"scaled": False, "accumulate": False}
        args = converted(Call(clean, BACKWARD), dtype)
        da, dW = written("bn_relu_conv3x3_backward", args, BACKWARD)[:2]
        assert da.isnan().any(1).nonzero().flatten().tolist() == [43, 44, 52, 53]
        assert dW[1, :, :2, :2].isnan().all() and not dW[[0, 2, 3]].isnan().any()
        args["grad"] = torch.randn(54, 4).to(dtype)
        args["x"][53, 2] = float("nan")
        dW = written("bn_relu_conv3x3_backward", args, BACKWARD)[1]
        assert dW[:, 2, 1:, 1:].isnan().all() and not dW[:, 2, 0].isnan().any() and not dW[:, 2, :, 0].isnan().any()


@pytest.mark.parametrize("what", ["x", "grad"])
def test_infinity_gives_what_eager_gives(what: str, level: str, products: str) -> None:  # noqa: F811
    forward, backward = calls([2, 1, 7, 6], 2, 19, 5)
    spoilt = torch.randn(84, 19 if what == "x" else 5, dtype=F64)
    spoilt[20, 3] = float("inf")
    backward["features_grad_mean"], backward["features_grad_var"] = torch.zeros(2, 5, dtype=F64)
    for name, args, outputs, usual in (
        ("bn_relu_conv3x3", forward, FORWARD[:1], eager_forward),
        ("bn_relu_conv3x3_backward", backward, BACKWARD[:2], eager_backward),
    ):
        if what not in args:
            continue
        ours, eagers = (converted(Call({**args, "drop_rate": 0.0, what: spoilt}, outputs), torch.float32) for _ in "12")
        for a, b in zip(written(name, ours, outputs), usual(eagers), strict=False):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4, equal_nan=True)


# ---- nothing ---------------------------------------------------------------------------------------------------------
def test_a_convolution_of_no_channels_is_its_bias() -> None:
    out = torch.empty(7, 5)
    nothing = (None,) * 4
    given = (torch.empty(7, 0), [1, 1, 1, 7], *nothing, 0.0, torch.empty(5, 0, 3))
    ops.bn_relu_conv3x3(*given, torch.arange(5.0), 0.0, None, 0, 1, out, None, None)
    assert torch.equal(out, torch.arange(5.0).expand(7, 5))


# ---- the benchmark ---------------------------------------------------------------------------------------------------
def test_a_line_of_the_benchmark() -> None:
    assert len(conv3x3.shapes()) == len(conv3x3.shapes(batch=1)) == 9
    for dtype, peak in ((torch.float32, None), (torch.bfloat16, 100.0)):
        # Not smaller: a clock runs as many calls as make it precise.
        line = conv3x3.measure(conv3x3.Shape("tiny", 2, (20, 20), 64, 32), dtype, 1, peak)
        assert line.startswith("tiny") and ("%" in line) == (peak is not None)
    layer = conv3x3.Layer(conv3x3.Shape("tiny", 2, (5, 4), 8, 4), torch.float32)
    layer.ours()
    mine = layer.out.clone()
    layer.theirs()
    torch.testing.assert_close(mine, layer.out, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["bn_relu_conv1x1", "bn_relu_conv3x3"])
def test_float32_is_multiplied_as_bfloat16_where_that_is_allowed(name: str, level: str) -> None:  # noqa: F811
    if level != "avx512_bf16":
        pytest.skip("a level without dot products of bfloat16")
    x, norm = torch.randn(24, 9), (torch.zeros(9), torch.ones(9), None, None, 0.0)
    out, lowered = torch.zeros(24, 5), torch.zeros(24, 5)
    if name == "bn_relu_conv1x1":
        W = torch.randn(5, 9)
        call = (x, *norm, W, None, False)
        expected = x.relu().bfloat16().double() @ W.bfloat16().double().t()
        rest: tuple[Any, ...] = (None, None)
    else:
        W = torch.randn(5, 9, 3, 3)
        call = (x, [1, 1, 6, 4], *norm, W, None, 0.0, None, 0, 1)
        image = x.relu().bfloat16().double().view(1, 6, 4, 9).permute(0, 3, 1, 2)
        expected = F.conv2d(image, W.bfloat16().double(), padding=1)[0].flatten(1).t()
        rest = (None, None)
    op = getattr(torch.ops.densenet_ext, name)
    op(*call, out, *rest)
    op(*call, lowered, *rest, bf16=True)
    assert (lowered - expected).abs().max() < 1e-5 * expected.abs().max() < (out - expected).abs().max()
