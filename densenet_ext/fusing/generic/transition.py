"""Transitions of somebody's own code: norm, ReLU, 1x1 convolution, average pooling, as modules or as functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from densenet_ext import checks, reference
from densenet_ext.algorithm.dispatch import plain_reason
from densenet_ext.algorithm.norm import norm_of
from densenet_ext.algorithm.transition import transition
from densenet_ext.fusing.forwards import Fused
from densenet_ext.fusing.generic.anatomy import kind_of, own_code, settings_of
from densenet_ext.fusing.generic.trial import Refusal, Refused, Trial, attempt
from densenet_ext.inspection import hooks_on_all_modules, obstacle, other_avg_pool, other_conv, other_norm, other_relu

_POOLS = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_SPATIAL = {1: (7,), 2: (5, 4), 3: (4, 5, 4)}


@dataclass(frozen=True)
class TransitionParts:
    """Names of a transition's children, by what they are."""

    norm: str
    conv: str
    activation: str | None
    dropout: str | None
    pool: str | None


def transition_parts_of(module: nn.Module) -> TransitionParts | None:
    """The parts of ``module``, or None when it is not built like a transition."""
    if not own_code(module):
        return None
    names: dict[str, str] = {}
    for name, child in module._modules.items():
        if child is not None:
            kind = "pool" if isinstance(child, _POOLS) else kind_of(child)
            if kind is None or kind == "between" or kind in names:
                return None
            names[kind] = name
    if "norm" not in names or "conv" not in names:
        return None
    norm, conv = module._modules[names["norm"]], module._modules[names["conv"]]
    if not isinstance(norm, _BatchNorm) or not isinstance(conv, _ConvNd):
        return None
    if norm.num_features != conv.in_channels or set(conv.kernel_size) != {1}:
        return None
    return TransitionParts(names["norm"], names["conv"], *map(names.get, ("activation", "dropout", "pool")))


def try_out_transition(module: nn.Module, parts: TransitionParts) -> TransitionParts | Refusal:
    """The parts, or why ``forward`` of ``module`` does something else with them than a fused transition."""
    return attempt(lambda: _TransitionTrial(module, parts).run())


class _TransitionTrial(Trial):
    words = "norm, ReLU, 1x1 convolution and average pooling of window 2"

    def __init__(self, module: nn.Module, parts: TransitionParts) -> None:
        self.parts = parts
        conv: Any = module._modules[parts.conv]
        self.channels = conv.weight.shape[0]
        dims = conv.weight.dim() - 2
        super().__init__(module, conv.weight.shape[1], dims, _SPATIAL[dims])

    def run(self) -> TransitionParts:
        self.set_training(lambda i: False)
        shape = list(self.their_result(self.input()).shape)
        halved = [self.size[0], self.channels, *(n // 2 for n in self.size[2:])]
        if shape != halved:
            raise Refused(f"it returns {shape} rather than {halved}", "shape")
        self.compare()
        return self.parts

    def our_result(self, x: Tensor) -> Tensor:
        children: Any = self.ours._modules
        return reference.transition(x, norm_of(children[self.parts.norm]), children[self.parts.conv].weight, 2)


class FusedGenericTransition(Fused):
    """A transition whose ``forward`` has been tried out; it remembers how it was built and set at that time."""

    kind = "transition"

    def __init__(self, module: nn.Module, parts: TransitionParts) -> None:
        super().__init__(module)
        self.parts = parts
        conv: Any = module._modules[parts.conv]
        self.dims = conv.weight.dim() - 2
        self.children = tuple(module._modules)
        self.settings = settings_of(module)

    def reason(self) -> str | None:
        module, parts = self.module, self.parts
        if tuple(module._modules) != self.children:
            return "it has other modules than when its forward was tried out"
        for attribute, value in self.settings:
            now = getattr(module, attribute, None)
            if now != value:
                return f"it has {attribute} {now!r}, which was {value!r} when its forward was tried out"
        known: Any = module._modules
        others = [
            (parts.norm, other_norm(known[parts.norm], self.dims)),
            (parts.conv, other_conv(known[parts.conv], self.dims, 1)),
        ]
        if parts.activation is not None:
            others.append((parts.activation, other_relu(known[parts.activation])))
        if parts.pool is not None:
            others.append((parts.pool, other_avg_pool(known[parts.pool], self.dims)))
        if parts.dropout is not None:
            rate = getattr(known[parts.dropout], "p", None)
            others.append((parts.dropout, None if rate == 0 else f"drops at rate {rate}"))
        for name, other in others:
            reason = "is missing" if known[name] is None else obstacle(known[name]) or other
            if reason is not None:
                return f"{name} {reason}"
        norm, weight = known[parts.norm], known[parts.conv].weight
        if norm.num_features != weight.shape[1]:
            return f"{parts.norm} has {norm.num_features} features, {parts.conv} takes {weight.shape[1]}"
        return hooks_on_all_modules()

    def run(self, x: Tensor) -> Tensor:
        known: Any = self.module._modules
        weight = known[self.parts.conv].weight
        x = checks.feature_maps("input", x, weight.shape[1], weight.dim() - 2, weight)
        if min(x.shape[2:]) < 2:
            raise ValueError(f"input: expected at least 2 pixels along every dimension, got shape {list(x.shape)}")
        return transition(x, norm_of(known[self.parts.norm]), weight, 2)

    def decide(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or plain_reason(x) is not None or self.reason() is not None:
            return self.original(x)
        out = self.run(x)
        # What stands behind it is not known, and may call view(): it gets the layout that it would get unfused.
        return out.contiguous() if x.is_contiguous() else out
