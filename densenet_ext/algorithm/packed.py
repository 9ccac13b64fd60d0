"""Convolution weights whose packed forms operations keep, because somebody says that they stay what they are.

A kernel reads weights in an order of its own, or transformed (Winograd), and packs them so at every call. What is
packed can only be kept by who knows of every change. A tensor's version tells of those that autograd sees; writes
through ``.data`` or through NumPy it doesn't.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.kept import Kept


class _Weight:
    """A weight, and its packed form as the operations know it."""

    def __init__(self, weight: Tensor) -> None:
        self.weight, self.holders = weight, 0
        self.lowered: dict[torch.dtype, Tensor] = {}
        """It as autocast would cast it, by dtype."""
        self.pack_again()

    def pack_again(self) -> None:
        """Has the next call pack the weight as it is now."""
        ops = kernels.select(self.weight)
        self.lowered.clear()
        # An alias: packed forms are found by address, which nobody else may get when the weight is given other memory.
        self.version, self._kept = self.weight._version, Kept(ops, ops.keep_packed([self.weight.detach()]))


_weights: dict[int, _Weight] = {}
_lock = threading.Lock()  # of the workspaces, which threads that call add while another releases weights
_workspaces: weakref.WeakSet[Freed] = weakref.WeakSet()
_changes = 0
"""How often somebody has held or released weights."""


def hold(weights: Iterable[Tensor]) -> list[Tensor]:
    """Has the packed forms of ``weights`` kept until they are released; returns those for which there are any."""
    global _changes
    held = [weight for weight in weights if _can_be_kept(weight)]
    for weight in held:
        if id(weight) not in _weights:
            _weights[id(weight)] = _Weight(weight)
        _weights[id(weight)].holders += 1
    _changes += 1
    return held


def release(weights: Iterable[Tensor]) -> None:
    """Drops the packed forms of ``weights``, which were held, unless somebody else holds them."""
    global _changes
    for weight in weights:
        own = _weights[id(weight)]
        own.holders -= 1
        if own.holders == 0:
            del _weights[id(weight)]
    _changes += 1  # behind what has changed: who sees the number sees that as well
    with _lock:
        freed = list(_workspaces)
        _workspaces.clear()
    for workspace in freed:
        workspace.free()


def changes() -> int:
    """Returns a number that is another one whenever somebody has held or released weights."""
    return _changes


class Freed(Protocol):
    """Memory that is kept while weights are held."""

    def free(self) -> None:
        """Gives it back."""


def free_at_release(workspace: Freed) -> None:
    """Has memory given back as soon as somebody releases weights; whoever still needs it makes it anew."""
    with _lock:
        _workspaces.add(workspace)


class Held:
    """Those of a unit's ``weights`` of which operations may keep packed forms, call after call."""

    def __init__(self, weights: Sequence[Tensor | None]) -> None:
        self._weights = weights
        self._seen = -1  # of _changes
        self._held: list[Tensor] = []
        self._versions: list[int] = []

    def any(self) -> bool:
        """Returns whether there are any; sees to it that the packed forms are right."""
        if self._seen != _changes:
            seen = _changes
            self._held = [weight for weight in self._weights if weight is not None and id(weight) in _weights]
            self._seen, self._versions = seen, []
        versions = [weight._version for weight in self._held]
        if versions != self._versions:
            # looked up: whoever releases a weight frees it, in another thread perhaps
            for own in map(_weights.get, map(id, self._held)):
                if own is not None and own.version != own.weight._version:
                    own.pack_again()
            self._versions = versions
        return bool(self._held)


def are_held(weights: Sequence[Tensor | None]) -> bool:
    """Returns whether operations may keep packed forms of any of ``weights``; sees to it that they are right."""
    return bool(_weights) and Held(weights).any()


def lowered(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Returns a held weight in ``dtype``, cast once until its version changes; None for one that nobody holds."""
    own = _weights.get(id(weight))
    if own is None:
        return None
    if own.version != weight._version:
        own.pack_again()
    found = own.lowered.get(dtype)
    if found is None:
        found = own.lowered[dtype] = weight.detach().to(dtype)
    return found


def _can_be_kept(weight: Tensor) -> bool:
    # a GPU's kernels read weights as they are; tensors made under inference_mode have no version
    return weight.is_cpu and kernels.select(weight) is not kernels.plain and not weight.is_inference()
