"""Units around dense blocks: the transition, and the stem, which is a part of a Sequential."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.transition import key_of, transition
from densenet_ext.units.built import Built
from densenet_ext.units.entry import MapUnit, Mismatch, ran
from densenet_ext.units.flow import Flow
from densenet_ext.units.metadata import with_metadata
from densenet_ext.units.norms import NormReading, has_own, tensors_of
from densenet_ext.units.parts import (
    dimensions_of,
    hooks_on_all_modules,
    is_plain,
    obstacle,
    other_avg_pool,
    other_conv,
    other_max_pool,
    other_norm,
    other_relu,
    parameter,
    pooled_dimensions,
    submodule,
)
from densenet_ext.units.reading import Part, Readings, record
from densenet_ext.units.stretch import Repeat


@dataclass(frozen=True)
class Transition(MapUnit):
    """Norm, ReLU, 1x1 convolution and average pooling; pooled first, which commutes with the convolution."""

    norm: str  # names from the module on
    conv: str
    activations: tuple[str, ...]
    dropouts: tuple[str, ...]
    pools: tuple[str, ...]
    built: Built

    kind: ClassVar[str] = "transition"

    def reason(self, module: nn.Module) -> str | None:
        """Returns why the transition runs unfused as it stands now, or None."""
        return hooks_on_all_modules() or self.built.changed(module) or self.other_parts(module, True)

    def other_parts(self, module: nn.Module, here: bool = False) -> str | None:
        """Returns why no transition computes what the parts do; ``here``: or what acts through their calls; or None."""
        conv: Any = submodule(module, self.conv)
        norm: Any = submodule(module, self.norm)
        dims = dimensions_of(conv)
        if dims is None:
            return f"{self.conv} is a {type(conv).__name__}"
        tests = [(self.norm, lambda part: other_norm(part, dims)), (self.conv, lambda part: other_conv(part, dims, 1))]
        tests += [(name, other_relu) for name in self.activations]
        tests += [(name, lambda part: other_avg_pool(part, dims)) for name in self.pools]
        tests += [(name, lambda part: f"drops at rate {part.p}" if part.p != 0 else None) for name in self.dropouts]
        for name, other in tests:
            part = submodule(module, name)
            assert part is not None
            reason = (obstacle(part) if here else None) or other(part)
            if reason is not None:
                return f"{name} {reason}"
        if norm.num_features != conv.weight.shape[1]:
            return f"{self.norm} has {norm.num_features} features, {self.conv} takes {conv.weight.shape[1]}"
        return None

    def step(self, module: nn.Module, flow: Flow) -> Flow | Mismatch | None:
        """Returns the pooled features in channels_last memory."""

        known = self._read(module)
        if known is None:
            return None
        norm, conv = known[0].now(), known[1]
        weight, bias = parameter(conv, "weight"), parameter(conv, "bias")
        if norm is None or not is_plain(weight):
            return None
        words = checks.mismatch(flow.x, weight.shape[1], weight.dim() - 2, weight)
        if words is None and flow.x.numel() > 0 and min(flow.x.shape[2:]) < 2:
            words = f"expected at least 2 pixels along every dimension, got shape {list(flow.x.shape)}"
        if words is not None:
            return Mismatch(words)
        ran(module, self.kind)
        stats = flow.stats
        out = with_metadata(lambda x: transition(x, norm, weight, 2, conv_bias=bias, stats=stats), flow.x)
        return Flow(out, flow.behind(weight))

    def repeated(self, module: nn.Module, x: Tensor) -> Repeat | None:
        """Returns a call on features like x that can be repeated without `step`; None where there is none."""
        known = self._read(module)
        norm = None if known is None else known[0].now()
        if known is None or norm is None or x.dim() == 5:  # what autocast does to volumes is not part of a call
            return None
        conv = known[1]
        weight, bias = parameter(conv, "weight"), parameter(conv, "bias")
        call = norm.inferences.find(x, key_of(weight, 2, bias))
        if call is None or not has_own(conv, "weight", "bias"):
            return None
        records = [_TRANSITIONS.record(module, self), *known[0].records, record(tensors_of([conv]), identical=True)]
        return Repeat(call, records, [*known[0].tensors, *(t for t in (weight, bias) if t is not None)])

    def _read(self, module: nn.Module) -> tuple[NormReading, nn.Module] | None:
        def read() -> tuple[NormReading, nn.Module] | None:
            if self.reason(module) is not None:
                return None
            norm, conv = submodule(module, self.norm), submodule(module, self.conv)
            return NormReading(norm), conv  # type: ignore[arg-type, return-value]

        if hooks_on_all_modules() is not None:
            return None
        if torch.compiler.is_compiling():
            return read()
        return _TRANSITIONS.get(module, self, read, lambda: self.built.watched(module))


_TRANSITIONS: Readings[tuple[NormReading, nn.Module]] = Readings()


@dataclass(frozen=True)
class Stem:
    """The norm, ReLU and max-pooling behind a network's first convolution, as children of a Sequential."""

    norm: str
    relu: str | None  # None: the norm has it inside
    pool: str

    kind: ClassVar[str] = "stem"

    @property
    def names(self) -> tuple[str, ...]:
        """The children, in the order in which they run."""
        return tuple(name for name in (self.norm, self.relu, self.pool) if name is not None)

    def reason(self, module: nn.Module) -> str | None:
        """Returns why norm, ReLU and pooling run one by one as they stand now, or None."""
        reason = self.other_parts(module)
        if reason is not None:
            return reason
        names = tuple(module._modules)
        at = names.index(self.norm)
        if names[at : at + len(self.names)] != self.names:
            return f"{', '.join(self.names)} do not follow one another"
        for name in self.names:
            reason = obstacle(module._modules[name])  # type: ignore[arg-type]
            if reason is not None:
                return f"{name} {reason}"
        return hooks_on_all_modules()

    def other_parts(self, module: nn.Module) -> str | None:
        """Returns why no stem computes what the children do, or None."""
        children: Any = module._modules
        missing = [name for name in self.names if children.get(name) is None]
        if missing:
            return f"{missing[0]} is missing"
        dims = pooled_dimensions(children[self.pool]) or 2
        relu = self.norm if self.relu is None else self.relu
        others = (
            (self.pool, other_max_pool(children[self.pool], dims)),
            (self.norm, other_norm(children[self.norm], dims)),
            (relu, other_relu(children[relu])),
        )
        return next((f"{name} {other}" for name, other in others if other is not None), None)

    def step(self, module: nn.Module, flow: Flow) -> Flow | None:
        """Returns the pooled features in channels_last memory; None where they have to be computed one by one."""

        known = self._read(module)
        if known is None:
            return None
        x, norm, pool = flow.x, known[0].now(), known[1]
        if norm is None or x.dim() - 2 != pooled_dimensions(pool) or x.shape[1] != known[0].module.num_features:
            return None
        window: Any = pool.kernel_size, pool.stride, pool.padding
        ran(module, self.kind)
        return Flow(with_metadata(lambda x: stem(x, norm, *window), x), flow.layout)

    def repeated(self, module: nn.Module, x: Tensor) -> Repeat | None:
        """Returns a call on features like x that can be repeated without `step`; None where there is none."""
        # a norm with its ReLU inside is read at every call, and what autocast does to volumes is not part of one
        known = None if self.relu is None or x.dim() == 5 else self._read(module)
        norm = None if known is None else known[0].now()
        if known is None or norm is None:
            return None
        pool: Any = known[1]
        call = norm.inferences.find(x, (pool.kernel_size, pool.stride, pool.padding))
        if call is None:
            return None
        return Repeat(call, [_STEMS.record(module, self), *known[0].records], known[0].tensors)

    def _read(self, module: nn.Module) -> tuple[NormReading, nn.Module] | None:
        def read() -> tuple[NormReading, nn.Module] | None:
            if self.reason(module) is not None:
                return None
            norm, pool = module._modules[self.norm], module._modules[self.pool]
            return NormReading(norm), pool  # type: ignore[arg-type, return-value]

        if torch.compiler.is_compiling() or self.relu is None:  # what a norm with its ReLU inside is made of
            return read()  # is not watched
        return _STEMS.get(module, self, read, lambda: self._watched(module)) if hooks_on_all_modules() is None else None

    def _watched(self, module: nn.Module) -> list[Part]:
        parts = [Part(module, hooks=False)]
        return parts + [Part(part) for part in (module._modules[name] for name in self.names) if part is not None]


_STEMS: Readings[tuple[NormReading, nn.Module]] = Readings()
