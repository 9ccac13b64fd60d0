"""Faults for the emulated kernels, and the small calls that have to see them (mutations.py applies and runs them)."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch

from . import compare, conv1x1
from .library import Library

FAMILIES = ("DX_CONV1X1", "DX_STATISTICS", "DX_BN_RELU", "DX_COPY_TAPS")  # the kernels that are mutated


Case = Callable[[Library], None]


# ---- cases: small calls that raise when something is wrong -----------------------------------------------------------


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
    with device(shared=131):
        conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 300, 330, 100)


def forward_tf32(kernels: Library) -> None:
    with device():
        conv1x1.run_forward(kernels, *conv1x1.use("tf32"), 150, 40, 30, bias=True, stats=False)


def forward_unaligned(kernels: Library) -> None:
    for pitch, offset in ((44, 4), (45, 1)):
        conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 35, 36, 22, pitch, offset)


def forward_odd(kernels: Library) -> None:
    conv1x1.run_forward(kernels, *conv1x1.use("bf16"), 35, 36, 24, 40, 0)


def backward(kernels: Library) -> None:
    with device():
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 200, 140, 100, into="accumulate", orders=(5,))


def backward_of_many_channels(kernels: Library) -> None:
    with device():
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 150, 40, 150)


def backward_in_turns(kernels: Library) -> None:
    with device():
        conv1x1.run_backward(kernels, *conv1x1.use("bf16"), 150, 40, 150, wgrad=False)


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
BACKWARD = (backward, backward_of_many_channels, backward_in_turns)
BOTH = (forward, backward)


# ---- mutations -------------------------------------------------------------------------------------------------------


class Mutation(NamedTuple):
    """``old``, which stands once in ``file`` (of csrc/cuda), becomes ``new``; one of ``cases`` has to see it."""

    name: str
    file: str
    old: str
    new: str
    cases: tuple[Case, ...]


MUTATIONS = [
    Mutation(
        "forward: no barrier before the next tile",
        "conv1x1.cu",
        "    sync_block();  // the tile before",
        "    // the tile before",
        FORWARD,
    ),
    Mutation(
        "forward: no barrier before a chunk is multiplied",
        "conv1x1.cu",
        "      sync_block();  // this chunk",
        "      // this chunk",
        FORWARD,
    ),
    Mutation(
        "forward: no wait for a chunk's weights",
        "conv1x1.cu",
        "      cp_async_wait<0>();\n      sync_block();  // this",
        "      sync_block();  // this",
        FORWARD,
    ),
    Mutation(
        "forward: no wait for the first constants",
        "conv1x1.cu",
        "  cp_async_wait<1>();  // for",
        "  // for",
        FORWARD,
    ),
    Mutation(
        "forward: the tile takes the place of chunks that are still read",
        "conv1x1.cu",
        "    sync_block();\n    const bool relu",
        "    const bool relu",
        FORWARD,
    ),
    Mutation(
        "forward: the tile is read before it is there",
        "conv1x1.cu",
        "    sync_block();\n    if (done == 0",
        "    if (done == 0",
        FORWARD,
    ),
    Mutation(
        "forward: the pivots are read before they are there",
        "conv1x1.cu",
        "pivots);\n      sync_block();\n",
        "pivots);\n",
        FORWARD,
    ),
    Mutation(
        "forward: the warps' sums take the place of a tile that is still read",
        "conv1x1_forward_tile.h",
        "    sync_block();  // the tile is read no more\n",
        "",
        FORWARD,
    ),
    Mutation("forward: constants of the chunk before", "conv1x1.cu", "ahead = 2 % p", "ahead = 1 % p", FORWARD),
    Mutation(
        "forward: streamed weights of one side only",
        "conv1x1.cu",
        "(p.resident ? c : side) * Shape::kPanel",
        "(p.resident ? c : 0) * Shape::kPanel",
        FORWARD,
    ),
    Mutation(
        "forward: rows of the prepared weights lie C apart",
        "conv1x1_forward_tile.h",
        "from + i * Shape::kDown * p.prepared.Cp",
        "from + i * Shape::kDown * p.of.C",
        FORWARD,
    ),
    Mutation(
        "forward: lanes give away the half that they keep",
        "conv1x1_forward_tile.h",
        "shuffle_xor(upper ? values[e] : values[half + e], mask)",
        "shuffle_xor(upper ? values[half + e] : values[e], mask)",
        FORWARD,
    ),
    Mutation(
        "forward: two lanes carry the same row",
        "conv1x1_forward_tile.h",
        "of_lane % 2 * 4 + of_lane / 2",
        "of_lane % 2 * 4 + of_lane / 4",
        FORWARD,
    ),
    Mutation(
        "forward: statistics of rows that do not exist",
        "conv1x1_forward_tile.h",
        "row() + i * D < rows ? pieces[i].get(e) - from : A(0)",
        "pieces[i].get(e) - from",
        FORWARD,
    ),
    Mutation(
        "forward: sums of another group of columns",
        "conv1x1_forward_tile.h",
        "for (int w = thread_x() / 32; w <",
        "for (int w = 0; w <",
        FORWARD,
    ),
    Mutation(
        "forward: the last block counts as a whole one",
        "conv1x1.cu",
        "{double(rows),",
        "{double(p.partial.rows),",
        FORWARD,
    ),
    Mutation(
        "tensor cores: halves of the right operand exchanged",
        "gemm_mma.h",
        "low + quarter) * b_pitch + half\n",
        "low + half) * b_pitch + quarter\n",
        BOTH,
    ),
    Mutation(
        "tensor cores: halves of the transposed left operand exchanged",
        "gemm_mma.h",
        ": (low + quarter) * a_pitch + Grid::first_row() + half",
        ": (low + half) * a_pitch + Grid::first_row() + quarter",
        BOTH,
    ),
    Mutation(
        "tensor cores: sums of row + 8 stored at row + 4",
        "gemm_mma.h",
        "(i * 16 + e * 4) * pitch",
        "(i * 16 + e * 2) * pitch",
        BOTH,
    ),
    Mutation(
        "tensor cores: a bias for the column beside",
        "gemm_mma.h",
        "e % 2 ? second : first",
        "e % 2 ? first : second",
        (forward_tf32,),
    ),
    Mutation(
        "TF32: rows and k of the left operand exchanged",
        "gemm_mma.h",
        "e % 2 * 8) * a_row + (k + e / 2 * 4)",
        "e / 2 * 8) * a_row + (k + e % 2 * 4)",
        (forward_tf32,),
    ),
    Mutation(
        "TF32: the right operand's second k is its first",
        "gemm_mma.h",
        "b + j * 8 * b_row + (k + 4) * b_k",
        "b + j * 8 * b_row + k * b_k",
        (forward_tf32,),
    ),
    Mutation(
        "backward: dy is read before it is there",
        "conv1x1_backward.cu",
        "      sync_block();  // dy is there",
        "      // dy is there",
        BACKWARD,
    ),
    Mutation(
        "backward: no barrier between turns of the channels",
        "conv1x1_backward.cu",
        "if (n0 > n_first) sync_block();",
        "",
        BACKWARD,
    ),
    Mutation(
        "backward: no wait for the weights",
        "conv1x1_backward.cu",
        "      if constexpr (DGRAD) cp_async_wait<0>();\n",
        "",
        BACKWARD,
    ),
    Mutation(
        "backward: dW alone, no barrier between tiles",
        "conv1x1_backward.cu",
        "if (!DGRAD && done > 0) sync_block();",
        "",
        BACKWARD,
    ),
    Mutation(
        "backward: dW of every tile of channels in the place of the first",
        "conv1x1_backward.cu",
        "(block_y() * p.prepared.Np + n_first)",
        "(block_y() * p.prepared.Np)",
        BACKWARD,
    ),
    Mutation(
        "backward: no barrier before the blocks' sums are added",
        "conv1x1_backward.cu",
        "  sync_block();\n  if (group > 0",
        "  if (group > 0",
        BACKWARD,
    ),
    Mutation(
        "backward: the slope of norm2's correction is its center",
        "conv1x1_backward_tile.h",
        "slope = load_piece<F>(at + 4 * N)",
        "slope = load_piece<F>(at + 3 * N)",
        BACKWARD,
    ),
    Mutation(
        "backward: the last warp's sums are left out",
        "conv1x1_backward_tile.h",
        "for (int w = 0; w < Shape::kWarps; ++w) total",
        "for (int w = 0; w + 1 < Shape::kWarps; ++w) total",
        BACKWARD,
    ),
    Mutation(
        "backward: constants as if rows of them had no padding",
        "conv1x1_backward_tile.h",
        "from + i / WIDTH * pitch + i % WIDTH",
        "from + i / WIDTH * WIDTH + i % WIDTH",
        BACKWARD,
    ),
    Mutation(
        "pieces: 16 bytes at an address of 8",
        "pieces.h",
        "(WHOLE || alignment >= (P::kBytes < 16 ? P::kBytes : 16))",
        "(WHOLE || alignment >= 8)",
        FORWARD,
    ),
    Mutation(
        "pieces: rows that are not whole taken for whole",
        "pieces.h",
        "return columns % E == 0 &&",
        "return columns >= E &&",
        (forward_unaligned, backward_unaligned, forward_odd),
    ),
    Mutation(
        "pieces: the last store goes over the edge",
        "pieces.h",
        "if (e < valid) store_one(p + e, piece.raw(e));",
        "store_one(p + e, piece.raw(e));",
        (forward_unaligned, backward_unaligned),
    ),
    Mutation(
        "rows: a block's threads read sums that are not there",
        "sums.h",
        "    sync_block();\n    if (patch.any && patch.y % (2",
        "    if (patch.any && patch.y % (2",
        (statistics, bn_relu),
    ),
    Mutation(
        "rows: a block's threads overwrite sums that are still read",
        "sums.h",
        "shared[(V + v) * kThreads + other]);\n    }\n    sync_block();\n",
        "shared[(V + v) * kThreads + other]);\n    }\n",
        (statistics, bn_relu),
    ),
    Mutation(
        "rows: a row beyond the slab",
        "rows.h",
        "rows += r * step < within;",
        "rows += r * step <= within;",
        (statistics,),
    ),
    Mutation(
        "statistics: the last slab counts as a whole one",
        "statistics.cu",
        "(i == last ? rest : whole) * delta * delta",
        "whole * delta * delta",
        (statistics,),
    ),
]
# For the test suite: one of each kind.
FEW = (
    "no barrier before a chunk is multiplied",
    "no wait for a chunk's weights",
    "streamed weights of one side only",
    "halves of the transposed left operand exchanged",
    "rows of the prepared weights lie C apart",
)
