"""A block as one operation each way, against the same block layer by layer, and its refusals."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm import whole
from densenet_ext.algorithm.basic_block import basic_block
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.values import BasicLayer
from tests.support.covering import pairs
from tests.support.helpers import DEVICE, F64, make_conv, make_input, make_layers, make_norm

OPTIONS: dict[str, dict[str, Any]] = {
    "the usual": {},
    "frozen norms": {"batch": False},
    "some frozen": {"batch": [True, False, False, True, True, False]},
    "no affine": {"affine": False},
    "volumes": {"dims": 3},
    "lines": {"dims": 1},
}
DROPS: dict[str, dict[str, Any]] = {
    "no dropout": {},
    "values": {"drop_rate": 0.4, "inner_drop_rate": 0.3},
    "channels": {"drop_rate": 0.4, "drop_channels": True, "inner_drop_rate": 0.3, "inner_drop_channels": True},
}
SPATIAL = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}


@pytest.fixture
def by_layers(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function with the blocks' operations left out."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(whole, "operation", lambda *_: None)
            return function()

    return run


def outcome(block: Callable[..., Any], x: Tensor, layers: Any, inputs: list[Tensor], **options: Any) -> list[Tensor]:
    """Output, statistics and every gradient, from the same draws of dropout."""
    torch.manual_seed(3)
    out, stats = block(x, layers, **options)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    found = [g for g in torch.autograd.grad(out, inputs, grad, allow_unused=True) if g is not None]
    with torch.no_grad():
        torch.manual_seed(3)
        again = block(x, layers, **options)[0]
    return [out, *(stats or ()), *found, again]


def assert_close(got: list[Tensor], expected: list[Tensor], exact: bool) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b) if exact else (a - b).abs().max() <= 1e-11 * (1 + b.abs().max())


# In the emulator, where a case takes ten times as long, each pair of values.
SAVE = ("bottlenecks", "features")
CASES = [("compiled", *case) for case in itertools.product(OPTIONS, DROPS, SAVE)]
CASES += [("emulated", *case) for case in pairs(OPTIONS, DROPS, SAVE)]


@pytest.mark.parametrize(("backend", "options", "drops", "save"), CASES, indirect=["backend"])
def test_a_dense_block_is_its_layers(options: str, drops: str, save: str, backend: str, by_layers: Any) -> None:
    layers = [layer._replace(**DROPS[drops]) for layer in make_layers(**OPTIONS[options])]
    dims = OPTIONS[options].get("dims", 2)
    x = make_input(3, 5, *SPATIAL[dims])
    inputs = [x, *(t for layer in layers for t in (*layer.norm1[:2], layer.conv1, *layer.norm2[:2], layer.conv2))]
    inputs = [t for t in inputs if t is not None]
    for new_first in (False, True):
        run = lambda: outcome(dense_block, x, layers, inputs, save=save, new_first=new_first)  # noqa: B023, E731
        # on the GPU the convolution is PyTorch's either way, so that not a bit differs
        assert_close(run(), by_layers(run), exact=backend == "emulated")


@pytest.mark.parametrize("backend", ["compiled", "emulated"], indirect=True)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("drops", DROPS)
def test_biases_are_parameters_too(drops: str, batch: bool, backend: str, by_layers: Any) -> None:
    layers = [layer._replace(**DROPS[drops]) for layer in make_layers(batch=batch)]
    layers = [
        layer._replace(
            conv1_bias=torch.randn(6, dtype=F64, requires_grad=True),
            conv2_bias=torch.randn(3, dtype=F64, requires_grad=True),
        )
        for layer in layers
    ]
    x = make_input(2, 5, 4, 3)
    inputs = [x, *(t for layer in layers for t in (layer.conv1_bias, layer.conv2_bias) if t is not None)]
    run = lambda: outcome(dense_block, x, layers, inputs)  # noqa: E731
    assert_close(run(), by_layers(run), exact=backend == "emulated")


@pytest.mark.parametrize("backend", ["compiled", "emulated"], indirect=True)
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("drops", ["no dropout", "values", "channels"])
def test_a_basic_block_is_its_layers(drops: str, batch: bool, backend: str, by_layers: Any) -> None:
    rates = {name: value for name, value in DROPS[drops].items() if not name.startswith("inner")}
    layers = [BasicLayer(make_norm(C, batch=batch), make_conv(3, C, 2, 3), 0.0)._replace(**rates) for C in (5, 8, 11)]
    x = make_input(2, 5, 4, 3)
    inputs = [x, *(t for layer in layers for t in (*layer.norm[:2], layer.conv) if t is not None)]
    for new_first in (False, True):
        run = lambda: outcome(basic_block, x, layers, inputs, new_first=new_first)  # noqa: B023, E731
        # gm and gv are summed by a kernel there, by PyTorch's operations here
        assert_close(run(), by_layers(run), exact=backend == "emulated")


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("backend", ["compiled", "emulated"], indirect=True)
def test_kernels_of_other_sizes_are_pytorchs(size: int, backend: str, by_layers: Any) -> None:
    layers = [
        layer._replace(conv2=torch.randn(3, 6, size, size, dtype=F64, requires_grad=True)) for layer in make_layers()
    ]
    x = make_input(2, 5, 4, 3)
    run = lambda: outcome(dense_block, x, layers, [x, *(layer.conv2 for layer in layers)])  # noqa: E731
    assert_close(run(), by_layers(run), exact=True)


@pytest.mark.parametrize("asked", ["the input", "the last convolution", "the first norm", "the middle's bottleneck"])
@pytest.mark.parametrize("backend", ["compiled", "emulated"], indirect=True)
def test_only_what_is_asked_for(asked: str, backend: str, by_layers: Any) -> None:
    layers = [
        layer._replace(
            norm1=layer.norm1._replace(weight=layer.norm1.weight.detach(), bias=layer.norm1.bias.detach()),
            norm2=layer.norm2._replace(weight=layer.norm2.weight.detach(), bias=layer.norm2.bias.detach()),
            conv1=layer.conv1.detach(),
            conv2=layer.conv2.detach(),
        )
        for layer in make_layers()
    ]
    x = make_input(2, 5, 4, 3, grad=False)
    wanted = {
        "the input": x,
        "the last convolution": layers[-1].conv2,
        "the first norm": layers[0].norm1.weight,
        "the middle's bottleneck": layers[1].conv1,
    }[asked]
    wanted.requires_grad_()
    run = lambda: outcome(dense_block, x, layers, [wanted])[:-1]  # noqa: E731
    assert_close(run(), by_layers(run), exact=backend == "emulated")


LAYERS: dict[str, Any] = {
    "tensors": [torch.ones(2), torch.ones(3, 2, 1, 1), torch.ones(2, 3, 3, 3)],
    "given": [1 | 1 << 4 | 1 << 10],
    "batch_stats": [True, True],
    "eps": [1e-5, 1e-5],
    "drop_rates": [0.0],
    "drop_channels": [False],
    "inner_drop_rates": [0.0],
    "inner_drop_channels": [False],
    "new_first": False,
}


def call(**changed: Any) -> None:
    own = {
        "x": torch.zeros(4, 2),
        "size": [1, 2, 2],
        "seed": None,
        "out": torch.zeros(4, 4),
        "z": torch.zeros(12),
        "mean": torch.zeros(4),
        "var": torch.zeros(4),
        "z_mean": torch.zeros(3),
        "z_var": torch.zeros(3),
        "scratch": torch.zeros(64),
    }
    of_layers = {name: value for name, value in changed.items() if name in LAYERS}
    layers = torch.ops.densenet_ext.keep_layers(**{**LAYERS, **of_layers})
    own = {"layers": layers, **own, **{name: value for name, value in changed.items() if name not in LAYERS}}
    try:
        torch.ops.densenet_ext.dense_layers(**own)
    finally:
        torch.ops.densenet_ext.drop_kept(layers)


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")
@pytest.mark.parametrize(
    ("argument", "value", "words"),
    [
        ("size", [1, 2], "out: expected shape"),
        ("size", [1, 0, 2], "size: expected images of at least one pixel"),
        ("size", [4], "size: expected .N, .spatial."),
        ("layers", -1, "layers: expected the number of tensors that are kept, got -1"),
        ("given", [1 | 1 << 4], "tensors: expected 2 tensors, got 3"),
        ("given", [1 << 12], "tensors: expected bits for 12 tensors"),
        ("given", [1 | 1 << 1 | 1 << 10], "tensors: expected the convolutions of layer 0, got None"),
        ("batch_stats", [True], "batch_stats: expected 2 entries, got 1"),
        ("batch_stats", [False, True], "running statistics: expected those of frozen norm 0"),
        ("eps", [1e-5, float("nan")], "eps: expected a finite number"),
        ("drop_rates", [0.5], "seed: expected an int64 tensor"),
        ("drop_rates", [2.0], r"drop_rates: expected numbers in \[0, 1\]"),
        ("out", torch.zeros(4, 5), "mean: expected 5 contiguous elements"),
        ("out", torch.zeros(4, 3), "mean: expected 3 contiguous elements"),
        ("x", torch.zeros(4, 3), "x: expected shape"),
        ("x", torch.zeros(4, 2, dtype=torch.float64), "out: expected dtype"),
        ("z", torch.zeros(11), "z: expected 12 contiguous elements"),
        ("mean", None, "mean and var: expected both or neither"),
        ("z_mean", torch.zeros(2), "z_var: expected 2 contiguous elements"),
        ("tensors", [torch.ones(3), torch.ones(3, 2, 1, 1), torch.ones(2, 3, 3, 3)], "norm weight: expected 2"),
        (
            "tensors",
            [torch.ones(2), torch.ones(3, 2, 1, 1), torch.ones(2, 4, 3, 3)],
            "conv2: expected 3 input channels",
        ),
        (
            "tensors",
            [torch.ones(2), torch.ones(3, 2, 1, 1), torch.ones(2, 3, 2, 2)],
            "conv2: expected odd kernel sizes",
        ),
        ("tensors", [torch.ones(2), torch.ones(3, 2, 1, 1), torch.ones(2, 3, 3)], "conv2: expected 4 dimensions"),
    ],
)
def test_absurd_arguments_are_named(argument: str, value: Any, words: str) -> None:
    call()
    with pytest.raises(RuntimeError, match=f"densenet_ext: {words}"):
        call(**{argument: value})


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")
def test_too_little_scratch_is_named() -> None:
    call(z=None)
    least = 16 if DEVICE.type == "cpu" else 32  # PyTorch's convolution runs on a GPU, behind relu(norm2(z))
    with pytest.raises(RuntimeError, match=f"scratch: expected at least {least} elements, got 8"):
        call(z=None, scratch=torch.zeros(8))


def test_who_computes_a_convolution() -> None:
    with torch.device("cpu"):
        x, of_three, of_one = torch.zeros(1, 2, 4, 4), torch.zeros(3, 2, 3, 3), torch.zeros(3, 2, 1, 1)
    compiled = kernels.backend("cpu") == "compiled"
    assert whole.has_conv3x3(x) == compiled and not whole.has_conv3x3(x.to("meta"))
    assert whole.has_kernel(x, [of_three]) == compiled and not whole.has_kernel(x, [of_three, of_one])
    with kernels.force_plain():
        assert not whole.has_conv3x3(x) and whole.operation("dense_layers", x, []) is None


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")
def test_gradients_that_are_not_there_are_named() -> None:
    ops = torch.ops.densenet_ext
    layers = ops.keep_layers(**{**LAYERS, "tensors": LAYERS["tensors"][1:], "given": [1 << 4 | 1 << 10]})
    own = (torch.ones(4, 4), False, layers, [1, 2, 2], None)
    results = (torch.ones(4, 4), torch.ones(12), torch.zeros(4), torch.ones(4), torch.zeros(3), torch.ones(3))
    (found,) = ops.dense_layers_backward(*own, *results, None, [1 << 10], torch.zeros(256))
    assert found.shape == (2, 3, 3, 3)
    for asked, words in (([1], "asked: expected bits of tensors of layer 0"), ([], "asked: expected 1 entries")):
        with pytest.raises(RuntimeError, match=f"densenet_ext: {words}"):
            ops.dense_layers_backward(*own, *results, None, asked, torch.zeros(256))
    ops.drop_kept(layers)
