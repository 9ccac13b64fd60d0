"""`forward` is a method that can be taken, assigned and restored; classes can be patched, and parts subclassed."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.peers.twins import (
    NETS,
    assert_all_fused,
    fuse,
    images,
    library,
    outcome,
    pair,
    same,
    torchvision_net,
    train_step,
    warm,
)

EACH = pytest.mark.parametrize("name", NETS)
BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
BLOCK = "features.denseblock1"
PLACES = [
    *("", "features", "features.conv0", "features.norm0", "features.pool0", BLOCK, f"{BLOCK}.denselayer1"),
    *(f"{BLOCK}.denselayer2.{part}" for part in ("norm1", "relu1", "conv1", "norm2", "conv2")),
    *("features.transition1", "features.transition1.conv", "features.norm5", "classifier"),
]


# ---- forward is an attribute like any other --------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_assigned_forward_runs_and_restored_forward_is_fused(place: str) -> None:
    def run(model: nn.Module) -> Any:
        module = model.get_submodule(place)
        old = module.forward
        calls: list[str] = []

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append("called")
            return old(*args, **kwargs) * 2

        module.forward = wrapper
        inside = train_step(model)
        module.forward = old
        assigned = train_step(model)
        del module.forward
        return calls, inside, assigned, train_step(model)

    models = pair(torchvision_net().double())
    same(models, run)
    assert_all_fused(models[1])
    assert not any("forward" in module.__dict__ for module in models[1].modules())


@pytest.mark.parametrize("place", PLACES)
def test_restored_forward_is_fused_while_it_is_assigned(place: str) -> None:
    """`module.forward = module.forward`, which leaves a bound method in ``__dict__``, changes nothing."""
    models = pair(torchvision_net().double())
    for model in models:
        module = model.get_submodule(place)
        module.forward = module.forward
    same(models, train_step)
    assert_all_fused(models[1])


@EACH
def test_forward_is_a_bound_method(name: str) -> None:
    for model in pair(NETS[name]().double()):
        for module in model.modules():
            assert module.forward.__self__ is module and callable(module.forward.__func__)
            assert module.forward.__name__ == "forward"


@pytest.mark.parametrize("place", ["", BLOCK, "features.transition1"])
def test_forward_taken_off_one_module_runs_another(place: str) -> None:
    """The function behind `forward`, called on another module of the same kind, uses that module's parameters."""

    def run(model: nn.Module) -> Any:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for p in other.parameters():
                p.mul_(0.5)
        one, two = model.get_submodule(place), other.get_submodule(place)
        x = images() if not place else torch.ones(2, 16 if place == BLOCK else 32, 4, 4, dtype=torch.float64)
        by_function = type(one).forward(two, x)
        bound = types.MethodType(one.forward.__func__, two)(x)
        two.forward = types.MethodType(type(one).forward, two)
        return by_function, bound, two(x), functools.partial(type(one).forward, two)(x)

    same(pair(torchvision_net().double()), run)


def test_signature_and_source_are_the_original_ones() -> None:
    import inspect

    for plain, fused in zip(*(model.modules() for model in pair(torchvision_net())), strict=True):
        assert inspect.signature(plain.forward) == inspect.signature(fused.forward)
        assert inspect.signature(type(plain)) == inspect.signature(type(fused))
        assert inspect.getdoc(type(plain)) == inspect.getdoc(type(fused))
        assert inspect.unwrap(fused.forward.__func__) is plain.forward.__func__
        assert type(plain).__qualname__ == type(fused).__qualname__ and isinstance(fused, type(plain))


def test_keyword_argument() -> None:
    same(pair(torchvision_net().double()), lambda model: model(x=images()))
    same(pair(torchvision_net().double()), lambda model: outcome(lambda m: m(images(), 1), model))
    same(pair(torchvision_net().double()), lambda model: outcome(lambda m: m(), model))


# ---- classes ---------------------------------------------------------------------------------------------------------

PATCHED: dict[str, Callable[[], tuple[Any, str]]] = {
    "BatchNorm2d.forward": lambda: (nn.BatchNorm2d, "forward"),
    "_BatchNorm.forward": lambda: (nn.modules.batchnorm._BatchNorm, "forward"),
    "Conv2d.forward": lambda: (nn.Conv2d, "forward"),
    "Conv2d._conv_forward": lambda: (nn.Conv2d, "_conv_forward"),
    "ReLU.forward": lambda: (nn.ReLU, "forward"),
    "AvgPool2d.forward": lambda: (nn.AvgPool2d, "forward"),
    "MaxPool2d.forward": lambda: (nn.MaxPool2d, "forward"),
    "Sequential.forward": lambda: (nn.Sequential, "forward"),
    "_DenseLayer.forward": lambda: (library("torchvision.models.densenet")._DenseLayer, "forward"),
    "_DenseLayer.bn_function": lambda: (library("torchvision.models.densenet")._DenseLayer, "bn_function"),
    "_DenseBlock.forward": lambda: (library("torchvision.models.densenet")._DenseBlock, "forward"),
    "_Transition.forward": lambda: (library("torchvision.models.densenet")._Transition, "forward"),
    "DenseNet.forward": lambda: (library("torchvision.models.densenet").DenseNet, "forward"),
    "Module.__call__": lambda: (nn.Module, "__call__"),
}


@BOTH
@pytest.mark.parametrize("what", PATCHED)
@pytest.mark.parametrize("when", ["after fuse", "before fuse"])
def test_patched_classes(what: str, when: str, training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch is honoured while it is there, whenever it came, and the model runs as before when it is gone."""
    owner, name = PATCHED[what]()
    usual = getattr(owner, name)

    def patched(self: Any, *args: Any) -> Any:
        return usual(self, *args) * 1.5

    def run(model: nn.Module) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, patched, raising=False)
            inside = train_step(model)
        return inside, train_step(model)

    plain = warm(torchvision_net().double().train(training))
    if when == "after fuse":
        models = plain, fuse(copy.deepcopy(plain))
    else:
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, patched, raising=False)
            models = plain, fuse(copy.deepcopy(plain))
    same(models, run)


class Doubled(nn.BatchNorm2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * 2


class Named(nn.BatchNorm2d):
    """A subclass that changes nothing."""


class Scaled(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight * 2, bias)


class Leaky(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.leaky_relu(x, 0.1)


@BOTH
@pytest.mark.parametrize("place", [f"{BLOCK}.denselayer1.", "features.transition1.", "features."])
@pytest.mark.parametrize("kind", [Doubled, Named, Scaled, Leaky])
@pytest.mark.parametrize("how", ["class", "replaced"])
def test_subclasses_of_parts(place: str, kind: Any, how: str, training: bool) -> None:
    """A part that becomes another class after `fuse`, by ``__class__`` or by assignment, computes what it says."""

    def run(model: nn.Module) -> Any:
        parent = model.get_submodule(place[:-1])
        for name, child in parent.named_children():
            if type(child) in kind.__bases__:
                other = copy.deepcopy(child)
                other.__class__ = kind
                if how == "class":
                    child.__class__ = kind
                else:
                    setattr(parent, name, other)
        return train_step(model)

    same(pair(torchvision_net().double().train(training)), run)


def test_class_that_registers_its_subclasses() -> None:
    """A class made on the fly is no subclass that somebody declared: registries do not hear of it."""
    registered: list[str] = []
    densenet = library("torchvision.models.densenet").DenseNet

    class Registry(densenet):
        def __init_subclass__(cls, /, tag: str, **kwargs: Any) -> None:
            super().__init_subclass__(**kwargs)
            registered.append(tag)

    class Registered(Registry, tag="declared"):
        pass

    settings = {"growth_rate": 8, "block_config": (2, 2), "num_init_features": 16, "num_classes": 5}
    same(pair(Registered(**settings).double()), train_step)
    assert registered == ["declared"]
