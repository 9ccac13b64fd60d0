"""Units of densenet_ext's own modules and of whole models: a single dense layer, a transition down, the inside."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from densenet_ext import checks
from densenet_ext.algorithm.concat import bottleneck
from densenet_ext.algorithm.layer import dense_layer
from densenet_ext.algorithm.layout import concatenation_format, convolution_format
from densenet_ext.algorithm.values import Layer
from densenet_ext.units.block import Block
from densenet_ext.units.entry import Forward, MapUnit, Mismatch, as_eager, ran
from densenet_ext.units.flow import Flow, incoming, to_channels_last
from densenet_ext.units.metadata import with_metadata
from densenet_ext.units.parts import (
    hook_on,
    hooks_on_all_modules,
    norm_of,
    obstacle,
    other_conv,
    other_norm,
    other_relu,
)
from densenet_ext.units.sequence import first_mismatch


@dataclass(frozen=True)
class SingleLayer:
    """A dense layer that is called by itself, with one feature map or several, and gives the new features."""

    block: Block  # of this layer only

    kind: ClassVar[str] = "dense layer"

    def reason(self, module: nn.Module) -> str | None:
        """Returns why the layer runs unfused as it stands now, or None."""
        return self.block.reason(module)

    def call(self, module: nn.Module, usual: Forward, x: Any) -> Any:
        """Returns what ``usual(module, x)`` does, in eager's layout."""
        features = list(x) if isinstance(x, (list, tuple)) else [x]
        layer = self.block.values(module)
        if not isinstance(layer, Layer):
            return usual(module, x)
        words = _mismatch(features, layer)
        if words is not None:
            return as_eager(Mismatch(words), usual, module, x)
        ran(module, self.kind)
        layout = concatenation_format(features)
        for weight in (layer.conv1, layer.conv2):
            layout = convolution_format(layout, weight)
        new = dense_layer(features, layer, self.block.level(module))
        new = F.dropout(new, layer.drop_rate) if layer.drop_rate > 0 else new
        return new.contiguous(memory_format=layout)


def _mismatch(features: list[Tensor], layer: Layer) -> str | None:
    if not features:
        return "features: expected at least one tensor, got an empty sequence"
    conv = layer.conv1
    dims, first = conv.dim() - 2, features[0]
    for i, x in enumerate(features):
        name = "features" if len(features) == 1 else f"features[{i}]"
        if not isinstance(x, Tensor):
            return f"{name}: expected a tensor, got {type(x).__name__}"
        words = checks.mismatch(x, None, dims, conv)
        words = None if words is None else f"{name}: {words}"
        if words is None and (x.shape[0], *x.shape[2:]) != (first.shape[0], *first.shape[2:]):
            expected = ", ".join(["C", *map(str, first.shape[2:])])
            words = f"{name}: expected [{first.shape[0]}, {expected}] as features[0], got {list(x.shape)}"
        if words is not None:
            return words
    channels = sum(x.shape[1] for x in features)
    return None if channels == conv.shape[1] else f"features: expected {conv.shape[1]} channels in all, got {channels}"


@dataclass(frozen=True)
class TransitionDown(MapUnit):
    """FC-DenseNet's transition: norm, ReLU and 1x1 convolution in one read, then dropout and the child ``pool``."""

    kind: ClassVar[str] = "transition"

    def reason(self, module: nn.Module) -> str | None:
        """Returns why norm, ReLU and convolution run one by one as they stand now, or None."""
        children: Any = module._modules
        tests = {"norm": other_norm(children["norm"], 2), "relu": other_relu(children["relu"])}
        for name, other in {**tests, "conv": other_conv(children["conv"], 2, 1)}.items():
            reason = other or obstacle(children[name])
            if reason is not None:
                return f"{name} {reason}"
        return hooks_on_all_modules()

    def stop_dropping(self, module: Any) -> bool:
        """Sets the drop rate to 0 for good; returns whether it was above."""
        before, module.drop_rate = module.drop_rate, 0.0
        return before > 0

    def step(self, module: Any, flow: Flow) -> Flow | Mismatch | None:
        """Returns the pooled features."""
        if self.reason(module) is not None:
            return None
        weight, bias = module.conv.weight, module.conv.bias
        words = checks.mismatch(flow.x, weight.shape[1], 2, weight)
        if words is not None:
            return Mismatch(words)
        ran(module, self.kind)
        norm = norm_of(module.norm)
        out = with_metadata(lambda x: bottleneck([x], weight, norm, conv_bias=bias), flow.x)
        out = module.pool(F.dropout(out, module.drop_rate, module.training))
        return Flow(out, flow.behind(weight))


@dataclass(frozen=True)
class Inside:
    """A model whose parts hand features to each other by its own code: channels_last inside, where nobody looks on."""

    kind: ClassVar[str] = "inside"

    def reason(self, module: nn.Module) -> str | None:
        """Returns why the inside keeps eager's layout as it stands now, or None."""
        for name, inner in module.named_modules():
            reason = hook_on(inner) if name else None
            if reason is not None:
                return f"{name} {reason}"
        return hooks_on_all_modules()

    def call(self, module: nn.Module, usual: Forward, x: Any) -> Any:
        """Returns what ``usual(module, x)`` does."""
        mismatch = first_mismatch(module, x)
        if mismatch is not None:
            return as_eager(mismatch, usual, module, x)
        if incoming(x).layout != torch.contiguous_format or self.reason(module) is not None:
            return usual(module, x)
        return tree_map_only(Tensor, Tensor.contiguous, usual(module, to_channels_last(x)))
