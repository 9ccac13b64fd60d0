"""The functor for dense blocks of somebody's own code, whose ``forward`` has been tried out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from densenet_ext import checks
from densenet_ext.algorithm.basic_block import basic_block
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.dispatch import plain_reason
from densenet_ext.algorithm.values import BasicLayer, Layer
from densenet_ext.fusing.forwards import FusedBlock
from densenet_ext.fusing.generic.anatomy import Anatomy, Settings, part, settings_of
from densenet_ext.inspection import (
    hooks_on_all_modules,
    obstacle,
    other_conv,
    other_norm,
    other_relu,
)


class FusedGenericBlock(FusedBlock):
    """A dense block over one buffer; it remembers how it was built and set when its ``forward`` was tried out.

    One that uses gradient checkpointing saves "features" unless told otherwise, and moves running statistics once.
    """

    def __init__(self, module: nn.Module, anatomy: Anatomy) -> None:
        save = "features" if anatomy.recomputes else "bottlenecks"
        spelling: Any = anatomy
        super().__init__(module, spelling, type(next(iter(anatomy.layers_of(module).values()))), save)
        self.anatomy = anatomy
        first: Any = part(next(iter(anatomy.layers_of(module).values())), anatomy.parts.convs[0])
        self.channels, self.dims = first.weight.shape[1], first.weight.dim() - 2
        self.settings = tuple(self._settings(holder) for _, holder in self._own_modules())

    def _settings(self, module: nn.Module) -> Settings:
        rate = ("", "") if self.anatomy.drop is None else self.anatomy.drop
        return tuple((name, value) for name, value in settings_of(module) if ("", name) != rate)

    def _own_modules(self) -> list[tuple[str, nn.Module]]:
        """The modules that may have code of their own: block, container, layers, what holds the parts of layers."""
        anatomy, block = self.anatomy, self.module
        modules = [("", block), *anatomy.holders(block)]
        for name, layer in anatomy.layers_of(block).items():
            modules.append((name, layer))
            for inner in anatomy.parts.between:
                module = part(layer, inner)
                if module is not None:
                    modules.append((f"{name}.{inner}", module))
        return modules

    def reason(self) -> str | None:
        layers = self.anatomy.layers_of(self.module)
        if tuple(name.rpartition(".")[2] for name in layers) != self.anatomy.layers:
            return "it has other layers than when its forward was tried out"
        for name, layer in layers.items():
            if type(layer) is not self.layer_type:
                return f"{name} is a {type(layer).__name__}, not a {self.layer_type.__name__} as when it was fused"
        modules = self._own_modules()
        if len(modules) != len(self.settings):
            return "it has other modules than when its forward was tried out"
        for (name, module), settings in zip(modules, self.settings, strict=True):
            reason = obstacle(module) if name else None
            for attribute, value in settings:
                now = getattr(module, attribute, None)
                if now != value:
                    reason = f"has {attribute} {now!r}, which was {value!r} when its forward was tried out"
            if reason is not None:
                return f"{name or 'it'} {reason}"
        return self._layers_reason(layers) or hooks_on_all_modules()

    def other_parts(self) -> bool:
        """Whether some layer has parts that no fused block computes: then there is nothing to try out."""
        channels = self.channels
        for layer in self.anatomy.layers_of(self.module).values():
            if _other_layer(layer, self.anatomy, channels, self.dims) is not None:
                return True
            last: Any = part(layer, self.anatomy.parts.convs[-1])
            channels += last.weight.shape[0]
        return False

    def _layers_reason(self, layers: dict[str, nn.Module]) -> str | None:
        names = self.anatomy.parts
        norms: set[nn.Module] = set()
        place, channels = None, self.channels
        for name, layer in layers.items():
            reason = _layer_reason(layer, self.anatomy, channels, self.dims)
            if reason is not None:
                return f"{name}.{reason}"
            convs: list[Any] = [part(layer, conv) for conv in names.convs]
            weights: list[Tensor] = [conv.weight for conv in convs]
            places = {(weight.device, weight.dtype) for weight in weights}
            place = place or next(iter(places))
            if places != {place}:
                return f"{name} is not on {place[0]} in {place[1]}, as the first convolution is"
            channels += weights[-1].shape[0]
            norms.update(norm for norm in (part(layer, norm) for norm in names.norms) if norm is not None)
        return None if len(norms) == len(names.norms) * len(layers) else "layers share modules"

    def run(self, x: Tensor) -> Tensor:
        layers = [self.anatomy.as_layer(layer) for layer in self.anatomy.layers_of(self.module).values()]
        first = layers[0].conv1 if isinstance(layers[0], Layer) else layers[0].conv
        x = checks.feature_maps("input", x, self.channels, self.dims, first)
        bottlenecks = [layer for layer in layers if isinstance(layer, Layer)]
        if bottlenecks:
            out, _ = dense_block(x, bottlenecks, self.save, self.anatomy.new_first)
        else:
            basic = [layer for layer in layers if isinstance(layer, BasicLayer)]
            out, _ = basic_block(x, basic, self.anatomy.new_first)
        return out if self.anatomy.returns == "all" else out[:, x.shape[1] :]

    def decide(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or plain_reason(x) is not None or self.reason() is not None:
            return self.original(x)
        out = self.run(x)
        # What stands behind the block is not known, and may call view(): it gets the layout that it would get unfused.
        return out.contiguous() if x.is_contiguous() else out


def _layer_reason(layer: nn.Module, anatomy: Anatomy, channels: int, dims: int) -> str | None:
    """Why a layer that reads ``channels`` features is not fused: "bn1 has a forward hook"; or None."""
    for name in anatomy.parts.everything:
        module = part(layer, name)
        reason = "is missing" if module is None else obstacle(module)
        if reason is not None:
            return f"{name} {reason}"
    return _other_layer(layer, anatomy, channels, dims)


def _other_layer(layer: nn.Module, anatomy: Anatomy, channels: int, dims: int) -> str | None:
    """What makes the layer another one than a fused block computes, whatever its ``forward`` does; or None."""
    names = anatomy.parts
    sizes = (1, 3)[-len(names.convs) :]
    others: list[tuple[str, Callable[[Any], str | None]]] = [
        *((name, lambda norm: other_norm(norm, dims)) for name in names.norms),
        *((name, other_relu) for name in names.activations),
        *((name, lambda conv, n=n: other_conv(conv, dims, n)) for name, n in zip(names.convs, sizes, strict=True)),
        *((name, lambda module, n=name: _other_dropout(module, (n, "p") == anatomy.drop)) for name in names.dropouts),
    ]
    for name, other in others:
        reason = other(part(layer, name))
        if reason is not None:
            return f"{name} {reason}"
    for norm_name, conv_name in zip(names.norms, names.convs, strict=True):
        norm, conv = known = (part(layer, norm_name), part(layer, conv_name))
        assert isinstance(norm, _BatchNorm) and isinstance(conv, _ConvNd), known
        widths = (norm.num_features, conv.weight.shape[1])
        if widths != (channels, channels):
            return f"{norm_name} and {conv_name} take {widths[0]} and {widths[1]} features, where {channels} come"
        channels = conv.weight.shape[0]
    return None


def _other_dropout(module: nn.Module, known: bool) -> str | None:
    if type(module) is not nn.Dropout:
        return f"is a {type(module).__name__}, not a Dropout"
    return None if known or module.p == 0 else f"drops too, at rate {module.p}"
