"""Trials of dense blocks, transitions, and norms that run their activation themselves."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import FunctionType
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_ext import reference
from densenet_ext.algorithm.values import BasicLayer, Layer
from densenet_ext.fusing.structure import MEMORY_MODES
from densenet_ext.fusing.trial import Dropped, Pattern, Refusal, Refused, Trial, attempt, close
from densenet_ext.units.around import Transition
from densenet_ext.units.block import Block, Drop, layer_values
from densenet_ext.units.built import Built, Own, plain
from densenet_ext.units.entry import UNIT
from densenet_ext.units.parts import hooks_on_all_modules, norm_of, parameter, submodule

_BLOCK_SPATIAL = {1: (7,), 2: (3, 4), 3: (3, 2, 3)}
_TRANSITION_SPATIAL = {1: (7,), 2: (5, 4), 3: (4, 5, 4)}
_RATE = 0.28125
_INPUT, _WIDTH, _GROWTH = 3, 6, 2  # channels of a block that is tried out: in, of a bottleneck, added
_LIMIT = 256
_STANDARD = frozenset((*nn.Module().__dict__, UNIT))

_known: dict[object, Any] = {}
"""What trials found, by class and configuration: a model's blocks are alike, and ``report`` asks again."""

Found = TypeVar("Found")


def try_out_block(module: nn.Module, block: Block) -> Block | Refusal:
    """Returns the block with what ``module``'s ``forward`` does with its layers, or why no block does the same."""
    kin = None if _configuration(module) is None else _kin(module, block)

    def trial(thin: bool) -> Block:
        known = _known.get(kin)
        if isinstance(known, Block) and thin:
            return _BlockTrial(module, block, thin).confirm(known)
        found = _arrangement(module, block, thin)
        if kin is not None:
            _known[kin] = found
        return found

    return _tried_out((block.layers, block.parts), module, trial)


def _kin(module: nn.Module, block: Block) -> object:
    """Returns what blocks have in common that differ in nothing but their number of layers and channels; hashable.

    Of those a model has several. The first is tried out whole, the others in evaluation only.
    """
    own = dict.fromkeys((part.cls, part.settings) for part in block.built.own)
    leaves = dict.fromkeys(tuple(map(_leaf, layer.modules())) for layer in block.layers_of(module))
    return "kin", type(module), block.parts, tuple(own), tuple(leaves)


def _leaf(module: nn.Module) -> object:
    tensors = (*module._parameters.values(), *module._buffers.values())
    return type(module), tuple(t is None for t in tensors)


def try_out_transition(module: nn.Module, transition: Transition) -> Transition | Refusal:
    """Returns the transition, or why ``forward`` of ``module`` does something else with its parts."""
    return _tried_out("transition", module, lambda thin: _TransitionTrial(module, transition, thin).run())


def try_out_norm(norm: nn.Module) -> nn.Module | Refusal:
    """Returns a norm that runs its activation itself, or why it does something else than batch norm and ReLU."""
    return _tried_out("norm", norm, lambda thin: _NormTrial(norm, thin).run())


def _tried_out(kind: object, module: nn.Module, trial: Callable[[bool], Found]) -> Found | Refusal:
    reason = hooks_on_all_modules()
    if reason is not None:
        return Refusal(reason, "values")  # they would be called for what is tried out
    configured = _configuration(module)
    key = None if configured is None else (kind, configured)
    if key is not None and key in _known:
        return _known[key]
    found = attempt(lambda: trial(True))
    if isinstance(found, Refusal) and found.stage != "values":  # sizes are written into its code, perhaps
        found = attempt(lambda: trial(False))
    if len(_known) >= _LIMIT:
        _known.clear()
    if key is not None:
        _known[key] = found
    return found


def _arrangement(module: nn.Module, block: Block, thin: bool) -> Block:
    try:
        return _BlockTrial(module, block, thin).run(dropping=True)
    except Refused as refused:
        try:  # one that drops elsewhere too is known as long as its rates stay 0
            return _BlockTrial(module, block, thin).run(dropping=False)
        except Refused:
            raise refused from None


class _BlockTrial(Trial):
    def __init__(self, module: nn.Module, block: Block, thin: bool) -> None:
        self.block = block
        layers = block.layers_of(module)
        first: Any = submodule(layers[0], block.parts.convs[0])
        channels, dims = first.weight.shape[1], first.weight.dim() - 2
        widths: dict[nn.Module, tuple[int, int]] = {}
        if thin:
            channels = _INPUT
            for i, layer in enumerate(layers):
                C = channels + i * _GROWTH
                taken = (C, _WIDTH)[: len(block.parts.convs)]
                given = (_WIDTH, _GROWTH)[-len(block.parts.convs) :]
                for norm, conv, a, b in zip(block.parts.norms, block.parts.convs, taken, given, strict=True):
                    widths[submodule(layer, norm)] = (a, a)  # type: ignore[index]
                    widths[submodule(layer, conv)] = (a, b)  # type: ignore[index]
        super().__init__(module, channels, dims, _BLOCK_SPATIAL[dims], widths)

    @property
    def words(self) -> str:
        layer = "norm, ReLU, 1x1, norm, ReLU, 3x3" if len(self.block.parts.convs) == 2 else "norm, ReLU, 3x3"
        return f"{layer}{', dropout' if self.block.drops else ''} and concatenation"

    def run(self, dropping: bool) -> Block:
        """Tries the block out; ``dropping``: with drop rates above 0, otherwise only with the current ones."""
        self.block = dataclasses.replace(self.block, drops=self._drops() if dropping else ())
        if dropping:
            self.forget_statistics()
            for module in (self.theirs, self.ours):
                layers = self.block.layers_of(module)
                for i, layer in enumerate(layers):
                    for drop in self.block.drops:
                        setattr(submodule(layer, drop.part), drop.attribute, 0.2 + 0.5 * i / len(layers))
        self.block = self._arranged()
        self.compare()
        return self._known(self.block, "features" if self.recomputes else "bottlenecks")

    def confirm(self, known: Block) -> Block:
        """Returns the block, whose kin is ``known``, after one run in evaluation."""
        self.block = dataclasses.replace(self.block, drops=known.drops)
        found = self._arranged()
        self.refuse_others()
        if (found.new_first, found.returns) != (known.new_first, known.returns):
            raise Refused("it joins its features otherwise than other blocks of its kind")
        return self._known(found, known.save)

    def _known(self, block: Block, save: str | None) -> Block:
        free = {*MEMORY_MODES, *(drop.attribute for drop in block.drops if not drop.part)}
        return dataclasses.replace(block, built=_without(block.built, free, set(block.layers)), save=save)

    def _drops(self) -> tuple[Drop, ...]:
        """Returns where the layers drop, and which attribute has the rate: the one whose value arrives at dropout."""
        layers = self.block.layers_of(self.theirs)
        self.set_training(lambda i: True)
        places = [("", name) for name, value in vars(layers[0]).items() if _is_rate(value)]
        places += [(name, "p") for name in self.block.parts.dropouts]
        found: list[Drop] = []
        for part, attribute in places:
            owners: list[Any] = [submodule(layer, part) for layer in layers]
            if not all(hasattr(owner, attribute) for owner in owners):
                continue
            before = [getattr(owner, attribute) for owner in owners]
            try:
                for owner in owners:
                    setattr(owner, attribute, _RATE)
                with Pattern() as pattern, torch.no_grad():
                    self.theirs(self.input())
            except Exception:  # it has another meaning
                continue
            finally:
                for owner, rate in zip(owners, before, strict=True):
                    setattr(owner, attribute, rate)
            calls = [call for call in pattern.calls if call.rate == _RATE]
            found += [Drop(part, attribute, *place) for place in dict.fromkeys(map(self._place, calls))]
        return tuple(found)

    def _place(self, call: Dropped) -> tuple[bool, bool]:
        layer = self.block.layers_of(self.theirs)[0]
        convs: list[Any] = [submodule(layer, conv) for conv in self.block.parts.convs]
        widths = [conv.weight.shape[0] for conv in convs]
        return len(widths) == 2 and call.size == widths[0] != widths[1], call.channels

    def _arranged(self) -> Block:
        """Returns the block with its order of concatenation and what it returns, from one run in evaluation."""
        self.set_training(lambda i: False)
        x = self.input()
        layers = self.block.layers_of(self.ours)
        convs: list[Any] = [submodule(layer, self.block.parts.convs[-1]) for layer in layers]
        growth = sum(conv.weight.shape[0] for conv in convs)
        everything, news = ([x.shape[0], C, *x.shape[2:]] for C in (x.shape[1] + growth, growth))
        with torch.no_grad():
            got = self.their_result(x)
            if list(got.shape) == everything:
                choices = [dataclasses.replace(self.block, new_first=new_first) for new_first in (False, True)]
            elif list(got.shape) == news and len(layers) > 1:
                choices = [dataclasses.replace(self.block, returns="new")]
            else:
                raise Refused(f"it returns {list(got.shape)} where all features are {everything}", "shape")
            for choice in choices:
                if close(got, self._result(x, choice)):
                    return choice
        raise Refused(f"its values are not those of {self.words}")

    def our_result(self, x: Tensor) -> Tensor:
        return self._result(x, self.block)

    def _result(self, x: Tensor, block: Block) -> Tensor:
        layers: list[Any] = [layer_values(block, layer) for layer in block.layers_of(self.ours)]
        with Pattern():
            if isinstance(layers[0], Layer):
                out = reference.dense_block(x, layers, new_first=block.new_first)
            else:
                assert isinstance(layers[0], BasicLayer)
                out = reference.basic_block(x, layers, new_first=block.new_first)
        return out if block.returns == "all" else out[:, x.shape[1] :]


class _TransitionTrial(Trial):
    words = "norm, ReLU, 1x1 convolution and average pooling of window 2"

    def __init__(self, module: nn.Module, transition: Transition, thin: bool) -> None:
        self.transition = transition
        norm: Any = submodule(module, transition.norm)
        conv: Any = submodule(module, transition.conv)
        out, channels = conv.weight.shape[:2]
        widths: dict[nn.Module, tuple[int, int]] = {}
        if thin:
            channels, out = _INPUT, _GROWTH
            widths = {norm: (channels, channels), conv: (channels, out)}
        self.channels, dims = out, conv.weight.dim() - 2
        super().__init__(module, channels, dims, _TRANSITION_SPATIAL[dims], widths)

    def run(self) -> Transition:
        self.set_training(lambda i: False)
        shape = list(self.their_result(self.input()).shape)
        halved = [self.size[0], self.channels, *(n // 2 for n in self.size[2:])]
        if shape != halved:
            raise Refused(f"it returns {shape} rather than {halved}", "shape")
        self.compare()
        return self.transition

    def our_result(self, x: Tensor) -> Tensor:
        norm: Any = submodule(self.ours, self.transition.norm)
        conv: Any = submodule(self.ours, self.transition.conv)
        return reference.transition(x, norm_of(norm), conv.weight, 2, conv_bias=parameter(conv, "bias"))


class _NormTrial(Trial):
    words = "batch normalisation and ReLU"

    def __init__(self, norm: Any, thin: bool) -> None:
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
        dims = next(d for d, kind in enumerate(kinds, start=1) if isinstance(norm, kind))
        channels = _INPUT if thin else norm.num_features
        super().__init__(norm, channels, dims, _BLOCK_SPATIAL[dims], {norm: (channels, channels)})

    def run(self) -> nn.Module:
        self.compare()
        return self.theirs

    def our_result(self, x: Tensor) -> Tensor:
        return F.relu(reference.batch_norm(x, norm_of(self.ours)))


def _is_rate(value: object) -> bool:
    return type(value) in (int, float) and 0 <= value < 1  # type: ignore[operator]


def _without(how: Built, attributes: set[str], names: set[str]) -> Built:
    """Returns how a module is built, but for settings of the modules of these names that may change."""

    def kept(part: Own) -> Own:
        if part.name not in names:
            return part
        return part._replace(settings=tuple(pair for pair in part.settings if pair[0] not in attributes))

    return how._replace(own=tuple(map(kept, how.own)))


def _configuration(module: nn.Module) -> tuple[object, ...] | None:
    """Returns what the meaning of ``forward`` can depend on: classes, code, settings and shapes; hashable.

    The code is that of PyTorch's classes too: what was found while somebody had replaced a function of one does not
    hold afterwards. None where a module has an attribute whose content may change unseen.
    """
    inside = list(module.named_modules(remove_duplicate=False))
    kinds = dict.fromkeys(kind for _, inner in inside for kind in type(inner).__mro__)
    code = tuple(value for kind in kinds for value in vars(kind).values() if isinstance(value, FunctionType))
    try:
        return (code, *(_configured(name, inner) for name, inner in inside))
    except _Opaque:
        return None


class _Opaque(Exception):
    """An attribute that cannot be compared by its value."""


def _configured(name: str, module: nn.Module) -> tuple[object, ...]:
    attributes = [(key, _frozen(value)) for key, value in module.__dict__.items() if key not in _STANDARD]
    shapes = [
        (key, None if t is None else (t.shape, t.is_floating_point()))
        for key, t in (*module._parameters.items(), *module._buffers.items())
    ]
    return name, type(module), tuple(attributes), tuple(shapes)


def _frozen(value: object) -> object:
    if plain(value):
        return value
    if isinstance(value, (list, tuple)):
        return tuple(map(_frozen, value))
    raise _Opaque
