"""What stands between torch and the GPU's kernels (csrc/ops/cuda.h), over emulated kernels: errors, waiting, and how
much a block asks of the host."""

from __future__ import annotations

import ctypes
import itertools
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.values import BasicLayer
from tests.cuda.emulation.conv1x1 import TOLERANCE, compare
from tests.cuda.emulation.conv3x3 import wide
from tests.kernels.test_pools import check_sides_beyond_32_bits
from tests.support import helpers
from tests.support.helpers import F64, assert_equal, gradients, make_conv, make_input, make_layers, make_norm
from tests.support.kernel_calls import DTYPES, IMAGES, MAKERS, converted

ILLEGAL_ADDRESS, MEMORY_ALLOCATION = 700, 2  # cudaError_t


@pytest.fixture
def library(emulated_operators: SimpleNamespace) -> ctypes.CDLL:
    """The library that the operators lie in."""
    (path,) = (path for path in torch.ops.loaded_libraries if "emulated" in path)
    return ctypes.CDLL(path)


@pytest.fixture
def pretend(library: ctypes.CDLL) -> Iterator[Callable[..., None]]:
    """What the GPU answers from now on: ``pretend(error, capturing, no_memory)``."""

    def answer(error: int = 0, capturing: bool = False, no_memory: bool = False) -> None:
        library.dx_pretend(error, ctypes.c_bool(capturing), ctypes.c_bool(no_memory))

    yield answer
    answer()


def stats(ops: SimpleNamespace) -> tuple[Tensor, Tensor]:
    x = torch.arange(2400.0).view(800, 3)  # of several slabs: with fewer rows it needs no workspace
    mean, var = torch.zeros(3), torch.zeros(3)
    ops.channel_stats(x, mean, var)
    return mean, var


@pytest.mark.parametrize("error", [0, MEMORY_ALLOCATION])
def test_a_full_memory_is_torchs_own_error(emulated_operators: SimpleNamespace, pretend, error: int) -> None:
    pretend(error, no_memory=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. densenet_ext: channel_stats tried .* \d+ b"):
        stats(emulated_operators)
    pretend()
    mean, _ = stats(emulated_operators)
    assert mean.tolist() == [1198.5, 1199.5, 1200.5]


def test_pools_refuse_sides_beyond_32_bits(emulated_operators: SimpleNamespace) -> None:
    check_sides_beyond_32_bits(emulated_operators)


def test_an_earlier_fault_is_no_full_memory(emulated_operators: SimpleNamespace, pretend) -> None:
    pretend(ILLEGAL_ADDRESS, no_memory=True)
    with pytest.raises(RuntimeError, match="channel_stats: no workspace, since a kernel before it failed") as caught:
        stats(emulated_operators)
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_a_fault_is_named_where_it_is_made(emulated_operators: SimpleNamespace, pretend, monkeypatch) -> None:
    pretend(ILLEGAL_ADDRESS)
    stats(emulated_operators)  # nobody asks
    monkeypatch.setenv("DENSENET_EXT_SYNC", "1")
    with pytest.raises(RuntimeError, match="densenet_ext: channel_stats: CUDA error"):
        stats(emulated_operators)
    pretend(ILLEGAL_ADDRESS, capturing=True)
    stats(emulated_operators)  # what a graph records cannot be waited for
    pretend(ILLEGAL_ADDRESS)
    monkeypatch.setenv("DENSENET_EXT_SYNC", "0")
    stats(emulated_operators)


def launches_of_backward(library: ctypes.CDLL, count: int, conv2: bool) -> int:
    """How many kernels the gradients of a block of ``count`` layers take; with those of the 3x3 convolutions or not."""
    layers = make_layers(count=count, dtype=torch.float32)
    inputs = [t for layer in layers for t in (*layer.norm1[:2], layer.conv1, *layer.norm2[:2])]
    inputs += [layer.conv2 for layer in layers] if conv2 else []
    out, _ = dense_block(make_input(2, 5, 4, 4, dtype=torch.float32), layers)
    before = library.dx_launches()
    torch.autograd.grad(out.sum(), inputs)
    return library.dx_launches() - before


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_the_gradient_of_a_3x3_weight_takes_no_kernel_of_its_own(backend: str, library: ctypes.CDLL) -> None:
    """relu(bn2(z)), which it needs, comes out of the kernel that takes norm2's sums."""
    for count in (1, 3):
        assert launches_of_backward(library, count, conv2=True) == launches_of_backward(library, count, conv2=False)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_3x3_weights_are_copied_once_for_all_layers(backend: str, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Into the features' dtype and channels_last, and their gradients back: not by a copy for each layer."""

    def calls() -> Counter[str]:
        names = ("convolution", "convolution_backward", "copy_", "to", "contiguous")
        return Counter({name: library.dx_torch_calls(f"aten::{name}".encode()) for name in names})

    def asked_for(count: int) -> tuple[Counter[str], Counter[str]]:
        layers = make_layers(count=count, dtype=torch.float32)
        x = make_input(2, 5, 4, 4, dtype=dtype)
        before = calls()
        out, _ = dense_block(x, layers)
        between = calls()
        torch.autograd.grad(out.sum(), [x, *(t for layer in layers for t in (layer.conv1, layer.conv2))])
        return between - before, calls() - between

    (forward, backward), (more_forward, more_backward) = asked_for(1), asked_for(3)
    assert more_forward - forward == Counter(convolution=2)
    assert more_backward - backward == Counter(convolution_backward=4)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize(
    ("save", "size", "copies", "writes"),
    [
        ("bottlenecks", 8, 2, 2),  # all but the last where the last z will be, and the last; three gradients wait
        ("features", 8, 1, 2),
        ("bottlenecks", 2, 4, 4),  # nowhere is room, and no gradient waits for another
        ("features", 2, 4, 4),
    ],
)
def test_3x3_weights_are_copied_by_few_kernels_and_take_no_memory_of_their_own(
    backend: str, library: ctypes.CDLL, save: str, size: int, copies: int, writes: int
) -> None:
    """Held against weights that need no copy, as they are channels_last and float32: the same bits."""
    layers = make_layers(16, 8, 32, 4, dtype=torch.float32)
    x = make_input(8, 16, size, size, dtype=torch.float32)
    x = x.detach().contiguous(memory_format=torch.channels_last).requires_grad_()

    def run(format: torch.memory_format, frozen: bool) -> tuple[int, int, list[Tensor]]:
        """Kernels forward and backward; the output and the gradients."""
        own = [layer.conv2.detach().contiguous(memory_format=format).requires_grad_(not frozen) for layer in layers]
        before = library.dx_launches()
        out, _ = dense_block(x, [layer._replace(conv2=w) for layer, w in zip(layers, own, strict=True)], save)
        between = library.dx_launches()
        wanted = [x, *(layer.conv1 for layer in layers), *(() if frozen else own)]
        grads = torch.autograd.grad(out.square().sum(), wanted)
        return between - before, library.dx_launches() - between, [out.detach(), *grads]

    asked, frozen = run(torch.contiguous_format, False), run(torch.contiguous_format, True)
    no_copies, no_gradients = run(torch.channels_last, False), run(torch.channels_last, True)
    assert asked[0] - no_copies[0] == frozen[0] - no_gradients[0] == copies
    assert asked[1] - no_copies[1] == 1  # all where their gradients will be
    assert frozen[1] - no_gradients[1] == 4  # one at a time
    assert no_copies[1] - no_gradients[1] == writes
    for found, expected in ((asked, no_copies), (frozen, no_gradients)):
        for mine, theirs in zip(found[2], expected[2], strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize(
    ("size", "forward", "backward"),
    [
        # Many rows for each multiprocessor, as in training: workspaces lie in the scratch for relu(bn2(z)), but the one
        # of the kernel that writes that.
        (16, {"aten::convolution": 1}, {"aten::convolution_backward": 2, "aten::new_empty": 1}),
        # Few rows: the 1x1 convolution's take more than that scratch, sums need none.
        (2, {"aten::convolution": 1, "aten::new_empty": 2}, {"aten::convolution_backward": 2, "aten::new_empty": 1}),
    ],
)
def test_what_a_layer_asks_of_torch(
    backend: str, library: ctypes.CDLL, size: int, forward: dict[str, int], backward: dict[str, int], monkeypatch
) -> None:
    """Calls through the dispatcher, each some microseconds of the host, and kernels, for every further layer."""
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    names = ("convolution", "convolution_backward", "new_empty", "new_zeros", "copy_", "to", "contiguous", "mul")

    def state() -> Counter[str]:
        calls = {f"aten::{name}": library.dx_torch_calls(f"aten::{name}".encode()) for name in names}
        return Counter(calls, kernels=library.dx_launches())

    def asked_for(count: int) -> tuple[Counter[str], Counter[str]]:
        layers = make_layers(8, 4, 16, count, dtype=torch.float32)
        x = make_input(8, 8, size, size, dtype=torch.float32)
        before = state()
        out, _ = dense_block(x, layers)
        between = state()
        torch.autograd.grad(out.sum(), [x, *(t for layer in layers for t in (layer.conv1, layer.conv2))])
        return between - before, state() - between

    (few_forward, few_backward), (more_forward, more_backward) = asked_for(2), asked_for(4)
    one_forward = {name: calls / 2 for name, calls in (more_forward - few_forward).items()}
    one_backward = {name: calls / 2 for name, calls in (more_backward - few_backward).items()}
    assert one_forward.pop("kernels") <= 7 and one_backward.pop("kernels") <= 7
    assert one_forward == forward and one_backward == backward


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize(
    ("case", "forward", "backward"),
    [
        ({}, 5, 6),
        ({"save": "features"}, 5, 8),
        ({"batch": (False, True)}, 6, 6),  # norm1 reads nothing of what the layer before has summed up
        ({"batch": (True, False)}, 4, 7),  # norm2's sums are gradients, but no part of dz
        ({"bias": True}, 5, 7),  # PyTorch reads the sums
        ({"inner_drop_rate": 0.3}, 6, 9),
    ],
    ids=str,
)
def test_sums_are_merged_by_the_kernel_that_reads_them(
    backend: str, library: ctypes.CDLL, case: dict[str, Any], forward: int, backward: int
) -> None:
    """Of several slabs of rows: kernels for a further layer, backward with one that writes a 3x3 weight's gradient; and
    the numbers, held against plain PyTorch's. ``batch``: of all layers but the first."""
    case = dict(case)
    modes, bias, save = case.pop("batch", (True, True)), case.pop("bias", False), case.pop("save", "bottlenecks")

    def run(count: int) -> list[Tensor]:
        """Kernels forward and backward, and results."""
        torch.manual_seed(4)
        layers = make_layers(5, 13, 21, count, batch=(True, modes[1], *modes * (count - 1)))
        if bias:
            case["conv1_bias"] = torch.randn(21, dtype=F64, requires_grad=True)
        layers = [layer._replace(**case) for layer in layers]
        x = make_input(2, 5, 16, 16)
        launched.append(library.dx_launches())
        out = helpers.dense_block(x, layers, save=save)
        launched.append(library.dx_launches())
        found = gradients(out, [x, *helpers.parameters(layers)], torch.ones_like(out).cumsum(1) / 9)
        launched.append(library.dx_launches())
        return [out, *found, *(t for t in helpers.buffers(helpers.norms_of(layers)) if t.is_floating_point())]

    launched: list[int] = []
    run(2)
    got = run(3)
    few, many = [[b - a for a, b in itertools.pairwise(some)] for some in (launched[:3], launched[3:])]
    with kernels.force_plain():
        assert_equal(got, run(3), 1e-9)
    assert [b - a for a, b in zip(few, many, strict=True)] == [forward, backward]


# ---- our 3x3 convolution, where it is asked for ----------------------------------------------------------------------

BLOCKS = [
    {},
    {"save": "features", "drop_rate": 0.3},
    {"batch": False, "affine": False},
    {"batch": False, "grad": False},  # frozen norms that are folded on a GPU
    {"dims": 1},
    {"dims": 3, "dtype": torch.bfloat16},
    {"basic": True, "drop_rate": 0.3},
    {"basic": True, "grad_x": False, "dims": 3},
]


def run_block(
    basic: bool = False, save: str = "bottlenecks", dims: int = 2, dtype: torch.dtype = F64, drop_rate: float = 0.0,
    grad: bool = True, grad_x: bool = True, **norm: Any,
) -> list[Tensor]:  # fmt: skip
    """The features of a small block, all gradients and running statistics; the same block and dropout in every call."""
    torch.manual_seed(3)
    x = make_input(2, 5, *[4, 5, 3][:dims], dtype=dtype, grad=grad and grad_x)
    if basic:
        layers: list[Any] = [
            BasicLayer(make_norm(5 + 3 * i, **norm), make_conv(3, 5 + 3 * i, dims, 3), drop_rate) for i in range(3)
        ]
        norms = [layer.norm for layer in layers]
        inputs = [t for layer in layers for t in (*layer.norm[:2], layer.conv) if t is not None]
    else:
        acc = kernels.acc_dtype(dtype)
        layers = make_layers(dims=dims, dtype=acc, drop_rate=drop_rate, **norm)
        norms, inputs = helpers.norms_of(layers), helpers.parameters(layers)
    run = helpers.basic_block if basic else helpers.dense_block
    with torch.set_grad_enabled(grad):
        out = run(x, layers, **({} if basic else {"save": save}))
    found = gradients(out, [x, *inputs] if grad_x else inputs, torch.ones_like(out).cumsum(1) / 9) if grad else []
    return [t for t in (out, *found, *helpers.buffers(norms)) if t.is_floating_point()]


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_a_block_runs_our_3x3_convolution_where_it_is_asked_to(
    backend: str, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch, case: dict[str, Any]
) -> None:
    def convolutions() -> int:
        return sum(library.dx_torch_calls(f"aten::convolution{name}".encode()) for name in ("", "_backward"))

    before = convolutions()
    cudnn = run_block(**case)
    between = convolutions()
    monkeypatch.setenv("DENSENET_EXT_CONV3X3", "ours")
    ours = run_block(**case)
    assert between > before and convolutions() == between
    with kernels.force_plain():
        plain = run_block(**case)
    if case.get("dtype", F64) == F64:
        assert_equal(ours, plain, 1e-9)
    else:
        helpers.assert_as_good(ours, cudnn, [t.to(F64) for t in run_block(**case | {"dtype": F64})], 3.0, 64.0)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_nothing_is_ours_before_it_was_measured(
    backend: str, library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The table of conv3x3_choice.cu is empty; what does not fit stays PyTorch's whatever is asked."""

    def convolutions() -> int:
        before = library.dx_torch_calls(b"aten::convolution")
        dense_block(make_input(1, 5, 2, 3), make_layers(count=1))
        return library.dx_torch_calls(b"aten::convolution") - before

    assert convolutions() == 1
    monkeypatch.setenv("DENSENET_EXT_CONV3X3", "cudnn")
    assert convolutions() == 1
    monkeypatch.setenv("DENSENET_EXT_CONV3X3", "ours")
    assert convolutions() == 0
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(48 * 1024))
    assert convolutions() == 1


def test_an_operator_says_that_lines_are_too_long(emulated_operators: SimpleNamespace, monkeypatch) -> None:
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(48 * 1024))
    weight = torch.randn(4, 8, 3, 3)
    with pytest.raises(RuntimeError, match="bn_relu_conv3x3: size: expected lines for which .* got ones of 700 pixels"):
        emulated_operators.bn_relu_conv3x3(
            *(torch.randn(1400, 8), [1, 1, 2, 700], *[None] * 4, 1e-5, weight, None, 0.0, None, 0, 1),
            *(torch.empty(1400, 4), None, None),
        )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", ["bn_relu_conv3x3", "bn_relu_conv3x3_backward"])
def test_every_form_of_the_3x3_convolution(emulated_operators: SimpleNamespace, name: str, dtype: torch.dtype) -> None:
    """1-D to 3-D, slices of wider rows, without norm, statistics, dropout or any of the results.

    Every form with half of the images, and the other half in another dtype: a wide and a narrow one see each pair.
    """
    calls = MAKERS[name](0, 20, True)
    forms = len(calls) // len(IMAGES)
    for i, call in enumerate(calls):
        image, form = divmod(i, forms)
        if (image + form + DTYPES.index(dtype)) % 2 != 0:
            continue
        got = converted(call, dtype)
        exact = {key: wide(value) for key, value in converted(call, dtype).items()}
        getattr(emulated_operators, name)(*got.values())
        getattr(kernels.plain, name)(*exact.values())
        if got.get("out_mean") is not None:
            kernels.plain.channel_stats(got["out"].double(), exact["out_mean"], exact["out_var"])
        for key in call.outputs:
            if got[key] is not None:
                compare(key, got[key], exact[key], 4 * TOLERANCE[dtype])
