"""Threads that stay together for a block: any number of them, several blocks at once, a pool that has fewer."""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_ext import _extension
from densenet_ext.algorithm.basic_block import basic_block
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.values import BasicLayer
from tests.support.helpers import make_conv, make_layers

pytestmark = pytest.mark.skipif(_extension.module is None, reason="without the compiled part")

BLOCKS: dict[str, Callable[..., Any]] = {"dense": dense_block, "basic": basic_block}


@pytest.fixture(autouse=True)
def threads() -> Iterator[None]:
    """Sets the number of PyTorch's threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def made(kind: str) -> Callable[[int], list[Tensor]]:
    """A block that is work for eight threads: gives its output and gradients, on so many threads."""
    torch.manual_seed(0)
    layers: Any = make_layers(24, 16, 48, 3)
    if kind == "basic":
        layers = [
            BasicLayer(layer.norm1, make_conv(16, layer.conv1.shape[1], 2, 3, torch.float64), 0.0) for layer in layers
        ]
    weights = [layer.conv if kind == "basic" else layer.conv1 for layer in layers]
    x = torch.randn(4, 24, 24, 24, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(4, 72, 24, 24, dtype=torch.float64)

    def run(threads: int) -> list[Tensor]:
        torch.set_num_threads(threads)
        out = BLOCKS[kind](x, layers)[0]
        return [out, *torch.autograd.grad(out, [x, *weights], grad)]

    return run


@pytest.mark.parametrize("kind", BLOCKS)
def test_any_number_of_threads_gives_the_same(kind: str) -> None:
    run = made(kind)
    expected = run(1)
    for count in (2, 3, 8):
        for a, b, c in zip(run(count), run(count), expected, strict=True):
            assert torch.equal(a, b), count
            torch.testing.assert_close(a, c, rtol=1e-9, atol=1e-9)


def test_several_blocks_run_at_once() -> None:
    runs = {kind: made(kind) for kind in BLOCKS}
    expected = {kind: run(2) for kind, run in runs.items()}
    failed: list[str] = []

    def work(kind: str) -> None:
        for _ in range(10):
            if not all(map(torch.equal, runs[kind](2), expected[kind])):
                failed.append(kind)

    workers = [threading.Thread(target=work, args=(kind,)) for kind in BLOCKS]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failed


PROGRAM = """
import sys, torch
from tests.algorithm.test_block_threads import made
torch.save(made("dense")(4), sys.argv[1])
"""


def test_a_pool_of_fewer_threads_than_were_asked_for(tmp_path: Any) -> None:
    file = tmp_path / "results.pt"
    limited = {**os.environ, "OMP_THREAD_LIMIT": "2"}
    subprocess.run([sys.executable, "-c", PROGRAM, str(file)], env=limited, check=True, timeout=120)
    assert all(map(torch.equal, torch.load(file), made("dense")(4)))


@pytest.fixture
def openmp() -> ctypes.CDLL:
    """The library of threads that PyTorch has loaded."""
    loaded = Path("/proc/self/maps").read_text() if Path("/proc/self/maps").exists() else ""
    found = re.search(r"/\S*/libg?i?omp[^/\s]*\.so\S*", loaded)
    if found is None:
        pytest.skip("PyTorch's threads are not OpenMP's, or it is not known where that lies")
    return ctypes.CDLL(found[0])


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_pool_without_further_threads(openmp: ctypes.CDLL, kind: str) -> None:
    """Four are asked for and one comes: the threads do not wait for one another, and the parts are the same ones."""
    run = made(kind)
    expected = run(4)
    levels = openmp.omp_get_max_active_levels()
    openmp.omp_set_max_active_levels(0)
    try:
        got = run(4)
        assert torch.get_num_threads() == 4
    finally:
        openmp.omp_set_max_active_levels(levels)
    assert all(map(torch.equal, got, expected))
    assert all(map(torch.equal, run(4), expected))  # and together again


@pytest.mark.parametrize("kind", BLOCKS)
def test_a_block_inside_of_another_parallel_region(openmp: ctypes.CDLL, kind: str) -> None:
    """There PyTorch's pool does all of it in the thread that asks."""
    run = made(kind)
    expected, got, inside = run(4), [], []

    @ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    def body(_: object) -> None:
        if openmp.omp_get_thread_num() == 0:
            inside.append(openmp.omp_in_parallel())
            got.extend(run(4))

    openmp.GOMP_parallel(body, None, 2, 0)
    assert inside == [1]
    assert len(got) == len(expected) and all(map(torch.equal, got, expected))
