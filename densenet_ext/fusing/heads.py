"""Finds out what a model does behind its features by running its ``forward`` on tensors without data.

Every child is replaced by a stand-in that writes down its call; functions on tensors are written down too. A head is
what a fused unit computes (ReLU, the average over all pixels, flattening) and then modules, one after another. The
model is not touched: the probe is an empty object of its class that shares its attributes.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from contextlib import redirect_stdout
from io import StringIO
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from densenet_ext.fusing.structure import MEMORY_MODES
from densenet_ext.units.built import built
from densenet_ext.units.entry import original_class
from densenet_ext.units.head import OTHER, Head
from densenet_ext.units.parts import activates, submodule

_CHANNELS = 5
_RELU = (F.relu, torch.relu, torch.relu_, F.relu_, Tensor.relu, Tensor.relu_)
_AVERAGE = (F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d, Tensor.mean, torch.mean)
_FLATTEN = (torch.flatten, Tensor.flatten, Tensor.view, Tensor.reshape, torch.reshape, torch.squeeze, Tensor.squeeze)
_RESHAPING = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.Flatten)


class Step(NamedTuple):
    """One call: ``what`` is a module's name or a function."""

    what: Any
    given: tuple[Tensor, ...]
    output: Tensor


class _Record(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.steps: list[Step] = []

    def note(self, what: Any, args: tuple[Any, ...], output: Tensor) -> Tensor:
        self.steps.append(Step(what, tuple(value for value in args if isinstance(value, Tensor)), output))
        return output

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        return self.note(func, args, output) if isinstance(output, Tensor) else output


class _StandIn(nn.Module):
    def __init__(self, name: str, module: nn.Module, record: _Record, features: Tensor | None) -> None:
        super().__init__()
        self.name, self.module, self.record, self.features = name, (module,), record, features

    def __getattr__(self, name: str) -> Any:
        if name not in self.__dict__ and hasattr(self.__dict__["module"][0], name):
            raise _OneByOne
        return super().__getattr__(name)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        given = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        with torch._C.DisableTorchFunction():
            if self.features is not None or given is None:
                output = self.features if self.features is not None else torch.empty(2, 7, device="meta")
            elif type(self.module[0]) is nn.Identity:
                output = given
            elif type(self.module[0]) in _RESHAPING:
                output = self.module[0].forward(given)
            elif self.module[0]._parameters:
                output = given.new_empty(2, getattr(self.module[0], "out_features", 7))
            else:
                output = torch.empty_like(given)
        return self.record.note(self.name, (*args, *kwargs.values()), output)


class _OneByOne(Exception):
    """The forward asks for a part of the features."""


def head_of(model: nn.Module, features: str) -> Head | str:
    """Returns the head of ``model``, whose child ``features`` ends in a norm; or why it has none that is known."""
    sequence: Any = submodule(model, features)
    names = [name for name, child in sequence._modules.items() if child is not None]
    norm = sequence._modules[names[-1]]
    first = next((inner for inner in sequence.modules() if hasattr(inner, "kernel_size")), None)
    dims = 2 if first is None else len(first.kernel_size)  # type: ignore[arg-type]
    maps = torch.empty((2, _CHANNELS, *[4] * dims), device="meta")
    found: list[Head | str] = []
    for training in (True, False):
        steps = _record(model, features, maps, training)
        found.append(steps if isinstance(steps, str) else _parse(model, features, steps, dims, activates(norm)))
    return found[0] if found[0] == found[1] else "its forward is another one in evaluation than in training"


def _record(model: nn.Module, features: str, maps: Tensor, training: bool) -> list[Step] | str:
    record, x = _Record(), torch.empty_like(maps)
    probe = _probe(model, "", features, record, maps, training)
    before = dict(probe.__dict__)
    try:
        with torch.no_grad(), redirect_stdout(StringIO()), warnings.catch_warnings(), record:
            warnings.simplefilter("ignore")  # what it says of an image of four pixels
            result = original_class(model).forward(probe, x)  # type: ignore[misc]
    except _OneByOne:
        return "its forward runs the parts of its features one by one"
    except Exception as error:  # a stranger's code: whatever it raises, the answer is that it is not known
        return f"its forward could not be followed ({type(error).__name__}: {error})"
    changed = [name for name, value in probe.__dict__.items() if name not in before or before[name] is not value]
    if changed:
        return f"its forward changes {', '.join(changed)}"
    steps = record.steps
    if not steps or result is not steps[-1].output:
        return "its forward returns something else than the last module's result"
    if len(steps[0].given) != 1 or steps[0].given[0] is not x:
        return f"its forward runs {_words([steps[0].what])} on something else than its input"
    return steps


def _probe(module: nn.Module, name: str, features: str, record: _Record, maps: Tensor, training: bool) -> nn.Module:
    children = {key: child for key, child in module._modules.items() if child is not None}
    if name == features or not children:
        return _StandIn(name, module, record, maps if name == features else None)
    prefix = f"{name}." if name else ""
    probes = {key: _probe(child, prefix + key, features, record, maps, training) for key, child in children.items()}
    probe: nn.Module = object.__new__(original_class(module))
    probe.__dict__.update(module.__dict__, _modules=probes, training=training)
    return probe


def _parse(model: nn.Module, features: str, steps: list[Step], dims: int, activated: bool) -> Head | str:
    """Returns the head that ``steps`` are, or a phrase that says what else they do."""
    chain = [step for step in steps if not _is_nothing(model, step)]
    words = f"its forward runs {_words(step.what for step in chain)}"
    if not chain or chain[0].what != features:
        return words
    for before, step in zip(chain, chain[1:], strict=False):
        if len(step.given) != 1 or step.given[0] is not before.output:
            return f"{words}, not each on the last result"
    wanted = [*([] if activated else ["relu"]), "average", "flatten"]
    rest, replaced = list(chain[1:]), []
    while wanted:
        if not rest:
            return words
        what, step = wanted.pop(0), rest.pop(0)
        if what == "flatten" and not _flattens(step):
            return words
        if isinstance(step.what, str):
            part = submodule(model, step.what)
            assert part is not None
            other = OTHER[what](part, dims)
            if other is not None:
                return words if isinstance(part, nn.Dropout) else f"{step.what} {other}"
            replaced.append((step.what, what))
        elif step.what not in {"relu": _RELU, "average": _AVERAGE, "flatten": _FLATTEN}[what]:
            return words
        elif what == "average" and list(step.output.shape[2:]) not in ([1] * dims, []):
            return words
        if what == "average" and step.output.dim() == 2:
            wanted = []
    if not all(isinstance(step.what, str) for step in rest):
        return words
    # modules that do nothing, inside of those that are not called, must stay so
    replaced += [(step.what, "flatten") for step in steps if _is_nothing(model, step)]
    called = _whole([step.what for step in rest], [name for name, _ in replaced])
    holders = list(dict.fromkeys(holder for name, _ in replaced for holder in _holders(name)))
    names = [name for name, _ in model.named_modules() if name and name.rpartition(".")[0] in ("", *holders)]
    how = built(model, names, ("", *holders), MEMORY_MODES)
    return Head(features, tuple(replaced), tuple(called), dims, activated, how)


def _is_nothing(model: nn.Module, step: Step) -> bool:
    """Returns whether a step is that of an Identity inside of another module; one of the model's own may have hooks."""
    return isinstance(step.what, str) and "." in step.what and type(submodule(model, step.what)) is nn.Identity


def _flattens(step: Step) -> bool:
    return list(step.output.shape) == [2, _CHANNELS]


def _holders(name: str) -> list[str]:
    parts = name.split(".")[:-1]
    return [".".join(parts[: i + 1]) for i in range(len(parts))]


def _whole(called: Sequence[str], replaced: Sequence[str]) -> list[str]:
    """Returns the children of the model that are called as they are, where nothing inside of them is replaced."""
    taken = {name.split(".")[0] for name in replaced}
    return list(dict.fromkeys(name if name.split(".")[0] in taken else name.split(".")[0] for name in called))


def _words(whats: Iterable[Any]) -> str:
    return ", ".join(what if isinstance(what, str) else getattr(what, "__name__", repr(what)) for what in whats)
