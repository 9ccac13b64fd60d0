"""The functors that `fuse` installs: callables that stand as ``forward`` on the instance of a unit's module.

The module keeps its class, children, parameters and hooks; only ``module.forward(x)`` leads here. At every call the
functor looks at the module as it is now. Where something stands in the way it runs the class's own ``forward``, so that
a hook that is added later is called, and a graph capture sees the usual operations.

A functor is a plain object rather than a bound method: it pickles and deep-copies with its module, and makes itself
anew on the replicas of ``nn.DataParallel``. It refers to its module weakly: a model is freed when its last reference
goes.
"""

from __future__ import annotations

import inspect
import types
import weakref
from typing import Any, ClassVar, NamedTuple, NoReturn, Protocol

from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.dispatch import plain_reason
from densenet_ext.algorithm.norm import norm_of
from densenet_ext.algorithm.values import Layer
from densenet_ext.fusing.copies import FusedState
from densenet_ext.fusing.metadata import as_one_operation, bare
from densenet_ext.inspection import (
    dimensions_of,
    drop_rate_of,
    hooks_on_all_modules,
    kind_of,
    obstacle,
    other_conv,
    other_dropout,
    other_norm,
    other_relu,
    other_sequence,
)


class LayerParts(NamedTuple):
    """What a dense layer consists of, whatever its library calls it; None where a part is missing.

    A norm that has its ReLU inside stands for both.
    """

    norm1: nn.Module | None
    relu1: nn.Module | None
    conv1: nn.Module | None
    norm2: nn.Module | None
    relu2: nn.Module | None
    conv2: nn.Module | None
    drop_rate: float
    dropout: nn.Module | None = None  # drops the new features instead of ``drop_rate``
    sequence: nn.Module | None = None  # runs all its children one after another: they have to be just these parts


class Spelling(Protocol):
    """How a library spells its dense blocks: all that their functor knows of it. Stateless and picklable."""

    def layers(self, block: nn.Module) -> dict[str, nn.Module]:
        """The layers of ``block`` by name, in the order in which they run."""

    def parts(self, layer: nn.Module) -> LayerParts:
        """The parts of ``layer`` as they are now."""


_INSTALLED = ("forward", "_replicate_for_data_parallel", "__prepare_scriptable__", "__getstate__")
"""What a functor puts on the instance of its module."""


class Fused:
    """What all functors have in common. Subclasses say why they cannot run, and run."""

    kind: ClassVar[str]

    def __init__(self, module: nn.Module) -> None:
        self._module = weakref.ref(module)

    @property
    def module(self) -> nn.Module:
        """The module that the functor is the ``forward`` of."""
        module = self._module()
        if module is None:
            raise ReferenceError(f"the module of this fused {self.kind} is gone; keep a reference to the module itself")
        return module

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_module": self._module()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _module=weakref.ref(state["_module"]))

    def install(self) -> None:
        """Makes this the module's ``forward``."""
        self.module.__dict__.update(
            forward=self,
            _replicate_for_data_parallel=self.replicate,
            __prepare_scriptable__=self.refuse_script,
            __getstate__=self.state,
        )

    def remove(self) -> None:
        """Takes away what :meth:`install` put there."""
        for name in _INSTALLED:
            self.module.__dict__.pop(name, None)

    def state(self) -> Any:
        """What copies and pickles of the module are made of: a shallow copy comes out unfused, any other one fused."""
        module = self.module
        own = getattr(type(module), "__getstate__", None)  # of object from Python 3.11 on
        state = dict(module.__dict__) if own is None else own(module)
        return FusedState(state, _INSTALLED) if isinstance(state, dict) else state

    def replicate(self) -> nn.Module:
        """The module's replica for ``nn.DataParallel``, with a functor of its own."""
        module = self.module
        replica = type(module)._replicate_for_data_parallel(module)  # type: ignore[operator]
        functor = object.__new__(type(self))
        functor.__dict__.update(self.__dict__, _module=weakref.ref(replica))
        functor.install()
        return replica

    def refuse_script(self) -> NoReturn:
        """What ``torch.jit.script`` meets: RuntimeError."""
        raise RuntimeError(
            f"torch.jit.script cannot compile the fused {self.kind} of this {type(self.module).__name__}: "
            "call densenet_ext.unfuse(model) first (and fuse again afterwards)"
        )

    def reason(self) -> str | None:
        """Why the unit runs unfused as it is now, in words, or None when it runs fused."""
        raise NotImplementedError

    @property
    def __signature__(self) -> inspect.Signature:
        """That of the class's own ``forward``: what tools see that look at ``module.forward``."""
        return inspect.signature(types.MethodType(type(self.module).forward, self.module))

    @property
    def __code__(self) -> types.CodeType:
        """That of the class's own ``forward``: torch.export reads its file and line."""
        return type(self.module).forward.__code__

    def original(self, *args: Any, **kwargs: Any) -> Any:
        """The class's own ``forward``."""
        module = self.module
        return type(module).forward(module, *args, **kwargs)

    def run(self, x: Tensor) -> Tensor:
        """The fused computation; only where :meth:`reason` is None."""
        raise NotImplementedError

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs or len(args) != 1:
            args = self.__signature__.bind(*args, **kwargs).args
        return self.decide(*args)

    def decide(self, x: Any) -> Any:
        """The fused computation, or the original where something stands in the way."""
        if plain_reason(bare(x)) is not None or self.reason() is not None:
            return self.original(x)
        return self.run(x)


def installed(module: nn.Module) -> Fused | None:
    """The functor that is ``module``'s forward, or None."""
    functor = module.__dict__.get("forward")
    return functor if isinstance(functor, Fused) else None


class FusedBlock(Fused):
    """A dense block over one buffer; ``layer_type`` is the class whose ``forward`` is known."""

    kind = "dense block"

    def __init__(self, module: nn.Module, spelling: Spelling, layer_type: type[nn.Module], save: str) -> None:
        super().__init__(module)
        self.spelling = spelling
        self.layer_type = layer_type
        self.save = save

    def reason(self) -> str | None:
        layers = self.spelling.layers(self.module)
        if not layers:
            return "it has no layers"
        first = self.spelling.parts(next(iter(layers.values()))).conv1
        dims = None if first is None else dimensions_of(first)
        if first is None or dims is None:
            return f"the first layer's conv1 is {'missing' if first is None else 'a ' + kind_of(first)}"
        place = (_weight(first).device, _weight(first).dtype)
        channels = _weight(first).shape[1]
        norms: set[nn.Module | None] = set()
        for name, layer in layers.items():
            reason = obstacle(layer)
            if reason is not None:
                return f"{name} {reason}"
            if type(layer) is not self.layer_type:
                return f"{name} is a {type(layer).__name__}, not a {self.layer_type.__name__} as when it was fused"
            parts = self.spelling.parts(layer)
            reason = layer_reason(parts, channels, dims)
            if reason is not None:
                return f"{name}.{reason}"
            reason = _other_children(layer, parts)
            if reason is not None:
                return f"{name} {reason}"
            weight1, weight2 = _weight(parts.conv1), _weight(parts.conv2)
            if (weight1.device, weight1.dtype) != place or (weight2.device, weight2.dtype) != place:
                return f"{name} is not on {place[0]} in {place[1]}, as the first convolution is"
            channels += weight2.shape[0]
            norms.update((parts.norm1, parts.norm2))
        if len(norms) != 2 * len(layers):
            return "layers share modules"
        return hooks_on_all_modules()

    def run(self, x: Tensor) -> Tensor:
        parts = [self.spelling.parts(layer) for layer in self.spelling.layers(self.module).values()]
        training = [layer.training for layer in self.spelling.layers(self.module).values()]
        weight = _weight(parts[0].conv1)
        x = checks.feature_maps("init_features", x, weight.shape[1], weight.dim() - 2, weight)
        layers = [as_layer(p, t) for p, t in zip(parts, training, strict=True)]
        return as_one_operation(lambda x: dense_block(x, layers, save=self.save)[0], x)


def _weight(conv: Any) -> Tensor:
    return conv.weight


def _other_children(layer: nn.Module, parts: LayerParts) -> str | None:
    sequence = parts.sequence
    if sequence is None:
        return None
    reason = other_sequence(sequence, (*parts[:6], *([] if parts.dropout is None else [parts.dropout])))
    if reason is None and sequence is not layer:
        reason = obstacle(sequence)
        if type(sequence) is not nn.Sequential:
            reason = f"is a {type(sequence).__name__}, not a plain Sequential"
    return reason if reason is None or sequence is layer else f"holds a Sequential that {reason}"


def as_layer(parts: Any, training: bool) -> Layer:
    """The layer as the algorithm takes it."""
    drop_rate = float(parts.drop_rate) if training else 0.0
    if parts.dropout is not None:
        drop_rate = drop_rate_of(parts.dropout)
    return Layer(norm_of(parts.norm1), parts.conv1.weight, norm_of(parts.norm2), parts.conv2.weight, drop_rate)


def layer_reason(parts: LayerParts, channels: int, dims: int) -> str | None:
    """Why a layer of these parts that reads ``channels`` features is not fused: "norm1 has a forward hook"; or None."""
    for name, part in zip(LayerParts._fields, parts[:6], strict=False):
        if part is None:
            return f"{name} is missing"
        reason = obstacle(part)
        if reason is not None:
            return f"{name} {reason}"
    if parts.dropout is not None:
        reason = obstacle(parts.dropout) or other_dropout(parts.dropout)
        if reason is not None:
            return f"dropout {reason}"
    known: Any = parts[:6]
    norm1, relu1, conv1, norm2, relu2, conv2 = known
    for name, other in (
        ("norm1", other_norm(norm1, dims)),
        ("norm1" if relu1 is norm1 else "relu1", other_relu(relu1)),
        ("conv1", other_conv(conv1, dims, 1)),
        ("norm2", other_norm(norm2, dims)),
        ("norm2" if relu2 is norm2 else "relu2", other_relu(relu2)),
        ("conv2", other_conv(conv2, dims, 3)),
    ):
        if other is not None:
            return f"{name} {other}"
    width = conv1.weight.shape[0]
    if conv1.weight.shape[1] != channels or norm1.num_features != channels:
        return f"norm1 and conv1 take {norm1.num_features} and {conv1.weight.shape[1]} features, where {channels} come"
    if conv2.weight.shape[1] != width or norm2.num_features != width:
        return f"norm2 and conv2 take {norm2.num_features} and {conv2.weight.shape[1]} features, where {width} come"
    return None
