"""Faults for the emulated 1x1 convolution forward and for the tensor cores' fragments, and the calls that see them.

mutations.py applies and runs them, with those of mutation_backward.py and mutation_rows.py.
"""

from __future__ import annotations

from typing import NamedTuple

from .mutation_cases import BOTH, FORWARD, Case, forward_of_96_channels, forward_tf32

FAMILIES = ("DX_CONV1X1", "DX_CONV3X3", "DX_STATISTICS", "DX_BN_RELU", "DX_COPY_TAPS")  # the kernels that are mutated


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
        "    sync_block();\n    if (p.of.out_relu)",
        "    if (p.of.out_relu)",
        FORWARD,
    ),
    Mutation(
        "forward: results are not rectified",
        "conv1x1.cu",
        "    if (p.of.out_relu)",
        "    if (false)",
        (forward_tf32,),
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
        "forward: warps without columns carry rows too",
        "conv1x1_forward_tile.h",
        "if (warp() >= Shape::kCarriers) return;",
        "",
        (forward_of_96_channels,),
    ),
    Mutation(
        "forward: weights beyond a panel of 96 channels",
        "conv1x1_forward_tile.h",
        "row() + i * Shape::kDown < Shape::kChannels)",
        "true)",
        (forward_of_96_channels,),
    ),
    Mutation(
        "forward: the last block counts as a whole one",
        "partial_moments.h",
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
]
