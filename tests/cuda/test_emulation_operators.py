"""What stands between torch and the GPU's kernels (csrc/ops/cuda.h), over emulated kernels: errors and waiting."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

ILLEGAL_ADDRESS, MEMORY_ALLOCATION = 700, 2  # cudaError_t


@pytest.fixture
def pretend(emulated_operators: SimpleNamespace) -> Iterator[Callable[..., None]]:
    """What the GPU answers from now on: ``pretend(error, capturing, no_memory)``."""
    (path,) = (path for path in torch.ops.loaded_libraries if "emulated" in path)
    library = ctypes.CDLL(path)

    def answer(error: int = 0, capturing: bool = False, no_memory: bool = False) -> None:
        library.dx_pretend(error, ctypes.c_bool(capturing), ctypes.c_bool(no_memory))

    yield answer
    answer()


def stats(ops: SimpleNamespace) -> tuple[Tensor, Tensor]:
    x = torch.arange(12.0).view(4, 3)
    mean, var = torch.zeros(3), torch.zeros(3)
    ops.channel_stats(x, mean, var)
    return mean, var


@pytest.mark.parametrize("error", [0, MEMORY_ALLOCATION])
def test_a_full_memory_is_torchs_own_error(emulated_operators: SimpleNamespace, pretend, error: int) -> None:
    pretend(error, no_memory=True)
    with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. densenet_ext: channel_stats tried .* \d+ b"):
        stats(emulated_operators)
    pretend()
    mean, _ = stats(emulated_operators)
    assert mean.tolist() == [4.5, 5.5, 6.5]


def test_an_earlier_fault_is_no_full_memory(emulated_operators: SimpleNamespace, pretend) -> None:
    pretend(ILLEGAL_ADDRESS, no_memory=True)
    with pytest.raises(RuntimeError, match="channel_stats: no workspace, since a kernel before it failed") as caught:
        stats(emulated_operators)
    assert not isinstance(caught.value, torch.OutOfMemoryError)


def test_a_fault_is_named_where_it_is_made(emulated_operators: SimpleNamespace, pretend, monkeypatch) -> None:
    pretend(ILLEGAL_ADDRESS)
    stats(emulated_operators)  # nobody asks
    monkeypatch.setenv("DENSENET_EXT_SYNC", "1")
    with pytest.raises(RuntimeError, match="densenet_ext: channel_stats: CUDA error"):
        stats(emulated_operators)
    pretend(ILLEGAL_ADDRESS, capturing=True)
    stats(emulated_operators)  # what a graph records cannot be waited for
    pretend(ILLEGAL_ADDRESS)
    monkeypatch.setenv("DENSENET_EXT_SYNC", "0")
    stats(emulated_operators)
