"""What a class's ``forward`` does, found out by running it on tensors without data, with stand-ins for the children.

A class that is spelled like a known one may still compute something else. So ``forward`` runs once on the meta device;
every call of a child and every function on tensors is written down, and the record is compared with what a fused unit
computes. The module itself is not touched: the probe is an empty object of its class that shares its attributes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

RATE = 0.25
"""The drop rate that a probed layer is given."""

Passing = Literal["list", "arguments", "joined"]
"""How a layer is given the features so far: in a list, as arguments, or as one tensor, which it returns longer."""


class Step(NamedTuple):
    """One call: ``what`` is a child's name or a function; ``inputs`` the tensors that it was given, in order."""

    what: Any
    inputs: tuple[Tensor, ...]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


_SPELLINGS = {Tensor.flatten: torch.flatten, torch.concat: torch.cat, torch.concatenate: torch.cat, torch.relu: F.relu}


class _Record(TorchFunctionMode):
    """Writes down every function whose result is a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def note(self, what: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
        given: list[Any] = []
        for value in (*args, *kwargs.values()):
            given.extend(value if isinstance(value, (list, tuple)) else [value])
        inputs = tuple(value for value in given if isinstance(value, Tensor))
        self.steps.append(Step(_SPELLINGS.get(what, what), inputs, args, kwargs, output))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if isinstance(output, Tensor):
            self.note(func, args, kwargs or {}, output)
        return output


class _Child(nn.Module):
    """Stands for a child: notes that it was called and with what."""

    def __init__(self, name: str, record: _Record) -> None:
        super().__init__()
        self.name, self.record, self.output = name, record, feature()

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        self.record.note(self.name, args, kwargs, self.output)
        return self.output


def feature(channels: int = 3) -> Tensor:
    """Feature maps without data."""
    return torch.empty((2, channels, 4, 4), device="meta")


def record(module: nn.Module, args: Sequence[Any], training: bool, **attributes: Any) -> tuple[list[Step], Any] | str:
    """The steps of ``type(module).forward`` on ``args`` and its result; or in words what went wrong."""
    log = _Record()
    children = {name: _Child(name, log) for name in module._modules}
    probe = object.__new__(type(module))
    probe.__dict__.update(module.__dict__, **attributes, _modules=children, training=training)
    before = dict(probe.__dict__)
    try:
        with torch.no_grad(), log:
            result = type(module).forward(probe, *args)
    except Exception as error:  # a stranger's code: whatever it raises, the answer is that it is not known
        return f"it could not be followed ({type(error).__name__}: {error})"
    changed = [name for name, value in probe.__dict__.items() if name not in before or before[name] is not value]
    if changed or list(children) != list(module._modules):
        return f"it changes {', '.join(changed) or 'its children'}"
    return log.steps, result


def differs_from_layer(layer: nn.Module, passing: Passing, names: Sequence[str], drops: bool = True) -> str | None:
    """What ``forward`` of a layer does other than cat, norm, ReLU, 1x1, norm, ReLU, 3x3, dropout; None when it is that.

    ``names``: of the children that do this, in this order. ``drops``: dropout is a function, with the layer's
    ``drop_rate``. A layer that is given the features "joined" does not join them before, but the new ones to them.
    """
    for training in (True, False):
        features = [feature(5)] if passing == "joined" else [feature(5), feature(3)]
        attributes = {"drop_rate": RATE} if drops else {}
        found = record(layer, [features] if passing == "list" else features, training, **attributes)
        if isinstance(found, str):
            return found
        steps, result = found
        chain: list[Any] = [*names, F.dropout] if drops else [*names]
        if passing == "joined":
            if not steps:
                return "it runs nothing"
            reason = _not_a_chain(steps[:-1], steps[-2].output if steps[1:] else None, chain)
            if reason is None and not _same(steps[0].inputs, features):
                reason = f"{_words([steps[0].what])} is not given the features"
            reason = reason or _not_a_cat(steps[-1:], [*features, steps[-2].output])
            if reason is None and result is not steps[-1].output:
                reason = "it returns something else than all features"
            steps = steps[:-1]
        else:
            reason = _not_a_cat(steps[:1], features) or _not_a_chain(steps, result, [torch.cat, *chain])
        if reason is not None:
            return reason
        if drops:
            dropout = inspect.signature(F.dropout).bind(*steps[-1].args, **steps[-1].kwargs)
            dropout.apply_defaults()
            if dropout.arguments["p"] != RATE or bool(dropout.arguments["training"]) != training:
                return "its dropout follows other rules than drop_rate and training"
    return None


def differs_from_block(block: nn.Module, passing: Passing) -> str | None:
    """What ``forward`` of a block does other than giving each layer all features so far and joining all; None: that.

    Layers that are given the features "joined" need no more than to run one after another.
    """
    names = list(block._modules)
    for training in (True, False):
        x = feature()
        found = record(block, [x], training)
        if isinstance(found, str):
            return found
        steps, result = found
        if passing == "joined":
            reason = _not_a_chain(steps, result, names)
            if reason is not None or (names and not _same(steps[0].inputs, [x])):
                return reason or "its first layer is not given the input"
            continue
        if [step.what for step in steps[:-1]] != names:
            return f"it runs {_words(step.what for step in steps)}"
        features = [x]
        for step in steps[:-1]:
            as_list = len(step.args) == 1 and isinstance(step.args[0], (list, tuple))
            if not _same(step.inputs, features) or step.kwargs or as_list != (passing == "list"):
                return f"{step.what} is not given all features before it"
            features.append(step.output)
        reason = _not_a_cat(steps[-1:], features)
        if reason is not None or result is not steps[-1].output:
            return reason or "it returns something else than all features"
    return None


def differs_from_chain(module: nn.Module, chain: Sequence[str | Callable[..., Any]]) -> str | None:
    """What ``forward`` does other than this chain of children and functions, each on the last result; None: that.

    An average over pixels has to be one over all of them, and a flattening one that leaves [N, C].
    """
    for training in (True, False):
        x = feature()
        found = record(module, [x], training)
        if isinstance(found, str):
            return found
        steps, result = found
        reason = _not_a_chain(steps, result, chain)
        if reason is not None or not _same(steps[0].inputs, [x]):
            return reason or f"{_words([steps[0].what])} is not given the input"
        for step in steps:
            size = [*step.args[1:], *step.kwargs.values()]
            if step.what is F.adaptive_avg_pool2d and size not in ([1], [(1, 1)], [[1, 1]]):
                return "it does not average over the whole image"
            if step.what is torch.flatten and step.output.dim() != 2:
                return "it does not average over the whole image"
    return None


def differs_from_activated_norm(kind: type[nn.Module]) -> str | None:
    """What ``forward`` of such a norm does other than batch normalisation, its children drop and act; None: that."""
    norm: Any = kind(3).to("meta")
    for training in (True, False):
        x = feature()
        found = record(norm, [x], training)
        if isinstance(found, str):
            return found
        steps = [step for step in found[0] if step.what is not Tensor.add_]  # its counter
        if [step.what for step in steps] != [F.batch_norm, "drop", "act"]:
            return f"it runs {_words(step.what for step in steps)}"
        reason = _not_a_chain(steps[1:], found[1], ["drop", "act"])
        if reason is not None or not _same(steps[1].inputs, [steps[0].output]):
            return reason or "drop is not given the normalised features"
        given = inspect.signature(F.batch_norm).bind(*steps[0].args, **steps[0].kwargs)
        given.apply_defaults()
        wanted = (x, norm.running_mean, norm.running_var, norm.weight, norm.bias, training, norm.momentum, norm.eps)
        pairs = zip(given.arguments.values(), wanted, strict=True)
        if not all(a is b if isinstance(b, Tensor) else a == b for a, b in pairs):
            return "it normalises with other values than its own"
    return None


def _not_a_cat(steps: Sequence[Step], features: Sequence[Tensor]) -> str | None:
    if len(steps) != 1 or steps[0].what is not torch.cat:
        return f"it runs {_words(step.what for step in steps)} where a concatenation is expected"
    step = steps[0]
    dim = step.args[1] if len(step.args) > 1 else step.kwargs.get("dim", 0)
    if dim != 1 or not _same(step.inputs, features):
        return "it does not join all features along the channels"
    return None


def _not_a_chain(steps: Sequence[Step], result: Any, whats: Sequence[str | Callable[..., Any]]) -> str | None:
    if [step.what for step in steps] != list(whats):
        return f"it runs {_words(step.what for step in steps)}"
    for before, step in zip(steps, steps[1:], strict=False):
        if not _same(step.inputs, [before.output]):
            return f"{_words([step.what])} is not given the result of {_words([before.what])}"
    return None if result is steps[-1].output else "it returns something else than the last result"


def _same(tensors: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(tensors) == len(others) and all(a is b for a, b in zip(tensors, others, strict=True))


def _words(whats: Iterable[Any]) -> str:
    return (
        ", ".join(what if isinstance(what, str) else getattr(what, "__name__", repr(what)) for what in whats)
        or "nothing"
    )
