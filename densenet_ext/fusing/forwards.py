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

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.block import Layer, dense_block
from densenet_ext.algorithm.dispatch import plain_reason
from densenet_ext.algorithm.head import head
from densenet_ext.algorithm.norm import norm_of
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.transition import transition
from densenet_ext.inspection import (
    dimensions_of,
    hook_on,
    hooks_on_all_modules,
    obstacle,
    other_avg_pool,
    other_conv,
    other_max_pool,
    other_norm,
    other_relu,
)

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class LayerParts(NamedTuple):
    """What a dense layer consists of, whatever its library calls it; None where a part is missing."""

    norm1: nn.Module | None
    relu1: nn.Module | None
    conv1: nn.Module | None
    norm2: nn.Module | None
    relu2: nn.Module | None
    conv2: nn.Module | None
    drop_rate: float


class Spelling(Protocol):
    """How a library spells its parts: all that a functor knows of it. Stateless and picklable."""

    @property
    def stem(self) -> tuple[str, str, str]:
        """Names of norm, ReLU and pooling behind the first convolution, among the children of ``features``."""

    @property
    def final_norm(self) -> str:
        """Name of the last norm, among the children of ``features``."""

    def layers(self, block: nn.Module) -> dict[str, nn.Module]:
        """The layers of ``block`` by name, in the order in which they run."""

    def parts(self, layer: nn.Module) -> LayerParts:
        """The parts of ``layer`` as they are now."""


class Fused:
    """What all functors have in common. Subclasses say why they cannot run, and run."""

    kind: ClassVar[str]

    def __init__(self, module: nn.Module, spelling: Spelling) -> None:
        self._module = weakref.ref(module)
        self.spelling = spelling

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
            forward=self, _replicate_for_data_parallel=self.replicate, __prepare_scriptable__=self.refuse_script
        )

    def remove(self) -> None:
        """Takes away what :meth:`install` put there."""
        for name in ("forward", "_replicate_for_data_parallel", "__prepare_scriptable__"):
            self.module.__dict__.pop(name, None)

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
        if plain_reason(x) is not None or self.reason() is not None:
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
        super().__init__(module, spelling)
        self.layer_type = layer_type
        self.save = save

    def reason(self) -> str | None:
        layers = self.spelling.layers(self.module)
        if not layers:
            return "it has no layers"
        first = self.spelling.parts(next(iter(layers.values()))).conv1
        dims = None if first is None else dimensions_of(first)
        if first is None or dims is None:
            return f"the first layer's conv1 is a {type(first).__name__}"
        place = (_weight(first).device, _weight(first).dtype)
        channels = _weight(first).shape[1]
        norms: set[nn.Module | None] = set()
        for name, layer in layers.items():
            if type(layer) is not self.layer_type:
                return f"{name} is a {type(layer).__name__}, not a {self.layer_type.__name__} as when it was fused"
            parts = self.spelling.parts(layer)
            reason = layer_reason(parts, channels, dims)
            if reason is not None:
                return f"{name}.{reason}"
            reason = obstacle(layer)
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
        return dense_block(x, [as_layer(p, t) for p, t in zip(parts, training, strict=True)], save=self.save)


def _weight(conv: Any) -> Tensor:
    return conv.weight


def as_layer(parts: Any, training: bool) -> Layer:
    """The layer as the algorithm takes it."""
    drop_rate = float(parts.drop_rate) if training else 0.0
    return Layer(norm_of(parts.norm1), parts.conv1.weight, norm_of(parts.norm2), parts.conv2.weight, drop_rate)


def layer_reason(parts: LayerParts, channels: int, dims: int) -> str | None:
    """Why a layer of these parts that reads ``channels`` features is not fused: "norm1 has a forward hook"; or None."""
    for name, part in zip(LayerParts._fields, parts[:6], strict=False):
        if part is None:
            return f"{name} is missing"
        reason = obstacle(part)
        if reason is not None:
            return f"{name} {reason}"
    known: Any = parts
    norm1, relu1, conv1, norm2, relu2, conv2, _ = known
    for name, other in (
        ("norm1", other_norm(norm1, dims)),
        ("relu1", other_relu(relu1)),
        ("conv1", other_conv(conv1, dims, 1)),
        ("norm2", other_norm(norm2, dims)),
        ("relu2", other_relu(relu2)),
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


class FusedTransition(Fused):
    """Norm, ReLU, 1x1 convolution and average pooling, pooled first; children norm, relu, conv, pool."""

    kind = "transition"

    def reason(self) -> str | None:
        children = self.module._modules
        if tuple(children) != ("norm", "relu", "conv", "pool"):
            return f"its children are {', '.join(children)}, not norm, relu, conv, pool"
        for name, child in children.items():
            reason = "is missing" if child is None else obstacle(child)
            if reason is not None:
                return f"{name} {reason}"
        known: Any = children.values()
        norm, relu, conv, pool = known
        dims = dimensions_of(conv)
        if dims is None:
            return f"conv is a {type(conv).__name__}"
        for name, other in (
            ("norm", other_norm(norm, dims)),
            ("relu", other_relu(relu)),
            ("conv", other_conv(conv, dims, 1)),
            ("pool", other_avg_pool(pool, dims)),
        ):
            if other is not None:
                return f"{name} {other}"
        if norm.num_features != conv.weight.shape[1]:
            return f"norm has {norm.num_features} features, conv takes {conv.weight.shape[1]}"
        return hooks_on_all_modules()

    def run(self, x: Tensor) -> Tensor:
        children: Any = self.module._modules
        weight = children["conv"].weight
        x = checks.feature_maps("input", x, weight.shape[1], weight.dim() - 2, weight)
        if min(x.shape[2:]) < 2:
            raise ValueError(f"input: expected at least 2 pixels along every dimension, got shape {list(x.shape)}")
        return transition(x, norm_of(children["norm"]), weight, 2)


class FusedFeatures(Fused):
    """The convolutional part: channels_last inside, and the stem's norm, ReLU and max-pooling in one pass."""

    kind = "stem"

    def reason(self) -> str | None:
        children = self.module._modules
        names = tuple(children)
        norm, relu, pool = (children.get(name) for name in self.spelling.stem)
        if norm is None or relu is None or pool is None:
            return "there are no norm, ReLU and pooling behind the first convolution"
        at = names.index(self.spelling.stem[0])
        if names[at : at + 3] != self.spelling.stem:
            return f"{', '.join(self.spelling.stem)} do not follow one another"
        for name, child in zip(self.spelling.stem, (norm, relu, pool), strict=True):
            reason = obstacle(child)
            if reason is not None:
                return f"{name} {reason}"
        others = (other_norm(norm, 2), other_relu(relu), other_max_pool(pool, 2))
        for name, other in zip(self.spelling.stem, others, strict=True):
            if other is not None:
                return f"{name} {other}"
        return hooks_on_all_modules()

    def decide(self, x: Any) -> Any:
        # Also where the stem is not fused the units behind it want channels_last memory.
        if plain_reason(x) is not None:
            return self.original(x)
        out = self.run(x)
        # Fused units return channels_last tensors; who passes a contiguous image may go on with view().
        return out.contiguous() if isinstance(out, Tensor) and x.is_contiguous() else out

    def run(self, x: Tensor, without: str | None = None) -> Tensor:
        """``x`` through the children in order, but for the one named ``without``."""
        fused_stem = self.spelling.stem if self.reason() is None else ()
        layout = _CHANNELS_LAST.get(x.dim())
        if layout is not None:
            x = x.contiguous(memory_format=layout)  # then the first convolution gives what the next unit reads in place
        for name, child in self.module._modules.items():
            if child is None or name == without:
                continue
            if name not in fused_stem:
                x = child(x)
            elif name == self.spelling.stem[0]:
                x = self._stem(x)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        norm, relu, pool = (self.module._modules[name] for name in self.spelling.stem)
        assert isinstance(norm, nn.BatchNorm2d) and isinstance(relu, nn.ReLU) and isinstance(pool, nn.MaxPool2d)
        if plain_reason(x) is not None or x.dim() != 4 or x.shape[1] != norm.num_features:
            return pool(relu(norm(x)))
        settings: Any = pool
        return stem(x, norm_of(norm), settings.kernel_size, settings.stride, settings.padding)


class FusedHead(Fused):
    """The final norm, ReLU and global average in one pass, then the model's own classifier."""

    kind = "head"

    def reason(self) -> str | None:
        features = self.module._modules.get("features")
        if not isinstance(features, nn.Sequential) or self.module._modules.get("classifier") is None:
            return "features is no Sequential, or there is no classifier"
        if tuple(features._modules)[-1:] != (self.spelling.final_norm,):
            return f"features do not end in {self.spelling.final_norm}"
        reason = hook_on(features)
        if reason is not None:
            return f"features {reason}"
        if type(features).forward is not nn.Sequential.forward:
            return f"features is a {type(features).__name__} with a forward of its own"
        if "forward" in features.__dict__ and not isinstance(features.__dict__["forward"], FusedFeatures):
            return "features has a forward that was replaced on the instance"
        norm: Any = features._modules[self.spelling.final_norm]
        reason = obstacle(norm) or other_norm(norm, 2)
        if reason is not None:
            return f"{self.spelling.final_norm} {reason}"
        return hooks_on_all_modules()

    def run(self, x: Tensor) -> Tensor:
        model: Any = self.module
        name = self.spelling.final_norm
        functor = installed(model.features)
        if isinstance(functor, FusedFeatures):
            maps = functor.run(x, without=name)
        else:
            maps = x
            for child in list(model.features.children())[:-1]:
                maps = child(maps)
        norm = model.features._modules[name]
        if plain_reason(maps) is None and maps.dim() == 4 and maps.shape[1] == norm.num_features:
            return model.classifier(head(maps, norm_of(norm)))
        # A shape that does not fit: PyTorch says what is wrong with it.
        return model.classifier(torch.flatten(F.adaptive_avg_pool2d(F.relu(norm(maps)), (1, 1)), 1))
