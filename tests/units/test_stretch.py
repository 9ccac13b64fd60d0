"""Units of a Sequential that run as a whole: only while each of them is what it was, and nobody looks on."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization

import densenet_ext as dx
from densenet_ext import kernels
from densenet_ext.algorithm.inference import form_of
from densenet_ext.units import head
from densenet_ext.units.entry import is_observed, observed
from densenet_ext.units.flow import incoming
from densenet_ext.units.parts import Probe
from densenet_ext.units.stretch import Chain, Stretch, key_of, stretches_of

pytestmark = pytest.mark.skipif(kernels.why_plain("cpu") is not None, reason="plain PyTorch prepares no calls")
LAST = torch.channels_last


class Shouting(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * 3


def networks() -> tuple[Any, Any]:
    """A fused network in evaluation and its unfused twin, on weights and statistics that all count."""
    torch.manual_seed(1)
    model: Any = dx.DenseNet(4, (2, 2, 2), 8, num_classes=5).eval()
    for value in model.state_dict().values():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(torch.rand(value.shape) + 0.5)
    model.to(memory_format=LAST)
    return model, dx.unfuse(copy.deepcopy(model))


def images(n: int = 2) -> Tensor:
    return torch.randn(n, 3, 48, 40).contiguous(memory_format=LAST)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many units each stretch has that has run."""
    seen: list[int] = []
    run = Stretch.run

    def noted(self: Stretch, *args: Any) -> Any:
        seen.append(len(self))
        return run(self, *args)

    monkeypatch.setattr(Stretch, "run", noted)
    return seen


def assert_alike(model: Any, usual: Any, x: Tensor) -> None:
    ours, theirs = model(x), usual(x)
    assert ours.dtype == theirs.dtype
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    if isinstance(model, dx.DenseNet):
        ours, theirs = model.features(x), usual.features(x)
        assert ours.stride() == theirs.stride()
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


@torch.no_grad()
def test_convolution_stem_blocks_transitions_and_head_run_as_one(ran: list[int]) -> None:
    model, usual = networks()
    x = images()
    for _ in range(2):
        assert_alike(model, usual, x)
    ran.clear()
    assert_alike(model, usual, x + 1)
    assert ran == [8, 7]  # with the head, and the features alone
    ran.clear()
    model(images(3))  # another form
    assert not ran
    model(images(3))
    assert ran == [8]
    with kernels.force_plain():
        assert_alike(model, usual, x)
    with torch.enable_grad():
        model(x).sum().backward()
    assert ran == [8] and model.features.conv0.weight.grad is not None


def reorder(features: Any, *names: str) -> None:
    """Gives children another order, from ``denseblock1`` on; "shout" is a new one."""
    children = dict(features._modules, shout=Shouting())
    first = list(features._modules).index("denseblock1")
    before, behind = list(features._modules)[:first], list(features._modules)[first:]
    features._modules.clear()
    for name in (*before, *names, *(name for name in behind if name not in names)):
        features._modules[name] = children[name]


def threefold(linear: nn.Linear) -> nn.Linear:
    made = copy.deepcopy(linear)
    made.weight.mul_(3)
    return made


def other_features(features: nn.Module) -> nn.Module:
    made: Any = copy.deepcopy(features)
    made.norm5.weight.mul_(3)
    return made


CHANGES: dict[str, Callable[[Any], object]] = {
    "a hook on a block": lambda m: m.features.denseblock2.register_forward_hook(lambda block, args, out: out * 2),
    "a hook on a layer": lambda m: m.features.denseblock2.denselayer1.register_forward_pre_hook(
        lambda layer, args: None
    ),
    "a hook in the stem": lambda m: m.features.relu0.register_forward_hook(lambda relu, args, out: out + 1),
    "a hook on the convolution": lambda m: m.features.conv0.register_forward_hook(lambda conv, args, out: out + 1),
    "another forward": lambda m: setattr(m.features.transition1, "forward", lambda x: x[:, :8, ::2, ::2] * 2),
    "another block": lambda m: setattr(m.features, "denseblock1", copy.deepcopy(m.features.denseblock2).train()),
    "a copied block": lambda m: setattr(m.features, "denseblock3", copy.deepcopy(m.features.denseblock3)),
    "a module between": lambda m: reorder(m.features, "denseblock1", "shout", "transition1"),
    "another order": lambda m: reorder(m.features, "denseblock2", "transition2", "denseblock1", "transition1"),
    "the activation of the stem": lambda m: setattr(m.features, "relu0", nn.LeakyReLU(0.5)),
    "a block in training": lambda m: m.features.denseblock2.train(),
    "a rate in training": lambda m: m.features.denseblock2.denselayer1.train(),
    "one layer less": lambda m: m.features.denseblock3._modules.popitem(),
    "a weight": lambda m: m.features.transition2.conv.weight.neg_(),
    "a norm": lambda m: m.features.transition2.norm.running_var.mul_(3),
    "another norm": lambda m: setattr(m.features.transition1, "norm", nn.BatchNorm2d(16).eval()),
    "another eps": lambda m: setattr(m.features.transition1.norm, "eps", 0.5),
    "another weight": lambda m: setattr(
        m.features.transition1.conv, "weight", nn.Parameter(m.features.transition1.conv.weight * 2)
    ),
    "another layout": lambda m: m.features.transition1.to(memory_format=torch.contiguous_format),
    "a block's own eps": lambda m: setattr(m.features.denseblock1.denselayer2.norm1, "eps", 0.5),
    "a weight's dtype": lambda m: m.features.transition2.conv.double(),
    "a transition's features": lambda m: setattr(
        m.features.transition2.conv.weight, "data", torch.full((9, 16, 1, 1), 0.1)
    ),
    "the stem's eps": lambda m: setattr(m.features.norm0, "eps", 0.5),
    "the stem's window": lambda m: setattr(m.features.pool0, "padding", 0),
    "only new features": lambda m: setattr(m.features.denseblock3, "returns", "new"),
    "the last norm": lambda m: m.features.norm5.weight.neg_(),
    "the last norm's eps": lambda m: setattr(m.features.norm5, "eps", 0.5),
    "another last norm": lambda m: setattr(
        m.features, "norm5", nn.BatchNorm2d(m.features.norm5.num_features, eps=0.5).eval()
    ),
    "the last norm in training": lambda m: m.features.norm5.train(),
    "a hook on the last norm": lambda m: m.features.norm5.register_forward_hook(lambda norm, args, out: out * 2),
    "a hook on the classifier": lambda m: m.classifier.register_forward_hook(lambda linear, args, out: out * 2),
    "a probe before the classifier": lambda m: m.classifier.register_forward_pre_hook(lambda linear, args: None),
    "another forward of the classifier": lambda m: setattr(m.classifier, "forward", lambda x: x[:, :3] * 2),
    "the classifier's weight": lambda m: m.classifier.weight.neg_(),
    "the classifier's memory": lambda m: setattr(m.classifier.bias, "data", m.classifier.bias.data + 1),
    "the classifier's layout": lambda m: setattr(m.classifier.weight, "data", m.classifier.weight.data.t().clone().t()),
    "another weight of the classifier": lambda m: setattr(
        m.classifier, "weight", nn.Parameter(m.classifier.weight[:4] * 2)
    ),
    "the classifier's dtype": lambda m: m.classifier.double(),
    "no bias": lambda m: setattr(m.classifier, "bias", None),
    "another classifier": lambda m: setattr(m, "classifier", threefold(m.classifier)),
    "a classifier of another kind": lambda m: setattr(
        m, "classifier", nn.Sequential(nn.Dropout(0.5), nn.ReLU(), m.classifier).eval()
    ),
    "a hook on the features": lambda m: m.features.register_forward_hook(lambda features, args, out: out * 2),
    "other features": lambda m: setattr(m, "features", other_features(m.features)),
    "a child that is not fused": lambda m: dx.unfuse(m.features.denseblock2),
    "a parametrised weight": lambda m: register_parametrization(m.features.transition1.conv, "weight", Shouting()),
    "a parametrised classifier": lambda m: register_parametrization(m.classifier, "weight", Shouting()),
    "the convolution's stride": lambda m: setattr(m.features.conv0, "stride", (1, 1)),
    "another weight of the convolution": lambda m: setattr(
        m.features.conv0, "weight", nn.Parameter(m.features.conv0.weight * 2)
    ),
    "the convolution's dtype": lambda m: m.features.conv0.double(),
    "one module more": lambda m: m.features.add_module("shout", Shouting()),
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """What PyTorch's linear layer was called with."""
    seen: list[Tensor] = []

    def noted(part: nn.Module, x: Tensor) -> Tensor:
        seen.append(x)
        return linear(part, x)

    linear = head._linear
    monkeypatch.setattr(head, "_linear", noted)
    return seen


@torch.no_grad()
def test_a_small_classifier_runs_with_the_head_in_every_call(called: list[Tensor]) -> None:
    model, usual = networks()
    x = images(3)
    first = model(x)
    for _ in range(3):
        assert torch.equal(model(x), first)
    assert not called
    exact = usual.double()(x.double())
    assert (first - exact).abs().max() <= 2 * (usual.float()(x) - exact).abs().max()
    nothing = model(x[:0])
    assert nothing.shape == (0, 5) and len(called) == 1
    with torch.enable_grad():
        model(x).sum().backward()
    assert len(called) == 2 and model.classifier.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).dtype == torch.bfloat16
    assert len(called) == 3
    seen: list[Any] = []
    model.classifier.register_forward_hook(lambda linear, args, out: seen.append(out))
    assert torch.equal(model(x), seen[0]) and len(called) == 3


@torch.no_grad()
def test_a_large_classifier_is_pytorchs(called: list[Tensor]) -> None:
    model, usual = networks()
    for each in (model, usual):
        each.classifier = nn.Linear(model.classifier.in_features, 2**16 // model.classifier.in_features + 1)
    usual.classifier.load_state_dict(model.classifier.state_dict())
    for _ in range(3):
        assert_alike(model, usual, images())
    assert len(called) == 3


@torch.no_grad()
def test_who_replaced_the_linear_layers_function_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = networks()
    for _ in range(3):
        model(images())
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, weight, bias: x[:, :2])
    assert model(images()).shape == (2, 2)


@pytest.mark.parametrize("what", CHANGES)
@torch.no_grad()
def test_whatever_changes_between_two_calls(what: str, ran: list[int]) -> None:
    model, usual = networks()
    x = images()
    for _ in range(3):
        assert_alike(model, usual, x)
    assert ran
    for each in (model, usual):
        CHANGES[what](each)
    found = []
    for each in (model, usual):
        try:
            found.append(each(x))
        except RuntimeError as error:
            found.append(type(error))
    if isinstance(found[1], type):
        assert found[0] is found[1]
        return
    for _ in range(3):
        assert_alike(model, usual, x)


class HooksTheLast(nn.Module):
    """Hooks another module while it runs."""

    def __init__(self, last: nn.Module) -> None:
        super().__init__()
        self.last = [last]  # not a child

    def forward(self, x: Tensor) -> Tensor:
        if not self.last[0]._forward_hooks:
            self.last[0].register_forward_hook(lambda norm, args, out: out * 2)
        return x


@torch.no_grad()
def test_a_module_that_hooks_the_last_norm_on_its_way() -> None:
    model, usual = networks()
    for each in (model, usual):
        each.features._modules["shout"] = HooksTheLast(each.features.norm5)
        each.features._modules["norm5"] = each.features._modules.pop("norm5")  # stays the last
    x = images()
    for _ in range(3):
        assert_alike(model, usual, x)


@torch.no_grad()
def test_who_observes_is_told_of_each_unit(ran: list[int]) -> None:
    model, _ = networks()
    x = images()
    for _ in range(3):
        model(x)
    ran.clear()
    kinds: list[str] = []
    assert not is_observed()
    with observed(lambda module, kind: kinds.append(kind)):
        assert is_observed()
        model(x)
    assert not ran and kinds.count("dense block") == 3 and kinds.count("transition") == 2


@torch.no_grad()
def test_a_stretch_keeps_no_module_alive() -> None:
    model, _ = networks()
    for _ in range(3):
        model(images())
        model.features(images())
    kept = [weakref.ref(each) for each in (model, model.features, model.features.denseblock1, model.classifier.weight)]
    del model
    gc.collect()
    assert not any(each() is not None for each in kept)


@torch.no_grad()
def test_two_models_over_the_same_features(ran: list[int]) -> None:
    pairs = networks(), networks()
    for each in (0, 1):
        pairs[1][each].features = pairs[0][each].features
        pairs[1][each].classifier.weight.mul_(3)
    for _ in range(3):
        for model, usual in pairs:
            assert_alike(model, usual, images())
    assert 8 in ran
    for each in (0, 1):
        pairs[1][each].features = copy.deepcopy(pairs[0][each].features)
        pairs[1][each].features.norm5.weight.mul_(2)
    for _ in range(3):
        for model, usual in pairs:
            assert_alike(model, usual, images())


@torch.no_grad()
def test_a_probe_is_told_of_a_unit_whose_stretch_is_known(ran: list[int]) -> None:
    model, _ = networks()
    for _ in range(3):
        model(images())
    told: list[str] = []
    model.features.transition1.register_forward_hook(Probe(lambda: told.append("transition1")))
    ran.clear()
    model(images())
    assert told == ["transition1"] and 8 not in ran


@torch.no_grad()
def test_the_first_units_run_as_one_where_the_head_cannot(ran: list[int]) -> None:
    model, usual = networks()
    x = images()
    for each in (model, usual):
        each.features._modules["shout"] = Shouting()
        each.features._modules["norm5"] = each.features._modules.pop("norm5")
    for _ in range(3):
        assert_alike(model, usual, x)
    assert ran
    for each in (model, usual):
        each.features.norm5.register_forward_hook(lambda norm, args, out: out * 2)
    ran.clear()
    assert_alike(model, usual, x)
    with pytest.raises((TypeError, AttributeError), match="expected a tensor, got list"):
        model([x])


@torch.no_grad()
def test_a_stretch_is_forgotten_with_its_module_and_is_not_copied() -> None:
    model, _ = networks()
    for _ in range(3):
        model(images())
    chain = Chain(model.features, (), model)
    known = stretches_of(chain)
    assert known is stretches_of(chain) and known.find(1, chain, incoming(images())) is None
    twin = copy.deepcopy(model)
    assert stretches_of(Chain(twin.features, (), twin)) is not known
    assert key_of(1, incoming(images())) is not None and form_of(images()) is not None
    with torch.enable_grad():
        assert key_of(1, incoming(images())) is None and form_of(images()) is None
