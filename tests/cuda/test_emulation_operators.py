"""What stands between torch and the GPU's kernels (csrc/ops/cuda.h), over emulated kernels: errors, waiting, and how
much a block asks of the host."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from densenet_ext.algorithm.block import dense_block
from tests.support.helpers import make_input, make_layers

ILLEGAL_ADDRESS, MEMORY_ALLOCATION = 700, 2  # cudaError_t


@pytest.fixture
def library(emulated_operators: SimpleNamespace) -> ctypes.CDLL:
    """The library that the operators lie in."""
    (path,) = (path for path in torch.ops.loaded_libraries if "emulated" in path)
    return ctypes.CDLL(path)


@pytest.fixture
def pretend(library: ctypes.CDLL) -> Iterator[Callable[..., None]]:
    """What the GPU answers from now on: ``pretend(error, capturing, no_memory)``."""

    def answer(error: int = 0, capturing: bool = False, no_memory: bool = False) -> None:
        library.dx_pretend(error, ctypes.c_bool(capturing), ctypes.c_bool(no_memory))

    yield answer
    answer()


def stats(ops: SimpleNamespace) -> tuple[Tensor, Tensor]:
    x = torch.arange(2400.0).view(800, 3)  # of several slabs: with fewer rows it needs no workspace
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
    assert mean.tolist() == [1198.5, 1199.5, 1200.5]


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


def launches_of_backward(library: ctypes.CDLL, count: int, conv2: bool) -> int:
    """How many kernels the gradients of a block of ``count`` layers take; with those of the 3x3 convolutions or not."""
    layers = make_layers(count=count, dtype=torch.float32)
    inputs = [t for layer in layers for t in (*layer.norm1[:2], layer.conv1, *layer.norm2[:2])]
    inputs += [layer.conv2 for layer in layers] if conv2 else []
    out, _ = dense_block(make_input(2, 5, 4, 4, dtype=torch.float32), layers)
    before = library.dx_launches()
    torch.autograd.grad(out.sum(), inputs)
    return library.dx_launches() - before


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
def test_the_gradient_of_a_3x3_weight_takes_no_kernel_of_its_own(backend: str, library: ctypes.CDLL) -> None:
    """relu(bn2(z)), which it needs, comes out of the kernel that takes norm2's sums."""
    for count in (1, 3):
        assert launches_of_backward(library, count, conv2=True) == launches_of_backward(library, count, conv2=False)


@pytest.mark.parametrize("backend", ["emulated"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_3x3_weights_are_copied_once_for_all_layers(backend: str, library: ctypes.CDLL, dtype: torch.dtype) -> None:
    """Into the features' dtype and channels_last, and their gradients back: not by a copy for each layer."""

    def calls() -> Counter[str]:
        names = ("convolution", "convolution_backward", "copy_", "to", "contiguous")
        return Counter({name: library.dx_torch_calls(f"aten::{name}".encode()) for name in names})

    def asked_for(count: int) -> tuple[Counter[str], Counter[str]]:
        layers = make_layers(count=count, dtype=torch.float32)
        x = make_input(2, 5, 4, 4, dtype=dtype)
        before = calls()
        out, _ = dense_block(x, layers)
        between = calls()
        torch.autograd.grad(out.sum(), [x, *(t for layer in layers for t in (layer.conv1, layer.conv2))])
        return between - before, calls() - between

    (forward, backward), (more_forward, more_backward) = asked_for(1), asked_for(3)
    assert more_forward - forward == Counter(convolution=2)
    assert more_backward - backward == Counter(convolution_backward=4)
