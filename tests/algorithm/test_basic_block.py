"""The dense block of layers without a bottleneck against the usual formulation: values, gradients, buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_ext import _extension, kernels, reference
from densenet_ext.algorithm import basic_block as basic
from densenet_ext.algorithm.layout import from_rows
from densenet_ext.algorithm.values import BasicLayer
from densenet_ext.units.parts import norm_of
from tests.kernels.conv3x3_calls import winograd
from tests.kernels.test_kernels import threads
from tests.support.helpers import (
    DEVICE,
    F64,
    SPATIAL,
    allocations,
    assert_as_good,
    assert_equal,
    assert_same_direction,
    basic_block,
    buffers,
    clone,
    gradcheck,
    gradients,
    kept_for_backward,
    make_conv,
    make_input,
    make_norm,
    vector_error,
)

__all__ = ["threads", "winograd"]  # fixtures
MODES = {"train": True, "frozen": False, "mixed": [True, False, True]}
ORDERS = {"new behind": False, "new in front": True}


def make_basic(
    C0: int = 5,
    growth: Sequence[int] = (3, 3, 3),
    dims: int = 2,
    dtype: torch.dtype = F64,
    *,
    batch: bool | Sequence[bool] = True,
    drop_rate: float = 0.0,
    **norm: Any,
) -> list[BasicLayer]:
    layers = []
    for i, k in enumerate(growth):
        values = make_norm(C0, dtype, batch=batch if isinstance(batch, bool) else batch[i], **norm)
        layers.append(BasicLayer(values, make_conv(k, C0, dims, 3, dtype), drop_rate))
        C0 += k
    return layers


def parameters(layers: Sequence[BasicLayer]) -> list[Tensor]:
    return [t for layer in layers for t in (*layer.norm[:2], layer.conv) if t is not None]


def running(layers: Sequence[BasicLayer]) -> list[Tensor]:
    return buffers(layer.norm for layer in layers)


def copied(layers: Sequence[BasicLayer], dtype: torch.dtype | None = None) -> list[BasicLayer]:
    return [BasicLayer(*(clone(value, dtype) for value in layer)) for layer in layers]


def compare(
    x: Tensor, layers: list[BasicLayer], new_first: bool = False, tolerance: float = 1e-9, steps: int = 1
) -> None:
    others = copied(layers)
    inputs, other_inputs = [x, *parameters(layers)], [x, *parameters(others)]
    for _ in range(steps):
        got, expected = basic_block(x, layers, new_first), reference.basic_block(x, others, new_first)
        assert_equal([got], [expected], tolerance)
        grad = torch.randn_like(expected)
        for g in (grad, grad.to(memory_format=torch.channels_last) if grad.dim() == 4 else grad):
            mine = gradients(got, inputs, g, retain_graph=True)
            assert_equal(mine, gradients(expected, other_inputs, g, retain_graph=True), tolerance)
        assert_equal(running(layers), running(others), tolerance)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_reference(dims: int, mode: str, order: str, backend: str) -> None:
    x, layers = make_input(2, 5, *SPATIAL[dims]), make_basic(dims=dims, batch=MODES[mode])
    compare(x, layers, ORDERS[order], steps=3 if dims == 2 else 1)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_gradcheck(mode: str, order: str, backend: str) -> None:
    layers, x = make_basic(2, (1, 2), batch=MODES[mode]), make_input(2, 2, 3, 2)
    inputs = [x, *parameters(layers)]
    assert gradcheck(lambda *_: basic_block(x, layers, ORDERS[order]), inputs, backend)
    assert torch.autograd.gradgradcheck(lambda *_: basic_block(x, layers, ORDERS[order]), inputs, fast_mode=True)


@pytest.mark.parametrize("order", ORDERS)
def test_gradcheck_with_dropout(order: str, backend: str) -> None:
    layers, x = make_basic(2, (2, 1), drop_rate=0.4), make_input(2, 2, 3, 2)

    def run(*_: Tensor) -> Tensor:
        torch.manual_seed(5)
        return basic_block(x, layers, ORDERS[order])

    inputs = [x, *parameters(layers)]
    assert gradcheck(run, inputs, backend)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("order", ORDERS)
def test_penalty_on_the_gradient(order: str) -> None:
    """Gradients that are differentiated again start from the block's input, which it does not keep."""
    layers, x = make_basic(), make_input(2, 5, 4, 3)
    inputs, grad = [x, *parameters(layers)], torch.randn(2, 14, 4, 3, dtype=F64)
    results = []
    for block, options in ((basic_block, {}), (reference.basic_block, {"update": False})):
        out = block(x, layers, ORDERS[order], **options)
        (dx,) = gradients(out, [x], grad, create_graph=True)
        results.append([dx, *gradients(dx.square(), inputs)])
    assert_equal(*results)


@pytest.mark.parametrize("order", ORDERS)
def test_dropout_is_a_factor_of_the_new_features(order: str, backend: str) -> None:
    layers, x = make_basic(drop_rate=0.3), make_input(2, 5, 4, 3)
    torch.manual_seed(11)
    got = basic_block(x, layers, ORDERS[order])
    torch.manual_seed(11)
    seed = torch.randint(2**62, (1,))
    factors = [from_rows(kernels.plain.dropout_factor(seed, i, 24, 3, 0.3, F64), x.shape) for i in range(3)]
    expected = reference.basic_block(x, layers, ORDERS[order], factors=factors, update=False)
    assert_equal([got], [expected])
    inputs = [x, *parameters(layers)]
    assert_equal(gradients(got, inputs), gradients(expected, inputs))


@pytest.mark.parametrize(
    "options", [{"affine": False}, {"momentum": None}, {"tracked": False}, {"momentum": 1.0, "affine": False}], ids=str
)
def test_kinds_of_norms(options: dict, backend: str) -> None:
    compare(make_input(2, 5, 4, 3), make_basic(**options), steps=3)


SHAPES = {
    "one pixel": ((3, 5, 1, 1), (3, 3)),
    "one image": ((1, 5, 3, 3), (3, 3)),
    "primes": ((2, 7, 13, 11), (3, 5)),
    "k = 12": ((2, 24, 5, 5), (12, 12)),
    "one channel": ((2, 1, 4, 4), (1, 1)),
    "one layer": ((2, 5, 4, 4), (3,)),
    "30 layers": ((2, 3, 3, 3), (2,) * 30),
    "growth differs": ((2, 4, 4, 5), (1, 7, 2, 16)),
}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("shape", SHAPES)
def test_odd_shapes(shape: str, order: str, backend: str) -> None:
    size, growth = SHAPES[shape]
    compare(make_input(*size), make_basic(size[1], growth), ORDERS[order], tolerance=1e-7)


def test_no_layers_and_empty_batch() -> None:
    x = make_input(2, 5, 4, 3)
    assert torch.equal(basic_block(x, []), x)
    for batch in (True, False):
        compare(make_input(0, 5, 4, 3), make_basic(batch=batch))


@pytest.mark.parametrize("order", ORDERS)
def test_only_what_is_asked_for(order: str, backend: str) -> None:
    layers, x = make_basic(), make_input(2, 5, 4, 3)
    everything = [x, *parameters(layers)]
    expected = gradients(reference.basic_block(x, layers, ORDERS[order], update=False), everything)
    subsets = [[i] for i in range(len(everything))] + [[0, 9], [4, 8], [6, 7], [1, 2, 4]]
    for subset in subsets:
        for i, t in enumerate(everything):
            t.requires_grad_(i in subset)
        out = basic_block(x, layers, ORDERS[order])
        assert_equal(gradients(out, [everything[i] for i in subset]), [expected[i] for i in subset])
    for t in everything:
        t.requires_grad_()
    out = basic_block(x, layers, ORDERS[order])
    for subset in subsets:
        got = gradients(out, [everything[i] for i in subset], retain_graph=True)
        assert_equal(got, [expected[i] for i in subset])


@pytest.mark.skipif(_extension.module is None or DEVICE.type != "cpu", reason="Winograd's products of the CPU")
@pytest.mark.parametrize("new_first", ORDERS.values(), ids=ORDERS)
@pytest.mark.parametrize("products", ["never", "always"])
def test_a_layer_in_the_middle_alone(
    products: str,
    new_first: bool,
    winograd: Callable[[str], None],
    threads: Callable[[int], None],
) -> None:
    """Where nothing below it is asked for: in images that several threads share, each in several steps."""
    winograd(products)
    threads(2)
    layers = make_basic(24, (24, 24, 24), dtype=torch.float32)
    x = make_input(2, 24, 24, 256, dtype=torch.float32, grad=False).contiguous(memory_format=torch.channels_last)
    grad = torch.randn(2, 96, 24, 256).contiguous(memory_format=torch.channels_last)
    wide = copied(layers, F64)
    for asked in ([3], [4], [5], [3, 4, 5], [5, 8]):  # norm and convolution of the second layer, and of the third
        found = []
        for all_layers, images in ((layers, x), (wide, x.double())):
            for i, t in enumerate(parameters(all_layers)):
                t.requires_grad_(i in asked)
            chosen = [parameters(all_layers)[i] for i in asked]
            block = basic_block if all_layers is layers else reference.basic_block
            found.append(gradients(block(images, all_layers, new_first), chosen, grad.to(images.dtype)))
        for got, exact in zip(*found, strict=True):
            assert vector_error(got, exact) < 1e-5


def test_the_incoming_gradient_is_only_read(backend: str) -> None:
    layers, x = make_basic(), make_input(2, 5, 4, 3)
    out = basic_block(x, layers)
    wide = torch.randn(2, 4, 3, 20, dtype=F64).permute(0, 3, 1, 2)[:, 2:16]
    for grad in (torch.randn(2, 14, 4, 3, dtype=F64), torch.randn_like(out), wide, torch.ones_like(out[:1, :1])):
        grad = grad.expand_as(out)
        before = grad.clone()
        gradients(out, [x, *parameters(layers)], grad, retain_graph=True)
        assert torch.equal(grad, before)


def test_changing_the_output_before_backward_is_an_error() -> None:
    layers, x = make_basic(), make_input(2, 5, 4, 3)
    out = basic_block(x, layers)
    out.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_one_value_per_channel_is_pytorchs_error() -> None:
    x = make_input(1, 5, 1, 1)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        basic_block(x, make_basic())
    compare(x, make_basic(batch=False))


@pytest.mark.parametrize("order", ORDERS)
def test_statistics_go_with_the_result(order: str, backend: str) -> None:
    out, known = basic.basic_block(make_input(2, 5, 4, 3), make_basic(), ORDERS[order])
    assert known is not None
    var, mean = torch.var_mean(out.detach(), (0, 2, 3), correction=0)
    assert_equal(known, [mean, var])
    assert basic.basic_block(make_input(2, 5, 4, 3), make_basic(batch=False))[1] is None


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_eager(dtype: torch.dtype, mode: str, backend: str) -> None:
    layers, x = make_basic(16, (8,) * 3, dtype=dtype, batch=MODES[mode]), make_input(4, 16, 7, 7, dtype=dtype)
    grad = torch.randn(4, 40, 7, 7).to(dtype)
    values, grads = [], []
    for block, to in ((basic_block, dtype), (reference.basic_block, dtype), (reference.basic_block, F64)):
        mine, leaf = copied(layers, to), x.detach().to(to).requires_grad_()
        out = block(leaf, mine)
        values.append([out, *(t for t in running(mine) if t.is_floating_point())])
        grads.append(gradients(out, [leaf, *parameters(mine)], grad.to(to)))
    # the bounds of the block with bottlenecks
    assert_as_good(*values, floor=16.0)
    assert_as_good(*grads, factor=3.0, floor=16.0)
    eps = torch.finfo(dtype).eps
    assert_same_direction(grads[0], grads[2], 1 - 100 * (eps**2 if dtype == torch.float32 else eps))


def test_autocast_has_the_dtype_of_eagers_concatenation() -> None:
    layers = make_basic(dtype=torch.float32)
    for dtype in (torch.float32, torch.bfloat16):
        x = make_input(2, 5, 4, 3, dtype=dtype)
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            got, expected = basic_block(x, layers), reference.basic_block(x, layers)
        assert got.dtype == expected.dtype
        assert vector_error(got, expected) < 0.02


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_buffer_is_all_that_is_kept(backend: str) -> None:
    layers, M = make_basic(16, (8,) * 6, dtype=torch.float32), 4 * 8 * 8
    x = make_input(4, 16, 8, 8, dtype=torch.float32)
    existing = [x, *parameters(layers), *running(layers)]
    with kept_for_backward(existing) as kept:
        out = basic_block(x, layers)
    assert kept.bytes == 4 * M * 64 + 2 * 4 * 64
    with kept_for_backward(existing) as usual:
        other = reference.basic_block(x, layers)
    assert 6 * kept.bytes < usual.bytes
    del out, other
    stays, _ = allocations(lambda: basic_block(x, layers))
    assert 0 <= stays - kept.bytes <= 1024
    with kept_for_backward() as nothing, torch.no_grad():
        basic_block(x, layers)
    assert nothing.count == 0


# ---- torch.compile ---------------------------------------------------------------------------------------------------


class Net(nn.Module):
    def __init__(self, new_first: bool) -> None:
        super().__init__()
        self.new_first = new_first
        self.conv0 = nn.Conv2d(3, 4, 3, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 + 3 * i) for i in range(3))
        self.convs = nn.ModuleList(nn.Conv2d(4 + 3 * i, 3, 3, padding=1, bias=False) for i in range(3))

    def forward(self, x: Tensor) -> Tensor:
        pairs = zip(self.norms, self.convs, strict=True)
        layers = [BasicLayer(norm_of(norm), conv.weight, 0.0) for norm, conv in pairs]
        return basic_block(self.conv0(x), layers, self.new_first)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_break(training: bool, order: str) -> None:
    torch._dynamo.reset()
    net = Net(ORDERS[order]).double().train(training)
    other = copy.deepcopy(net)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        x = make_input(2, 3, 8, 7)
        results = []
        for model in (compiled, net):
            out = model(x)
            results.append([out, *gradients(out.square(), [x, *model.parameters()])])
        assert_equal(*results)
        assert_equal(list(other.buffers()), list(net.buffers()))
