"""Units around dense blocks: the transition, and a Sequential with its stem and its runs of layers."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.transition import transition
from densenet_ext.units.block import Block
from densenet_ext.units.built import Built
from densenet_ext.units.entry import Forward, MapUnit, Mismatch, as_eager, not_a_tensor, ran, straight
from densenet_ext.units.flow import Flow, incoming, to_channels_last
from densenet_ext.units.metadata import with_metadata
from densenet_ext.units.norms import NormReading
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
from densenet_ext.units.reading import Part, Readings


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

        def read() -> tuple[NormReading, nn.Module] | None:
            if self.reason(module) is not None:
                return None
            norm, conv = submodule(module, self.norm), submodule(module, self.conv)
            return NormReading(norm), conv  # type: ignore[arg-type, return-value]

        if hooks_on_all_modules() is not None:
            return None
        compiling = torch.compiler.is_compiling()
        known = read() if compiling else _TRANSITIONS.get(module, self, read, lambda: self.built.watched(module))
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

        def read() -> tuple[NormReading, nn.Module] | None:
            if self.reason(module) is not None:
                return None
            norm, pool = module._modules[self.norm], module._modules[self.pool]
            return NormReading(norm), pool  # type: ignore[arg-type, return-value]

        # what a norm with its ReLU inside is made of is not watched
        known = read() if torch.compiler.is_compiling() or self.relu is None else None
        if known is None and self.relu is not None and hooks_on_all_modules() is None:
            known = _STEMS.get(module, self, read, lambda: self._watched(module))
        if known is None:
            return None
        x, norm, pool = flow.x, known[0].now(), known[1]
        if norm is None or x.dim() - 2 != pooled_dimensions(pool) or x.shape[1] != known[0].module.num_features:
            return None
        window: Any = pool.kernel_size, pool.stride, pool.padding
        ran(module, self.kind)
        return Flow(with_metadata(lambda x: stem(x, norm, *window), x), flow.layout)

    def _watched(self, module: nn.Module) -> list[Part]:
        parts = [Part(module, hooks=False)]
        return parts + [Part(part) for part in (module._modules[name] for name in self.names) if part is not None]


_STEMS: Readings[tuple[NormReading, nn.Module]] = Readings()


@dataclass(frozen=True)
class Run:
    """Dense layers that follow one another among the children of a Sequential, each handing on all features."""

    block: Block

    @property
    def names(self) -> tuple[str, ...]:
        """The children, in the order in which they run."""
        return self.block.layers

    def step(self, module: nn.Module, flow: Flow) -> Flow | None:
        """Returns all features; None where the layers have to run one by one."""
        found = self.block.step(module, flow)
        return found if isinstance(found, Flow) else None


@dataclass(frozen=True)
class Sequence(MapUnit):
    """A Sequential some of whose children run as one, and whose units hand features straight on to each other."""

    segments: tuple[Stem | Run, ...] = ()

    kind: ClassVar[str] = "sequence"

    @property
    def stem(self) -> Stem | None:
        """The stem among the children, if there is one."""
        return next((segment for segment in self.segments if isinstance(segment, Stem)), None)

    def with_level(self, save: str) -> Sequence:
        """Returns the sequence with this level of saving in its runs of layers."""
        segments = (
            Run(dataclasses.replace(segment.block, save=save)) if isinstance(segment, Run) else segment
            for segment in self.segments
        )
        return Sequence(tuple(segments))

    def reason(self, module: nn.Module) -> str | None:
        """Returns None: every child decides for itself."""
        return None

    def call(self, module: nn.Module, usual: Forward, x: Any) -> Any:
        """Returns what the children give one after another, in eager's layout."""
        if hooks_on_all_modules() is not None:
            return usual(module, x)
        mismatch = first_mismatch(module, x)
        if mismatch is not None:
            return as_eager(mismatch, usual, module, x)
        return self.run(module, incoming(x)).shown()

    def step(self, module: nn.Module, flow: Flow) -> Flow:
        """Returns what the children give one after another."""
        return self.run(module, flow)

    def run(self, module: nn.Module, flow: Flow, stop: int | None = None) -> Flow:
        """Returns what the first ``stop`` children (all if None) give one after another."""
        children = [(name, child) for name, child in module._modules.items() if child is not None][:stop]
        starts = {segment.names[0]: segment for segment in self.segments}
        units = [straight(child) for _, child in children]
        i = 0
        while i < len(children):
            name, child = children[i]
            segment = starts.get(name)
            if segment is not None and tuple(name for name, _ in children[i : i + len(segment.names)]) == segment.names:
                found = segment.step(module, flow)
                if found is not None:
                    flow = found
                    i += len(segment.names)
                    continue
            follows = i + 1 < len(children) and (children[i + 1][0] in starts or units[i + 1] is not None)
            flow = _through(child, units[i], flow, follows)
            i += 1
        return flow


def first_mismatch(module: nn.Module, x: Any) -> Mismatch | None:
    """Returns in words why x does not fit the convolution that ``module`` begins with; None if it begins otherwise."""
    if not isinstance(x, Tensor):
        return not_a_tensor(x)
    first: Any = next(iter(module._modules.values()), None)
    if first is None or dimensions_of(first) is None or obstacle(first) is not None:
        return None
    words = checks.mismatch(x, first.in_channels, len(first.kernel_size), parameter(first, "weight"))
    return None if words is None else Mismatch(words)


def _through(child: nn.Module, unit: Any, flow: Flow, unit_follows: bool) -> Flow:
    """Returns what ``child`` gives: straight from unit to unit where nobody looks on, else by a call like any other.

    ``unit``: that of the child, where running it is all that a call would do.
    """
    if isinstance(unit, MapUnit):
        for probe in child._forward_pre_hooks.values():
            probe()
        found = unit.step(child, flow)
        if isinstance(found, Flow):
            for probe in child._forward_hooks.values():
                probe()
            return found
    if unit_follows and dimensions_of(child) is not None and obstacle(child) is None:
        # A plain convolution whose result only the next unit sees: that one reads channels_last memory in place.
        return Flow(child(to_channels_last(flow.x)), flow.behind(parameter(child, "weight")))
    return incoming(child(flow.shown()))
