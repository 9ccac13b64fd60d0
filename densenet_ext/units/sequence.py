"""A Sequential with its stem and its runs of dense layers, whose units hand features straight on to each other."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.first_conv import first_conv, prepared_conv
from densenet_ext.units.around import Stem
from densenet_ext.units.block import Block
from densenet_ext.units.entry import (
    Forward,
    MapUnit,
    Mismatch,
    as_eager,
    is_observed,
    not_a_tensor,
    straight,
    straightness,
)
from densenet_ext.units.flow import Flow, incoming, to_channels_last
from densenet_ext.units.norms import has_own, tensors_of
from densenet_ext.units.parts import dimensions_of, hooks_on_all_modules, obstacle, parameter
from densenet_ext.units.reading import Part, Watch, record
from densenet_ext.units.stretch import Chain, Repeat, Stretch, stretches_of


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

    def repeated(self, module: nn.Module, x: Tensor) -> Repeat | None:
        """Returns a call on features like x that can be repeated without `step`; None where there is none."""
        return self.block.repeated(module, x)


class End(Protocol):
    """A unit of another module that takes the features of a Sequential, in the place of its last child."""

    def can_run(self, module: nn.Module) -> bool:
        """Returns whether it can, as the module stands now."""

    def step(self, module: nn.Module, flow: Flow) -> Flow:
        """Returns the unit's result as a flow."""

    def repeated(self, module: nn.Module, x: Tensor) -> Repeat | None:
        """Returns a call on features like x that can be repeated without `step`; None where there is none."""


class Ending(NamedTuple):
    """Such a unit, and the module that it is of."""

    unit: End
    module: nn.Module


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
        found = self.run(module, incoming(x)) if isinstance(x, Tensor) else not_a_tensor(x)
        return found.shown() if isinstance(found, Flow) else as_eager(found, usual, module, x)

    def step(self, module: nn.Module, flow: Flow) -> Flow | Mismatch:
        """Returns what the children give one after another; in words why ``flow`` does not fit the first."""
        return self.run(module, flow)

    def run(self, module: nn.Module, flow: Flow) -> Flow | Mismatch:
        """Returns what the children give one after another; in words why ``flow`` does not fit the first."""
        chain = Chain(module, self.segments)
        known = _known(chain, flow)
        if known is not None and known.is_whole:
            return known.run(flow)
        return first_mismatch(module, flow.x) or self._run(chain, flow, known, None)

    def run_to(self, ending: Ending, module: nn.Module, flow: Flow) -> Flow | Mismatch | None:
        """Returns what the children give one after another, with ``ending`` in the place of the last; None where that
        cannot run."""
        chain = Chain(module, (self.segments, ending.unit), ending.module)
        known = _known(chain, flow)
        if known is not None and known.is_whole:
            return known.run(flow)
        if not ending.unit.can_run(ending.module):
            return None
        return first_mismatch(module, flow.x) or self._run(chain, flow, known, ending)

    def _run(self, chain: Chain, flow: Flow, known: Stretch | None, ending: Ending | None) -> Flow:
        """``known``: the stretch that the chain begins with."""
        module = chain.module
        children = [(name, child) for name, child in module._modules.items() if child is not None]
        units = [straight(child) for _, child in children[: None if ending is None else -1]]
        if ending is not None:
            children[-1] = children[-1][0], ending.module
            units.append(ending.unit)
        segments = {segment.names[0]: segment for segment in self.segments}
        stretches = stretches_of(chain) if _may_repeat() else None
        stretch = None  # what runs in this call and can be repeated
        i = 0
        while i < len(children):
            if stretches is not None and stretch is None:
                known = stretches.find(i, chain, flow) if i else known
                if known is not None:
                    flow, i = known.run(flow), known.stop
                    continue
                stretch = stretches.begin(i, chain, flow)
            before = flow.x
            inside, part, found = False, children[i : i + 1], None
            at_end = ending is not None and i == len(children) - 1
            segment = segments.get(children[i][0])
            if at_end:
                found = units[i].step(children[i][1], flow)
            elif segment is not None and tuple(name for name, _ in children[i:][: len(segment.names)]) == segment.names:
                found = segment.step(module, flow)
                if found is not None:
                    inside, part = True, children[i : i + len(segment.names)]
            if found is None:
                follows = i + 1 < len(children) and (children[i + 1][0] in segments or units[i + 1] is not None)
                found = _through(children[i][1], units[i], flow, follows)
            if stretches is not None and stretch is not None:
                unit, owner = (segment, module) if inside else (units[i], part[0][1])
                repeat = units[i].repeated(owner, before) if at_end else _repeated(chain, unit, owner, before)
                call = None if inside or at_end or repeat is None else straightness(owner)
                if not stretch.add(len(part), repeat, found, call) or stretch.stop == len(children):
                    stretches.keep(stretch, len(children))
                    stretch = None
            flow = found
            i += len(part)
        return flow


def _known(chain: Chain, flow: Flow) -> Stretch | None:
    """Returns the stretch that the chain begins with and that can be run, if there is one."""
    return stretches_of(chain).find(0, chain, flow) if _may_repeat() else None


def _may_repeat() -> bool:
    """Returns whether calls may be repeated without a look at each unit in turn, which somebody may be told of."""
    return not (torch.compiler.is_compiling() or torch.is_grad_enabled() or is_observed() or hooks_on_all_modules())


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
        convolved = _convolved(child, flow.x)
        out = child(to_channels_last(flow.x)) if convolved is None else convolved
        return Flow(out, flow.behind(parameter(child, "weight")))
    return incoming(child(flow.shown()))


def _convolved(child: nn.Module, x: Tensor) -> Tensor | None:
    """Returns a plain convolution of images, computed without a call of ``child``; None where that is not done."""
    settings = _settings(child)
    found = None if settings is None else first_conv(x, *settings)
    if found is not None:
        for probe in (*child._forward_pre_hooks.values(), *child._forward_hooks.values()):
            probe()
    return found


def _settings(child: nn.Module) -> tuple[Any, ...] | None:
    """Returns weight, bias, stride and padding of a plain convolution; None of one that `first_conv` does not know."""
    conv: Any = child
    if hooks_on_all_modules() is not None or conv.groups != 1 or conv.padding_mode != "zeros":
        return None
    settings = conv.stride, conv.padding, conv.dilation
    if not all(type(setting) is tuple for setting in settings) or set(conv.dilation) != {1}:
        return None
    return parameter(conv, "weight"), parameter(conv, "bias"), *settings[:2]


def _repeated(chain: Chain, unit: Any, module: nn.Module, x: Tensor) -> Repeat | None:
    """Returns a call of what has run on x that can be repeated: of a unit, or of a plain convolution of images."""
    if isinstance(unit, (Stem, Run, MapUnit)):
        return unit.repeated(module, x)
    if unit is not None or dimensions_of(module) is None or not _is_unseen(module):
        return None
    settings = _settings(module)
    call = None if settings is None else prepared_conv(x, *settings)
    if settings is None or call is None or not has_own(module, "weight", "bias"):
        return None
    weight, bias = settings[:2]
    watched = Watch([Part(chain.module, hooks=False), Part(module)])
    records = [watched.record, record(tensors_of([module]), identical=True)]
    return Repeat(call, records, [t for t in (weight, bias) if t is not None])


def _is_unseen(module: nn.Module) -> bool:
    """Returns whether nobody would see a call of ``module``, a probe not either."""
    return not (module._forward_pre_hooks or module._forward_hooks) and obstacle(module) is None
