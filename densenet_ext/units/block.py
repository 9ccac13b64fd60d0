"""The dense block as a unit: which modules it consists of, why it may not run now, and the values of its layers."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.basic_block import BasicLayers, basic_block
from densenet_ext.algorithm.block import Layers as DenseLayers
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.layout import convolution_format
from densenet_ext.algorithm.values import BasicLayer, Layer, Norm, Stats
from densenet_ext.units.built import Built
from densenet_ext.units.entry import MapUnit, Mismatch, ran
from densenet_ext.units.flow import Flow
from densenet_ext.units.metadata import with_metadata
from densenet_ext.units.norms import NORM_TENSORS, has_own, settings_of, tensors_of
from densenet_ext.units.parts import (
    dimensions_of,
    hooks_on_all_modules,
    is_plain,
    is_usual,
    kind_of,
    norm_of,
    obstacle,
    other_conv,
    other_dropout,
    other_norm,
    other_relu,
    parameter,
    submodule,
)
from densenet_ext.units.reading import ABSENT, Entry, Readings, record
from densenet_ext.units.stretch import Repeat


class Parts(NamedTuple):
    """The names of a layer's parts, within the layer: "bn1", "layers.norm1"."""

    norms: tuple[str, ...]  # two, or one without a bottleneck
    convs: tuple[str, ...]
    activations: tuple[str, ...]  # fewer than norms, or none, where ``forward`` calls F.relu
    dropouts: tuple[str, ...] = ()
    between: tuple[str, ...] = ()  # modules that hold the parts


class Drop(NamedTuple):
    """A place where a layer drops values."""

    part: str  # the module that has the rate, "" for the layer itself; its training flag counts
    attribute: str
    inner: bool = False  # the bottleneck's features, else the new ones
    channels: bool = False  # whole channels of a sample


@dataclass(frozen=True)
class Block(MapUnit):
    """A run of dense layers over one buffer."""

    layers: tuple[str, ...]  # names from the module on, in the order in which they run
    parts: Parts  # of every layer
    built: Built
    drops: tuple[Drop, ...] = ()
    new_first: bool = False  # features are joined as [new, x]
    returns: str | None = "all"  # or "new": the block's own input is left out; None: the module's attribute ``returns``
    save: str | None = None  # the level of saving; None: the module has it, as its attribute ``save``

    kind: ClassVar[str] = "dense block"

    def level(self, module: nn.Module) -> str:
        """Returns what is kept for the backward pass, "bottlenecks" or "features"."""
        return str(getattr(module, "save", "bottlenecks")) if self.save is None else self.save

    def with_level(self, module: nn.Module, save: str) -> Block:
        """Returns the unit with this level of saving; one whose module has the level sets it there."""
        if self.save is not None:
            return dataclasses.replace(self, save=save)
        module.save = save  # type: ignore[assignment]
        return self

    def layers_of(self, module: nn.Module) -> list[nn.Module]:
        """Returns the layers in the order in which they run."""
        return [layer for layer in (submodule(module, name) for name in self.layers) if layer is not None]

    def stop_dropping(self, module: nn.Module) -> bool:
        """Sets all drop rates to 0 for good; returns whether any was above."""
        owners: list[tuple[Any, str]] = [
            (submodule(layer, drop.part), drop.attribute) for layer in self.layers_of(module) for drop in self.drops
        ]
        dropping = [(owner, name) for owner, name in owners if getattr(owner, name) > 0]
        for owner, name in dropping:
            setattr(owner, name, 0.0)
        return bool(dropping)

    # ---- why not ---------------------------------------------------------------------------------------------------

    def reason(self, module: nn.Module) -> str | None:
        """Returns why the block runs unfused as it stands now, or None."""
        return hooks_on_all_modules() or self.built.changed(module) or self._other_layers(module, True)

    def other_parts(self, module: nn.Module) -> str | None:
        """Returns why no fused block computes what the parts do, whatever holds them and acts on them; or None."""
        return self._other_layers(module, False)

    def _other_layers(self, module: nn.Module, here: bool) -> str | None:
        """Returns why layers are others; ``here``: also for what acts through a call, and where parameters are."""
        channels = dims = None
        place: tuple[Any, ...] | None = None
        norms: set[nn.Module] = set()
        for name, layer in zip(self.layers, self.layers_of(module), strict=True):
            first: Any = submodule(layer, self.parts.convs[0])
            if dims is None or channels is None:
                dims = None if first is None else dimensions_of(first)
                if dims is None:
                    other = "is missing" if first is None else (here and obstacle(first)) or f"is a {kind_of(first)}"
                    return f"{name}.{self.parts.convs[0]} {other}"
                channels = first.weight.shape[1]
                place = (first.weight.device, first.weight.dtype)
            reason = self._other_layer(layer, channels, dims, here)
            if reason is not None:
                return f"{name}.{reason}"
            weights = [submodule(layer, conv).weight for conv in self.parts.convs]  # type: ignore[union-attr]
            if here and any((weight.device, weight.dtype) != place for weight in weights):
                assert place is not None
                return f"{name} is not on {place[0]} in {place[1]}, as the first convolution is"
            channels += weights[-1].shape[0]  # type: ignore[index, operator]
            norms.update(norm for norm in (submodule(layer, norm) for norm in self.parts.norms) if norm is not None)
        return None if len(norms) == len(self.parts.norms) * len(self.layers) else "layers share modules"

    def _other_layer(self, layer: nn.Module, channels: int, dims: int, here: bool) -> str | None:
        names = self.parts
        sizes = (1, 3)[-len(names.convs) :]
        others: list[tuple[str, Callable[[Any], str | None]]] = []
        others += [(name, lambda norm: other_norm(norm, dims)) for name in names.norms]
        others += [(name, other_relu) for name in names.activations]
        others += [
            (name, functools.partial(other_conv, dims=dims, kernel_size=n))
            for name, n in zip(names.convs, sizes, strict=True)
        ]
        others += [(name, functools.partial(self._other_dropout, name, dims)) for name in names.dropouts]
        for name, other in others:
            part = submodule(layer, name)
            reason = "is missing" if part is None else (obstacle(part) if here else None) or other(part)
            if reason is not None:
                return f"{name} {reason}"
        for norm_name, conv_name in zip(names.norms, names.convs, strict=True):
            norm: Any = submodule(layer, norm_name)
            conv: Any = submodule(layer, conv_name)
            widths = (norm.num_features, conv.weight.shape[1])
            if widths != (channels, channels):
                return f"{norm_name} and {conv_name} take {widths[0]} and {widths[1]} features, where {channels} come"
            channels = conv.weight.shape[0]
        return None

    def _other_dropout(self, name: str, dims: int, dropout: Any) -> str | None:
        known = any(drop.part == name for drop in self.drops)
        reason = other_dropout(dropout, dims)
        return reason if reason is not None or known or dropout.p == 0 else f"drops too, at rate {dropout.p}"

    # ---- how -------------------------------------------------------------------------------------------------------

    def step(self, module: nn.Module, flow: Flow) -> Flow | Mismatch | None:
        """Returns all features, or the new ones, in channels_last memory."""
        reading = self._read(module)
        if reading is None:
            return None
        layers = reading.now(self.new_first)
        if layers is None:
            return None
        first = reading.weights[0]
        words = checks.mismatch(flow.x, first.shape[1], first.dim() - 2, first)
        if words is not None:
            return Mismatch(words)
        ran(module, self.kind)
        new = functools.reduce(convolution_format, reading.weights[: len(self.parts.convs)], flow.layout)
        layout = flow.layout if new == flow.layout else torch.contiguous_format  # of their concatenation
        stats: list[Stats | None] = []

        def compute(x: Tensor) -> Tensor:
            if isinstance(layers, DenseLayers):
                out, taken = dense_block(x, layers, self.level(module), self.new_first)
            else:
                out, taken = basic_block(x, layers, self.new_first)
            stats.append(taken)
            return out

        out = with_metadata(compute, flow.x)
        if self._returns(module) == "new":
            return Flow(out[:, first.shape[1] :], new)
        return Flow(out, layout, stats[0])

    def _returns(self, module: nn.Module) -> str:
        return str(getattr(module, "returns", "all")) if self.returns is None else self.returns

    def repeated(self, module: nn.Module, x: Tensor) -> Repeat | None:
        """Returns a call on features like x that can be repeated without `step`; None where there is none."""
        reading = self._read(module)
        layers = None if reading is None else reading.now(self.new_first)
        call = None if layers is None else layers.repeated.inferences.find(x)
        if reading is None or layers is None or call is None or self._returns(module) != "all":
            return None

        records = [_READINGS.record(module, self), *reading.records]
        if self.returns is None:
            own = vars(module)
            records.append(record([(own, -1, ("returns",), (own.get("returns", ABSENT),))]))
        return Repeat(call, records, [t for t in layers.parameters if t is not None])

    def values(self, module: nn.Module) -> Layer | BasicLayer | None:
        """Returns the first layer as it stands at this call; None where the block cannot run."""
        reading = self._read(module)
        layer = None if reading is None else reading.layers[0].values()
        if layer is None or not all(map(is_plain, _weights(layer))) or not all(map(is_usual, norms_of([layer]))):
            return None
        return layer

    def _read(self, module: nn.Module) -> _Reading | None:
        def read() -> _Reading | None:
            return None if self.reason(module) is not None else _Reading(self, self.layers_of(module))

        if torch.compiler.is_compiling():  # the compiler watches what it has seen by itself
            return read()
        if hooks_on_all_modules() is not None:
            return None
        return _READINGS.get(module, self, read, lambda: self.built.watched(module))


class _Reading:
    """The modules of a block's layers; and the layers as the last call found them, which most calls find again."""

    def __init__(self, block: Block, layers: Sequence[nn.Module]) -> None:
        self.layers = [_LayerParts(block, layer) for layer in layers]
        self.weights = [weight for layer in self.layers for weight in _weights(layer.values())]
        self._shapes = [weight.shape for weight in self.weights]
        self.records: list[Any] = []
        """Of the tensors and the numbers that the layers' values are made of."""
        # what norms of several processes do follows from the group, too; tensors that are attributes are not watched
        self._repeats = all(layer.repeats for layer in self.layers)
        self._found: DenseLayers | BasicLayers | None = None

    def now(self, new_first: bool) -> DenseLayers | BasicLayers | None:
        """Returns the layers as they stand at this call; None where they are no plain tensors of the shapes that were
        read, alike in dtype and device."""
        if torch.compiler.is_compiling() or not self._repeats:
            return self._read(new_first)
        found = self._found
        if found is not None and all(each.holds() for each in self.records):
            hold = found.repeated.hold()
            if hold or (hold is None and self._fits()):
                return found
        tensors = [entry for layer in self.layers for entry in layer.tensors()]
        settings = [entry for layer in self.layers for entry in layer.settings()]
        self.records = [record(tensors, identical=True), record(settings)]
        self._found = self._read(new_first)
        return self._found

    def _read(self, new_first: bool) -> DenseLayers | BasicLayers | None:
        layers: list[Any] = [layer.values() for layer in self.layers]
        self.weights = [weight for layer in layers for weight in _weights(layer)]
        if not self._fits() or not all(map(is_plain, self.weights)) or not all(map(is_usual, norms_of(layers))):
            return None
        return DenseLayers(layers, new_first) if isinstance(layers[0], Layer) else BasicLayers(layers, new_first)

    def _fits(self) -> bool:
        """Returns whether the weights of this call have the shapes that were read, and one dtype and device."""
        if [weight.shape for weight in self.weights] != self._shapes:
            return False
        return len({(weight.dtype, weight.device) for weight in self.weights}) == 1


_READINGS: Readings[_Reading] = Readings()


class _LayerParts:
    """The modules of one layer, from which every call takes the values."""

    def __init__(self, block: Block, layer: nn.Module) -> None:
        self.norms: list[Any] = [submodule(layer, name) for name in block.parts.norms]
        self._convs: list[Any] = [submodule(layer, name) for name in block.parts.convs]
        # their attributes: a layer that is a unit by itself must not be kept alive by what was read of it
        self._drops = [(vars(submodule(layer, drop.part)), drop) for drop in block.drops]

    @property
    def repeats(self) -> bool:
        """Whether the layer's values follow from its modules' parameters, buffers and settings alone."""
        owns = all(has_own(norm, *NORM_TENSORS) for norm in self.norms) and all(
            has_own(conv, "weight", "bias") for conv in self._convs
        )
        return owns and not any(isinstance(norm, nn.SyncBatchNorm) for norm in self.norms)

    def tensors(self) -> list[Entry]:
        """Returns the parameters and buffers that the layer's values are made of, where they are."""
        return tensors_of((*self.norms, *self._convs))

    def settings(self) -> list[Entry]:
        """Returns the numbers and flags that they are made of, where they are."""
        drops = [(values, ("training", drop.attribute)) for values, drop in self._drops]
        own: list[Entry] = [(values, -1, names, tuple(map(values.get, names))) for values, names in drops]
        return settings_of(self.norms) + own

    def values(self) -> Layer | BasicLayer:
        """Returns the layer as the algorithm takes it, as it stands at this call."""
        rate, channels, inner_rate, inner_channels = 0.0, False, 0.0, False
        for values, drop in self._drops:
            p = float(values[drop.attribute]) if values["training"] else 0.0
            if p > 0 and drop.inner:
                inner_rate, inner_channels = p, drop.channels
            elif p > 0:
                rate, channels = p, drop.channels
        norms, convs = self.norms, self._convs
        W1, bias1 = parameter(convs[0], "weight"), parameter(convs[0], "bias")
        if len(norms) == 1:
            return BasicLayer(norm_of(norms[0]), W1, rate, bias1, channels)
        W2, bias2 = parameter(convs[1], "weight"), parameter(convs[1], "bias")
        norm1, norm2 = norm_of(norms[0]), norm_of(norms[1])
        return Layer(norm1, W1, norm2, W2, rate, bias1, bias2, channels, inner_rate, inner_channels)


def norms_of(layers: Sequence[Layer | BasicLayer]) -> list[Norm]:
    """Returns the norms of all layers."""
    return [n for layer in layers for n in ((layer.norm1, layer.norm2) if isinstance(layer, Layer) else (layer.norm,))]


def layer_values(block: Block, layer: nn.Module) -> Layer | BasicLayer:
    """Returns one of the block's layers as the algorithm takes it, whatever stands in its way."""
    return _LayerParts(block, layer).values()


def _weights(layer: Layer | BasicLayer) -> tuple[Tensor, ...]:
    return (layer.conv1, layer.conv2) if isinstance(layer, Layer) else (layer.conv,)
