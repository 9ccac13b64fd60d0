"""Trying out what somebody's own code computes, against the formulation that would stand in for it.

Two copies of a module get the same random parameters in float64. One runs its own code, the other's parameters go
through the usual formulation (``reference``), in training, in evaluation and with flags of both kinds mixed; results,
gradients and buffers have to agree. Dropout is replaced by a fixed pattern of factors, so that where values are
dropped, and at which rate, shows in the numbers too. The module itself, the generators of random numbers and the hooks
of its user are not touched.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from densenet_ext.fusing.structure import MEMORY_MODES
from densenet_ext.units.built import plain

_NORM: dict[int, type[nn.Module]] = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_TOLERANCE = 1e-8  # relative, in float64: rounding stays below, any other formula above
_HOOKS = tuple(name for name, value in nn.Module().__dict__.items() if "hook" in name and isinstance(value, dict))

Found = TypeVar("Found")


class Refusal(NamedTuple):
    """Says why no unit computes what a module does, and how far the trial came."""

    reason: str
    stage: str  # "running": it cannot be run; "shape": it returns something else; "values": its numbers are others


class Refused(Exception):
    """Ends a trial with a `Refusal`."""

    def __init__(self, reason: str, stage: str = "values") -> None:
        self.refusal = Refusal(reason, stage)


def attempt(trial: Callable[[], Found]) -> Found | Refusal:
    """Returns what ``trial`` returns, or why it ended; it may use random numbers, and runs in no surrounding mode.

    Hooks that are registered for all modules would be called.
    """
    state = random.getstate()
    try:
        with (
            torch.random.fork_rng(devices=[]),
            torch.inference_mode(False),
            torch.enable_grad(),
            torch.autocast("cpu", enabled=False),
        ):
            return trial()
    except Refused as refused:
        return refused.refusal
    except Exception as error:  # attributes that cannot be copied, parts that are others than they seem
        return Refusal(f"it could not be compared ({type(error).__name__}: {error})", "values")
    finally:
        random.setstate(state)


class Dropped(NamedTuple):
    """A call of dropout."""

    rate: float
    size: int  # channels of what it was given
    channels: bool  # it drops whole channels


class Pattern(TorchFunctionMode):
    """Makes dropout multiply with a fixed pattern; notes its calls, and what runs that no dense block needs.

    Values of one trial say little about code that looks at sizes or at values: so it must run nothing else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Dropped] = []
        self.others: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in _DROPOUTS:
            counter = func is Tensor.__float__ and not args[0].is_floating_point()  # of a norm without momentum
            if func not in _NEEDED and _attribute(func) in _LOOKS and not counter:
                self.others.append(_attribute(func) or getattr(func, "__name__", str(func)))
            return func(*args, **(kwargs or {}))
        if func is torch.feature_dropout:
            (x, p, training), inplace = args, False
        else:
            call = inspect.signature(func).bind(*args, **(kwargs or {}))
            call.apply_defaults()
            x, p, training, inplace = call.arguments.values()
        if not training:
            return x
        channels = func is not F.dropout
        self.calls.append(Dropped(p, x.shape[1], channels))
        factors = _factors(x.new_empty(*x.shape[:2], *[1] * (x.dim() - 2)) if channels else x, p)
        return x.mul_(factors) if inplace else x * factors


def _attribute(func: Any) -> str:
    """Returns the name of the tensor's attribute that ``func`` reads or sets, "" for any other function."""
    kind = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", "") if kind in ("__get__", "__set__") else ""


_LOOKS = frozenset(("", "shape", "data", "grad", "T", "mT", "H", "real", "imag", "nbytes", "itemsize"))
"""Attributes whose value the code may go by; "" stands for all functions."""

_DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, torch.feature_dropout)
_NEEDED = frozenset(
    (
        *(torch.cat, torch.concat, torch.concatenate, F.batch_norm, torch.batch_norm),
        *(F.relu, F.relu_, torch.relu, torch.relu_, Tensor.relu, Tensor.relu_),
        *(F.conv1d, F.conv2d, F.conv3d, torch.conv1d, torch.conv2d, torch.conv3d),
        *(F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, torch.avg_pool1d),
        *(Tensor.dim, Tensor.add_, Tensor.__iadd__, Tensor.contiguous, Tensor.requires_grad_, Tensor.detach),
        *(Tensor.is_floating_point, torch.is_tensor, Tensor.__len__, Tensor.__hash__, Tensor.ndimension, torch._assert),
    )
)
"""What dense blocks and transitions run, norms' counters and checkpoints included."""


def _factors(x: Tensor, p: float) -> Tensor:
    return 1 + p * torch.arange(x.numel(), dtype=x.dtype).sin().view(x.shape)


class Trial:
    """Two copies of ``module``, which takes ``channels`` features of ``dims`` spatial dimensions.

    ``theirs`` runs its own code; the parameters of ``ours`` go through the formulation that ``words`` names.
    ``widths``: how many channels norms and convolutions of the copies take and give, where that is not what they are
    built for. What a module does with its features does not depend on their number, and few are tried out in no time.
    """

    def __init__(
        self,
        module: nn.Module,
        channels: int,
        dims: int,
        spatial: tuple[int, ...],
        widths: Mapping[nn.Module, tuple[int, int]],
    ) -> None:
        self.recomputes = False  # whether its backward pass runs the forward pass again
        self.others: list[str] = []  # what it runs that no unit needs
        self.random = torch.Generator().manual_seed(0)
        self.size = (2, channels, *spatial)
        values = {id(t): self._value(t, owner, name, widths.get(owner)) for owner, name, t in _tensors(module)}
        self.theirs, self.ours = (_copy(module, values) for _ in range(2))
        for inner in (*self.theirs.modules(), *self.ours.modules()):
            if type(inner) is nn.SyncBatchNorm:  # this computes the same in one process, and runs on the CPU
                inner.__class__ = _NORM[dims]  # type: ignore[assignment]
        parameters = inspect.signature(type(module).forward).parameters
        if len(parameters) != 2 or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()):
            raise Refused("it takes more than one tensor")

    def _value(self, t: Tensor, module: nn.Module, name: str, width: tuple[int, int] | None) -> Tensor:
        if not t.is_floating_point():
            return torch.full(t.shape, 3, dtype=t.dtype)
        shape: tuple[int, ...] = tuple(t.shape)
        if width is not None and t.dim() > 0:
            shape = (width[1],) if t.dim() == 1 else (width[1], width[0], *shape[2:])
        value = torch.randn(shape, generator=self.random, dtype=torch.float64)
        if isinstance(module, _BatchNorm) and name in ("weight", "running_var"):
            return value.abs_().add_(0.5)
        return value / max(1, value[0].numel()) ** 0.5 if value.dim() > 1 else value

    @property
    def words(self) -> str:
        """The formulation in words."""
        raise NotImplementedError

    def our_result(self, x: Tensor) -> Tensor:
        """Returns the formulation with the parameters of ``ours``, on ``x`` of ``size``."""
        raise NotImplementedError

    def input(self) -> Tensor:
        """Returns random features [2, channels, *spatial]."""
        return torch.randn(self.size, generator=self.random, dtype=torch.float64)

    def set_training(self, flag: Callable[[int], bool]) -> None:
        """Sets the flag of every module of both copies, given its number."""
        for module in (self.theirs, self.ours):
            for i, inner in enumerate(module.modules()):
                inner.training = flag(i)

    def their_result(self, x: Tensor) -> Tensor:
        """Returns what ``theirs`` gives for ``x``; it must have no other effect than that of its norms."""
        torch_state, python_state = torch.get_rng_state(), random.getstate()
        attributes = [(module, dict(module.__dict__)) for module in self.theirs.modules()]
        given = x.detach().clone()
        try:
            with Pattern() as pattern:
                out = self.theirs(x)
            self.others += pattern.others
        except Exception as error:  # a stranger's code: whatever it raises, the answer is that it is not known
            raise Refused(f"it could not be tried out ({type(error).__name__}: {error})", "running") from None
        if not torch.equal(torch_state, torch.get_rng_state()) or python_state != random.getstate():
            raise Refused("it draws random numbers other than by dropout")
        for module, before in attributes:
            now = module.__dict__
            changed = [name for name in now if name not in before or now[name] is not before[name]]
            if changed:
                raise Refused(f"it changes {', '.join(changed)} of a {type(module).__name__}")
        if not torch.equal(given, x):
            raise Refused("it changes its input")
        if not isinstance(out, Tensor):
            raise Refused(f"it returns a {type(out).__name__}", "shape")
        return out

    def compare(self) -> None:
        """Compares results, buffers and gradients in training and in evaluation; with mixed flags all but gradients."""
        flags = torch.randint(2, (sum(1 for _ in self.ours.modules()),), generator=self.random).tolist()
        self.set_training(lambda i: True)
        self._compare_gradients(*self._compare_values())
        self.set_training(lambda i: False)
        self._compare_gradients(*self._compare_values())
        for inverted in (0, 1):
            self.set_training([flag != inverted for flag in flags].__getitem__)
            self._compare_values()
        self.refuse_others()

    def refuse_others(self) -> None:
        """Raises Refused where ``theirs`` ran what no unit needs, although its values were the same."""
        if self.others:
            names = ", ".join(dict.fromkeys(self.others))
            raise Refused(f"it also runs {names}, on which its values may depend for other inputs")

    def _compare_values(self) -> tuple[Tensor, Tensor, Tensor]:
        x = self.input().requires_grad_()
        got, expected = self.their_result(x), self.our_result(x)
        self._same([got, *self.theirs.buffers()], [expected, *self.ours.buffers()], "values")
        return x, got, expected

    def _compare_gradients(self, x: Tensor, got: Tensor, expected: Tensor) -> None:
        grad = torch.randn(got.shape, generator=self.random, dtype=torch.float64)
        theirs = _gradients(got, x, self.theirs, grad)
        if not all(map(close, self.theirs.buffers(), self.ours.buffers())):
            self.recomputes = True  # a checkpoint's second forward pass moves running statistics once more
            self.forget_statistics()
        self._same(theirs, _gradients(expected, x, self.ours, grad), "gradients")

    def forget_statistics(self) -> None:
        """Gives ``theirs`` the buffers of ``ours``."""
        with torch.no_grad():
            for buffer, other in zip(self.theirs.buffers(), self.ours.buffers(), strict=True):
                buffer.copy_(other)

    def _same(self, got: Any, expected: Any, what: str) -> None:
        for a, b in zip(got, expected, strict=True):
            if (a is None) != (b is None) or (a is not None and not close(a, b)):
                raise Refused(f"its {what} are not those of {self.words}")


def close(got: Tensor, expected: Tensor) -> bool:
    """Returns whether both are the same but for rounding."""
    if got.shape != expected.shape or got.dtype != expected.dtype:
        return False
    difference = (got - expected).abs().max() if got.is_floating_point() else (got != expected).sum()
    return bool(difference <= _TOLERANCE * expected.abs().max())


def _gradients(out: Tensor, x: Tensor, module: nn.Module, grad: Tensor) -> list[Tensor | None]:
    """Returns those of ``x`` and every parameter; by backward(), since not every checkpoint can be asked for them."""
    leaves = [x, *module.parameters()]
    for leaf in leaves:
        leaf.grad = None
    with Pattern():
        out.backward(grad)
    return [leaf.grad for leaf in leaves]


def _tensors(module: nn.Module) -> Iterator[tuple[nn.Module, str, Tensor]]:
    for owner in module.modules():
        for name, t in (*owner._parameters.items(), *owner._buffers.items()):
            if t is not None:
                yield owner, name, t


def _copy(module: nn.Module, values: Mapping[int, Tensor]) -> nn.Module:
    """Returns the module with other values, in float64 on the CPU, without hooks and without its own memory mode.

    By hand, since ``copy.deepcopy`` takes most of a trial's time; what is no module, tensor or plain value it copies.
    """
    memo: dict[int, Any] = {}

    def tensor(t: Tensor | None) -> Any:
        if t is not None and id(t) not in memo:
            value = values[id(t)].clone()
            memo[id(t)] = nn.Parameter(value) if isinstance(t, nn.Parameter) else value
        return None if t is None else memo[id(t)]

    def twin(inner: nn.Module) -> nn.Module:
        if id(inner) in memo:
            return memo[id(inner)]
        found: nn.Module = object.__new__(type(inner))
        memo[id(inner)] = found
        for name, value in inner.__dict__.items():
            if name.startswith("__"):
                continue  # what fully_shard remembers; the hooks that ask for it are left out as well
            if name in _HOOKS:
                value = type(value)()
            elif name in ("_parameters", "_buffers"):
                value = type(value)((key, tensor(t)) for key, t in value.items())
            elif name == "_modules":
                value = type(value)((key, None if child is None else twin(child)) for key, child in value.items())
            elif name in MEMORY_MODES and value is True:
                value = False
            elif name != "process_group" and not plain(value):
                value = copy.deepcopy(value, memo)
            found.__dict__[name] = value
        _set_widths(found)
        return found

    return twin(module)


def _set_widths(module: nn.Module) -> None:
    weight = module._parameters.get("weight")
    if weight is not None and isinstance(module, _ConvNd):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
    elif isinstance(module, _BatchNorm):
        known = [t for t in (weight, module._buffers.get("running_mean")) if t is not None]
        module.num_features = known[0].shape[0] if known else module.num_features
