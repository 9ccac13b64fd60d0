"""Which modules make up a dense block in somebody's own code: found by their types and by how channels add up.

A layer holds norm and convolution twice (1x1, 3x3), or once (3x3), and besides them at most activations and dropouts. A
block is a module that holds nothing but such layers, directly or in one container, where each layer takes as many
channels as there are once all layers before it have added theirs. Names don't matter, and what ``forward`` does with
the modules is not looked at here (``trial``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from types import BuiltinFunctionType, FunctionType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import activation, batchnorm, dropout, instancenorm, normalization
from torch.nn.modules.conv import _ConvNd

from densenet_ext.algorithm.norm import norm_of
from densenet_ext.algorithm.values import BasicLayer, Layer

_NORMS = (batchnorm, instancenorm, normalization)
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
_STANDARD = frozenset(nn.Module().__dict__)
_VALUES = (bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)

Settings = tuple[tuple[str, Any], ...]
"""Attributes by name, with values that can be compared."""


@dataclass(frozen=True)
class Parts:
    """Names of a layer's parts, within the layer: "bn1", "layers.norm1"."""

    norms: tuple[str, ...]  # two, or one without a bottleneck
    convs: tuple[str, ...]
    activations: tuple[str, ...]  # fewer than norms, or none, where ``forward`` calls F.relu
    dropouts: tuple[str, ...]
    between: tuple[str, ...]  # modules that hold the parts

    @property
    def everything(self) -> tuple[str, ...]:
        """All names."""
        return (*self.norms, *self.convs, *self.activations, *self.dropouts, *self.between)


@dataclass(frozen=True)
class Anatomy:
    """How a block of somebody's own code is built. The last four are what its ``forward`` turned out to do."""

    container: str  # name of the child that holds the layers, "" where the block itself does
    layers: tuple[str, ...]
    parts: Parts  # of every layer
    drop: tuple[str, str] | None = None  # a layer's drop rate: name of the part, "" for itself, and attribute
    new_first: bool = False  # features are joined as [new, x]
    returns: str = "all"  # or "new": the block's own input is left out
    recomputes: bool = False  # it saves memory by gradient checkpointing

    def holders(self, block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        """The modules between the block and the layers, by name: the container, if there is one."""
        if self.container:
            child = block._modules.get(self.container)
            if child is not None:
                yield self.container, child

    def layers_of(self, block: nn.Module) -> dict[str, nn.Module]:
        """The layers by name, in the order in which they run, as they are now."""
        holder: nn.Module | None = block._modules.get(self.container) if self.container else block
        children = {} if holder is None else holder._modules
        prefix = f"{self.container}." if self.container else ""
        return {prefix + name: layer for name, layer in children.items() if layer is not None}

    def as_layer(self, layer: nn.Module) -> Layer | BasicLayer:
        """A layer as the algorithm takes it, as it stands at this call."""
        norms: list[Any] = [part(layer, name) for name in self.parts.norms]
        convs: list[Any] = [part(layer, name) for name in self.parts.convs]
        rate = self.drop_rate(layer)
        if len(norms) == 1:
            return BasicLayer(norm_of(norms[0]), convs[0].weight, rate)
        return Layer(norm_of(norms[0]), convs[0].weight, norm_of(norms[1]), convs[1].weight, rate)

    def drop_rate(self, layer: nn.Module) -> float:
        """The probability with which ``layer`` drops a value of its new features now; 0 when it is not training."""
        if self.drop is None:
            return 0.0
        module, name = part(layer, self.drop[0]), self.drop[1]
        return float(getattr(module, name)) if module is not None and module.training else 0.0

    def set_drop_rate(self, layer: nn.Module, rate: float) -> bool:
        """Sets the drop rate of ``layer`` for good, unless it never drops anything; whether it was above 0."""
        module = None if self.drop is None else part(layer, self.drop[0])
        if self.drop is None or module is None:
            return False
        before = getattr(module, self.drop[1])
        setattr(module, self.drop[1], rate)
        return before > 0


def part(layer: nn.Module, name: str) -> nn.Module | None:
    """The part of a layer that has this dotted name ("" is itself), or None where there is none."""
    module: nn.Module | None = layer._modules.get(name)
    if module is not None:
        return module
    module = layer
    for child in name.split(".") if name else ():
        module = None if module is None else module._modules.get(child)
    return module


def anatomy_of(block: nn.Module) -> Anatomy | None:
    """The block's modules, or None when it is not built like a dense block."""
    if not own_code(block):
        return None
    children = {name: child for name, child in block._modules.items() if child is not None}
    container = ""
    if len(children) == 1:
        ((name, child),) = children.items()
        if isinstance(child, _CONTAINERS) and parts_of(child) is None:
            container, children = name, {n: c for n, c in child._modules.items() if c is not None}
    found = [parts_of(layer) for layer in children.values()]
    if not found or found[0] is None or any(parts != found[0] for parts in found):
        return None
    if len({type(layer) for layer in children.values()}) != 1 or not _channels_add_up(children.values(), found[0]):
        return None
    if len(found) == 1 and type(block).forward is not nn.Sequential.forward:
        return None  # a layer with its parts in a container looks like that
    drop = (found[0].dropouts[0], "p") if found[0].dropouts else None
    return Anatomy(container, tuple(children), found[0], drop)


def own_code(module: nn.Module) -> bool:
    """Whether what ``module`` does is all in the values that it returns, and not a library's business."""
    # what torch wraps models in (DataParallel, a compiled module) has a meaning beyond the values that it returns
    return type(module) is nn.Sequential or not type(module).__module__.startswith(("torch.", "densenet_ext."))


def parts_of(layer: nn.Module) -> Parts | None:
    """The parts of a dense layer, or None when it is not built like one."""
    if not own_code(layer):
        return None
    names: dict[str, list[str]] = defaultdict(list)
    for name, module in _leaves(layer, ""):
        kind = kind_of(module)
        if kind is None:
            return None
        names[kind].append(name)
    norms, convs = names["norm"], names["conv"]
    if len(norms) != len(convs) or len(convs) not in (1, 2) or len(names["activation"]) > len(norms):
        return None
    sizes = [set(conv.kernel_size) for conv in (part(layer, name) for name in convs) if isinstance(conv, _ConvNd)]
    if sizes != [{1}, {3}][-len(convs) :]:
        return None
    kinds = ("norm", "conv", "activation", "dropout", "between")
    return Parts(*(tuple(names[kind]) for kind in kinds))


def kind_of(module: nn.Module) -> str | None:
    """ "norm", "conv", "activation" or "dropout"; "between" for what holds other modules; None for anything else."""
    if isinstance(module, _ConvNd):
        return "conv"
    homes = {cls.__module__ for cls in type(module).__mro__}
    if homes & {home.__name__ for home in _NORMS}:
        return "norm"
    if activation.__name__ in homes:
        return "activation"
    if dropout.__name__ in homes:
        return "dropout"
    return "between" if module._modules else None


def _leaves(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """What ``module`` consists of, and the modules that hold it, each once."""
    for name, child in module._modules.items():
        if child is not None:
            yield prefix + name, child
            if kind_of(child) == "between":
                yield from _leaves(child, f"{prefix}{name}.")


def _channels_add_up(layers: Any, parts: Parts) -> bool:
    expected = None
    for layer in layers:
        convs: list[Any] = [part(layer, name) for name in parts.convs]
        if expected is not None and convs[0].in_channels != expected:
            return False
        if len(convs) == 2 and convs[1].in_channels != convs[0].out_channels:
            return False
        expected = convs[0].in_channels + convs[-1].out_channels
    return True


def settings_of(module: nn.Module) -> Settings:
    """The attributes of ``module`` that are not every module's and that can be compared: numbers, words, functions."""
    return tuple((name, value) for name, value in module.__dict__.items() if name not in _STANDARD and _plain(value))


def _plain(value: Any) -> bool:
    return isinstance(value, _VALUES) or (isinstance(value, tuple) and all(map(_plain, value)))


def configuration(block: nn.Module) -> tuple[object, ...] | None:
    """What the meaning of the block's ``forward`` can depend on: classes, code, settings and shapes; hashable.

    None where a module has an attribute whose content may change unseen.
    """
    try:
        return tuple(_configuration(name, module) for name, module in block.named_modules(remove_duplicate=False))
    except _Opaque:
        return None


class _Opaque(Exception):
    """An attribute that cannot be compared by its value."""


def _configuration(name: str, module: nn.Module) -> tuple[object, ...]:
    attributes = [(key, _frozen(value)) for key, value in module.__dict__.items() if key not in _STANDARD]
    shapes = [
        (key, None if t is None else (t.shape, t.is_floating_point()))
        for key, t in (*module._parameters.items(), *module._buffers.items())
    ]
    return name, type(module), type(module).forward, tuple(attributes), tuple(shapes)


def _frozen(value: object) -> object:
    if isinstance(value, _VALUES):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    raise _Opaque
