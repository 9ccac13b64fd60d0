"""Finds the units of a model: those that it runs as already, and those that it could run as."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from densenet_ext.fusing.heads import head_of
from densenet_ext.fusing.libraries import taps
from densenet_ext.fusing.structure import MEMORY_MODES, Candidate, candidates, transition_of, what_else
from densenet_ext.fusing.trial import Refusal
from densenet_ext.fusing.trials import try_out_block, try_out_norm, try_out_transition
from densenet_ext.units import captures
from densenet_ext.units.around import Stem, Transition
from densenet_ext.units.block import Block
from densenet_ext.units.entry import original_class, reason_outside, unit_of
from densenet_ext.units.head import Head
from densenet_ext.units.parts import (
    activates,
    has_other_forward,
    hidden_function,
    hooks_on_all_modules,
    obstacle,
    submodule,
)
from densenet_ext.units.sequence import Run, Sequence


@dataclass(frozen=True)
class Found:
    """A unit of a model, or what could be one.

    ``unit``: what the module runs as, or would; None where that can never be, and ``refusal`` says why. ``part``: the
    unit is a segment of the Sequential's, and counts as one by itself.
    """

    kind: str  # "stem", "dense block", "transition" or "head"
    name: str  # the module's place in the model
    module: nn.Module
    unit: Any = None
    refusal: str | None = None
    part: bool = False

    @property
    def is_fused(self) -> bool:
        """Returns whether the module has entered, so that the unit runs unless there is a reason."""
        return self.unit is not None and unit_of(self.module) is not None

    def reason(self) -> str | None:
        """Returns why the unit would not run fused, as it stands now and were it fused; or None."""
        if self.unit is None:
            return self.refusal
        outside = captures.patched() or (reason_outside(self.module) if self.is_fused else _replaced(self.module))
        return outside or self.unit.reason(self.module)


def find_units(model: nn.Module) -> list[Found]:
    """Returns the units in ``model``, itself included, in the order of ``named_modules``; each module once.

    Sequentials that hand features from one unit to the next are not among them (`Finder` has them too).
    """
    return [found for found in Finder(model).all() if found.kind in ("stem", "dense block", "transition", "head")]


class Finder:
    """One look at a model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = {module: name for name, module in model.named_modules()}
        self._inside: set[nn.Module] = set()
        self._found: dict[nn.Module, list[Found]] = {}
        self._runs: dict[nn.Module, list[Run | Found]] = {}
        for module in self._modules:
            if module not in self._inside:
                self._found[module] = list(self._blocks_and_transitions(module))
        for module in reversed(list(self._modules)):
            if module not in self._inside and not self._found[module]:
                self._found[module] = list(self._sequence(module))
        for module in self._modules:
            if module not in self._inside and not self._found[module]:
                self._found[module] = list(self._model(module))

    def all(self) -> list[Found]:
        """Returns every unit in the order of the modules, sequences included."""
        return [found for units in self._found.values() for found in units]

    # ---- blocks and transitions ------------------------------------------------------------------------------------

    def _blocks_and_transitions(self, module: nn.Module) -> Iterator[Found]:
        unit, name = unit_of(module), self._modules[module]
        if unit is None and _is_ours(module):
            unit = module.unit()  # type: ignore[operator]
        if isinstance(unit, (Block, Transition)) or getattr(unit, "kind", "") == "transition":
            self._inside.update(set(module.modules()) - {module})
            yield Found(unit.kind, name, module, unit)
            return
        if isinstance(unit, Sequence):
            self._enclose(module, (segment for segment in unit.segments if isinstance(segment, Run)))
        if unit is not None or not _runs_own_code(module):
            return
        runs = list(self._find_runs(module)) if type(module).forward is nn.Sequential.forward else []
        if runs:
            self._runs[module] = runs
            self._enclose(module, (run for run in runs if isinstance(run, Run)))
        else:
            found = self._block(module)
            if found is not None:
                self._inside.update(set(module.modules()) - {module})
                yield found
                return
        yield from self._transition(module)

    def _enclose(self, module: nn.Module, runs: Iterable[Run]) -> None:
        """Has the layers of these runs be looked at no more."""
        for run in runs:
            self._inside.update(inner for layer in run.block.layers_of(module) for inner in layer.modules())

    def _block(self, module: nn.Module) -> Found | None:
        for candidate in candidates(module):
            found = self._tell(module, candidate)
            if found is not None:
                return found
        return None

    def _tell(self, module: nn.Module, candidate: Candidate) -> Found | None:
        block, name = candidate.block, self._modules[module]
        several = len(block.layers) > 1
        if not candidate.whole:
            if type(module).forward is nn.Sequential.forward or (_is_bare(module) and not several):
                return None  # its runs of layers may be fused by themselves
            return Found(Block.kind, name, module, refusal=what_else(module, candidate))
        if _is_bare(module):
            words = "its layers are run by the code of the module that holds them"
            return Found(Block.kind, name, module, refusal=words) if several else None
        known = tell_block(module, block)
        if isinstance(known, Block):
            return Found(Block.kind, name, module, known)
        if known is None or not several:
            return None  # norm, ReLU, convolution and concatenation occur in any network
        holders = {layer.rpartition(".")[0] for layer in block.layers} - {""}
        for holder in holders:  # more than a block: its Sequential is one
            inner = submodule(module, holder)
            if inner is not None and any(
                isinstance(tell_block(inner, other.block), Block) for other in candidates(inner) if other.whole
            ):
                return None
        return Found(Block.kind, name, module, refusal=known)

    def _transition(self, module: nn.Module) -> Iterator[Found]:
        transition = transition_of(module)
        if transition is None or hooks_on_all_modules() or any(map(_replaced, module.modules())):
            return
        found = try_out_transition(module, transition)
        if isinstance(found, Transition):
            self._inside.update(set(module.modules()) - {module})
            yield Found(Transition.kind, self._modules[module], module, found)
        elif found.stage == "values":  # norm and convolution occur in any network
            other = transition.other_parts(module)
            unknown = f"{type(module).__name__} is not a known transition: {found.reason}"
            yield Found(Transition.kind, self._modules[module], module, refusal=other or unknown)

    # ---- sequences -------------------------------------------------------------------------------------------------

    def _sequence(self, module: nn.Module) -> Iterator[Found]:
        """Yields the sequence that ``module`` is, its stem and its runs of layers, if it holds a unit."""
        unit, name = unit_of(module), self._modules[module]
        if unit is not None and not isinstance(unit, Sequence):
            return
        if _forward_of(original_class(module)) is not nn.Sequential.forward or _replaced(module) is not None:
            return
        runs = [] if unit is not None else self._runs.get(module, [])
        segments = unit.segments if unit is not None else tuple(run for run in runs if isinstance(run, Run))
        blocks = [segment for segment in segments if isinstance(segment, Run)]
        refused = [run for run in runs if isinstance(run, Found)]
        holds = any(self._is_unit(child) for child in module.children())
        if not holds and not blocks:
            yield from refused
            return
        stem = unit.stem if unit is not None and unit.stem is not None else _stem_of(module)
        if unit is None:
            if isinstance(stem, Stem):
                segments = (stem, *segments)
            unit = Sequence(segments)
        yield Found(Sequence.kind, name, module, unit)
        if isinstance(stem, Stem):
            if stem in unit.segments:
                yield Found(Stem.kind, name, module, stem, part=True)
        elif stem is not None:
            yield Found(Stem.kind, name, module, refusal=stem)
        for run in blocks:
            yield Found(Block.kind, _place(name, run, module), module, run.block, part=True)
        yield from refused

    def _find_runs(self, module: nn.Module) -> Iterator[Run | Found]:
        for candidate in candidates(module):
            block = candidate.block
            if candidate.whole or block.layers[0] not in module._modules:
                continue
            layers = nn.Sequential()
            for name in block.layers:
                layers.add_module(name, module._modules[name])
            known = tell_block(layers, block)
            if isinstance(known, Block):
                yield Run(known)
            elif known is not None and len(block.layers) > 1:
                yield Found(Block.kind, self._modules[module], module, refusal=known)

    def _is_unit(self, module: nn.Module) -> bool:
        return any(found.unit is not None and found.kind != Head.kind for found in self._found.get(module, ()))

    # ---- models ----------------------------------------------------------------------------------------------------

    def _model(self, module: nn.Module) -> Iterator[Found]:
        unit, name = unit_of(module), self._modules[module]
        if unit is None and _is_ours(module):
            unit = module.unit()  # type: ignore[operator]
        if taps(module) is not None and any(map(self._is_unit, module.children())):
            unit = unit or taps(module)
            words = "its parts run one by one, for the features between them"
            yield Found(Stem.kind, name, module, refusal=words)
        if unit is not None:
            yield Found(unit.kind, name, module, unit)
            return
        for key, child in module._modules.items():
            if child is None or not any(isinstance(found.unit, Sequence) for found in self._found.get(child, ())):
                continue
            last = next(reversed([inner for inner in child._modules.values() if inner is not None]))
            if not isinstance(last, _BatchNorm):
                continue
            replaced = _replaced(module) or _other_norm(last)
            head = replaced or head_of(module, key)
            if isinstance(head, Head):
                yield Found(Head.kind, name, module, head)
            else:
                yield Found(Head.kind, name, module, refusal=head)
            return


def tell_block(module: nn.Module, block: Block) -> Block | str | None:
    """Returns the block that the layers of ``module`` are, or in words why not; None: nothing speaks for a block."""
    inside = [module, *(inner for layer in block.layers_of(module) for inner in layer.modules())]
    if any(map(has_other_forward, inside)):
        return "a forward in it was replaced on the instance"
    hidden = next((name for name in map(hidden_function, inside) if name is not None), None)
    if hidden is not None:
        return f"a {hidden} in it was replaced on the instance"
    other = block.other_parts(module)
    if other is not None or any(activates(inner) and obstacle(inner) for inner in inside):
        return block.reason(module) or other
    for inner in module.modules():
        refused = _other_norm(inner)
        if refused is not None:
            return refused
    found = try_out_block(module, block)
    if isinstance(found, Refusal):
        if found.stage == "running" and type(module).forward is nn.Sequential.forward:
            return None  # its layers are not made to be chained
        layer = type(block.layers_of(module)[0]).__name__
        return block.reason(module) or f"this block of {layer} layers is not a known one: {found.reason}"
    on = any(inner.__dict__.get(mode) is True for inner in module.modules() for mode in MEMORY_MODES)
    save = "features" if on else found.save
    return dataclasses.replace(found, save=save)


def _runs_own_code(module: nn.Module) -> bool:
    """Returns whether a function of Python runs ``module``, rather than traced or scripted code."""
    return isinstance(_forward_of(type(module)), FunctionType)


def _forward_of(cls: type) -> object:
    """Returns the ``forward`` of ``cls``, or None; what TorchScript makes has none on its class."""
    return getattr(cls, "forward", None)


def _other_norm(norm: nn.Module) -> str | None:
    if not activates(norm):
        return None
    found = try_out_norm(norm)
    if not isinstance(found, Refusal):
        return None
    return f"the forward of {type(norm).__name__} is not the known one: {found.reason}"


def _replaced(module: nn.Module) -> str | None:
    hidden = "forward" if has_other_forward(module) else hidden_function(module)
    return None if hidden is None else f"its {hidden} was replaced on the instance"


def _is_bare(module: nn.Module) -> bool:
    """Returns whether ``module`` only holds others, for the code of somebody else to run them."""
    return type(module) in (nn.ModuleList, nn.ModuleDict)


def _is_ours(module: nn.Module) -> bool:
    return hasattr(type(module), "unit") and type(module).__module__.startswith("densenet_ext.")


def _place(name: str, run: Run, module: nn.Module) -> str:
    """Returns where a run is; by its first layer, where its Sequential holds other layers of its class too."""
    kind = type(module._modules[run.names[0]])
    alone = sum(type(child) is kind for child in module.children()) == len(run.names)
    return name if alone else f"{name}.{run.names[0]}".removeprefix(".")


def _stem_of(module: nn.Module) -> Stem | str | None:
    """Returns the stem among the children: norm, ReLU and max-pooling behind a convolution; or why it is none."""
    children = [(name, child) for name, child in module._modules.items() if child is not None]
    if not children or not isinstance(children[0][1], _ConvNd):
        return None
    for i, (name, norm) in enumerate(children[1:], start=1):
        if not isinstance(norm, _BatchNorm):
            continue
        behind = children[i + 1 : i + 3]
        relu = behind.pop(0)[0] if behind and not activates(norm) else None
        if not behind or isinstance(behind[0][1], _ConvNd) or unit_of(behind[0][1]) is not None:
            continue
        pool, kind = behind[0]
        if not isinstance(kind, (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.Sequential)):
            return None
        stem = Stem(name, relu, pool)
        return _other_norm(norm) or stem.other_parts(module) or stem
    return None
