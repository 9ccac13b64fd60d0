"""Calls in evaluation without gradients: what one call finds out serves the next one on features of the same form.

A small network is served in two or three milliseconds, and to find the same dtypes, sizes and operations at every call
took a third of them. A prepared call allocates, and runs the unit's compiled operation.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.conversions import without_autocast
from densenet_ext.algorithm.packed import Held
from densenet_ext.checks import autocast_enabled

_MOST = 16  # forms for each unit: who serves images of every size gains nothing


class Form(NamedTuple):
    """What a call depends on beside a unit and the values of tensors."""

    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    lowered: torch.dtype | None  # autocast's dtype where it is on
    ops: int  # which operations compute: of kernels.select, whose namespaces live as long as the process


def form_of(x: Tensor) -> Form | None:
    """Returns the form of a call on features x; None where calls are not repeated: with gradients, or in compiled code,
    or on tensors of another kind."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or type(x) is not Tensor:
        return None
    kind = x.device.type
    lowered = torch.get_autocast_dtype(kind) if autocast_enabled(kind) else None
    return Form(x.shape, x.stride(), x.dtype, x.device, lowered, id(kernels.select(x)))


class Made(NamedTuple):
    """A tensor that a call makes, uninitialised."""

    size: Sequence[int]
    stride: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def like(cls, x: Tensor) -> Made:
        """Returns one of the form of x, which has no gaps."""
        return cls(x.shape, x.stride(), x.dtype, x.device)

    def empty(self) -> Tensor:
        """Makes it."""
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class Call:
    """A unit's call on features of one form: ``compute(x, *made)`` fills the tensors that it ``makes``.

    The first of them is the result; nobody needs the others afterwards. ``held``: the unit's weights.
    """

    def __init__(self, compute: Callable[..., None], *makes: Made, held: Held | None = None) -> None:
        self.compute, self.makes, self.held = compute, makes, held

    def __call__(self, x: Tensor) -> Tensor:
        made = [each.empty() for each in self.makes]
        self.compute(x, *made)
        return made[0]


class Inferences:
    """The prepared calls of one unit, as long as its parameters and settings are the same: who has this sees to it.

    A call is prepared for a form and a ``key``, what else the unit was asked. It has to run without autocast.
    """

    def __init__(self) -> None:
        self._known: dict[Hashable, Call] = {}

    def find(self, x: Tensor, key: Hashable = None) -> Call | None:
        """Returns the call for features like ``x``, or None where there is none."""
        return self._known.get((form_of(x), key)) if self._known else None

    def run(self, x: Tensor, key: Hashable = None) -> Tensor | None:
        """Returns the unit's result for ``x``, or None where no call is prepared for it."""
        call = self.find(x, key)
        if call is None:
            return None
        with without_autocast(x.device.type):
            return call(x)

    def keep(self, x: Tensor, prepare: Callable[[], Call | None], key: Hashable = None) -> None:
        """Keeps the call that ``prepare`` gives for features like ``x``, where such calls can be repeated."""
        form = form_of(x)
        call = None if form is None else prepare()
        if call is None:
            return
        if len(self._known) >= _MOST:
            self._known.clear()
        self._known[form, key] = call
