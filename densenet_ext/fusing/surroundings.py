"""The functors for what lies around dense blocks: transition, stem and head, in one to three dimensions."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from densenet_ext import checks
from densenet_ext.algorithm.dispatch import plain_reason
from densenet_ext.algorithm.head import head
from densenet_ext.algorithm.norm import norm_of
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.transition import transition
from densenet_ext.fusing.forwards import Fused, installed
from densenet_ext.fusing.metadata import as_one_operation, bare
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
    pooled_dimensions,
)

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


class FusedTransition(Fused):
    """Norm, ReLU, 1x1 convolution and average pooling, pooled first; children norm, relu, conv, pool.

    The norm may have its ReLU inside; then there is no child relu.
    """

    kind = "transition"

    def reason(self) -> str | None:
        children = self.module._modules
        names = tuple(children)
        if names != ("norm", "relu", "conv", "pool") and names != ("norm", "conv", "pool"):
            return f"its children are {', '.join(children)}, not norm, relu, conv, pool"
        for name, child in children.items():
            reason = "is missing" if child is None else obstacle(child)
            if reason is not None:
                return f"{name} {reason}"
        known: Any = children
        norm, conv, pool = known["norm"], known["conv"], known["pool"]
        dims = dimensions_of(conv)
        if dims is None:
            return f"conv is a {type(conv).__name__}"
        for name, other in (
            ("norm", other_norm(norm, dims)),
            ("relu", other_relu(known["relu"])) if "relu" in names else ("norm", other_relu(norm)),
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
        return as_one_operation(lambda x: transition(x, norm_of(children["norm"]), weight, 2), x)


class FusedFeatures(Fused):
    """The convolutional part: channels_last inside, and the stem's norm, ReLU and max-pooling in one pass.

    ``stem``: the names of these three children, or of two of them where the norm has its ReLU inside.
    """

    kind = "stem"

    def __init__(self, module: nn.Module, stem: tuple[str, ...]) -> None:
        super().__init__(module)
        self.stem = stem

    def reason(self) -> str | None:
        children = self.module._modules
        names = tuple(children)
        parts = [child for child in map(children.get, self.stem) if child is not None]
        if len(parts) != len(self.stem):
            return "there are no norm, ReLU and pooling behind the first convolution"
        at = names.index(self.stem[0])
        if names[at : at + len(parts)] != self.stem:
            return f"{', '.join(self.stem)} do not follow one another"
        for name, child in zip(self.stem, parts, strict=True):
            reason = obstacle(child)
            if reason is not None:
                return f"{name} {reason}"
        norm, relu, pool = parts[0], parts[-2], parts[-1]
        dims = pooled_dimensions(pool) or 2
        others = (
            (self.stem[-1], other_max_pool(pool, dims)),
            (self.stem[0], other_norm(norm, dims)),
            (self.stem[-2], other_relu(relu)),
        )
        for name, other in others:
            if other is not None:
                return f"{name} {other}"
        return hooks_on_all_modules()

    def decide(self, x: Any) -> Any:
        # Also where the stem is not fused the units behind it want channels_last memory.
        if plain_reason(bare(x)) is not None:
            return self.original(x)
        out = self.run(x)
        # Fused units return channels_last tensors; who passes a contiguous image may go on with view().
        return out.contiguous() if isinstance(out, Tensor) and x.is_contiguous() else out

    def run(self, x: Tensor, without: str | None = None) -> Tensor:
        """``x`` through the children in order, but for the one named ``without``."""
        fused_stem = self.stem if self.reason() is None else ()
        x = _channels_last(x)
        for name, child in self.module._modules.items():
            if child is None or name == without:
                continue
            if name not in fused_stem:
                x = child(x)
            elif name == fused_stem[0]:
                x = self._stem(x)
        return x

    def _stem(self, x: Tensor) -> Tensor:
        parts: list[Any] = [self.module._modules[name] for name in self.stem]
        norm, pool = parts[0], parts[-1]
        fits = x.dim() - 2 == pooled_dimensions(pool) and x.shape[1] == norm.num_features
        if plain_reason(bare(x)) is not None or not fits:
            for part in parts:
                x = part(x)
            return x
        window = pool.kernel_size, pool.stride, pool.padding
        return as_one_operation(lambda x: stem(x, norm_of(norm), *window), x)


def _channels_last(x: Tensor) -> Tensor:
    # then the first convolution gives what the next unit reads in place
    layout = _CHANNELS_LAST.get(x.dim())
    return x if layout is None else x.contiguous(memory_format=layout)


class FusedTaps(Fused):
    """A model that runs its parts one by one and returns what several of them give: channels_last inside."""

    kind = "stem"

    def reason(self) -> str | None:
        return "its parts run one by one, for the features between them"

    def decide(self, x: Any) -> Any:
        if plain_reason(bare(x)) is not None:
            return self.original(x)
        out = self.original(_channels_last(x))
        return tree_map_only(Tensor, Tensor.contiguous, out) if x.is_contiguous() else out


class HeadParts(NamedTuple):
    """What a model consists of from its features on.

    ``replaced``: the modules that the fused head stands for, each with its name and with what makes it another
    operation than ReLU, global average or flattening; none where these are functions. ``rest``: by name, the modules
    that are called one after another on the pooled features. ``dims``: the spatial dimensions that are averaged.
    """

    features: nn.Module | None
    rest: dict[str, nn.Module | None]
    replaced: tuple[tuple[str, nn.Module, str | None], ...] = ()
    dims: int = 2


class HeadSpelling(Protocol):
    """How a library spells its models: all that the functor of a head knows of it. Stateless and picklable."""

    @property
    def final_norm(self) -> str:
        """Name of the last norm, among the children of ``features``."""

    def head(self, model: nn.Module) -> HeadParts:
        """The parts of ``model`` as they are now."""


class FusedHead(Fused):
    """The final norm, ReLU and global average in one pass, then the model's own classifier."""

    kind = "head"

    def __init__(self, module: nn.Module, spelling: HeadSpelling) -> None:
        super().__init__(module)
        self.spelling = spelling

    def reason(self) -> str | None:
        name = self.spelling.final_norm
        parts = self.spelling.head(self.module)
        features = parts.features
        if not isinstance(features, nn.Sequential) or None in parts.rest.values():
            return f"features is no Sequential, or there is no {' or '.join(parts.rest)}"
        if tuple(features._modules)[-1:] != (name,):
            return f"features do not end in {name}"
        reason = hook_on(features)
        if reason is not None:
            return f"features {reason}"
        if type(features).forward is not nn.Sequential.forward:
            return f"features is a {type(features).__name__} with a forward of its own"
        if "forward" in features.__dict__ and not isinstance(features.__dict__["forward"], FusedFeatures):
            return "features has a forward that was replaced on the instance"
        norm: Any = features._modules[name]
        reason = obstacle(norm) or other_norm(norm, parts.dims)
        if reason is not None:
            return f"{name} {reason}"
        for place, module, other in parts.replaced:
            reason = other or obstacle(module)
            if reason is not None:
                return f"{place} {reason}"
        return hooks_on_all_modules()

    def run(self, x: Tensor) -> Tensor:
        parts: Any = self.spelling.head(self.module)
        name = self.spelling.final_norm
        functor = installed(parts.features)
        if isinstance(functor, FusedFeatures):
            maps = functor.run(x, without=name)
        else:
            maps = x
            for child in list(parts.features.children())[:-1]:
                maps = child(maps)
        norm = parts.features._modules[name]
        fits = maps.dim() - 2 == parts.dims and maps.shape[1] == norm.num_features
        if plain_reason(bare(maps)) is None and fits:
            out = as_one_operation(lambda maps: head(maps, norm_of(norm)), maps)
        else:  # where the shape does not fit, the norm says what is wrong with it
            out = F.relu(norm(maps)).flatten(2).mean(2)
        for module in parts.rest.values():
            out = module(out)
        return out
