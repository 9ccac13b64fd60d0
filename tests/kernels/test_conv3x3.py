"""BatchNorm, ReLU and the 3x3 convolution in one operator each way: against autograd, against the plain form by eager's
own error, on images of odd sizes, over threads, with what is not asked left out."""

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
from tests.kernels.test_kernels import level, outside_is_untouched, threads  # noqa: F401  fixtures
from tests.support import kernel_calls
from tests.support.helpers import DEVICE, F64, assert_as_good, error
from tests.support.kernel_calls import CONV_GRADS, DTYPES, SEED, SUMS, Call, converted, rows, vector

pytestmark = pytest.mark.skipif(
    _extension.module is None or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)
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
shapes = pytest.mark.parametrize(("size", "dims", "C", "k"), SHAPES, ids=str)


@pytest.fixture
def winograd() -> Iterator[Callable[[str], None]]:
    """Says for a test where float's convolutions take Winograd's products: "faster", "always" or "never"."""
    module = _extension.module
    assert module is not None
    yield module.set_winograd
    module.set_winograd("faster")


@pytest.fixture(params=["direct", "winograd"])
def products(request: pytest.FixtureRequest, winograd: Callable[[str], None]) -> str:
    """Runs the test with either kind of products; where numbers are not multiplied as float they stay direct ones."""
    winograd("always" if request.param == "winograd" else "never")
    return str(request.param)


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


# ---- the formulas ----------------------------------------------------------------------------------------------------
def conv(x: Tensor, size: list[int], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Rows of torch's own convolution of rows."""
    dims = weight.dim() - 2
    image = x.view(*([size[0] * size[1], size[2]] if dims == 1 else [size[0]]), *size[4 - dims :], x.shape[1])
    image = image.flatten(0, 1) if dims == 1 else image
    convolution: Any = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
    return convolution(image.movedim(-1, 1), weight, bias, padding=1).movedim(1, -1).reshape(-1, weight.shape[0])


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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@shapes
def test_as_good_as_eager(size: list[int], dims: int, C: int, k: int, dtype: torch.dtype, level: str) -> None:  # noqa: F811
    check_as_good_as_eager(size, dims, C, k, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("size", "dims", "C", "k"),
    [shape for shape in SHAPES if shape[1] > 1]
    + [([2, 1, 8, 6], 2, 33, 96), ([1, 1, 5, 260], 2, 128, 16), ([1, 3, 3, 4], 3, 200, 64)],
    ids=str,
)
def test_winograd_is_as_good_as_eager(
    size: list[int],
    dims: int,
    C: int,
    k: int,
    dtype: torch.dtype,
    level: str,  # noqa: F811
    winograd: Callable[[str], None],
) -> None:
    """Tiles beyond an image's edge, slices beyond a volume's, rows of tiles that are cut into bands,
    sums that take more memory than tasks keep."""
    winograd("always")
    check_as_good_as_eager(size, dims, C, k, dtype)


def check_as_good_as_eager(size: list[int], dims: int, C: int, k: int, dtype: torch.dtype) -> None:
    for name, args, outputs, usual in zip(
        ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"),
        calls(size, dims, C, k),
        (FORWARD, BACKWARD),
        (eager_forward, eager_backward),
        strict=True,
    ):
        got = converted(Call(args, outputs), dtype)
        stored = Call({key: converted(Call(args, outputs), dtype)[key] for key in args}, outputs)
        eager, exact = converted(stored, dtype), converted(stored, F64)
        found, theirs = written(name, got, outputs), usual(eager)
        right = written(name, exact, outputs, plainly=True)
        if outputs is FORWARD:  # statistics are of the values as stored, and their errors no matter of the convolution
            mean, var = torch.empty(k, dtype=F64), torch.empty(k, dtype=F64)
            plain.channel_stats(found[0].double(), mean, var)
            torch.testing.assert_close(found[1].double(), mean, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(found[2].double(), var, rtol=1e-4, atol=1e-5)
            found, theirs, right = found[:1], theirs[:1], right[:1]
        # sums over few rows and channels may cancel: one of eager's may be right by chance
        least = 0.0 if dtype == F64 else 40 * torch.finfo(dtype).eps * (10 if C < 8 or len(got["x"]) < 50 else 1)
        assert_as_good(found, theirs, right, factor=2.0, floor=64.0, least=least)
        assert all(
            outside_is_untouched(value) for value in got.values() if isinstance(value, Tensor) and value.dim() == 2
        )


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
    winograd: Callable[[str], None],
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


# ---- which products --------------------------------------------------------------------------------------------------
NETWORKS = [shape for shape in conv3x3.shapes() if shape.image[0] > 4]


@pytest.mark.parametrize("shape", NETWORKS, ids=lambda shape: f"{shape.where}-{shape.image[0]}")
def test_winograd_where_networks_are_large(shape: conv3x3.Shape, winograd: Callable[[str], None]) -> None:
    """The estimate takes it there, and its outputs have no larger errors than direct sums."""
    layer = conv3x3.Layer(shape._replace(batch=min(shape.batch, 16)), torch.float32)
    outputs = {}
    for use in ("faster", "always", "never"):
        winograd(use)
        layer.ours()
        outputs[use] = layer.out.clone()
    assert torch.equal(outputs["faster"], outputs["always"])
    y = (layer.x.double() * (1 + 1e-5) ** -0.5).relu().view(layer.size[0], *shape.image, shape.C).movedim(-1, 1)
    conv = F.conv2d if len(shape.image) == 2 else F.conv3d
    exact = conv(y, layer.weight.double(), padding=1).movedim(1, -1).reshape(-1, shape.k)
    assert error(outputs["always"], exact) <= error(outputs["never"], exact)


def test_direct_sums_where_there_are_few_tiles(winograd: Callable[[str], None]) -> None:
    args, _ = calls([1, 1, 4, 4], 2, 64, 32)
    results = {}
    for use in ("faster", "always", "never"):
        winograd(use)
        results[use] = written("bn_relu_conv3x3", converted(Call(args, FORWARD), torch.float32), FORWARD)[0].clone()
    assert torch.equal(results["faster"], results["never"])
    assert not torch.equal(results["always"], results["never"])


def test_the_use_has_three_names() -> None:
    assert _extension.module is not None
    with pytest.raises(ValueError, match="expected 'faster', 'always' or 'never', got 'sometimes'"):
        _extension.module.set_winograd("sometimes")


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
def test_float32_is_multiplied_as_bfloat16_where_that_is_allowed(name: str) -> None:
    if _extension.module is None or _extension.module.simd_level() != "avx512_bf16":
        pytest.skip("this processor has no dot products of bfloat16")
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
