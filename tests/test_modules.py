from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import densenet_ext as dx
from tests.support.fusing_helpers import reason_of
from tests.support.helpers import DEVICE, gradcheck

SHAPES = {1: (2, 6, 5), 2: (2, 6, 5, 3), 3: (2, 6, 3, 2, 3)}
POOL = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def usual_layer(layer: dx.DenseLayer, *features: torch.Tensor) -> torch.Tensor:
    x = torch.cat(features, 1)
    return layer.conv2(F.relu(layer.norm2(layer.conv1(F.relu(layer.norm1(x))))))


def usual_block(block: dx.DenseBlock, x: torch.Tensor) -> torch.Tensor:
    features = [x]
    for layer in block.values():
        features.append(usual_layer(layer, *features))
    return torch.cat(features, 1)


def compare(fused, usual, twin_of, *inputs):
    """Outputs, gradients of inputs and parameters, and buffers of ``fused(*inputs)`` and ``usual`` on a copy."""
    module, twin = twin_of, copy.deepcopy(twin_of)
    ours = [x.detach().clone().requires_grad_() for x in inputs]
    theirs = [x.detach().clone().requires_grad_() for x in inputs]
    out, expected = fused(module, *ours), usual(twin, *theirs)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    cotangent = torch.randn_like(expected)
    out.backward(cotangent)
    expected.backward(cotangent)
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-8, atol=1e-10)
    for (name, p), q in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
    for (name, a), b in zip(module.named_buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("training", [True, False])
def test_block_is_the_usual_block(dims, save, training):
    torch.manual_seed(dims)
    block = dx.DenseBlock(3, 6, 2, 3, 0.0, dims=dims, save=save).double().train(training)
    assert reason_of(block) is None
    compare(lambda m, x: m(x), usual_block, block, torch.randn(SHAPES[dims], dtype=torch.float64))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("training", [True, False])
def test_layer_is_the_usual_layer(dims, save, training, backend):
    torch.manual_seed(dims)
    layer = dx.DenseLayer(10, 3, 2, 0.0, dims=dims, save=save).double().train(training)
    shape = SHAPES[dims]
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.randn((shape[0], 4, *shape[2:]), dtype=torch.float64)
    compare(lambda m, *xs: m(list(xs)), usual_layer, copy.deepcopy(layer), x, y)
    compare(lambda m, xs: m(xs), usual_layer, layer, torch.cat([x, y], 1))


@pytest.mark.parametrize("frozen", ["norm1", "norm2"])
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_layer_with_one_frozen_norm(frozen, save):
    layer = dx.DenseLayer(6, 3, 2, 0.0, save=save).double()
    layer.get_submodule(frozen).eval()
    compare(lambda m, x: m(x), usual_layer, layer, torch.randn(2, 6, 5, 4, dtype=torch.float64))


@pytest.mark.parametrize("asked", [[], ["conv2.weight"], ["norm2.bias"], ["conv1.weight"], ["norm1.weight"], ["x"]])
@pytest.mark.parametrize("training", [True, False])
def test_layer_computes_the_gradients_that_are_asked_for(asked, training):
    layer = dx.DenseLayer(6, 3, 2, 0.0).double().train(training)
    for name, p in layer.named_parameters():
        p.requires_grad_(name in asked)
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64, requires_grad="x" in asked)
    out = layer(x)
    assert out.requires_grad == bool(asked)
    if asked:
        wanted = [x if name == "x" else layer.get_parameter(name) for name in asked]
        cotangent = torch.randn_like(out)
        ours = torch.autograd.grad(out, wanted, cotangent)
        theirs = torch.autograd.grad(usual_layer(layer, x), wanted, cotangent)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
        assert all(p.grad is None for p in layer.parameters())


def test_layer_under_no_grad_is_the_layer_with_gradients():
    layer = dx.DenseLayer(6, 3, 2, 0.0).double().eval()
    x = torch.randn(2, 6, 5, 4, dtype=torch.float64)
    with torch.no_grad():
        folded = layer(x)
    torch.testing.assert_close(folded, layer(x), rtol=1e-10, atol=1e-12)
    assert not folded.requires_grad and layer(x).requires_grad


def test_layer_in_low_precision():
    layer = dx.DenseLayer(6, 3, 2, 0.0)
    features = [torch.randn(2, 3, 5, 4), torch.randn(2, 3, 5, 4)]
    expected = layer(features)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = layer([features[0].bfloat16(), features[1]])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)
    out = layer.bfloat16()([x.bfloat16() for x in features])
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_layer_takes_empty_batches_and_refuses_one_value_per_channel():
    layer = dx.DenseLayer(6, 3, 2, 0.0)
    out = layer(torch.zeros(0, 6, 5, 4))
    out.sum().backward()
    assert out.shape == (0, 3, 5, 4) and layer.conv1.weight.grad is not None
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        layer(torch.zeros(1, 6, 1, 1))


def test_layers_make_a_block():
    torch.manual_seed(0)
    block = dx.DenseBlock(3, 6, 2, 3, 0.0).double()

    def layer_by_layer(block, x):
        features = [x]
        for layer in block.values():
            features.append(layer(features))
        return torch.cat(features, 1)

    compare(layer_by_layer, usual_block, block, torch.randn(2, 6, 5, 4, dtype=torch.float64))


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("training", [True, False])
def test_derivatives_of_the_layer(save, training, backend):
    torch.manual_seed(1)
    layer = dx.DenseLayer(5, 2, 2, 0.0, save=save).double().train(training)
    inputs = [torch.randn(2, c, 3, 2, dtype=torch.float64, requires_grad=True) for c in (2, 3)]
    assert gradcheck(lambda *xs: layer(xs), inputs, backend)
    assert torch.autograd.gradgradcheck(lambda *xs: layer(xs), inputs, fast_mode=backend == "emulated")
    out = layer(inputs)
    out.sum().backward(retain_graph=True)
    first = [x.grad.clone() for x in inputs]
    out.sum().backward()
    for x, g in zip(inputs, first, strict=True):
        torch.testing.assert_close(x.grad, 2 * g)


def test_two_forwards_before_a_backward():
    torch.manual_seed(0)
    layer, xs = dx.DenseLayer(6, 3, 2, 0.0).double(), [torch.randn(2, 6, 4, 3, dtype=torch.float64) for _ in range(2)]
    xs = [x.requires_grad_() for x in xs]
    together = [layer(x) for x in xs]
    sum(out.square().sum() for out in together).backward()
    grads = [x.grad.clone() for x in xs]
    for x, grad in zip(xs, grads, strict=True):
        x.grad = None
        layer(x).square().sum().backward()
        torch.testing.assert_close(x.grad, grad)


def kept_elements(run) -> int:
    """Elements of the distinct storages that autograd keeps for the backward pass of ``run()``."""
    kept = {}

    def pack(x):
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes() // x.element_size()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = run()
    out.sum().backward()
    return sum(kept.values())


def test_what_a_layer_keeps():
    C, k, b, M = 32, 8, 32, 2 * 8 * 8
    x = torch.randn(2, C, 8, 8, requires_grad=True)
    layer = dx.DenseLayer(C, k, 4, 0.0)
    parameters = sum(p.numel() for p in layer.parameters())
    statistics = 2 * C + 2 * b
    assert kept_elements(lambda: layer(x)) == M * (C + b) + parameters + statistics
    layer.save = "features"
    assert kept_elements(lambda: layer(x)) == M * C + parameters + statistics
    assert kept_elements(lambda: usual_layer(layer, x)) > M * (2 * C + 2 * b)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transition_is_the_usual_transition(dims):
    torch.manual_seed(dims)
    module = dx.Transition(6, 4, dims=dims).double()

    def usual(m, x):
        return POOL[dims](m.conv(F.relu(m.norm(x))), 2)

    compare(lambda m, x: m(x), usual, module, torch.randn(SHAPES[dims], dtype=torch.float64))


def test_block_returns_the_new_features():
    block = dx.DenseBlock(2, 6, 2, 3, 0.0, returns="new").eval()
    x = torch.randn(2, 6, 5, 4)
    new = block(x)
    block.returns = "all"
    assert torch.equal(new, block(x)[:, 6:]) and new.shape == (2, 6, 5, 4)


def test_children_are_spelled_as_in_torchvision():
    block = dx.DenseBlock(2, 6, 2, 3, 0.0)
    assert list(block) == ["denselayer1", "denselayer2"]
    assert list(block.denselayer1._modules) == ["norm1", "relu1", "conv1", "norm2", "relu2", "conv2"]
    assert list(dx.Transition(6, 3)._modules) == ["norm", "relu", "conv", "pool"]


@pytest.mark.parametrize("whole_block", [True, False])
def test_dropout_drops_in_training_only_and_follows_the_seed(whole_block):
    module = dx.DenseBlock(1, 6, 2, 3, 0.5, returns="new") if whole_block else dx.DenseLayer(6, 3, 2, 0.5)
    x = torch.randn(4, 6, 9, 9)
    torch.manual_seed(1)
    first = module(x)
    torch.manual_seed(1)
    assert torch.equal(module(x), first)
    assert 0.4 < (first == 0).float().mean() < 0.6
    assert (module.eval()(x) == 0).float().mean() < 0.01


def replace_relu(block):
    block.denselayer2.relu1 = nn.LeakyReLU(0.5)


def replace_norm(block):
    block.denselayer2.norm2 = nn.GroupNorm(1, 6)


def group_conv(block):
    block.denselayer2.conv2 = nn.Conv2d(6, 3, 3, padding=1, groups=3, bias=False)


def dilate(block):
    block.denselayer1.conv2 = nn.Conv2d(6, 3, 3, padding=2, dilation=2, bias=False)


def parametrise(block):
    nn.utils.parametrizations.weight_norm(block.denselayer1.conv1)


def hook(block):
    block.denselayer2.conv1.register_forward_hook(lambda module, args, out: out * 2)


def hook_layer(block):
    block.denselayer2.register_forward_hook(lambda module, args, out: out * 2)


def another_layer(block):
    class Other(dx.DenseLayer):
        def forward(self, features):
            return super().forward(features) + 1

    block["denselayer2"] = Other(9, 3, 2, 0.0)


@pytest.mark.parametrize(
    "change",
    [replace_relu, replace_norm, group_conv, dilate, parametrise, hook, hook_layer, another_layer],
    ids=lambda f: f.__name__,
)
def test_changed_blocks_run_their_own_layers_and_say_why(change):
    torch.manual_seed(0)
    block = dx.DenseBlock(2, 6, 2, 3, 0.0)
    change(block)
    block.double()
    reason = reason_of(block)
    assert reason is not None and reason.startswith(("denselayer1", "denselayer2"))

    def usual(block, x):
        features = [x]
        for layer in block.values():
            z = layer.conv1(layer.relu1(layer.norm1(torch.cat(features, 1))))
            new = layer.conv2(layer.relu2(layer.norm2(z)))
            if change in (hook_layer, another_layer) and layer is block["denselayer2"]:
                new = new * 2 if change is hook_layer else new + 1
            features.append(new)
        return torch.cat(features, 1)

    compare(lambda m, x: m(x), usual, block, torch.randn(2, 6, 5, 4, dtype=torch.float64))


def test_changed_transitions_run_their_children_and_say_why():
    for pool in (nn.AvgPool2d(2, ceil_mode=True), nn.AvgPool2d(3, 2), nn.MaxPool2d(2), nn.AvgPool2d(2, padding=1)):
        module = dx.Transition(6, 3)
        module.pool = pool
        assert reason_of(module).startswith("pool ")
        x = torch.randn(2, 6, 5, 5)
        assert torch.equal(module.eval()(x), pool(module.conv(F.relu(module.norm(x)))))
    module = dx.Transition(6, 3)
    module.append(nn.Identity())
    assert "a child 4" in reason_of(module) and module(torch.randn(2, 6, 4, 4)).shape == (2, 3, 2, 2)


def test_norms_may_stay_in_float32_when_the_rest_is_bfloat16():
    block = dx.DenseBlock(2, 6, 2, 3, 0.0).bfloat16()
    for module in block.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    assert block(torch.randn(2, 6, 5, 4).bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: dx.DenseLayer(0, 3, 2, 0.0), "num_input_features: expected .* got 0"),
        (lambda: dx.DenseLayer(6, 0, 2, 0.0), "growth_rate: expected .* got 0"),
        (lambda: dx.DenseLayer(6, 3, 0, 0.0), "bn_size: expected .* got 0"),
        (lambda: dx.DenseLayer(6, 3, 2, -0.5), "drop_rate: expected .* got -0.5"),
        (lambda: dx.DenseLayer(6, 3, 2, 0.0, dims=4), "dims: expected an integer from 1 to 3, got 4"),
        (lambda: dx.DenseLayer(6, 3, 2, 0.0, dims=0), "dims: expected .* got 0"),
        (lambda: dx.DenseLayer(6, 3, 2, 0.0, save="none"), "save: expected one of .* got 'none'"),
        (lambda: dx.DenseBlock(0, 6, 2, 3, 0.0), "num_layers: expected .* got 0"),
        (lambda: dx.DenseBlock(1, 6, 2, 3, 0.0, returns="old"), "returns: expected one of 'all', 'new', got 'old'"),
        (lambda: dx.Transition(6, 0), "num_output_features: expected .* got 0"),
        (lambda: dx.Transition(6, 3, dims=5), "dims: expected an integer from 1 to 3, got 5"),
    ],
)
def test_constructors_name_the_argument(make, message):
    with pytest.raises(ValueError, match=message):
        make()


BLOCK, LAYER, TRANSITION = dx.DenseBlock(1, 6, 2, 3, 0.0), dx.DenseLayer(6, 3, 2, 0.0), dx.Transition(6, 3)


@pytest.mark.parametrize(
    "module, x, error, message",
    [
        (
            dx.DenseBlock(1, 6, 2, 3, 0.0),
            torch.zeros(2, 6, 5),
            ValueError,
            r"init_features: expected 4 dim.*\[2, 6, 5\]",
        ),
        (BLOCK, torch.zeros(2, 5, 5, 5), RuntimeError, "init_features: expected 6 channels"),
        (BLOCK, torch.zeros(2, 6, 5, 5).half(), RuntimeError, "init_features: expected dtype"),
        (
            dx.DenseBlock(1, 6, 2, 3, 0.0),
            torch.zeros(2, 6, 5, 5, device="meta"),
            RuntimeError,
            f"expected a tensor on {DEVICE}",
        ),
        (BLOCK, None, TypeError, "init_features: expected a tensor, got NoneType"),
        (dx.DenseBlock(1, 6, 2, 3, 0.0, dims=1), torch.zeros(2, 6, 5, 5), ValueError, r"expected 3 dim.*\[N, 6, W\]"),
        (LAYER, [], ValueError, "features: expected at least one tensor"),
        (
            LAYER,
            torch.zeros(2, 5, 5, 5),
            RuntimeError,
            "features: expected 6 channels in all, got 5",
        ),
        (
            LAYER,
            [torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 5, 4)],
            RuntimeError,
            r"features\[1\]: expected \[2, C, 5, 5\] as features\[0\], got \[2, 3, 5, 4\]",
        ),
        (
            LAYER,
            [torch.zeros(2, 3, 5, 5), torch.zeros(2, 3, 5, 5).double()],
            RuntimeError,
            r"features\[1\]: expected dtype torch.float32",
        ),
        (
            dx.Transition(6, 3),
            torch.zeros(2, 6, 1, 4),
            RuntimeError,
            r"input: expected at least 2 pixels .*\[2, 6, 1, 4\]",
        ),
        (TRANSITION, torch.zeros(2, 7, 4, 4), RuntimeError, "input: expected 6 channels"),
    ],
)
def test_forward_names_what_was_expected_and_what_came(module, x, error, message):
    with pytest.raises(error, match=message):
        module(x)
