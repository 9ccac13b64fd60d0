"""timm's DenseNet: norms with their ReLU inside, ``grad_checkpointing``, a pooling module in the head."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from densenet_ext.fusing.adapters.usual import Classes, UsualAdapter, spelled, unit_of
from densenet_ext.fusing.forwards import LayerParts
from densenet_ext.fusing.matching import Unit
from densenet_ext.fusing.probing import differs_from_activated_norm, differs_from_chain
from densenet_ext.fusing.surroundings import FusedTaps, HeadParts
from densenet_ext.inspection import activates, other_flatten, other_global_average, other_relu

_METHODS = ("forward_features", "forward_head")  # what forward calls
_POOL = "SelectAdaptivePool2d"
_TAPS = ("FeatureListNet", "FeatureDictNet")


class Timm(UsualAdapter):
    """``timm.models.densenet``, with ``features_only=True`` too; timm itself is never imported."""

    library = "timm"
    classes = Classes("DenseLayer", "DenseBlock", "DenseTransition", "DenseNet")
    memory_mode = "grad_checkpointing"
    passing = "list"
    chain = ("norm1", "conv1", "norm2", "conv2")
    stem = ("norm0", "pool0")
    head_chain = ("features", "global_pool", "head_drop", "classifier")

    def parts(self, layer: nn.Module) -> LayerParts:
        """norm1, conv1, norm2, conv2 and drop_rate; the norms stand for their ReLUs."""
        norm1, conv1, norm2, conv2 = map(layer._modules.get, self.chain)
        rate: Any = layer.drop_rate
        return LayerParts(norm1, norm1, conv1, norm2, norm2, conv2, rate)

    def head(self, model: nn.Module) -> HeadParts:
        """features, global_pool, head_drop and classifier, of which global_pool is replaced."""
        children = model._modules
        features, pool = children.get("features"), children.get("global_pool")
        rest = {name: children.get(name) for name in ("head_drop", "classifier")}
        replaced: list[tuple[str, nn.Module, str | None]] = [
            (name, model, "was replaced on the instance") for name in _METHODS if name in model.__dict__
        ]
        norm = None if features is None else features._modules.get(self.final_norm)
        if norm is not None:
            replaced.append((self.final_norm, norm, other_relu(norm)))
        if pool is not None:
            replaced += _pooling(pool)
        return HeadParts(features, {"global_pool": None} if pool is None else rest, tuple(replaced))

    def match(self, module: nn.Module) -> Unit | None:
        """As :meth:`UsualAdapter.match`; what the class of the norms computes is tried out besides."""
        if type(module).__name__ in _TAPS and self._holds_block(module):
            return unit_of(FusedTaps(module))
        unit = super().match(module)
        if unit is None or unit.functor is None:
            return unit
        for kind in {type(norm): None for norm in module.modules() if activates(norm)}:
            found = differs_from_activated_norm(kind)
            if found is not None:
                refusal = f"the forward of {kind.__name__} is not the known one: {found}"
                return dataclasses.replace(unit, functor=None, refusal=refusal)
        return unit

    def _differs_from_model(self, model: nn.Module) -> str | None:
        pool = model._modules.get("global_pool")
        found = super()._differs_from_model(model)
        if found is None and pool is not None and spelled(pool, _POOL):
            found = differs_from_chain(pool, ("pool", "flatten"))
            found = None if found is None else f"the forward of {type(pool).__name__} is not the known one: {found}"
        return found

    def _stem(self, features: nn.Module) -> tuple[str, ...]:
        return ("norm2", "pool0") if "norm2" in features._modules else self.stem


def _pooling(pool: nn.Module) -> list[tuple[str, nn.Module, str | None]]:
    average, flatten = map(pool._modules.get, ("pool", "flatten"))
    if type(pool).__name__ != _POOL or average is None or flatten is None:
        return [("global_pool", pool, f"is a {type(pool).__name__}, not a {_POOL}")]
    return [
        ("global_pool", pool, None),
        ("global_pool.pool", average, other_global_average(average, 2)),
        ("global_pool.flatten", flatten, other_flatten(flatten)),
    ]
