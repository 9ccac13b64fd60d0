"""Small calls of the emulated kernels that raise when something is wrong; mutation_list.py has what they must see."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from . import compare, conv1x1, unmerged
from .library import Library

Case = Callable[[Library], None]


@contextmanager
def device(multiprocessors: int = 2, shared: int = 227) -> Iterator[None]:
    """A small GPU (csrc/cuda/limits.h): so many multiprocessors, and KiB of shared memory for a block."""
    os.environ["DENSENET_EXT_TEST_MULTIPROCESSORS"] = str(multiprocessors)
    os.environ["DENSENET_EXT_TEST_SHARED"] = str(shared * 1024)
    yield
    del os.environ["DENSENET_EXT_TEST_MULTIPROCESSORS"], os.environ["DENSENET_EXT_TEST_SHARED"]


def forward(kernels: Library) -> None:
    with device():
        conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 300, 200, 100, orders=(5,))


def forward_streamed(kernels: Library) -> None:
    with device(shared=163):
        conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 300, 450, 100)


def forward_tf32(kernels: Library) -> None:
    with device():
        conv1x1.run_forward(kernels, *conv1x1.use("tf32"), 150, 40, 30, bias=True, stats=False)


def forward_of_96_channels(kernels: Library) -> None:
    with device():
        conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 300, 72, 192)


def forward_unaligned(kernels: Library) -> None:
    for pitch, offset in ((44, 4), (45, 1)):
        conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 35, 36, 22, pitch, offset)


def forward_odd(kernels: Library) -> None:
    conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 35, 36, 24, 40, 0)


def backward(kernels: Library) -> None:
    with device():
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 200, 136, 104, into="accumulate", orders=(5,))


def backward_of_many_channels(kernels: Library) -> None:
    with device():
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 150, 40, 150)


def backward_in_two_runs(kernels: Library) -> None:
    with device(shared=163):  # which has no room for a tile of 192 channels
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 150, 40, 150)


def backward_in_turns(kernels: Library) -> None:
    with device(shared=163):
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 150, 40, 152, wgrad=False)


def backward_streamed(kernels: Library) -> None:
    with device(shared=99):
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 150, 40, 330, wgrad=False)


def forward_of_unmerged_statistics(kernels: Library) -> None:
    """Of the first columns, where a constant's own come behind them, and of later ones."""
    for first in (0, 20):
        unmerged.check_moments(kernels, torch.bfloat16, 700, first, (0, 5))


def backward_of_unmerged_sums(kernels: Library) -> None:
    unmerged.check_sums(kernels, torch.bfloat16, 350, 12, (0, 5))


def many_blocks(kernels: Library) -> None:
    conv1x1.check_many_blocks(kernels)


def backward_narrow(kernels: Library) -> None:
    with device():
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 150, 40, 48)


def backward_of_no_rows(kernels: Library) -> None:
    conv1x1.check_backward_of_no_rows(kernels)


def backward_of_dead_channels(kernels: Library) -> None:
    conv1x1.check_backward_of_dead_channels(kernels)


def backward_unaligned(kernels: Library) -> None:
    conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 35, 37, 22, 45, 1)


def statistics(kernels: Library) -> None:
    for M, C, offset in ((600, 12, 4), (8000, 131, 0)):
        x = compare.random_rows(M, C, torch.bfloat16, offset)
        sums = {"mean": torch.zeros(C), "var": torch.zeros(C)}
        compare.check(kernels, "channel_stats", M, (0, 5), x=x, **sums)


def bn_relu(kernels: Library) -> None:
    x, grad = compare.random_rows(130, 36, torch.bfloat16, 4), compare.random_rows(130, 36, torch.bfloat16)
    norm, sums = compare.random_norm(x), {"grad_weight": torch.zeros(36), "grad_bias": torch.zeros(36)}
    compare.check(kernels, "bn_relu", 1, (0, 5), x=x, **norm, out=grad.clone())
    compare.check(kernels, "bn_relu_backward_reduce", 130, (0, 5), grad=grad, x=x, **norm, **sums)


FORWARD: tuple[Case, ...] = (forward, forward_streamed, forward_unaligned)
BACKWARD = (backward, backward_of_many_channels, backward_in_two_runs, backward_in_turns, backward_streamed)
BOTH = (forward, backward)
