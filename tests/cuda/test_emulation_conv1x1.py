"""The CUDA kernels of the 1x1 convolution, run by emulation, against the CPU backend and float64.

Every case is executed thread by thread with the emulator's checks on (bounds, alignment, races, barriers, asynchronous
copies); a result is compared with the same operator in float64 on the values as stored.
"""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

import densenet_ext  # noqa: F401  (registers the operators)
from tests.cuda.emulation import mutation_list, mutations
from tests.cuda.emulation.conv1x1 import ARITHMETIC, F64, acc, make_norm, make_rows, ops, run_backward, run_forward, use
from tests.cuda.emulation.library import Library, compile_library
from tests.support.kernel_calls import WIDE

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


@pytest.fixture(scope="session")
def kernels() -> Library:
    return Library(compile_library())


SHAPES = [(1, 1, 1), (37, 12, 48), (130, 33, 17), (129, 64, 128), (65, 70, 129)]


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("M", "C", "N"), SHAPES)
def test_forward(kernels, arithmetic, M, C, N) -> None:
    torch.manual_seed(M * C + N)
    run_forward(kernels, *use(arithmetic), M, C, N)


@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize(("pitch", "offset"), [(48, 0), (45, 1), (44, 2), (44, 4), (48, 8)])
def test_forward_reads_any_alignment(kernels, arithmetic, pitch, offset) -> None:
    torch.manual_seed(pitch + offset)
    run_forward(kernels, *use(arithmetic), 35, 36, 24, pitch, offset)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
def test_forward_with_bias_and_relu(kernels, arithmetic) -> None:
    torch.manual_seed(3)
    run_forward(kernels, *use(arithmetic), 40, 20, 30, bias=True, stats=False)


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("M", "C", "N"), SHAPES)
def test_backward(kernels, arithmetic, M, C, N) -> None:
    torch.manual_seed(M + C * N)
    run_backward(kernels, *use(arithmetic), M, C, N)


@pytest.mark.parametrize("arithmetic", ["double", "float", "bf16"])
@pytest.mark.parametrize(("pitch", "offset"), [(48, 0), (45, 1), (44, 2), (44, 4), (48, 8)])
def test_backward_reads_any_alignment(kernels, arithmetic, pitch, offset) -> None:
    torch.manual_seed(pitch + offset)
    run_backward(kernels, *use(arithmetic), 35, 36, 24, pitch, offset)


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
def test_backward_cases(kernels, arithmetic, case) -> None:
    torch.manual_seed(9)
    run_backward(kernels, *use(arithmetic), 70, 20, 30, **case)


# ---- blocks that work through several tiles -------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize("shared", [227, 131, 66], ids="{}KiB".format)
@pytest.mark.parametrize(("C", "N"), [(30, 40), (330, 100)])
def test_forward_with_several_tiles_in_a_block(kernels, monkeypatch, arithmetic, shared, C, N) -> None:
    """With 227 KiB of shared memory all weights stay there, with less they stream; with 66 the tiles are narrow."""
    torch.manual_seed(C)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_forward(kernels, *use(arithmetic), 300, C, N, orders=(5,))


@pytest.mark.parametrize("arithmetic", ARITHMETIC)
@pytest.mark.parametrize(("C", "N", "wgrad"), [(40, 30, True), (140, 100, True), (40, 150, True), (40, 150, False)])
@pytest.mark.parametrize("shared", [227, 99], ids="{}KiB".format)
def test_backward_with_several_tiles_in_a_block(kernels, monkeypatch, arithmetic, C, N, wgrad, shared) -> None:
    torch.manual_seed(C + N)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_backward(kernels, *use(arithmetic), 200, C, N, wgrad=wgrad, into="accumulate", orders=(5,))


def turns(tiles: int, slices: int, multiprocessors: int, each: int) -> int:
    """How many blocks the busiest multiprocessor works through, when each block has so many tiles."""
    return -(-slices * -(-tiles // each) // multiprocessors)


@pytest.mark.parametrize("multiprocessors", [20, 80, 84, 108, 132, 148, 170])
def test_no_multiprocessor_works_alone_at_the_end(kernels, multiprocessors) -> None:
    """DenseNet-121's stages at batch 1 to 256: the time, in tiles, is near that of work that can be cut anywhere."""
    for batch in (1, 16, 64, 256):
        for pixels in (56 * 56, 28 * 28, 14 * 14, 7 * 7):
            tiles = -(-batch * pixels // 64)
            for slices in range(1, 20):
                each = kernels.c.dx_tiles_of_a_block(tiles, slices, multiprocessors)
                blocks = turns(tiles, slices, multiprocessors, each)
                least = tiles * slices / multiprocessors
                # in two turns: a tile more than the share, a tile's time for a block, and what the slices leave idle
                idle = 2 * multiprocessors / (slices * (2 * multiprocessors // slices))
                assert blocks * (each + 1) <= idle * least + 2 * 2, (batch, pixels, slices, each, blocks)
                assert blocks <= 2


def test_the_shares_of_an_h100(kernels) -> None:
    """14x14 at batch 256: with 5 and 7 slices there were 265 and 266 blocks for 264 places, a third turn for two."""
    for slices, share in ((5, 31), (7, 44), (8, 49)):
        each = kernels.c.dx_tiles_of_a_block(784, slices, 132)
        assert (each, turns(784, slices, 132, each)) == (share, 1)
    assert kernels.c.dx_tiles_of_a_block(6272, 1, 132) == 48  # forward, 56x56: the weights are fetched once a block


# ---- the sizes of whole networks: tiles of 128 channels, several of them for a block, resident and streamed weights --
SHIPPED = ["tf32", "bf16", "fp16"]


@pytest.mark.parametrize("arithmetic", SHIPPED)
@pytest.mark.parametrize(("N", "C"), WIDE)
def test_forward_of_whole_networks(kernels, monkeypatch, arithmetic, N, C) -> None:
    torch.manual_seed(C)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    run_forward(kernels, *use(arithmetic), 390, C, N)


BACKWARD_FORMS = [
    (96, 64, {}),
    (128, 200, {"into": "accumulate"}),
    (128, 200, {"through_norm": False}),
    (128, 200, {"wgrad": False}),
    (128, 1000, {"frozen_z": True, "into": "nothing"}),
    (192, 640, {}),
    (192, 640, {"wgrad": False, "frozen": True}),
]


@pytest.mark.parametrize("arithmetic", SHIPPED)
@pytest.mark.parametrize(("N", "C", "form"), BACKWARD_FORMS)
def test_backward_of_whole_networks(kernels, monkeypatch, arithmetic, N, C, form) -> None:
    torch.manual_seed(N + C)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    run_backward(kernels, *use(arithmetic), 140, C, N, **form)


# ---- numbers that are not ordinary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["double", "float", "tf32", "bf16"])
def test_forward_nan_and_infinity(kernels, arithmetic) -> None:
    """A NaN or infinity reaches the outputs of its row as on the CPU, and no other row."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(1)
    x, norm = make_rows(40, 20, dtype), make_norm(20, dtype)
    x[3, 5], x[7, 19], x[39, 0] = float("nan"), float("inf"), -float("inf")
    weight = torch.randn(10, 20, dtype=acc(dtype))
    got, want = torch.zeros(40, 10, dtype=dtype), torch.zeros(40, 10, dtype=dtype)
    kernels(
        "bn_relu_conv1x1", x=x, **norm, conv_weight=weight, out_bias=None, out_relu=False, out=got, out_mean=None,
        out_var=None, tf32=tf32,
    )  # fmt: skip
    ops.bn_relu_conv1x1(x, *norm.values(), weight, None, False, want, None, None)
    assert torch.equal(got.isnan(), want.isnan()) and got.isnan()[3].all()
    assert torch.equal(got.isinf(), want.isinf())


@pytest.mark.parametrize("arithmetic", ["double", "float", "tf32", "bf16", "fp16"])
def test_backward_nan(kernels, arithmetic) -> None:
    """The gradient passes where not (u <= 0), so also at a NaN; a NaN of one column stays in its column."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(2)
    x, norm, weight = make_rows(40, 20, dtype), make_norm(20, dtype), torch.randn(10, 20, dtype=acc(dtype))
    grad = make_rows(40, 10, dtype)
    x[3, 5] = float("nan")
    arguments = {"x": x, **norm, "conv_weight": weight, "grad_out": grad} | dict.fromkeys(
        ["z", "z_mean", "z_var", "z_weight", "z_bias"], None
    )
    arguments |= {"z_eps": 0.0, "z_grad_weight": None, "z_grad_bias": None, "grad_in": None, "accumulate": False}

    def results() -> dict[str, Tensor]:
        vectors = {k: torch.zeros(20, dtype=acc(dtype)) for k in ("grad_weight", "grad_bias", "grad_mean", "grad_var")}
        return {"grad_x": torch.zeros(40, 20, dtype=dtype), "grad_conv_weight": torch.zeros_like(weight)} | vectors

    got, want = results(), results()
    kernels("bn_relu_conv1x1_backward", **arguments, **got, tf32=tf32)
    ops.bn_relu_conv1x1_backward(*arguments.values(), *want.values())
    for name in got:
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "double"])
def test_statistics_of_a_large_mean(kernels, monkeypatch, arithmetic) -> None:
    """Mean 1e4 and deviation 1: E[x^2] - E[x]^2 would have no correct digit in float."""
    dtype, tf32, _ = use(arithmetic)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    torch.manual_seed(4)
    x, norm, weight = make_rows(700, 16, dtype), make_norm(16, dtype), torch.randn(9, 16, dtype=acc(dtype))
    out, mean, var = (
        torch.empty(700, 9, dtype=dtype),
        torch.empty(9, dtype=acc(dtype)),
        torch.empty(9, dtype=acc(dtype)),
    )
    kernels(
        "bn_relu_conv1x1", x=x, **norm, conv_weight=weight, out_bias=torch.full((9,), 1e4, dtype=acc(dtype)),
        out_relu=False, out=out, out_mean=mean, out_var=var, tf32=tf32,
    )  # fmt: skip
    stored = out.double()
    assert ((mean.double() - stored.mean(0)).abs() <= 2e-3).all()
    assert ((var.double() / stored.var(0, unbiased=False) - 1).abs() <= 1e-5).all()


@pytest.mark.parametrize("arithmetic", ["float", "bf16"])
@pytest.mark.parametrize("odd", [30.0, float("inf"), float("nan")])
def test_statistics_of_an_odd_first_row(kernels, monkeypatch, arithmetic, odd) -> None:
    """Distances are taken from one of a block's first rows: one far away costs nothing, infinity its own column."""
    dtype, tf32, _ = use(arithmetic)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    torch.manual_seed(5)
    x, one = torch.randn(700, 1, dtype=F64).abs().to(dtype), torch.ones(1)
    x[0] = odd
    weight = torch.arange(1.0, 41.0)[:, None]
    out, mean, var = torch.empty(700, 40, dtype=dtype), torch.empty(40), torch.empty(40)
    kernels(
        "bn_relu_conv1x1", x=x, mean=0 * one, var=one, weight=one, bias=None, eps=0.0, conv_weight=weight,
        out_bias=None, out_relu=False, out=out, out_mean=mean, out_var=var, tf32=tf32,
    )  # fmt: skip
    stored = out.double()
    if odd == 30.0:
        assert ((mean.double() - stored.mean(0)).abs() <= 3e-7 * stored.std(0)).all()
        assert ((var.double() / stored.var(0, unbiased=False) - 1).abs() <= 1e-6).all()
    else:
        assert var.isnan().all() and not mean.isfinite().any()


# ---- do these tests see faults? --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_mutations_are_caught() -> None:
    """A few of them; ``python -m tests.cuda.emulation.mutations`` runs all."""
    few = [mutation for mutation in mutation_list.MUTATIONS if mutation.name.endswith(mutation_list.FEW)]
    assert len(few) == len(mutation_list.FEW) and mutations.run(few) == []


def test_every_mutation_can_be_made() -> None:
    assert len(mutation_list.MUTATIONS) >= 20
    for mutation in mutation_list.MUTATIONS:
        text = mutations.place(mutation).read_text()
        assert text.count(mutation.old) == 1 and mutation.new != mutation.old, mutation.name
