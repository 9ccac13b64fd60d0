"""Runs a model without data: a copy of it in a ``FakeTensorMode``, in which tensors have shapes and no memory.

The fused units run as they do with data, compiled operations doing nothing: what they allocate and save is the same.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densenet_ext import checks
from densenet_ext.memory.counting import Allocations, SavedBytes, storage_bytes
from densenet_ext.memory.shapes import ShapesMode
from densenet_ext.units.parts import Probe

REFUSALS = (RuntimeError, ValueError, TypeError, IndexError)
"""What models and PyTorch raise on a shape that they do not take."""

LOW_PRECISION = (torch.bfloat16, torch.float16)


class Step(NamedTuple):
    """Bytes of a training step without its optimizer."""

    saved: SavedBytes  # of the forward pass
    standing: int  # parameters, buffers and the input
    timeline: list[int]  # what is held besides, after each allocation of forward and backward pass


class _NormStatistics(TorchDispatchMode):
    """Gives the statistics that a norm saves the dtype of its parameters, where those without data have the input's."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.native_batch_norm.default:
            like = next((parameter for parameter in args[1:5] if parameter is not None), args[0])
            result = (result[0], *(statistic.to(like.dtype) for statistic in result[1:]))
        return result


class DryRun:
    """A copy of ``model`` without data, in ``dtype``: under autocast where that is 16 bits wide and the model is not.

    Hooks of the model are copied and called, with tensors that have no data; a model on the meta device is planned as
    on the CPU.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype | None = None) -> None:
        own = parameter_dtype(model)
        self.dtype = own if dtype is None else dtype
        self.autocast = self.dtype in LOW_PRECISION and own == torch.float32
        self._mode = ShapesMode()
        with self._mode:
            memo = {id(tensor): self._without_data(tensor) for tensor in _tensors(model)}
        self.model = copy.deepcopy(model, memo)

    def _without_data(self, tensor: Tensor) -> Tensor:
        device = torch.device("cpu") if tensor.device.type == "meta" else tensor.device
        dtype = self.dtype if tensor.is_floating_point() and not self.autocast else tensor.dtype
        empty = self._mode.empty(tensor.shape, tensor.stride(), dtype, device)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    def forward(self, input_shape: Sequence[int], owners: Sequence[str] = ()) -> SavedBytes:
        """Returns what a forward pass on a batch of ``input_shape`` saves. Raises what the model raises on it.

        ``owners``: names of submodules in the order in which they run. What is saved from the entry into one of them on
        counts as its own, until the next; before the first, and after the last, as None's and as ""'s.
        """
        with self._mode, _unlogged():
            x = self._input(input_shape)
            saved = SavedBytes((x, *self._state()))
            handles = []
            for name in owners:
                module = self.model.get_submodule(name)
                handles.append(module.register_forward_pre_hook(Probe(partial(saved.own, name))))
            if owners:
                handles.append(module.register_forward_hook(Probe(partial(saved.own, ""))))
            try:
                self._run(x, saved)
            finally:
                for handle in handles:
                    handle.remove()
        return saved

    def step(self, input_shape: Sequence[int]) -> Step:
        """Runs a forward pass and a backward pass from every output. Raises what the model raises on such a batch."""
        with self._mode, _unlogged():
            x = self._input(input_shape)
            state = (x, *self._state())
            saved = SavedBytes(state)
            allocations = Allocations(state)
            with self._mode.telling(allocations.note):
                outputs = self._run(x, saved)
                torch.autograd.backward(outputs, [torch.ones_like(output) for output in outputs])
            for parameter in self.model.parameters():
                parameter.grad = None
            return Step(saved, storage_bytes(state), allocations.timeline)

    def _state(self) -> list[Tensor]:
        return [*self.model.parameters(), *self.model.buffers()]

    def _input(self, shape: Sequence[int]) -> Tensor:
        dtype = torch.float32 if self.autocast else self.dtype
        return torch.empty(tuple(shape), dtype=dtype, device=parameter_device(self.model))

    def _run(self, x: Tensor, saved: SavedBytes) -> list[Tensor]:
        # where all are of one dtype there is nothing to give, and a mode costs
        statistics = _NormStatistics() if self.autocast else nullcontext()
        with torch.enable_grad(), self._autocast(x.device.type), saved, warnings.catch_warnings(), statistics:
            warnings.simplefilter("ignore")
            outputs = tree_leaves(self.model(x))
        return [output for output in outputs if isinstance(output, Tensor) and output.requires_grad]

    def _autocast(self, kind: str) -> AbstractContextManager[object]:
        return torch.autocast(kind, dtype=self.dtype) if self.autocast else nullcontext()


@contextmanager
def _unlogged() -> Iterator[None]:
    """Keeps ``FakeTensorMode`` from logging the errors that it raises: the caller tells them in a sentence."""

    def is_no_error(record: logging.LogRecord) -> bool:
        return record.exc_info is None

    log = logging.getLogger(FakeTensorMode.__module__)
    log.addFilter(is_no_error)
    try:
        yield
    finally:
        log.removeFilter(is_no_error)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    """Yields parameters, buffers, and what else hangs on a module, as a pruned weight does."""
    for module in model.modules():
        for values in (module._parameters, module._buffers, module.__dict__):
            yield from (value for value in values.values() if isinstance(value, Tensor))


def parameter_dtype(model: nn.Module) -> torch.dtype:
    """Returns the dtype of the first floating-point parameter; torch's default where there is none."""
    found = (parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    return next(found, torch.get_default_dtype())


def parameter_device(model: nn.Module) -> torch.device:
    """Returns the device of the first parameter, the CPU where there is none."""
    return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))


def refused(shape: Sequence[int], error: Exception) -> ValueError:
    """Returns what the model said about a batch of ``shape``, in one line that names the argument."""
    words = str(error).strip().splitlines() or [type(error).__name__]
    return ValueError(f"input_shape: the model does not take {list(shape)}: {words[0]}")


def checked_shape(shape: Any) -> tuple[int, ...]:
    """Returns ``shape`` as a tuple. Raises TypeError or ValueError that names ``input_shape`` when it is no batch's."""
    expected = "[N, C, *spatial] of 1 to 3 spatial dimensions"
    if isinstance(shape, (str, bytes)) or not isinstance(shape, Sequence):
        raise TypeError(f"input_shape: expected {expected}, got {shape!r}")
    if not 3 <= len(shape) <= 5:
        raise ValueError(f"input_shape: expected {expected}, got {list(shape)}")
    return tuple(checks.integer(f"input_shape[{i}]", n, 1) for i, n in enumerate(shape))
