"""What torchvision's spelling and those derived from it have in common; an adapter fills in the differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from densenet_ext.fusing.forwards import Fused, FusedBlock, LayerParts
from densenet_ext.fusing.matching import Unit
from densenet_ext.fusing.probing import Passing, differs_from_block, differs_from_chain, differs_from_layer
from densenet_ext.fusing.surroundings import FusedFeatures, FusedHead, FusedTransition, HeadParts

PARTS = LayerParts._fields[:6]


class Classes(NamedTuple):
    """The names of a library's classes."""

    layer: str = "_DenseLayer"
    block: str = "_DenseBlock"
    transition: str = "_Transition"
    model: str = "DenseNet"


class UsualAdapter:
    """Classes for layer, block, transition and a model of features and classifier.

    Classes are recognised by their names, so that copies in other files count too; that their ``forward`` does what is
    expected is tried out (``probing``).
    """

    library: ClassVar[str]
    classes: ClassVar[Classes] = Classes()
    memory_mode: ClassVar[str | None]  # the layer's attribute of the library's own memory mode
    passing: ClassVar[Passing]  # how a layer is given the features
    chain: ClassVar[tuple[str, ...]] = PARTS  # the layer's children that its forward runs
    drops: ClassVar[bool] = True  # dropout is a function, with the layer's drop_rate
    stem: ClassVar[tuple[str, ...]] = ("norm0", "relu0", "pool0")
    final_norm: ClassVar[str] = "norm5"
    head_chain: ClassVar[tuple[str | Callable[..., Any], ...]] = (
        "features",
        F.relu,
        F.adaptive_avg_pool2d,
        torch.flatten,
        "classifier",
    )

    def layers(self, block: nn.Module) -> dict[str, nn.Module]:
        """Every child is a layer."""
        return {name: layer for name, layer in block._modules.items() if layer is not None}

    def parts(self, layer: nn.Module) -> LayerParts:
        """norm1, relu1, conv1, norm2, relu2, conv2 and drop_rate."""
        norm1, relu1, conv1, norm2, relu2, conv2 = map(layer._modules.get, PARTS)
        rate: Any = layer.drop_rate
        return LayerParts(norm1, relu1, conv1, norm2, relu2, conv2, rate)

    def head(self, model: nn.Module) -> HeadParts:
        """features and classifier; ReLU, average and flattening are functions."""
        children = model._modules
        return HeadParts(children.get("features"), {"classifier": children.get("classifier")})

    def set_deterministic(self, block: nn.Module) -> bool:
        """Sets ``drop_rate`` of the layers to 0; whether any was above."""
        return _set_all(self._layers(block), "drop_rate", 0.0)

    def set_memory_mode_off(self, block: nn.Module) -> bool:
        """Switches the layers' memory mode off; whether any was on."""
        return self.memory_mode is not None and _set_all(self._layers(block), self.memory_mode, False)

    def match(self, module: nn.Module) -> Unit | None:
        """``module`` as a unit of this library, or None when it is not spelled like one."""
        if self._is_block(module):
            return self._block(module)
        if spelled(module, self.classes.transition):
            return unit_of(FusedTransition(module), _differs_from_sequential(module))
        if isinstance(module, nn.Sequential) and self._holds_block(module):
            return unit_of(FusedFeatures(module, self._stem(module)), _differs_from_sequential(module))
        features = module._modules.get("features")
        if spelled(module, self.classes.model) and features is not None and self._holds_block(features):
            return unit_of(FusedHead(module, self), self._differs_from_model(module))
        return None

    def _is_layer(self, layer: nn.Module) -> bool:
        return spelled(layer, self.classes.layer) and self.memory_mode is not None and hasattr(layer, self.memory_mode)

    def _layers(self, block: nn.Module) -> list[nn.Module]:
        return [layer for layer in self.layers(block).values() if self._is_layer(layer)]

    def _is_block(self, module: nn.Module) -> bool:
        return spelled(module, self.classes.block) and bool(self._layers(module))

    def _holds_block(self, module: nn.Module) -> bool:
        return any(self._is_block(child) for child in module.children())

    def _stem(self, features: nn.Module) -> tuple[str, ...]:
        return self.stem

    def _block(self, block: nn.Module) -> Unit:
        layers = self._layers(block)
        known = [layer for layer in layers if _spells_forward(layer, self.classes.layer)]
        layer = known[0] if known else layers[0]
        refusal = (
            None
            if self.passing == "joined" and _differs_from_sequential(block) is None
            else _unknown_forward(block, self.classes.block, lambda: differs_from_block(block, self.passing))
        )
        if refusal is None:
            refusal = _unknown_forward(
                layer,
                self.classes.layer,
                lambda: differs_from_layer(layer, self.passing, self.chain, self.drops),
            )
        on = self.memory_mode is not None and any(getattr(layer, self.memory_mode) for layer in layers)
        functor = FusedBlock(block, self, type(layer), "features" if on else "bottlenecks")
        return dataclasses.replace(unit_of(functor, refusal), settings=self)

    def _differs_from_model(self, model: nn.Module) -> str | None:
        return _unknown_forward(model, self.classes.model, lambda: differs_from_chain(model, self.head_chain))


def _set_all(layers: Sequence[nn.Module], name: str, value: Any) -> bool:
    differing = [layer for layer in layers if getattr(layer, name, value) != value]
    for layer in differing:
        setattr(layer, name, value)
    return bool(differing)


def spelled(module: nn.Module, name: str) -> bool:
    """Whether the module's class, or one that it derives from, has this name outside of densenet_ext."""
    return any(cls.__name__ == name and not cls.__module__.startswith("densenet_ext.") for cls in type(module).__mro__)


def _spells_forward(module: nn.Module, name: str) -> bool:
    return getattr(type(module).forward, "__qualname__", "").split(".")[-2:] == [name, "forward"]


def _differs_from_sequential(module: nn.Module) -> str | None:
    return None if type(module).forward is nn.Sequential.forward else _has_own_forward(module)


def _has_own_forward(module: nn.Module) -> str:
    return f"{type(module).__name__} has a forward of its own"


def _unknown_forward(module: nn.Module, name: str, difference: Callable[[], str | None]) -> str | None:
    if not _spells_forward(module, name):
        return _has_own_forward(module)
    found = difference()
    return None if found is None else f"the forward of {type(module).__name__} is not the known one: {found}"


def unit_of(functor: Fused, refusal: str | None = None) -> Unit:
    """What ``functor`` is for, with the reason why it can never be installed, if there is one."""
    module = functor.module
    if refusal is None and "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Fused):
        refusal = "its forward was replaced on the instance"
    return Unit(functor.kind, module, functor if refusal is None else None, refusal)
