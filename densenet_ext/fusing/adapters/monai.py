"""MONAI's DenseNet in one to three dimensions: layers return all features, their parts lie in ``layers``."""

from __future__ import annotations

from typing import Any

from torch import nn

from densenet_ext.fusing.adapters.usual import PARTS, UsualAdapter, spelled
from densenet_ext.fusing.forwards import LayerParts
from densenet_ext.fusing.surroundings import HeadParts
from densenet_ext.inspection import (
    other_flatten,
    other_global_average,
    other_relu,
    other_sequence,
    pooled_dimensions,
)


class Monai(UsualAdapter):
    """``monai.networks.nets.densenet``; MONAI itself is never imported."""

    library = "MONAI"
    memory_mode = None
    passing = "joined"
    chain = ("layers",)
    drops = False
    head_chain = ("features", "class_layers")

    def parts(self, layer: nn.Module) -> LayerParts:
        """The children of ``layers``, which may end in a dropout module."""
        sequence: Any = layer._modules.get("layers")
        children = sequence._modules
        norm1, relu1, conv1, norm2, relu2, conv2 = map(children.get, PARTS)
        return LayerParts(norm1, relu1, conv1, norm2, relu2, conv2, 0.0, children.get("dropout"), sequence)

    def head(self, model: nn.Module) -> HeadParts:
        """features and class_layers, of which out is called and relu, pool and flatten are replaced."""
        features, layers = model._modules.get("features"), model._modules.get("class_layers")
        if features is None or layers is None:
            return HeadParts(features, {"class_layers": None})
        named = {name: layers._modules.get(name) for name in ("relu", "pool", "flatten", "out")}
        mismatch = other_sequence(layers, named.values())
        if type(layers) is not nn.Sequential or None in named.values():
            mismatch = mismatch or f"is no plain Sequential of {', '.join(named)}"
        if mismatch is not None:
            return HeadParts(features, {}, (("class_layers", layers, mismatch),))
        relu, pool, flatten, out = (module for module in named.values() if module is not None)
        dims = pooled_dimensions(pool) or 2
        replaced = (
            ("class_layers", layers, None),
            ("class_layers.relu", relu, other_relu(relu)),
            ("class_layers.pool", pool, other_global_average(pool, dims)),
            ("class_layers.flatten", flatten, other_flatten(flatten)),
        )
        return HeadParts(features, {"class_layers.out": out}, replaced, dims)

    def set_deterministic(self, block: nn.Module) -> bool:
        """Sets the probability of the dropout modules to 0; whether any was above."""
        dropouts: list[Any] = [self.parts(layer).dropout for layer in self._layers(block)]
        dropping = [dropout for dropout in dropouts if getattr(dropout, "p", 0.0) > 0]
        for dropout in dropping:
            dropout.p = 0.0
        return bool(dropping)

    def _is_layer(self, layer: nn.Module) -> bool:
        return spelled(layer, self.classes.layer) and isinstance(layer._modules.get("layers"), nn.Module)
