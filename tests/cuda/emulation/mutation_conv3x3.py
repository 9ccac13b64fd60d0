"""Faults in the kernels of the 3x3 convolution, with the calls that see them."""

from __future__ import annotations

from . import conv3x3
from .conv1x1 import use
from .library import Library
from .mutation_cases import device
from .mutation_list import Mutation

IMAGES, MANY = [2, 1, 5, 7], [9, 1, 11, 11]


def forward3x3(kernels: Library) -> None:
    """Several chunks of channels."""
    conv3x3.run_forward(kernels, *use("bf16"), IMAGES, 40, 12, drop=0.3, bias=True, orders=(5,))


def forward3x3_tf32(kernels: Library) -> None:
    conv3x3.run_forward(kernels, *use("tf32"), IMAGES, 20, 12)


def forward3x3_streamed(kernels: Library) -> None:
    """Weights that come chunk by chunk."""
    with device(multiprocessors=132, shared=60):
        conv3x3.run_forward(kernels, *use("bf16"), IMAGES, 100, 12)


def forward3x3_of_several_tiles(kernels: Library) -> None:
    """For a block, and statistics of several blocks."""
    with device():
        conv3x3.run_forward(kernels, *use("bf16"), MANY, 40, 12, drop=0.3)


def forward3x3_of_planes(kernels: Library) -> None:
    conv3x3.run_forward(kernels, *use("bf16"), [2, 3, 3, 4], 12, 10, 3)


def backward3x3(kernels: Library) -> None:
    conv3x3.run_backward(kernels, *use("bf16"), IMAGES, 20, 34, drop=0.3, orders=(5,))


def backward3x3_tf32(kernels: Library) -> None:
    conv3x3.run_backward(kernels, *use("tf32"), IMAGES, 12, 12, into="accumulate")


def backward3x3_of_several_tiles(kernels: Library) -> None:
    """Of rows for a block: the ring of rows is gone around."""
    with device():
        conv3x3.run_backward(kernels, *use("bf16"), [7, 1, 9, 11], 16, 10)


def backward3x3_of_planes(kernels: Library) -> None:
    conv3x3.run_backward(kernels, *use("bf16"), [1, 3, 3, 4], 12, 10, 3)


FORWARD = (forward3x3, forward3x3_of_several_tiles)
BACKWARD = (backward3x3, backward3x3_of_several_tiles)
MUTATIONS = [
    Mutation(
        "3x3: no barrier before a step is multiplied",
        "conv3x3.cu",
        "      sync_block();  // this step is there, and nobody reads the one before any more\n",
        "",
        FORWARD,
    ),
    Mutation(
        "3x3: no barrier before the tile takes a buffer's place",
        "conv3x3.cu",
        "    sync_block();                      // which nobody reads any more\n",
        "",
        FORWARD,
    ),
    Mutation(
        "3x3: no wait for a step's rows",
        "conv3x3.cu",
        "      cp_async_wait<0>();\n      Copies::normalise",
        "      cp_async_wait<1>();\n      Copies::normalise",
        FORWARD,
    ),
    Mutation(
        "3x3: streamed weights of one side only",
        "conv3x3.cu",
        "panel(p.resident ? step : side)",
        "panel(p.resident ? step : 0)",
        (forward3x3_streamed,),
    ),
    Mutation(
        "3x3: dropout by the rows of a tile",
        "conv3x3.cu",
        "const int64_t m = first + done + Tile::row(i);",
        "const int64_t m = Tile::row(i);",
        (forward3x3_of_several_tiles,),
    ),
    Mutation(
        "3x3: a line's last tap reads the next line",
        "conv3x3_common.h",
        "w >= 0 && w < size[2]",
        "w >= 0",
        FORWARD,
    ),
    Mutation(
        "3x3: a halo without the lines' ends",
        "conv3x3_common.h",
        "reach = (taps > 3 ? line : 0) + 1;",
        "reach = (taps > 3 ? line : 1);",
        FORWARD,
    ),
    Mutation(
        "3x3: lines of the window in reverse",
        "conv3x3_common.h",
        "return (t / 3 - before()) * line",
        "return (before() - t / 3) * line",
        FORWARD,
    ),
    Mutation(
        "3x3: planes outside of the image count",
        "conv3x3_common.h",
        "return bits >> (kPlaneBits + i) & 1 ? bits & ((1u << kPlaneBits) - 1) : 0;",
        "return bits & ((1u << kPlaneBits) - 1);",
        (forward3x3_of_planes,),
    ),
    Mutation(
        "3x3: what lies in front of a row's end is read as the row",
        "conv3x3_common.h",
        "left < 0 ? 0 : left < E ? int(left) : E;\n    for_rows",
        "E;\n    for_rows",
        FORWARD,
    ),
    Mutation(
        "3x3: a lane's upper rows take the lower half of k",
        "gemm_rows.h",
        "ldmatrix_x4(left, rows[i] + quarter + k);",
        "ldmatrix_x4(left, rows[i] + 8 - quarter + k);",
        FORWARD,
    ),
    Mutation(
        "3x3: TF32 rows of the other half",
        "gemm_rows.h",
        "rows[2 * i + e % 2] + four",
        "rows[2 * i + 1 - e % 2] + four",
        (forward3x3_tf32,),
    ),
    Mutation(
        "3x3: statistics of threads without rows",
        "conv3x3_forward_tile.h",
        "const int end = rows < Shape::kRows ? rows : Shape::kRows;",
        "const int end = Shape::kRows;",
        FORWARD,
    ),
    Mutation(
        "3x3 backward: taps in the forward order",
        "conv3x3_common.h",
        "{weight.data + (taps - 1) * weight.tap, weight.input, weight.output, -weight.tap}",
        "{weight.data, weight.input, weight.output, weight.tap}",
        BACKWARD,
    ),
    Mutation(
        "3x3 backward: the ReLU's mask is left out",
        "conv3x3_dgrad.h",
        "gradient_passes(of_centered(xc, scale.v[e], bias.v[e])) ? piece.get(e) : A(0)",
        "piece.get(e)",
        BACKWARD,
    ),
    Mutation(
        "3x3 backward: no wait for x",
        "conv3x3_dgrad.h",
        "cp_async_wait<1>();                // for x",
        "cp_async_wait<2>();",
        BACKWARD,
    ),
    Mutation(
        "3x3 backward: a thread's sums lie where another's do",
        "conv3x3_dgrad.h",
        "store_one(of_threads + row(0) * 2 * N + N + column() + e, sum_xc_[e]);",
        "store_one(of_threads + row(0) * 2 * N + column() + e, sum_xc_[e]);",
        BACKWARD,
    ),
    Mutation(
        "3x3 backward: the ring is not gone around",
        "conv3x3_wgrad.h",
        "    if (at >= size) at -= size;\n",
        "",
        (backward3x3_of_several_tiles,),
    ),
    Mutation(
        "3x3 backward: no barrier before rows are overwritten",
        "conv3x3_wgrad.h",
        "    sync_block();  // this tile is there, and nobody reads the one before any more\n",
        "",
        BACKWARD,
    ),
    Mutation(
        "3x3 backward: rows of another half",
        "gemm_window.h",
        "const int row = r + low + half;",
        "const int row = r + low + quarter;",
        BACKWARD,
    ),
    Mutation(
        "3x3 backward: TF32 rows of another half",
        "gemm_window.h",
        "under.row(r + four + 4, inside[1], t)",
        "under.row(r + four, inside[0], t)",
        (backward3x3_tf32,),
    ),
    Mutation(
        "3x3 backward: all planes see the middle one",
        "conv3x3_wgrad.h",
        "p.window.first_of_halo(first, plane)",
        "p.window.first_of_halo(first, p.window.planes / 2)",
        (backward3x3_of_planes,),
    ),
]
