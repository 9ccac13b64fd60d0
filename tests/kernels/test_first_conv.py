"""The kernel of a network's first convolution against PyTorch's own: every dtype, layout and SIMD level, odd windows
and images, and its refusals."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext import _extension, kernels
from densenet_ext.algorithm.layout import new_features
from tests.kernels.operator_abuse import freed, misaligned, shortened
from tests.kernels.test_kernels import level, threads
from tests.support.helpers import DEVICE, F64, assert_as_good
from tests.support.kernel_calls import DTYPES

__all__ = ["level", "threads"]  # fixtures
pytestmark = pytest.mark.skipif(
    _extension.module is None or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)
CONVOLUTIONS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}

# Spatial sizes of the images, their channels, output channels, window, stride, padding.
Case = tuple[tuple[int, ...], int, int, tuple[int, ...], tuple[int, ...], tuple[int, ...]]
CASES: list[Case] = [
    ((32, 32), 3, 24, (3, 3), (1, 1), (1, 1)),  # DenseNet-BC on CIFAR
    ((37, 41), 3, 64, (7, 7), (2, 2), (3, 3)),  # DenseNet-121, on a small odd image
    ((9, 13), 1, 16, (5, 5), (1, 1), (2, 2)),
    ((9, 13), 1, 1, (1, 1), (1, 1), (0, 0)),
    ((8, 7), 5, 33, (1, 1), (2, 3), (0, 1)),
    ((11, 29), 2, 17, (3, 5), (3, 1), (0, 4)),
    ((29, 11), 4, 48, (4, 2), (2, 2), (1, 0)),
    ((5, 50), 6, 96, (3, 3), (1, 1), (1, 1)),
    ((7, 7), 7, 70, (7, 7), (1, 1), (0, 0)),  # one output
    ((3, 2), 3, 10, (7, 7), (2, 2), (3, 3)),  # images smaller than what is padded
    ((1, 1), 8, 12, (5, 5), (1, 1), (2, 2)),
    ((2, 3), 3, 5, (2, 2), (1, 2), (4, 5)),  # windows of nothing but padding
    ((6, 90), 3, 130, (2, 9), (1, 4), (1, 0)),
    ((61,), 3, 24, (7,), (2,), (3,)),
    ((61,), 1, 9, (4,), (1,), (2,)),
    ((6, 7, 9), 1, 20, (3, 3, 3), (1, 1, 1), (1, 1, 1)),
    ((6, 7, 9), 3, 33, (5, 3, 7), (2, 1, 2), (2, 1, 3)),
    ((2, 9, 5), 2, 8, (3, 1, 2), (1, 2, 1), (2, 0, 1)),
]
ids = [f"{C} channels of {'x'.join(map(str, spatial))}, {window}" for spatial, C, _, window, _, _ in CASES]


def result_size(x: Tensor, weight: Tensor, stride: Sequence[int], padding: Sequence[int]) -> list[int]:
    sizes = zip(x.shape[2:], weight.shape[2:], stride, padding, strict=True)
    return [x.shape[0], weight.shape[0], *((n + 2 * p - w) // s + 1 for n, w, s, p in sizes)]


def computed(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: Sequence[int], padding: Sequence[int], dtype: torch.dtype
) -> Tensor:
    """The operator's result of ``dtype``, in some columns of a buffer of which the others stay what they are."""
    size = result_size(x, weight, stride, padding)
    buffer = new_features(x, [size[0], size[1] + 5, *size[2:]], dtype).fill_(7)
    out = buffer[:, 3 : 3 + size[1]]
    out.fill_(float("nan"))
    torch.ops.densenet_ext.first_conv(x, weight, bias, stride, padding, out)
    assert (buffer[:, :3] == 7).all() and (buffer[:, 3 + size[1] :] == 7).all()
    return out


def tensors(case: Case, dtype: torch.dtype, batch: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    """Images, weight and bias as ``dtype`` has them."""
    spatial, C, out, window, _, _ = case
    weight = torch.randn(out, C, *window, dtype=F64) / (C * torch.Size(window).numel()) ** 0.5
    return torch.randn(batch, C, *spatial, dtype=F64).to(dtype), weight.to(dtype), torch.randn(out, dtype=F64).to(dtype)


def check(got: Tensor, case: Case, x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Judges a result by the error of PyTorch's own convolution of tensors in its dtype."""
    convolution, geometry = CONVOLUTIONS[x.dim() - 2], case[4:]
    wide = [None if t is None else t.double() for t in (x, weight, bias)]
    low = [None if t is None else t.to(got.dtype) for t in (x, weight, bias)]
    exact, eager = convolution(*wide, *geometry), convolution(*low, *geometry)  # type: ignore[arg-type]
    if got.dtype == F64:
        torch.testing.assert_close(got, exact, rtol=1e-12, atol=1e-12)
    else:
        assert_as_good([got], [eager], [exact])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_is_pytorchs_convolution(case: Case, dtype: torch.dtype, level: str) -> None:
    x, weight, bias = tensors(case, dtype)
    for added in (None, bias.to(kernels.acc_dtype(dtype))):
        check(computed(x, weight, added, *case[4:], dtype), case, x, weight, added)


def test_long_sums_are_made_of_parts(level: str) -> None:
    """A sum of 343 products, one after another, would have a larger error: it is rounded 343 times at its full size."""
    x, weight, _ = tensors(((7, 7, 7), 1, 512, (7, 7, 7), (1, 1, 1), (0, 0, 0)), torch.float32)
    got = computed(x, weight, None, (1, 1, 1), (0, 0, 0), torch.float32).flatten(1)
    exact = x.double().flatten(1) @ weight.double().flatten(1).T
    chain = torch.zeros(2, 512)
    for column, weights in zip(x.flatten(1).T, weight.flatten(1).T, strict=True):
        chain += column[:, None] * weights
    assert (got - exact).norm() < 0.85 * (chain - exact).norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=ids)
def test_converts_float32_as_it_reads(case: Case, dtype: torch.dtype, level: str) -> None:
    """What autocast would cast first, images or weight or both."""
    x, weight, bias = tensors(case, torch.float32)
    for images, w in ((x, weight), (x, weight.to(dtype)), (x.to(dtype), weight)):
        check(computed(images, w, bias, *case[4:], dtype), case, images, w, bias)


def layouts(x: Tensor) -> dict[str, Tensor]:
    """x [N, C, *spatial] in every kind of memory."""
    wide = new_features(x, (x.shape[0], x.shape[1] + 3, *x.shape[2:]))
    wide[:, 2 : 2 + x.shape[1]] = x
    cropped = new_features(x, (*x.shape[:-1], x.shape[-1] + 4))
    cropped[..., 1 : 1 + x.shape[-1]] = x
    larger = torch.zeros(2 * x.shape[0], *x.shape[1:-1], 2 * x.shape[-1], dtype=x.dtype)
    larger[::2, ..., ::2] = x
    return {
        "channels_last": new_features(x, x.shape).copy_(x),
        "contiguous": x.contiguous(),
        "columns of a buffer": wide[:, 2 : 2 + x.shape[1]],
        "cropped": cropped[..., 1 : 1 + x.shape[-1]],
        "every other pixel": larger[::2, ..., ::2],
        "transposed": x.transpose(0, -1).contiguous().transpose(0, -1),
    }


@pytest.mark.parametrize("case", [CASES[1], CASES[5], CASES[13], CASES[16]], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_any_layout_gives_the_same_bits(case: Case, dtype: torch.dtype, level: str) -> None:
    x, weight, bias = tensors(case, torch.float32, batch=3)
    expected = computed(x, weight, bias, *case[4:], dtype)
    for name, images in layouts(x).items():
        assert torch.equal(computed(images, weight, bias, *case[4:], dtype), expected), name
    turned = weight.movedim(1, -1).contiguous().movedim(-1, 1)
    assert torch.equal(computed(x, turned, bias, *case[4:], dtype), expected)
    one = x[:1].expand(3, *x.shape[1:])
    assert torch.equal(computed(one, weight, bias, *case[4:], dtype)[2], expected[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_give_the_same_bits(dtype: torch.dtype, level: str, threads: Callable[[int], None]) -> None:
    for case in (CASES[1], ((50, 40), 3, 24, (3, 3), (1, 1), (1, 1)), CASES[16]):
        x, weight, bias = tensors(case, dtype, batch=5)
        results = []
        for count in (1, 2, 3):
            threads(count)
            results.append(computed(x, weight, bias.to(kernels.acc_dtype(dtype)), *case[4:], dtype))
        assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_is_not_finite_stays_in_its_windows(bad: float, dtype: torch.dtype, level: str) -> None:
    """Of an odd count of numbers the last one is multiplied with a zero beside it, whatever follows in memory."""
    for case, (row, column) in product((CASES[0], CASES[1], CASES[5]), ((0, 0), (5, 7), (8, 12))):
        x, weight, _ = tensors(case, dtype)
        x[1, 0, row, column] = bad
        got = computed(layouts(x)["channels_last"], weight, None, *case[4:], dtype)
        expected = F.conv2d(x.double(), weight.double(), None, *case[4:])
        assert torch.equal(got.isfinite(), expected.isfinite())


def test_no_images_and_no_outputs_write_nothing() -> None:
    x, weight = torch.randn(0, 3, 8, 8), torch.randn(4, 3, 3, 3)
    assert computed(x, weight, None, [1, 1], [1, 1], torch.float32).shape == (0, 4, 8, 8)
    assert computed(torch.randn(2, 3, 8, 8), weight[:0], None, [1, 1], [1, 1], torch.float32).shape == (2, 0, 8, 8)


def test_opcheck() -> None:
    x, weight, bias = tensors(CASES[0], torch.float32)
    out = new_features(x, (2, 24, 32, 32))
    arguments = (x, weight, bias, [1, 1], [1, 1], out)
    torch.library.opcheck(torch.ops.densenet_ext.first_conv.default, arguments)


# ---- refusals --------------------------------------------------------------------------------------------------------


def arguments(**changed: Any) -> dict[str, Any]:
    own = {
        "x": torch.randn(2, 3, 8, 9),
        "conv_weight": torch.randn(4, 3, 3, 3),
        "conv_bias": torch.randn(4),
        "stride": [2, 1],
        "padding": [1, 1],
        "out": new_features(torch.empty(0), (2, 4, 4, 9)),
    }
    return {**own, **changed}


HUGE = 2**63 - 1


def refused() -> Iterator[tuple[str, Any, str]]:
    """An argument, what it is given, and the words of the error."""
    own = arguments()
    x, weight, bias, out = own["x"], own["conv_weight"], own["conv_bias"], own["out"]
    yield "x", x[0], "conv_weight: expected shape \\[O, 8, \\*window\\] of 3 dimensions"
    yield "x", x[:, 0, 0], "x: expected images \\[N, C, \\*spatial\\]"
    yield "x", x[:, :0], "x: expected images .* of at least one channel"
    yield "x", x[:, :2], "conv_weight: expected shape \\[O, 2, \\*window\\]"
    yield "x", x[:1], "out: expected size 1 in dimension 0"
    yield "x", x[..., :0], "conv_weight: expected windows"
    yield "x", x.double(), "x: expected dtype Float"
    yield "x", x.half(), "x: expected dtype Float"
    yield "x", freed(x), "x: expected storage"
    yield "x", shortened(x), "x: expected storage"
    yield "x", misaligned(x), "x: expected storage aligned"
    yield "conv_weight", weight[0], "conv_weight: expected shape"
    yield "conv_weight", weight[..., :0], "conv_weight: expected windows of at least one pixel"
    yield "conv_weight", torch.randn(4, 3, 3, 12), "conv_weight: expected windows .* at most the padded images"
    yield "conv_weight", torch.randn(4, 3, 3, 6)[..., ::2], "conv_weight: expected contiguous or channels_last"
    yield "conv_weight", weight.double(), "conv_weight: expected dtype Float"
    yield "conv_weight", weight[:3], "out: expected size 3 in dimension 1"
    yield "conv_weight", freed(weight), "conv_weight: expected storage"
    yield "conv_bias", bias[:3], "conv_bias: expected 4 contiguous elements"
    yield "conv_bias", bias.double(), "conv_bias: expected dtype Float"
    yield "stride", [1], "stride: expected 2 numbers"
    yield "stride", [1, 1, 1], "stride: expected 2 numbers"
    yield "stride", [0, 1], "stride: expected numbers of at least 1"
    yield "stride", [HUGE, 1], "stride: expected at most"
    yield "stride", [1, 1], "out: expected size 8 in dimension 2"
    yield "padding", [1], "padding: expected 2 numbers"
    yield "padding", [-1, 1], "padding: expected numbers of at least 0"
    yield "padding", [1, HUGE], "padding: expected at most"
    yield "padding", [0, 1], "out: expected size 3 in dimension 2"
    yield "out", out.contiguous(), "out: expected images in channels_last memory"
    yield "out", out[0], "out: expected 4 dimensions"
    yield "out", out.double(), "x: expected dtype Double"
    yield "out", out.int(), "out: expected float32, float64, bfloat16 or float16"
    lost = out.clone(memory_format=torch.channels_last)
    lost.untyped_storage().resize_(0)
    yield "out", lost, "out: expected storage"
    for name in ("x", "conv_weight", "out"):
        yield name, None, f"{name}: expected a tensor|argument '{name}'"
        yield name, own[name].to("meta"), "expected a tensor on (cpu|meta) as the other arguments"


@pytest.mark.parametrize(("name", "value", "words"), list(refused()))
def test_absurd_arguments_are_named(name: str, value: Any, words: str) -> None:
    torch.ops.densenet_ext.first_conv(**arguments())
    with pytest.raises(RuntimeError, match=words):
        torch.ops.densenet_ext.first_conv(**arguments(**{name: value}))


def test_results_may_not_lie_on_what_is_read() -> None:
    memory = torch.randn(2 * 3 * 8 * 9)
    x = memory.view(2, 8, 9, 3).permute(0, 3, 1, 2)
    out = memory[: 2 * 3 * 8 * 9].view(2, 8, 9, 3).permute(0, 3, 1, 2)
    with pytest.raises(RuntimeError, match="out: expected storage apart from that of x, got an overlap"):
        torch.ops.densenet_ext.first_conv(x, torch.randn(3, 3, 3, 3), None, [1, 1], [1, 1], out)
