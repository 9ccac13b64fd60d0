"""The head as a unit: the last norm, ReLU and global average in one pass, then what the model runs on the result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.head import head, prepared_scores
from densenet_ext.algorithm.inference import Call, form_of
from densenet_ext.algorithm.packed import lowered
from densenet_ext.algorithm.single import SingleNorm
from densenet_ext.units.built import Built
from densenet_ext.units.entry import Forward, as_eager, not_a_tensor, original_class, ran, reason_outside, unit_of
from densenet_ext.units.flow import Flow, incoming
from densenet_ext.units.metadata import with_metadata
from densenet_ext.units.norms import NormReading, has_own, tensors_of
from densenet_ext.units.parts import (
    activates,
    has_other_forward,
    hook_on,
    hooks_on_all_modules,
    is_plain,
    obstacle,
    other_flatten,
    other_global_average,
    other_norm,
    other_relu,
    parameter,
    submodule,
)
from densenet_ext.units.reading import Entry, Part, Readings, Watch, record
from densenet_ext.units.sequence import Ending, Sequence
from densenet_ext.units.stretch import Repeat

OTHER: dict[str, Callable[[nn.Module, int], str | None]] = {
    "relu": lambda module, dims: other_relu(module),
    "average": other_global_average,
    "flatten": lambda module, dims: None if type(module) is nn.Identity else other_flatten(module),
}
"""What a module is instead of what it stands for behind the last norm, by the name of that; or None."""

_RUNNING: Readings[NormReading] = Readings()
"""The last norms of the models whose heads run fused."""


@dataclass(frozen=True)
class Head:
    """A model: its features up to the last norm, ReLU and average over the pixels, and modules that follow."""

    features: str  # a Sequential that ends in the norm
    replaced: tuple[tuple[str, str], ...]  # modules that are not called, by name, and what they are: a key of OTHER
    rest: tuple[str, ...]  # modules that are called one after another on [N, C]
    dims: int  # spatial dimensions
    activated: bool  # the norm has its ReLU inside
    built: Built

    kind: ClassVar[str] = "head"

    def reason(self, module: nn.Module) -> str | None:
        """Returns why norm, ReLU and average run one by one as they stand now, or None."""
        reason = hooks_on_all_modules() or self.built.changed(module)
        if reason is not None:
            return reason
        features: Any = submodule(module, self.features)
        reason = hook_on(features)
        if reason is not None:
            return f"{self.features} {reason}"
        reason = reason_outside(features)
        if reason is not None or original_class(features).forward is not nn.Sequential.forward:
            return f"{self.features} does not run its children one after another"
        names = tuple(features._modules)
        norm = features._modules[names[-1]] if names else None
        reason = "is missing" if norm is None else obstacle(norm) or other_norm(norm, self.dims)
        if reason is None and norm is not None and self.activated and not activates(norm):
            reason = f"is a {type(norm).__name__}, without the ReLU that was inside of it"
        if reason is not None:
            return f"{names[-1] if names else 'the last norm'} {reason}"
        for name, what in self.replaced:
            part = submodule(module, name)
            assert part is not None
            reason = OTHER[what](part, self.dims) or obstacle(part)
            if reason is not None:
                return f"{name} {reason}"
        return None

    def _norm(self, module: nn.Module) -> NormReading | None:
        """Returns the norm, or None where the head runs unfused."""

        def read() -> NormReading | None:
            return None if self.reason(module) is not None else NormReading(self._features(module)[-1])

        # what a norm with its ReLU inside is made of is not watched
        if torch.compiler.is_compiling() or self.activated:
            return read()
        if hooks_on_all_modules() is not None:
            return None
        return _RUNNING.get(module, self, read, lambda: self._watched(module))

    def _features(self, module: nn.Module) -> list[Any]:
        features: Any = submodule(module, self.features)
        return list(features._modules.values())

    def _watched(self, module: nn.Module) -> list[Part]:
        features: Any = submodule(module, self.features)
        parts = [*self.built.watched(module), Part(features), Part(self._features(module)[-1])]
        found = (submodule(module, name) for name, _ in self.replaced)
        return parts + [Part(part) for part in found if part is not None]

    def call(self, module: nn.Module, usual: Forward, x: Any) -> Any:
        """Returns what ``usual(module, x)`` does."""
        features = submodule(module, self.features)
        if features is None:
            return usual(module, x)
        if not isinstance(x, Tensor):
            return as_eager(not_a_tensor(x), usual, module, x)
        unit = unit_of(features)
        sequence = unit if isinstance(unit, Sequence) else Sequence()
        found = sequence.run_to(Ending(self, module), features, incoming(x))
        if not isinstance(found, Flow):
            return usual(module, x) if found is None else as_eager(found, usual, module, x)
        out = found.x
        for name in () if found.scored else self.rest:
            part: Any = submodule(module, name)
            out = _linear(part, out) if _is_plain_linear(part) else part(out)
        return out

    def can_run(self, module: nn.Module) -> bool:
        """Returns whether norm, ReLU and average run in one pass as they stand now."""
        return self._norm(module) is not None

    def step(self, module: nn.Module, flow: Flow) -> Flow:
        """Returns the averages [N, C] of the features that ``call`` has, in the place of the last norm; or the scores
        [N, K] of what follows."""
        norm, last = self._norm(module), self._features(module)[-1]
        values = None if norm is None else norm.now()
        if values is not None and flow.x.dim() - 2 == self.dims and flow.x.shape[1] == last.num_features:
            ran(module, self.kind)
            scores = self._scores(module, values, flow.x)
            if scores is not None:
                return Flow(with_metadata(scores.call, flow.x), flow.layout, scored=True)
            return Flow(with_metadata(lambda maps: head(maps, values, stats=flow.stats), flow.x), flow.layout)
        # the norm says what is wrong with it, or a module before it has just changed it
        return Flow(F.relu(last(flow.shown())).flatten(2).mean(2), flow.layout)

    def repeated(self, module: nn.Module, x: Tensor) -> Repeat | None:
        """Returns a call on features like x that can be repeated without `step`; None where there is none."""
        # a norm with its ReLU inside is read at every call, and what autocast does to volumes is not part of one
        norm = None if self.activated or x.dim() == 5 else self._norm(module)
        values = None if norm is None else norm.now()
        if norm is None or values is None:
            return None
        scores = self._scores(module, values, x)
        call = values.inferences.find(x) if scores is None else scores.call
        if call is None:
            return None
        records, tensors = [_RUNNING.record(module, self), *norm.records], norm.tensors
        if scores is not None:
            records, tensors = [*records, *scores.records(module)], [*tensors, *scores.tensors]
        return Repeat(call, records, tensors, scores=scores is not None)

    def _scores(self, module: nn.Module, norm: SingleNorm, x: Tensor) -> _Scores | None:
        """Returns how features like x are scored in one call; None where the linear layer is called by itself."""
        usual = self.activated or x.dim() == 5 or form_of(x) is None or checks.autocast_enabled(x.device.type)
        part = None if usual or x.numel() == 0 else self._scorer(module)
        if part is None:
            return None
        weight, bias = parameter(part, "weight"), parameter(part, "bias")
        if not is_plain(weight) or not (bias is None or is_plain(bias)):
            return None
        call = prepared_scores(x, norm, weight, bias) if has_own(part, "weight", "bias") else None
        return None if call is None else _Scores(call, part, [weight] if bias is None else [weight, bias])

    def _scorer(self, module: nn.Module) -> nn.Linear | None:
        """Returns the linear layer where a plain one, which nobody sees, is all that follows; else None."""
        part: Any = submodule(module, self.rest[0]) if len(self.rest) == 1 else None
        return part if _is_plain_linear(part) else None

    def weights(self, module: nn.Module) -> list[Tensor]:
        """Returns the weights and biases of the linear layers that run on the result."""
        linear = [part for part in (submodule(module, name) for name in self.rest) if isinstance(part, nn.Linear)]
        return [t for part in linear for t in (part.weight, part.bias) if isinstance(t, Tensor)]


def _is_plain_linear(part: Any) -> bool:
    """Returns whether a call of ``part`` is that of F.linear on its weight and bias, and nobody sees it."""
    own = type(part) is nn.Linear and nn.Linear.forward is _FORWARD and F.linear is _LINEAR
    seen = own and (part._forward_hooks or part._forward_pre_hooks or hook_on(part) is not None)
    return own and not seen and not has_other_forward(part)


_FORWARD, _LINEAR = nn.Linear.forward, F.linear


class _Scores:
    """A call on features of one form that gives a linear layer's result, and what it depends on of that layer."""

    def __init__(self, call: Call, part: nn.Linear, tensors: list[Tensor]) -> None:
        self.call, self._part = call, part
        self.tensors = tensors
        """Those whose form it depends on."""

    def records(self, module: nn.Module) -> list[Any]:
        """Returns what it depends on beside, of the layer and of PyTorch; ``module``: the model."""
        code: list[Entry] = [(vars(nn.Linear), -1, ("forward",), (_FORWARD,)), (vars(F), -1, ("linear",), (_LINEAR,))]
        watched = Watch([Part(module, hooks=False), Part(self._part)])
        return [watched.record, record(code), record(tensors_of([self._part]), identical=True)]


def _linear(part: Any, x: Tensor) -> Any:
    """Returns ``part(x)``; under autocast without gradients by weights that somebody holds, which are cast already."""
    kind = x.device.type
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or not checks.autocast_enabled(kind):
        return part(x)
    given = [part.weight] if part.bias is None else [part.weight, part.bias]
    if any(t.dtype == torch.float64 for t in (x, *given)):  # which autocast leaves alone
        return part(x)
    cast = [lowered(t, torch.get_autocast_dtype(kind)) for t in given]
    return part(x) if any(t is None for t in cast) else F.linear(x, *cast)  # type: ignore[arg-type]
