"""CUDA graphs on the processor: a stand-in for torch.cuda's streams and graphs, for code that needs a GPU.

A capture runs its operations once, notes each with the very tensors that it reads and writes, and then puts back
whatever they changed, as capturing on a GPU runs nothing. A replay runs them again on the same tensors. So a batch that
is not copied into the captured tensors has no effect, as on a GPU, and reading a value during a capture is an error.
What else only CUDA refuses is not seen. Tensors that operators were given once (densenet_ext.algorithm.kept) count as
those of every call that names them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from densenet_ext import kernels

_KEEPS = [getattr(kernels.select(torch.empty(0)), name, None) for name in kernels.KEPT_OPS]
_kept: dict[int, list[Tensor]] = {}


class Graph:
    """In the place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def replay(self) -> None:
        with torch.no_grad():
            for function, args, kwargs, noted in self.calls:
                for new, old in zip(_tensors(function(*args, **kwargs)), _tensors(noted), strict=True):
                    if _memory(new) != _memory(old):
                        old.copy_(new)


class _Notes(TorchDispatchMode):
    """Notes operations in a graph, and the contents of everything that was there before."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph = graph
        self.made: set[int] = set()
        self.before: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a value is read during a capture")
        if func in _KEEPS:  # no work of the device
            return func(*args, **(kwargs or {}))
        named = [_kept.get(leaf, []) for leaf in tree_leaves((args, kwargs)) if type(leaf) is int]
        for tensor in _tensors((args, kwargs, named)):
            if _memory(tensor) not in {*self.made, *self.before}:
                self.before[_memory(tensor)] = (tensor.detach(), tensor.detach().clone())
        out = func(*args, **(kwargs or {}))
        self.made.update({_memory(tensor) for tensor in _tensors(out)} - set(self.before))
        self.graph.calls.append((func, args, kwargs or {}, out))
        return out


@contextlib.contextmanager
def capture(graph: Graph, pool: object = None, **settings: object) -> Iterator[None]:
    """In the place of torch.cuda.graph, to which each torch passes other settings."""
    notes = _Notes(graph)
    with notes:
        yield
    for tensor, contents in notes.before.values():
        tensor.copy_(contents)


class Stream:
    """In the place of torch.cuda.Stream: here everything runs in order."""

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Puts the stand-ins in torch.cuda's place, and lets capturable optimizers take tensors of the processor."""
    for name, stand_in in {
        "CUDAGraph": Graph,
        "graph": capture,
        "Stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": Stream,
        "synchronize": lambda: None,
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    ops = kernels.select(torch.empty(0))
    for name in ("keep_layers", "keep_norms"):
        if hasattr(ops, name):
            monkeypatch.setattr(ops, name, _remembering(getattr(ops, name)))
    if hasattr(ops, "drop_kept"):
        monkeypatch.setattr(ops, "drop_kept", lambda number: None)  # a replay names them again
    monkeypatch.setattr(torch.cuda.graphs, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(sys.modules["torch.optim.adam"], "_get_capturable_supported_devices", lambda: ["cpu"])


def _remembering(keep: Any) -> Any:
    def remembering(*args: Any) -> int:
        number = keep(*args)
        _kept[number] = _tensors(args)
        return number

    return remembering


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
