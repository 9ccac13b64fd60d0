"""Dense layers whose convolutions have a bias, that drop whole channels, or that drop bottleneck features."""

from __future__ import annotations

import copy
from statistics import median
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_ext import kernels, reference
from densenet_ext.algorithm.dropout import BOTTLENECKS
from densenet_ext.algorithm.layer import dense_layer
from densenet_ext.algorithm.values import BasicLayer, Layer
from densenet_ext.units.parts import norm_of
from tests.support.covering import BACKENDS, pairs
from tests.support.helpers import (
    F64,
    SPATIAL,
    assert_as_good,
    assert_equal,
    assert_same_direction,
    basic_block,
    buffers,
    clone,
    dense_block,
    gradients,
    kept_for_backward,
    make_conv,
    make_input,
    make_layers,
    make_norm,
    norms_of,
    parameters,
    vector_error,
)

LEVELS = ["bottlenecks", "features"]
MODES = {"train": True, "frozen": False, "mixed": [True, False, False, True, True, False]}
DROPS: dict[str, dict[str, Any]] = {
    "channels": {"drop_rate": 0.4, "drop_channels": True},
    "bottlenecks": {"inner_drop_rate": 0.3},
    "channels of both": {
        "drop_rate": 0.3,
        "drop_channels": True,
        "inner_drop_rate": 0.4,
        "inner_drop_channels": True,
    },
    "values of both": {"drop_rate": 0.3, "inner_drop_rate": 0.4},
}


def biased(layers: list[Layer]) -> list[Layer]:
    """The same layers, with biases of different size."""
    dtype = layers[0].conv1.dtype
    return [
        layer._replace(
            conv1_bias=(torch.randn(layer.conv1.shape[0], dtype=F64) * 3).to(dtype).requires_grad_(),
            conv2_bias=torch.randn(layer.conv2.shape[0], dtype=F64).to(dtype).requires_grad_(),
        )
        for layer in layers
    ]


def factor(seed: Tensor, site: int, size: torch.Size, columns: int, rate: float, channels: bool) -> Tensor | None:
    """What the hash says, as the features are shaped."""
    if rate == 0:
        return None
    spatial = (1,) * len(size[2:]) if channels else size[2:]
    rows = size[0] * torch.Size(spatial).numel()
    found = kernels.plain.dropout_factor(seed, site, rows, columns, rate, F64)
    return found.view(size[0], *spatial, columns).movedim(-1, 1)


def factors(layers: list[Layer], size: torch.Size, seed: int) -> dict[str, list[Tensor | None]]:
    """The factors of a block that draws its own after ``torch.manual_seed(seed)``."""
    torch.manual_seed(seed)
    drawn = torch.randint(2**62, (1,))
    new, inner = [], []
    for l, layer in enumerate(layers):
        k, b = layer.conv2.shape[:2]
        new.append(factor(drawn, l, size, k, layer.drop_rate, layer.drop_channels))
        inner.append(factor(drawn, BOTTLENECKS + l, size, b, layer.inner_drop_rate, layer.inner_drop_channels))
    return {"factors": new, "inner_factors": inner}


def assert_near(got: list[Tensor | None], expected: list[Tensor | None]) -> None:
    """Gradients that are equal; those of a bias in front of batch statistics are 0 but for eager's rounding."""
    for a, b in zip(got, expected, strict=True):
        if a is None or b is None:
            assert all(t is None or not t.any() for t in (a, b))
        else:
            assert torch.allclose(a, b, rtol=1e-9, atol=1e-10), (a - b).abs().max()


def compare(x: Tensor, layers: list[Layer], save: str = "bottlenecks", new_first: bool = False) -> None:
    """Output, gradients, buffers, and the gradient of a gradient, against the reference."""
    others = clone(layers)
    drawn = factors(others, x.shape, 7)
    expected = reference.dense_block(x, others, new_first=new_first, **drawn)
    torch.manual_seed(7)
    got = dense_block(x, layers, save, new_first)
    assert_equal([got], [expected])
    assert_equal(buffers(norms_of(layers)), buffers(norms_of(others)))
    grad = torch.randn_like(expected)
    results = []
    for out, values in ((got, layers), (expected, others)):
        inputs = [x, *parameters(values)]
        found = gradients(out, inputs, grad, retain_graph=True)
        (dx,) = gradients(out, [x], grad, create_graph=True)
        results.append([*found, *gradients(dx.square().sum(), inputs, allow_unused=True)])
    assert_near(*results)


@pytest.mark.parametrize(
    ("dims", "mode", "save", "backend"), pairs([1, 2, 3], MODES, LEVELS, BACKENDS), indirect=["backend"], ids=str
)
def test_biases_equal_the_reference(dims: int, mode: str, save: str, backend: str) -> None:
    compare(make_input(2, 5, *SPATIAL[dims]), biased(make_layers(dims=dims, batch=MODES[mode])), save, dims == 1)


@pytest.mark.parametrize(
    ("drops", "mode", "save", "bias", "backend"),
    pairs(DROPS, MODES, LEVELS, [False, True], BACKENDS),
    indirect=["backend"],
    ids=str,
)
def test_dropout_equals_the_reference(drops: str, mode: str, save: str, bias: bool, backend: str) -> None:
    layers = [layer._replace(**DROPS[drops]) for layer in make_layers(batch=MODES[mode])]
    layers[1] = layers[1]._replace(drop_rate=0.0, inner_drop_rate=0.0)
    compare(make_input(3, 5, 4, 3), biased(layers) if bias else layers, save)


@pytest.mark.parametrize("dims", [1, 3])
def test_dropout_in_other_dimensions(dims: int, backend: str) -> None:
    for drops in DROPS.values():
        compare(make_input(2, 5, *SPATIAL[dims]), [layer._replace(**drops) for layer in make_layers(dims=dims)])


@pytest.mark.parametrize(
    ("drops", "mode", "backend"),
    pairs(["none", "channels of both", "values of both"], MODES, BACKENDS),
    indirect=["backend"],
)
def test_gradcheck(drops: str, mode: str, backend: str) -> None:
    layers = [layer._replace(**DROPS.get(drops, {})) for layer in biased(make_layers(2, 2, 3, 3, batch=MODES[mode]))]
    x = make_input(2, 2, 3, 2)

    def run(*_: Tensor) -> Tensor:
        torch.manual_seed(5)
        return dense_block(x, layers)

    assert torch.autograd.gradcheck(run, [x, *parameters(layers)], fast_mode=True)


@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_only_what_is_asked_for(mode: str, backend: str) -> None:
    layers, x = biased(make_layers(batch=MODES[mode], update=False)), make_input(2, 5, 4, 3)
    layers[1] = layers[1]._replace(inner_drop_rate=0.3)
    everything = [x, *parameters(layers)]
    torch.manual_seed(3)
    expected = gradients(dense_block(x, layers), everything)
    for subset in [[i] for i in range(len(everything))] + [[4, 8], [12, 16], [0, 20, 24], [4, 12, 20]]:
        for i, t in enumerate(everything):
            t.requires_grad_(i in subset)
        torch.manual_seed(3)
        out = dense_block(x, layers)
        assert_equal(gradients(out, [everything[i] for i in subset]), [expected[i] for i in subset])


def test_a_bias_in_front_of_batch_statistics_moves_the_running_mean_only(backend: str) -> None:
    layers, x = biased(make_layers()), make_input(2, 5, 4, 3)
    without = clone([layer._replace(conv1_bias=None) for layer in layers])
    out = dense_block(x, layers)
    assert_equal([out], [dense_block(x, without)])
    for layer, other in zip(layers, without, strict=True):
        moved = layer.norm2.running_mean - other.norm2.running_mean
        assert_equal([moved, layer.norm2.running_var], [0.1 * layer.conv1_bias, other.norm2.running_var])
    for grad in gradients(out, [layer.conv1_bias for layer in layers]):
        assert torch.equal(grad, torch.zeros_like(grad))


@pytest.mark.parametrize("mode", MODES)
def test_without_gradient_the_same_values(mode: str, backend: str) -> None:
    for drops in ({}, *DROPS.values()):
        layers = [layer._replace(**drops) for layer in biased(make_layers(batch=MODES[mode]))]
        others, x = clone(layers), make_input(2, 5, 4, 3)
        torch.manual_seed(1)
        expected = dense_block(x, others)
        torch.manual_seed(1)
        with torch.no_grad():
            got = dense_block(x, layers)
        assert_equal([got, *buffers(norms_of(layers))], [expected, *buffers(norms_of(others))])


class Usual(nn.Module):
    """A layer as people write it, of PyTorch's own modules."""

    def __init__(self, C: int, b: int, k: int, inner: nn.Module, outer: nn.Module) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, b, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, k, 3, padding=1)
        self.inner, self.outer = inner, outer

    def forward(self, x: Tensor) -> Tensor:
        z = self.inner(self.conv1(self.norm1(x).relu()))
        return torch.cat([x, self.outer(self.conv2(self.norm2(z).relu()))], 1)

    def as_layer(self, **drops: Any) -> Layer:
        norms, convs = (norm_of(self.norm1), norm_of(self.norm2)), (self.conv1, self.conv2)
        return Layer(norms[0], convs[0].weight, norms[1], convs[1].weight, 0.0, convs[0].bias, convs[1].bias, **drops)


@pytest.mark.parametrize("training", [True, False])
def test_equal_modules_of_pytorch(training: bool, backend: str) -> None:
    """Biases beside real convolutions; dropout where its outcome is certain: everything is dropped, or nothing."""
    for inner, outer, drops in (
        (nn.Identity(), nn.Identity(), {}),
        (nn.Identity(), nn.Dropout2d(1.0), {"drop_channels": True}),
        (nn.Dropout2d(1.0), nn.Identity(), {"inner_drop_channels": True}),
        (nn.Dropout(1.0), nn.Dropout(0.0), {}),
    ):
        plain = nn.Sequential(*(Usual(4 + 3 * i, 6, 3, inner, outer) for i in range(2))).double().train(training)
        x, rates = make_input(2, 4, 5, 3), [getattr(m, "p", 0.0) if training else 0.0 for m in (inner, outer)]
        twin = copy.deepcopy(plain)
        layers = [layer.as_layer(**drops, inner_drop_rate=rates[0])._replace(drop_rate=rates[1]) for layer in twin]
        got, expected = dense_block(x, layers), plain(x)
        assert_equal([got, *twin.buffers()], [expected, *plain.buffers()])
        grad = torch.randn_like(expected)
        assert_near(gradients(got, [x, *twin.parameters()], grad), gradients(expected, [x, *plain.parameters()], grad))


def test_channels_of_samples_are_dropped_whole(backend: str) -> None:
    """At the asked rate; others in every layer, in the bottleneck, and at the next call."""
    rate, layers = 0.3, make_layers(4, 32, 40, 2)
    with torch.no_grad():
        for layer in layers:
            layer.conv2.abs_()  # no new feature is 0 by itself, but for a window of zeros
    x = make_input(40, 4, 3, 3)
    kept = biased([layer._replace(drop_rate=rate, drop_channels=True) for layer in layers])
    out, again = dense_block(x, kept), dense_block(x, kept)
    whole = reference.dense_block(x, [layer._replace(drop_rate=0.0) for layer in kept], update=False)[:, 4:36]
    masks = []
    for found in (out[:, 4:36], out[:, 36:], again[:, 4:36]):
        zero = found.detach() == 0
        assert torch.equal(zero.all(3).all(2), zero.any(3).any(2))
        masks.append(zero[:, :, 0, 0])
        assert masks[-1].double().mean().item() == pytest.approx(rate, abs=0.05)
    present = ~masks[0]
    assert_equal([out[:, 4:36][present]], [whole[present] / (1 - rate)])
    assert not any(torch.equal(a, b) for a, b in ((masks[0], masks[1]), (masks[0], masks[2])))
    seed = torch.tensor([9])
    sites = (0, 1, BOTTLENECKS, BOTTLENECKS + 1)
    drawn = [kernels.plain.dropout_factor(seed, site, 40, 32, rate, F64) for site in sites]
    assert len({tuple(found.flatten().tolist()) for found in drawn}) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_low_precision_is_as_good_as_eager(mode: str, dtype: torch.dtype, backend: str) -> None:
    drops = {"drop_rate": 0.3, "drop_channels": True, "inner_drop_rate": 0.2}
    layers = biased(make_layers(16, 8, 24, dtype=dtype, batch=MODES[mode]))
    layers = [layer._replace(**drops) for layer in layers]
    x, grad = make_input(4, 16, 7, 7, dtype=dtype), torch.randn(4, 40, 7, 7).to(dtype)
    values, grads = [], []
    for block, to in ((dense_block, dtype), (reference.dense_block, dtype), (reference.dense_block, F64)):
        mine, leaf = clone(layers, to), clone(x, to)
        drawn = {
            key: [None if t is None else t.to(to) for t in found] for key, found in factors(mine, x.shape, 2).items()
        }
        torch.manual_seed(2)
        out = block(leaf, mine, **({} if block is dense_block else drawn))
        values.append([out, *(t for t in buffers(norms_of(mine)) if t.is_floating_point())])
        # a bias in front of batch statistics and dropout has a gradient, if a small one
        inputs = [leaf, *(t for t in parameters(mine) if not any(t is layer.conv1_bias for layer in mine))]
        grads.append(gradients(out, inputs, grad.to(to)))
    assert_as_good(*values, floor=16.0)
    # Where a rounded z falls on the other side of 0 a sum moves by a whole value, in eager as here: one gradient may be
    # several times worse than eager's, half of them may not.
    assert_as_good(*grads, factor=8.0, floor=16.0, measure=vector_error)
    errors = [[vector_error(t, exact) for t, exact in zip(found, grads[2], strict=True)] for found in grads[:2]]
    assert median(ours / theirs for ours, theirs in zip(*errors, strict=True)) <= 1.5
    eps = torch.finfo(dtype).eps
    assert_same_direction(grads[0], grads[2], 1 - 100 * (eps**2 if dtype == torch.float32 else eps))


@pytest.mark.parametrize("save", LEVELS)
def test_no_mask_is_kept(save: str, backend: str) -> None:
    kept = []
    for drops in ({"drop_rate": 0.3}, *DROPS.values()):
        layers = [layer._replace(**drops) for layer in make_layers(16, 8, 24)]
        x = make_input(4, 16, 7, 7)
        with kept_for_backward([x, *parameters(layers), *buffers(norms_of(layers))]) as found:
            out = dense_block(x, layers, save)
        kept.append(found.bytes)
        del out
    assert len(set(kept)) == 1


# ---- a layer on its own, and layers without a bottleneck -------------------------------------------------------------


@pytest.mark.parametrize("save", LEVELS)
@pytest.mark.parametrize("mode", [True, False, [True, False], [False, True]], ids=str)
@pytest.mark.parametrize("drops", [{}, {"inner_drop_rate": 0.4}, {"inner_drop_rate": 0.4, "inner_drop_channels": True}])
def test_a_layer_on_its_own(drops: dict[str, Any], mode: Any, save: str, backend: str) -> None:
    (layer,) = biased([layer._replace(**drops) for layer in make_layers(count=1, batch=mode)])
    other, features = clone(layer), [make_input(2, 3, 4, 3), make_input(2, 2, 4, 3)]
    torch.manual_seed(4)
    drawn = torch.randint(2**62, (1,))
    inner = factor(drawn, BOTTLENECKS, features[0].shape, 6, layer.inner_drop_rate, layer.inner_drop_channels)
    expected = reference.dense_layer(features, other, inner)
    inputs, others = [*features, *parameters([layer])], [*features, *parameters([other])]
    with torch.no_grad():
        torch.manual_seed(4)
        assert_equal([dense_layer(features, clone(layer), save)], [expected])
    torch.manual_seed(4)
    got = dense_layer(features, layer, save)
    assert_equal([got, *buffers(norms_of([layer]))], [expected, *buffers(norms_of([other]))])
    grad = torch.randn_like(expected)
    assert_near(gradients(got, inputs, grad), gradients(expected, others, grad))


def make_basic(batch: bool, drop_rate: float = 0.0, drop_channels: bool = False, dims: int = 2) -> list[BasicLayer]:
    return [
        BasicLayer(make_norm(c, batch=batch), make_conv(3, c, dims, 3), drop_rate, make_input(3), drop_channels)
        for c in (5, 8, 11)
    ]


@pytest.mark.parametrize("new_first", [False, True])
@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_layers_without_a_bottleneck(dims: int, batch: bool, new_first: bool, backend: str) -> None:
    for rate, channels in ((0.0, False), (0.4, True), (0.4, False)):
        layers, x = make_basic(batch, rate, channels, dims), make_input(2, 5, *SPATIAL[dims])
        torch.manual_seed(6)
        drawn = torch.randint(2**62, (1,))
        found = [factor(drawn, l, x.shape, 3, rate, channels) for l in range(3)]
        others = clone(layers)
        expected = reference.basic_block(x, others, new_first, factors=found)
        torch.manual_seed(6)
        got = basic_block(x, layers, new_first)
        assert_equal([got], [expected])
        grad, results = torch.randn_like(expected), []
        for out, values in ((got, layers), (expected, others)):
            inputs = [x, *(t for v in values for t in (v.norm.weight, v.norm.bias, v.conv, v.bias))]
            found = gradients(out, inputs, grad, retain_graph=True)
            assert_equal(gradients(out, inputs[-1:], grad, retain_graph=True), found[-1:])
            (dx,) = gradients(out, [x], grad, create_graph=True)
            results.append([*found, *gradients(dx.square(), [x])])
        assert_equal(*results)


def test_compiled(save: str = "features") -> None:
    torch._dynamo.reset()
    layers = biased([layer._replace(**DROPS["channels of both"]) for layer in make_layers()])
    others, x = clone(layers), make_input(2, 5, 4, 3)

    def run(x: Tensor, layers: list[Layer]) -> Tensor:
        torch.manual_seed(5)
        return dense_block(x, layers, save)

    compiled = torch.compile(dense_block, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    got = compiled(x, layers, save)
    expected = run(x, others)
    assert_equal([got], [expected])
    assert_near(gradients(got, [x, *parameters(layers)]), gradients(expected, [x, *parameters(others)]))
    assert_equal(buffers(norms_of(layers)), buffers(norms_of(others)))
