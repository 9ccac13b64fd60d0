"""What torchvision's spelling and those derived from it have in common; an adapter fills in the differences."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from densenet_ext.fusing.forwards import Fused, FusedBlock, FusedFeatures, FusedHead, FusedTransition, LayerParts
from densenet_ext.fusing.matching import Unit
from densenet_ext.fusing.probing import differs_from_block, differs_from_head, differs_from_layer

_PARTS = LayerParts._fields[:6]


class UsualAdapter:
    """Private classes ``_DenseLayer``, ``_DenseBlock``, ``_Transition`` and a ``DenseNet`` of features and classifier.

    Classes are recognised by their names, so that copies in other files count too; that their ``forward`` does what is
    expected is tried out (``probing``).
    """

    library: ClassVar[str]
    memory_mode: ClassVar[str]  # the layer's attribute of the library's own memory mode
    unpacks: ClassVar[bool]  # a layer takes features as arguments rather than as a list
    final_norm: ClassVar[str]
    stem: ClassVar[tuple[str, str, str]] = ("norm0", "relu0", "pool0")

    def layers(self, block: nn.Module) -> dict[str, nn.Module]:
        """Every child is a layer."""
        return {name: layer for name, layer in block._modules.items() if layer is not None}

    def parts(self, layer: nn.Module) -> LayerParts:
        """norm1, relu1, conv1, norm2, relu2, conv2 and drop_rate."""
        children = layer._modules
        norm1, relu1, conv1, norm2, relu2, conv2 = map(children.get, _PARTS)
        rate: Any = layer.drop_rate
        return LayerParts(norm1, relu1, conv1, norm2, relu2, conv2, rate)

    def set_deterministic(self, block: nn.Module) -> bool:
        """Sets ``drop_rate`` of the layers to 0; whether any was above."""
        return _set_all(self._layers(block), "drop_rate", 0.0)

    def set_memory_mode_off(self, block: nn.Module) -> bool:
        """Switches the layers' memory mode off; whether any was on."""
        return _set_all(self._layers(block), self.memory_mode, False)

    def match(self, module: nn.Module) -> Unit | None:
        """``module`` as a unit of this library, or None when it is not spelled like one."""
        if self._is_block(module):
            return self._block(module)
        if _spelled(module, "_Transition"):
            own = type(module).forward is nn.Sequential.forward
            return _unit(FusedTransition(module, self), None if own else _has_own_forward(module))
        if isinstance(module, nn.Sequential) and any(self._is_block(child) for child in module.children()):
            own = type(module).forward is nn.Sequential.forward
            return _unit(FusedFeatures(module, self), None if own else _has_own_forward(module))
        if _spelled(module, "DenseNet"):
            return self._head(module)
        return None

    def _layers(self, block: nn.Module) -> list[nn.Module]:
        layers = (layer for layer in self.layers(block).values() if _spelled(layer, "_DenseLayer"))
        return [layer for layer in layers if hasattr(layer, self.memory_mode)]

    def _is_block(self, module: nn.Module) -> bool:
        return _spelled(module, "_DenseBlock") and bool(self._layers(module))

    def _block(self, block: nn.Module) -> Unit:
        layers = self._layers(block)
        known = [layer for layer in layers if _spells_forward(layer, "_DenseLayer")]
        layer = known[0] if known else layers[0]
        refusal = _unknown_forward(block, "_DenseBlock", lambda: differs_from_block(block, self.unpacks))
        if refusal is None:
            refusal = _unknown_forward(layer, "_DenseLayer", lambda: differs_from_layer(layer, self.unpacks, _PARTS))
        on = any(getattr(layer, self.memory_mode) for layer in layers)
        functor = FusedBlock(block, self, type(layer), "features" if on else "bottlenecks")
        return dataclasses.replace(_unit(functor, refusal), settings=self)

    def _head(self, model: nn.Module) -> Unit | None:
        features: Any = model._modules.get("features")
        if not isinstance(features, nn.Module) or self.final_norm not in features._modules:
            return None
        return _unit(FusedHead(model, self), _unknown_forward(model, "DenseNet", lambda: differs_from_head(model)))


def _set_all(layers: list[nn.Module], name: str, value: Any) -> bool:
    differing = [layer for layer in layers if getattr(layer, name, value) != value]
    for layer in differing:
        setattr(layer, name, value)
    return bool(differing)


def _spelled(module: nn.Module, name: str) -> bool:
    """Whether the module's class, or one that it derives from, has this name outside of densenet_ext."""
    return any(cls.__name__ == name and not cls.__module__.startswith("densenet_ext.") for cls in type(module).__mro__)


def _spells_forward(module: nn.Module, name: str) -> bool:
    return getattr(type(module).forward, "__qualname__", "").split(".")[-2:] == [name, "forward"]


def _has_own_forward(module: nn.Module) -> str:
    return f"{type(module).__name__} has a forward of its own"


def _unknown_forward(module: nn.Module, name: str, difference: Callable[[], str | None]) -> str | None:
    if not _spells_forward(module, name):
        return _has_own_forward(module)
    found = difference()
    return None if found is None else f"the forward of {type(module).__name__} is not the known one: {found}"


def _unit(functor: Fused, refusal: str | None) -> Unit:
    module = functor.module
    if refusal is None and "forward" in module.__dict__ and not isinstance(module.__dict__["forward"], Fused):
        refusal = "its forward was replaced on the instance"
    return Unit(functor.kind, module, functor if refusal is None else None, refusal)
