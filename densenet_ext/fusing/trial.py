"""What a dense block of somebody's own code computes: its ``forward`` is tried out and compared.

Two copies of the block get the same random parameters in float64. One runs its own code, the other's parameters go
through the usual formulation (``reference``), in training, in evaluation and with flags of both kinds mixed; results,
gradients and buffers have to agree. F.dropout is replaced by a fixed pattern of factors, so that where a block drops
values, and at which rate, shows in the numbers too. The block itself, the generators of random numbers and the hooks of
its user are not touched.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from densenet_ext import reference
from densenet_ext.algorithm.basic_block import BasicLayer
from densenet_ext.algorithm.block import Layer
from densenet_ext.algorithm.norm import norm_of
from densenet_ext.fusing.anatomy import Anatomy, part

_SPATIAL = {1: (7,), 2: (3, 4), 3: (3, 2, 3)}
_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_TOLERANCE = 1e-8  # relative, in float64: rounding stays below, any other formula above
_RATE = 0.28125
_HOOKS = tuple(name for name, value in nn.Module().__dict__.items() if "hook" in name and isinstance(value, dict))


class Refusal(NamedTuple):
    """In words why no fused unit computes what a block does, and how far the trial came."""

    reason: str
    stage: str  # "running": it cannot be run; "shape": it returns something else; "values": its numbers are others


class _Refused(Exception):
    def __init__(self, reason: str, stage: str = "values") -> None:
        self.refusal = Refusal(reason, stage)


def try_out(block: nn.Module, anatomy: Anatomy) -> Anatomy | Refusal:
    """The anatomy with what ``forward`` does with it, or why no fused unit does the same.

    Hooks that are registered for all modules would be called.
    """
    try:
        with _undisturbed():
            try:
                return _Trial(block, anatomy).run(dropping=True)
            except _Refused as refused:
                try:  # one that drops elsewhere too is known as long as its rates stay 0
                    return _Trial(block, anatomy).run(dropping=False)
                except _Refused:
                    raise refused from None
    except _Refused as refused:
        return refused.refusal
    except Exception as error:  # attributes that cannot be copied, layers that are none
        return Refusal(f"it could not be compared ({type(error).__name__}: {error})", "values")


@contextmanager
def _undisturbed() -> Iterator[None]:
    state = random.getstate()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            yield
    finally:
        random.setstate(state)


class _Pattern(TorchFunctionMode):
    """Makes F.dropout multiply with a fixed pattern; notes the rates that it is called with."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.dropout:
            return func(*args, **(kwargs or {}))
        call = inspect.signature(F.dropout).bind(*args, **(kwargs or {}))
        call.apply_defaults()
        x, p, training, inplace = call.arguments.values()
        if not training:
            return x
        self.rates.append(p)
        return x.mul_(_factors(x, p)) if inplace else x * _factors(x, p)


def _factors(x: Tensor, p: float) -> Tensor:
    return 1 + p * torch.arange(x.numel(), dtype=x.dtype).sin().view(x.shape)


class _Trial:
    def __init__(self, block: nn.Module, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        self.random = torch.Generator().manual_seed(0)
        values = [(t, self._value(t, module, name)) for module, name, t in _tensors(block)]
        first = self._weight(next(iter(anatomy.layers_of(block).values())), 0)
        self.channels, self.dims = first.shape[1], first.dim() - 2
        # theirs runs its own code; ours gives its parameters to the formulation
        self.theirs, self.ours = (_copy(block, values) for _ in range(2))
        for module in (*self.theirs.modules(), *self.ours.modules()):
            if type(module) is nn.SyncBatchNorm:  # this computes the same in one process, and runs on the CPU
                module.__class__ = _NORM[self.dims]  # type: ignore[assignment]

    def _weight(self, layer: nn.Module, i: int = -1) -> Tensor:
        conv: Any = part(layer, self.anatomy.parts.convs[i])
        return conv.weight

    def _value(self, t: Tensor, module: nn.Module, name: str) -> Tensor:
        if not t.is_floating_point():
            return torch.full(t.shape, 3, dtype=t.dtype)
        value = torch.randn(t.shape, generator=self.random, dtype=torch.float64)
        if isinstance(module, _BatchNorm) and name in ("weight", "running_var"):
            return value.abs_().add_(0.5)
        return value / max(1, t[0].numel()) ** 0.5 if t.dim() > 1 else value

    def run(self, dropping: bool) -> Anatomy:
        """``dropping``: whatever its drop rates are, else only with those that it has."""
        parameters = inspect.signature(type(self.theirs).forward).parameters
        if len(parameters) != 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
            raise _Refused("it takes more than one tensor")
        self.anatomy = replace(self.anatomy, drop=self._drop() if dropping else None)
        if dropping:
            for buffer, other in zip(self.theirs.buffers(), self.ours.buffers(), strict=True):
                buffer.copy_(other)
            for block in (self.theirs, self.ours):
                for i, layer in enumerate(self.anatomy.layers_of(block).values()):
                    self.anatomy.set_drop_rate(layer, 0.2 + 0.5 * i / len(self.anatomy.layers))
        self._set_training(lambda i: False)
        self.anatomy = self._arrangement()
        flags = torch.randint(2, (sum(1 for _ in self.ours.modules()),), generator=self.random).tolist()
        for training in (lambda i: True, lambda i: False, lambda i: bool(flags[i]), lambda i: not flags[i]):
            self._set_training(training)
            self._compare()
        return self.anatomy

    def _set_training(self, training: Any) -> None:
        for block in (self.theirs, self.ours):
            for i, module in enumerate(block.modules()):
                module.training = training(i)

    def _input(self) -> Tensor:
        return torch.randn((2, self.channels, *_SPATIAL[self.dims]), generator=self.random, dtype=torch.float64)

    def _drop(self) -> tuple[str, str] | None:
        """Where the layers' drop rate stands: their attribute whose value arrives at F.dropout, or the module."""
        layers = list(self.anatomy.layers_of(self.theirs).values())
        self._set_training(lambda i: True)
        for name, value in list(vars(layers[0]).items()):
            if type(value) not in (int, float) or not 0 <= value < 1 or not all(hasattr(l, name) for l in layers):
                continue
            before = [getattr(layer, name) for layer in layers]
            try:
                for layer in layers:
                    setattr(layer, name, _RATE)
                with _Pattern() as pattern, torch.no_grad():
                    self.theirs(self._input())
            except Exception:  # it has another meaning
                continue
            finally:
                for layer, rate in zip(layers, before, strict=True):
                    setattr(layer, name, rate)
            if _RATE in pattern.rates:
                return "", name
        return self.anatomy.drop

    def _arrangement(self) -> Anatomy:
        """The order of concatenation and what is returned, from one run in evaluation."""
        x = self._input()
        layers = self.anatomy.layers_of(self.ours).values()
        growth = sum(self._weight(layer).shape[0] for layer in layers)
        everything, news = ([x.shape[0], C, *x.shape[2:]] for C in (self.channels + growth, growth))
        with torch.no_grad():
            got = self._their_result(x)
            if list(got.shape) == everything:
                choices = [replace(self.anatomy, new_first=new_first) for new_first in (False, True)]
            elif list(got.shape) == news and len(layers) > 1:
                choices = [replace(self.anatomy, returns="new")]
            else:
                raise _Refused(f"it returns {list(got.shape)} where all features are {everything}", "shape")
            for choice in choices:
                if _close(got, self._our_result(x, choice)):
                    return choice
        raise _Refused(f"its values are not those of {self._words()}")

    def _their_result(self, x: Tensor) -> Tensor:
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        attributes = [(module, dict(module.__dict__)) for module in self.theirs.modules()]
        given = x.detach().clone()
        try:
            with _Pattern():
                out = self.theirs(x)
        except Exception as error:  # a stranger's code: whatever it raises, the answer is that it is not known
            raise _Refused(f"it could not be tried out ({type(error).__name__}: {error})", "running") from None
        if not torch.equal(torch_state, torch.get_rng_state()) or python_state != random.getstate():
            raise _Refused("it draws random numbers other than by F.dropout")
        for module, before in attributes:
            now = module.__dict__
            changed = [name for name in now if name not in before or now[name] is not before[name]]
            if changed:
                raise _Refused(f"it changes {', '.join(changed)} of a {type(module).__name__}")
        if not torch.equal(given, x):
            raise _Refused("it changes its input")
        if not isinstance(out, Tensor):
            raise _Refused(f"it returns a {type(out).__name__}", "shape")
        return out

    def _our_result(self, x: Tensor, anatomy: Anatomy) -> Tensor:
        layers, factors = [], []
        like = x[:, :1]
        for layer in anatomy.layers_of(self.ours).values():
            built = as_layer(layer, anatomy)
            layers.append(built)
            k, rate = (built.conv2 if isinstance(built, Layer) else built.conv).shape[0], built.drop_rate
            factors.append(_factors(like.expand(-1, k, *like.shape[2:]), rate) if rate > 0 else None)
        block: Any = reference.dense_block if isinstance(layers[0], Layer) else reference.basic_block
        out = block(x, layers, new_first=anatomy.new_first, factors=factors)
        return out if anatomy.returns == "all" else out[:, self.channels :]

    def _compare(self) -> None:
        x = self._input().requires_grad_()
        got, expected = self._their_result(x), self._our_result(x, self.anatomy)
        self._same([got, *self.theirs.buffers()], [expected, *self.ours.buffers()], "values")
        grad = torch.randn(got.shape, generator=self.random, dtype=torch.float64)
        theirs = torch.autograd.grad(got, [x, *self.theirs.parameters()], grad, allow_unused=True)
        ours = torch.autograd.grad(expected, [x, *self.ours.parameters()], grad, allow_unused=True)
        self._same(theirs, ours, "gradients")

    def _same(self, got: Any, expected: Any, what: str) -> None:
        for a, b in zip(got, expected, strict=True):
            if (a is None) != (b is None) or (a is not None and not _close(a, b)):
                raise _Refused(f"its {what} are not those of {self._words()}")

    def _words(self) -> str:
        layer = "norm, ReLU, 1x1, norm, ReLU, 3x3" if len(self.anatomy.parts.convs) == 2 else "norm, ReLU, 3x3"
        return f"{layer}{', dropout' if self.anatomy.drop else ''} and concatenation"


def as_layer(layer: nn.Module, anatomy: Anatomy) -> Layer | BasicLayer:
    """A layer of somebody's own code as the algorithm takes it, as it stands at this call."""
    parts: Any = anatomy.parts
    norms: list[Any] = [part(layer, name) for name in parts.norms]
    weights: list[Any] = [getattr(part(layer, name), "weight", None) for name in parts.convs]
    rate = anatomy.drop_rate(layer)
    if len(norms) == 1:
        return BasicLayer(norm_of(norms[0]), weights[0], rate)
    return Layer(norm_of(norms[0]), weights[0], norm_of(norms[1]), weights[1], rate)


def _close(got: Tensor, expected: Tensor) -> bool:
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    difference = (got - expected).abs().max() if got.is_floating_point() else (got != expected).sum()
    return bool(difference <= _TOLERANCE * expected.abs().max())


def _tensors(block: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for module in block.modules():
        for name, t in (*module._parameters.items(), *module._buffers.items()):
            if t is not None:
                yield module, name, t


def _copy(block: nn.Module, values: list[tuple[Tensor, Tensor]]) -> nn.Module:
    """The block with other values, in float64 on the CPU, without hooks."""
    memo: dict[int, Any] = {}
    for t, value in values:
        memo[id(t)] = nn.Parameter(value.clone()) if isinstance(t, nn.Parameter) else value.clone()
    for module in block.modules():
        for name in _HOOKS:
            memo[id(module.__dict__[name])] = type(module.__dict__[name])()
    return copy.deepcopy(block, memo)
