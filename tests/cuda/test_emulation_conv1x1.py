"""The CUDA kernels of the 1x1 convolution, run by emulation, against the CPU backend and float64.

Every case is executed thread by thread with the emulator's checks on (bounds, alignment, races, barriers, asynchronous
copies); a result is compared with the same operator in float64 on the values as stored.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
import torch

import densenet_ext  # noqa: F401  (registers the operators)
from tests.cuda.emulation.conv1x1 import (
    ARITHMETIC,
    check_backward_of_no_rows,
    check_many_blocks,
    run_backward,
    run_forward,
    use,
)
from tests.cuda.emulation.unmerged import check_moments, check_sums
from tests.support.kernel_calls import WIDE

SHAPES = [(1, 1, 1), (37, 12, 48), (130, 33, 17), (129, 64, 128), (65, 70, 129)]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("M", "C", "N"), SHAPES)
def test_forward(gpu, arithmetic, M, C, N) -> None:
    torch.manual_seed(M * C + N)
    run_forward(gpu, *use(arithmetic), M, C, N)


@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize(("pitch", "offset"), [(48, 0), (45, 1), (44, 2), (44, 4), (48, 8)])
def test_forward_reads_any_alignment(gpu, arithmetic, pitch, offset) -> None:
    torch.manual_seed(pitch + offset)
    run_forward(gpu, *use(arithmetic), 35, 36, 24, pitch, offset)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_forward_with_bias_and_relu(gpu, arithmetic) -> None:
    torch.manual_seed(3)
    run_forward(gpu, *use(arithmetic), 40, 20, 30, bias=True, stats=False)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("M", "C", "N"), SHAPES)
def test_backward(gpu, arithmetic, M, C, N) -> None:
    torch.manual_seed(M + C * N)
    run_backward(gpu, *use(arithmetic), M, C, N)


@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize(("pitch", "offset"), [(48, 0), (45, 1), (44, 2), (44, 4), (48, 8)])
def test_backward_reads_any_alignment(gpu, arithmetic, pitch, offset) -> None:
    torch.manual_seed(pitch + offset)
    run_backward(gpu, *use(arithmetic), 35, 36, 24, pitch, offset)


@pytest.mark.parametrize("arithmetic", ["float", "bf16"])
@pytest.mark.parametrize(
    "case",
    [
        {"through_norm": False},
        {"frozen_z": True},
        {"into": "accumulate"},
        {"into": "nothing"},
        {"wgrad": False},
        {"frozen": True},
    ],
    ids=str,
)
def test_backward_cases(gpu, arithmetic, case) -> None:
    torch.manual_seed(9)
    run_backward(gpu, *use(arithmetic), 70, 20, 30, **case)


# ---- blocks that work through several tiles -------------------------------------------------------------------------
# Each launch once: where more shared memory changes nothing of it, the size stands with one amount of that; and in one
# of both 16-bit types, which have the same tiles and plans: their products are in every test of small sizes.
def one_half(half: str) -> list[str]:
    """All arithmetics but the other one of 16 bits."""
    return [arithmetic for arithmetic in ARITHMETIC if arithmetic not in {"bf16", "fp16"} - {half}]


# Weights of few channels stay in 66 KiB, many of 16 bits in 227; others stream, in narrow tiles where there is less
# than 163, but double's, which are narrow anyway.
FORWARD_TILES = [(arithmetic, 66, 30, 40) for arithmetic in one_half("bf16")]
FORWARD_TILES += [("fp16", 227, 450, 100)]
FORWARD_TILES += [(arithmetic, 163, 450, 100) for arithmetic in one_half("bf16")]
FORWARD_TILES += [(arithmetic, 66, 450, 100) for arithmetic in one_half("fp16") if arithmetic != "double"]


@pytest.mark.parametrize(("arithmetic", "shared", "C", "N"), FORWARD_TILES)
def test_forward_with_several_tiles_in_a_block(gpu, monkeypatch, arithmetic, shared, C, N) -> None:
    torch.manual_seed(C)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_forward(gpu, *use(arithmetic), 300, C, N, orders=(5,))


# With 99 KiB tiles have 64 output channels, as double's and those of few channels have with more of it.
WIDER = [("bf16", 140, 100, True), ("fp16", 40, 150, True), ("bf16", 40, 150, False)]
BACKWARD_TILES = [
    (arithmetic, 99, *size) for half, *size in (("fp16", 40, 30, True), *WIDER) for arithmetic in one_half(half)
]
BACKWARD_TILES += [
    (arithmetic, 227, *size) for half, *size in WIDER for arithmetic in one_half(half) if arithmetic != "double"
]


@pytest.mark.parametrize(("arithmetic", "shared", "C", "N", "wgrad"), BACKWARD_TILES)
def test_backward_with_several_tiles_in_a_block(gpu, monkeypatch, arithmetic, shared, C, N, wgrad) -> None:
    torch.manual_seed(C + N)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_backward(gpu, *use(arithmetic), 200, C, N, wgrad=wgrad, into="accumulate", orders=(5,))


@pytest.mark.parametrize("arithmetic", ["tf32", "bf16"])
def test_backward_with_streamed_weights(gpu, monkeypatch, arithmetic) -> None:
    """The turns' weights come one after another where shared memory has no place for all."""
    torch.manual_seed(10)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(99 * 1024))
    run_backward(gpu, *use(arithmetic), 150, 36, 330, wgrad=False, orders=(5,))


def turns(tiles: int, slices: int, multiprocessors: int, each: int) -> int:
    """How many blocks the busiest multiprocessor works through, when each block has so many tiles."""
    return -(-slices * -(-tiles // each) // multiprocessors)


@pytest.mark.parametrize("multiprocessors", [20, 80, 84, 108, 132, 148, 170])
def test_no_multiprocessor_works_alone_at_the_end(gpu, multiprocessors) -> None:
    """DenseNet-121's stages at batch 1 to 256: the time, in tiles, is near that of work that can be cut anywhere."""
    for batch in (1, 16, 64, 256):
        for pixels in (56 * 56, 28 * 28, 14 * 14, 7 * 7):
            tiles = -(-batch * pixels // 64)
            for slices in range(1, 20):
                each = gpu.c.dx_tiles_of_a_block(tiles, slices, multiprocessors)
                blocks = turns(tiles, slices, multiprocessors, each)
                least = tiles * slices / multiprocessors
                # in two turns: a tile more than the share, a tile's time for a block, and what the slices leave idle
                idle = 2 * multiprocessors / (slices * (2 * multiprocessors // slices))
                assert blocks * (each + 1) <= idle * least + 2 * 2, (batch, pixels, slices, each, blocks)
                assert blocks <= 2


def test_the_shares_of_an_h100(gpu) -> None:
    """14x14 at batch 256: with 5 and 7 slices there were 265 and 266 blocks for 264 places, a third turn for two."""
    for slices, share in ((5, 31), (7, 44), (8, 49)):
        each = gpu.c.dx_tiles_of_a_block(784, slices, 132)
        assert (each, turns(784, slices, 132, each)) == (share, 1)
    assert gpu.c.dx_tiles_of_a_block(6272, 1, 132) == 48  # forward, 56x56: the weights are fetched once a block


# ---- the sizes of whole networks: tiles of 128 channels, several of them for a block, resident and streamed weights --
def shipped(cases: Iterable[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    """Each case in TF32 and in one 16-bit type, bf16 and fp16 in turns: they have the same tiles and plans."""
    return [(math, *case) for i, case in enumerate(cases) for math in ("tf32", ("bf16", "fp16")[i % 2])]


@pytest.mark.parametrize(("arithmetic", "N", "C"), shipped(WIDE))
def test_forward_of_whole_networks(gpu, monkeypatch, arithmetic, N, C) -> None:
    torch.manual_seed(C)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    run_forward(gpu, *use(arithmetic), 390, C, N)


BACKWARD_FORMS = [
    (96, 64, {}),
    (128, 200, {"into": "accumulate"}),
    (128, 200, {"through_norm": False}),
    (128, 200, {"wgrad": False}),
    (128, 1000, {"frozen_z": True, "into": "nothing"}),
    (192, 640, {}),
    (192, 640, {"wgrad": False, "frozen": True}),
]


@pytest.mark.parametrize(("arithmetic", "N", "C", "form"), shipped(BACKWARD_FORMS))
def test_backward_of_whole_networks(gpu, monkeypatch, arithmetic, N, C, form) -> None:
    torch.manual_seed(N + C)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    run_backward(gpu, *use(arithmetic), 140, C, N, **form)


@pytest.mark.parametrize(("arithmetic", "N"), shipped([(96,), (150,), (192,)]))
def test_forward_in_tiles_of_96_channels(gpu, monkeypatch, arithmetic, N) -> None:
    torch.manual_seed(N)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    run_forward(gpu, *use(arithmetic), 300, 72, N, bias=N == 96, orders=(5,))


@pytest.mark.parametrize(
    ("arithmetic", "shared", "N", "wgrad"),
    shipped(
        [
            (163, 96, True),
            *((shared, N, wgrad) for shared in (227, 163) for N, wgrad in ((150, True), (192, True), (192, False))),
        ]
    ),
)
def test_backward_in_tiles_of_96_or_192_channels(gpu, monkeypatch, arithmetic, shared, N, wgrad) -> None:
    """192 at once where a block can have 227 KiB of shared memory, else 96 in two turns, and dW by itself."""
    torch.manual_seed(N)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_backward(gpu, *use(arithmetic), 200, 72, N, wgrad=wgrad, orders=(5,))


def test_sums_of_many_blocks(gpu) -> None:
    torch.manual_seed(4)
    check_many_blocks(gpu)


def test_backward_of_no_rows(gpu) -> None:
    check_backward_of_no_rows(gpu)


# ---- sums that it merges ---------------------------------------------------------------------------------------------
@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize("first", [0, 20])
def test_forward_merges_statistics(gpu, arithmetic: str, first: int) -> None:
    torch.manual_seed(first)
    check_moments(gpu, use(arithmetic)[0], 700, first, (0, 5))


@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize("N", [6, 70])
def test_backward_merges_sums(gpu, arithmetic: str, N: int) -> None:
    torch.manual_seed(N)
    check_sums(gpu, use(arithmetic)[0], 350, N, (0, 5))


# ---- what a launch asks of the driver --------------------------------------------------------------------------------
def test_shared_memory_is_asked_for_once(gpu) -> None:
    """For each kernel and device, and again by a call that wants more; a launch with more than was allowed fails."""

    def asked(C: int, device: int) -> int:
        gpu.c.dx_set_device(device)
        before = gpu.c.dx_allowances()
        run_forward(gpu, *use("bf16"), 20, C, 100)
        return gpu.c.dx_allowances() - before

    try:
        assert [asked(C, 1) for C in (64, 64, 136, 64, 136)] == [1, 0, 1, 0, 0]
        assert [asked(C, 2) for C in (136, 64, 136)] == [1, 0, 0]
        assert asked(136, 1) == 0
    finally:
        gpu.c.dx_set_device(0)
