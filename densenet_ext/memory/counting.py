"""Counts bytes while code runs: what autograd saves, and what is allocated at any time.

A storage is known by its Python object, which lives as long as the storage does, and not by its address: tensors
without data have none. So the same counting serves real tensors and those of ``FakeTensorMode``.

``torch.distributed._tools.mem_tracker`` cannot stand here: its hooks on all modules make every unit run unfused.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.weak import WeakIdKeyDictionary


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Returns the bytes of the storages of ``tensors``, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum(storage.nbytes() for storage in {id(storage): storage for storage in storages}.values())


def _known(tensors: Iterable[Tensor]) -> Any:
    """Returns the storages of ``tensors``, as weak keys: a storage that is freed leaves its id to another."""
    return WeakIdKeyDictionary({tensor.untyped_storage(): True for tensor in tensors})


class SavedBytes(saved_tensors_hooks):
    """Counts, inside its ``with``, the storages that autograd saves for the backward pass, each once.

    ``leave_out``: tensors that exist anyway (parameters, buffers, the input). ``by_owner`` has the bytes under the name
    that was given last to `own` when a storage was first saved, None before. What a ``torch.utils.checkpoint``
    region holds is not seen.
    """

    def __init__(self, leave_out: Iterable[Tensor] = ()) -> None:
        super().__init__(self._pack, _unpack)
        self._seen: Any = _known(leave_out)
        self._owner: str | None = None
        self.by_owner: Counter[str | None] = Counter()

    def own(self, name: str) -> None:
        """Storages that are saved from now on count as those of ``name``."""
        self._owner = name

    @property
    def total(self) -> int:
        """Bytes saved so far."""
        return sum(self.by_owner.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage not in self._seen:
            self._seen[storage] = True
            self.by_owner[self._owner] += storage.nbytes()
        # A node that holds its own output by way of a hook would never be freed; what has no node can't.
        return tensor if tensor.grad_fn is None else tensor.detach()


def _unpack(tensor: Tensor) -> Tensor:
    return tensor


class Allocations:
    """Follows the storages that operations make, until they are freed: those of the tensors that it is told of.

    ``timeline``: the bytes held after each new storage, over what was held at the start.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        self._known: Any = _known(existing)
        self._held = 0
        self.timeline: list[int] = []

    def note(self, tensor: Tensor) -> None:
        """Notes the storage of an operation's result, unless it was there before."""
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = storage.nbytes()
        self._known[storage] = True
        self._held += size
        self.timeline.append(self._held)
        weakref.finalize(storage, self._free, size).atexit = False

    def _free(self, size: int) -> None:
        self._held -= size
