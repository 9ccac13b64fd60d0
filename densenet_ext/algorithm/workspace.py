"""Memory of calls that follow one another, kept from one time to the next while somebody holds their weights.

What a process frees at the end of an inference Linux takes back, and gives it again at the next page by page, each of
them cleared: 26,000 times for 16 images of DenseNet-121, a twentieth of their time. A little is kept in any case: one
small image takes fourteen pieces of memory, which are a hundredth of its time.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from densenet_ext.algorithm import packed
from densenet_ext.algorithm.inference import Call, Made

_LINE = 64  # bytes


class Memory:
    """What the workspaces of one Sequential share: as much as the largest needed, for one thread at a time.

    ``little``: so many bytes a workspace keeps whether weights are held or not.
    """

    def __init__(self, little: int = 0) -> None:
        self.little = little
        self.lock = threading.Lock()
        self._change = threading.RLock()  # weights are released by any thread
        self._bytes: Tensor | None = None
        self._users: weakref.WeakSet[Workspace] = weakref.WeakSet()

    def of(self, user: Workspace, count: int) -> Tensor:
        """Returns so many bytes, which ``user`` has until it is told to forget them; all workspaces get the same."""
        with self._change:
            if self._bytes is None or self._bytes.numel() < count:
                self.free()
                with torch.inference_mode(False), torch.no_grad():
                    self._bytes = torch.empty(count, dtype=torch.uint8, device="cpu")
                packed.free_at_release(self)
            self._users.add(user)
            return self._bytes

    def free(self) -> None:
        """Gives the memory back."""
        with self._change:
            self._bytes = None
            for user in list(self._users):
                user.forget()
            self._users.clear()


class Workspace:
    """The tensors that ``calls`` make, each call the input of the next, but for the last one's result.

    A result lives until the next call has read it, the other tensors of a call as long as it runs.
    """

    def __init__(self, calls: Sequence[Call], memory: Memory) -> None:
        self._calls, self._memory = calls, memory
        self._tensors: list[list[Tensor]] | None = None  # of each call, without the last one's result
        self._seen, self._holds = -1, False  # of packed.changes; whether some of the weights were held then
        self._on_cpu = calls[0].makes[0].device.type == "cpu"  # an allocator of GPUs keeps memory by itself
        self._needs_little = self._on_cpu and sum(self._sizes()) <= memory.little

    def run(self, x: Tensor) -> Tensor:
        """Returns the last call's result for x."""
        mine = self._memory.lock.acquire(blocking=False)
        try:
            if not mine or not (self._needs_little or self._are_held()):
                for call in self._calls:
                    x = call(x)
                return x
            tensors = self._tensors
            if tensors is None:
                tensors = self._tensors = self._make()
            tensors = [*tensors[:-1], [self._calls[-1].makes[0].empty(), *tensors[-1]]]
            for call, made in zip(self._calls, tensors, strict=True):
                call.compute(x, *made)
                x = made[0]
            return x
        finally:
            if mine:
                self._memory.lock.release()

    def forget(self) -> None:
        """Drops the tensors, whose memory goes to somebody else."""
        self._tensors = None

    def _are_held(self) -> bool:
        """Returns whether weights are held."""
        if self._seen != packed.changes():
            seen = packed.changes()
            self._holds = self._on_cpu and any(call.held is not None and call.held.any() for call in self._calls)
            self._seen = seen
            if not self._holds:  # what was made while another thread released
                self._memory.free()
                self.forget()
        return self._holds

    def _sizes(self) -> tuple[int, int, int]:
        """The bytes of the results, of which two live at a time, in turns; and of the other tensors of a call."""
        results = [call.makes[0] for call in self._calls[:-1]]
        even, odd = (max(map(_bytes, results[turn::2]), default=0) for turn in (0, 1))
        return even, odd, max(sum(map(_bytes, call.makes[1:])) for call in self._calls)

    def _make(self) -> list[list[Tensor]]:
        even, odd, others = self._sizes()
        memory = self._memory.of(self, even + odd + others)
        found = []
        with torch.inference_mode(False), torch.no_grad():
            for i, call in enumerate(self._calls):
                last = i == len(self._calls) - 1
                tensors = [] if last else [_at(memory, i % 2 * even, call.makes[0])]
                offset = even + odd
                for each in call.makes[1:]:
                    tensors.append(_at(memory, offset, each))
                    offset += _bytes(each)
                found.append(tensors)
        return found


def _bytes(made: Made) -> int:
    """Its bytes, up to the next line of the caches."""
    return -(-prod(made.size) * made.dtype.itemsize // _LINE) * _LINE


def _at(memory: Tensor, offset: int, made: Made) -> Tensor:
    part = memory[offset : offset + prod(made.size) * made.dtype.itemsize]
    return part.view(made.dtype).as_strided(tuple(made.size), tuple(made.stride))
