"""`fuse` on torchvision's DenseNet: the same numbers, and the usual code where something stands in the way."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import densenet_ext as dx
from densenet_ext.units import entry
from tests.support import peers
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, rows, three_steps
from tests.support.helpers import generator

BLOCKS = ["features.denseblock1", "features.denseblock2", "features.denseblock3"]


def small(**kwargs: Any) -> nn.Module:
    torch.manual_seed(0)
    settings = {"growth_rate": 8, "block_config": (2, 2, 2), "num_init_features": 16, "num_classes": 10, **kwargs}
    return peers.torchvision_densenet().DenseNet(**settings).double()


def images(n: int = 2, size: int = 64) -> Tensor:
    return torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator(1))


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_three_steps_equal_the_unfused(save: str) -> None:
    plain = small()
    fused = dx.fuse(copy.deepcopy(plain), save=save)
    x = images()
    assert_same_state(three_steps(fused, x), three_steps(plain, x))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    assert [row.kind for row in dx.report(fused) if not row.fused] == []


def test_densenet121_three_steps_equal_the_unfused() -> None:
    torch.manual_seed(0)
    plain = peers.torchvision_densenet().densenet121(num_classes=10).double()
    fused = dx.fuse(copy.deepcopy(plain))
    x = images(4, 64)  # 16 values per channel at the end: with three, rounding is amplified beyond any comparison
    assert_same_state(three_steps(fused, x), three_steps(plain, x))


def test_memory_efficient_model_saves_features_and_moves_statistics_once() -> None:
    plain, fused = small(), dx.fuse(small(memory_efficient=True))
    assert {rows(fused)[name].save for name in BLOCKS} == {"features"}
    x = images()
    # not equal to torchvision's own memory mode, whose recomputation moves the running statistics again
    assert_same_state(three_steps(fused, x), three_steps(plain, x))
    explicit = dx.fuse(small(memory_efficient=True), save="bottlenecks")
    assert {rows(explicit)[name].save for name in BLOCKS} == {"bottlenecks"}


def test_evaluation_and_frozen_norms_equal_the_unfused() -> None:
    plain = small(drop_rate=0.3)
    fused = dx.fuse(copy.deepcopy(plain))
    x = images()
    for model in (plain, fused):
        model.eval()
        model.features.denseblock2.denselayer1.norm1.train()  # one norm alone goes on counting
    outs = [model(x) for model in (fused, plain)]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, msg=lambda text, name=name: f"{name}: {text}")
    assert_same_state(fused, plain)


def test_dropout_follows_the_seed_and_the_layers_mode() -> None:
    model = dx.fuse(small(drop_rate=0.5))
    x = images()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(model(x))
    assert torch.equal(outs[0], outs[1]) and not torch.equal(outs[0], outs[2])
    for layer in model.modules():
        if hasattr(layer, "drop_rate"):
            layer.drop_rate = 0.0  # it is read at every call
    assert torch.equal(model(x), model(x))


def _hook(model: Any) -> None:
    model.features.denseblock1.denselayer2.conv2.register_forward_hook(lambda module, args, out: out * 0.5)


def _elu(model: Any) -> None:
    model.features.denseblock1.denselayer2.relu2 = nn.ELU()


def _groups(model: Any) -> None:
    model.features.denseblock1.denselayer2.conv2 = nn.Conv2d(32, 8, 3, padding=1, groups=2, bias=False).double()


def _group_norm(model: Any) -> None:
    model.features.denseblock1.denselayer1.norm1 = nn.GroupNorm(4, 16).double()


def _parametrised(model: Any) -> None:
    parametrizations.weight_norm(model.features.denseblock1.denselayer1.conv2)


def _pruned(model: Any) -> None:
    prune.l1_unstructured(model.features.denseblock1.denselayer1.conv1, "weight", 0.3)


def _replaced_forward(model: Any) -> None:
    relu = model.features.denseblock1.denselayer1.relu1
    relu.forward = lambda x: x.clamp(0, 6)


class Squeeze(nn.Module):
    def __init__(self, features: list[Tensor]) -> None:
        super().__init__()

    def forward(self, features: list[Tensor]) -> Tensor:
        return features[-1][:, :8] * 0.1


def _replaced_layer(model: Any) -> None:
    model.features.denseblock1.denselayer2 = Squeeze([])


def _backward_hook(model: Any) -> None:
    model.features.denseblock1.denselayer1.relu2.inplace = False
    model.features.denseblock1.denselayer1.relu2.register_full_backward_hook(lambda module, grad_in, out: (out[0] * 2,))


ALTERATIONS = [
    (_hook, "denselayer2.conv2 has a forward hook"),
    (_elu, "denselayer2.relu2 is a ELU, not a ReLU"),
    (_groups, "denselayer2.conv2 has 2 groups"),
    (_group_norm, "denselayer1.norm1 is a GroupNorm, not a BatchNorm2d"),
    (_parametrised, "denselayer1.conv2 is parametrised"),
    (_pruned, "denselayer1.conv1 has a forward pre-hook"),
    (_replaced_forward, "was replaced on the instance"),
    (_replaced_layer, "denselayer2 is a Squeeze, not a _DenseLayer"),
    (_backward_hook, "denselayer1.relu2 has a backward hook"),
]


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("alter", "reason"), ALTERATIONS, ids=[alter.__name__ for alter, _ in ALTERATIONS])
def test_an_altered_block_runs_unfused_and_says_why(alter: Any, reason: str, when: str) -> None:
    models = [small(), small()]
    if when == "after":
        dx.fuse(models[0])
    for model in models:
        torch.manual_seed(3)
        alter(model)
    if when == "before":
        dx.fuse(models[0])
    found = rows(models[0])
    assert reason in (found["features.denseblock1"].reason or "")
    assert found["features.denseblock2"].fused and found["features.transition1"].fused
    x = images()
    outs = [model(x) for model in models]
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-8, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_convolutions_with_a_bias_run_fused(save: str, when: str) -> None:
    models = [small(), small()]
    if when == "after":
        dx.fuse(models[0], save=save)
    for model in models:
        torch.manual_seed(3)
        model.features.denseblock1.denselayer1.conv1 = nn.Conv2d(16, 32, 1).double()
        model.features.denseblock1.denselayer2.conv2 = nn.Conv2d(32, 8, 3, padding=1).double()
    if when == "before":
        dx.fuse(models[0], save=save)
    assert all(row.fused for row in dx.report(models[0]))
    ran: list[nn.Module] = []
    with entry.observed(lambda module, kind: ran.append(module)):
        outs = [model(images()) for model in models]
    assert models[0].features.denseblock1 in ran
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_same_gradients(*models)
    assert_same_state(*(three_steps(model, images()) for model in models))


def test_a_replaced_forward_is_named() -> None:
    model = dx.fuse(small())
    _replaced_forward(model)
    reason = "denselayer1.relu1 has a forward that was replaced on the instance"
    assert rows(model)["features.denseblock1"].reason == reason


def test_other_units_say_why_they_are_not_fused() -> None:
    model = dx.fuse(small())
    model.features.pool0 = nn.MaxPool2d(3, stride=2, padding=1, ceil_mode=True)
    model.features.transition1.pool = nn.MaxPool2d(2)
    model.features.norm5.register_forward_hook(lambda module, args, out: None)
    found = rows(model)
    assert found["features"].reason == "pool0 has dilation, ceil_mode or return_indices"
    assert found["features.transition1"].reason == "pool is a MaxPool2d, not a AvgPool2d"
    assert found[""].reason == "norm5 has a forward hook"
    x = images()
    torch.testing.assert_close(model(x), dx.unfuse(model)(x))


@pytest.mark.parametrize("first", ["fuse", "convert"])
def test_sync_batch_norm_is_an_ordinary_one_without_other_processes(first: str) -> None:
    plain, model = small(), small()
    model = dx.fuse(model) if first == "fuse" else nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model) if first == "fuse" else dx.fuse(model)
    assert all(row.fused for row in dx.report(model))
    x = images()
    assert_same_state(three_steps(model, x), three_steps(plain, x))
    torch.testing.assert_close(model.eval()(x), plain.eval()(x))


def test_a_subclass_with_its_own_forward_stays_unfused() -> None:
    module = peers.torchvision_densenet()

    class Layer(module._DenseLayer):
        def forward(self, input: Any) -> Tensor:
            return super().forward(input) * 2

    class Block(module._DenseBlock):
        def forward(self, init_features: Tensor) -> Tensor:
            return super().forward(init_features).relu()

    class Net(module.DenseNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.features(x).amax((2, 3))

    model = small()
    torch.manual_seed(0)
    net = Net(8, (2, 2, 2), 16, num_classes=10).double()
    net.features.denseblock1.denselayer1.__class__ = Layer
    net.features.denseblock2.__class__ = Block
    plain = copy.deepcopy(net)
    found = rows(dx.fuse(net))
    assert found[""].reason == "its forward runs features, amax"
    assert found["features.denseblock1"].reason == "denselayer2 is a _DenseLayer, not a Layer"
    words = "its values are not those of norm, ReLU, 1x1, norm, ReLU, 3x3, dropout and concatenation"
    unknown = f"this block of _DenseLayer layers is not a known one: {words}"
    assert found["features.denseblock2"].reason == unknown
    assert found["features.denseblock3"].fused
    x = images()
    torch.testing.assert_close(net(x), plain(x))
    dx.fuse(model)
    model.features.denseblock1.denselayer1.__class__ = Layer
    assert rows(model)["features.denseblock1"].reason == "denselayer1 is a Layer, not a _DenseLayer"
    plain = small()
    plain.features.denseblock1.denselayer1.__class__ = Layer
    torch.testing.assert_close(model(x), plain(x))
    assert type(dx.unfuse(model)) is module.DenseNet


def test_a_subclass_that_computes_the_same_runs_fused() -> None:
    module = peers.torchvision_densenet()

    class Layer(module._DenseLayer):
        def forward(self, input: Any) -> Tensor:
            return super().forward([input] if isinstance(input, Tensor) else list(input))

    class Block(module._DenseBlock):
        def forward(self, init_features: Tensor) -> Tensor:
            features = init_features
            for layer in self.values():
                features = torch.cat([features, layer([features])], 1)
            return features

    class Net(module.DenseNet):
        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.features(x).relu().mean((2, 3)))

    torch.manual_seed(0)
    plain = Net(8, (2, 2, 2), 16, num_classes=10).double()
    for layer in plain.features.denseblock1.children():
        layer.__class__ = Layer
    plain.features.denseblock2.__class__ = Block
    fused = dx.fuse(copy.deepcopy(plain))
    assert all(row.fused for row in dx.report(fused)), str(dx.report(fused))
    assert_same_state(three_steps(fused, images()), three_steps(plain, images()))


def test_a_class_that_is_only_spelled_alike_stays_unfused() -> None:
    module = peers.torchvision_densenet()

    class _DenseLayer(module._DenseLayer):
        def forward(self, input: Any) -> Tensor:
            x = torch.cat(input, 1)
            return self.conv2(self.relu2(self.norm2(self.conv1(self.norm1(self.relu1(x))))))

    class _DenseBlock(module._DenseBlock):
        def forward(self, init_features: Tensor) -> Tensor:
            features = [init_features]
            for layer in self.values():
                features.append(layer(features[-1:]))
            return torch.cat(features, 1)

    class Remembers(module._DenseLayer):
        def forward(self, input: Any) -> Tensor:
            self.seen = super().forward(input)
            return self.seen

    Remembers.forward.__qualname__ = "_DenseLayer.forward"
    model = small()
    for layer in model.features.denseblock1.children():
        layer.__class__ = _DenseLayer
    model.features.denseblock2.__class__ = _DenseBlock
    for layer in model.features.denseblock3.children():
        layer.__class__ = Remembers
    before = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="none of the 3 dense blocks"):
        found = rows(dx.fuse(model))
    unknown = "this block of _DenseLayer layers is not a known one:"
    words = "its values are not those of norm, ReLU, 1x1, norm, ReLU, 3x3 and concatenation"
    assert found["features.denseblock1"].reason == f"{unknown} {words}"
    assert (found["features.denseblock2"].reason or "").startswith(f"{unknown} it could not be tried out")
    remembers = "this block of Remembers layers is not a known one: it changes seen of a Remembers"
    assert found["features.denseblock3"].reason == remembers
    for module, twin in zip(model.modules(), before.modules(), strict=True):
        assert type(module) is type(twin) and module.__dict__.keys() == twin.__dict__.keys()
    assert_same_state(model, before)


def test_a_dense_block_inside_of_another_model() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = small().features
            self.classifier = nn.Linear(32, 3).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.classifier(self.backbone(x).relu().mean((2, 3)))

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = dx.fuse(Net())
    assert rows(model)["backbone.denseblock1"].fused and rows(model)["backbone"].fused
    x = images()
    torch.testing.assert_close(model.eval()(x), dx.unfuse(model)(x))
