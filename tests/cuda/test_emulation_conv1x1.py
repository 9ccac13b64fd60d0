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
from tests.cuda.emulation import mutations
from tests.cuda.emulation.conv1x1 import (
    ARITHMETIC,
    F64,
    acc,
    assert_same_kind,
    backward_of,
    check_backward_of_dead_channels,
    check_backward_of_no_rows,
    check_many_blocks,
    forward_of,
    make_norm,
    make_rows,
    ops,
    run_backward,
    run_forward,
    use,
)
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
# Each launch once: where more shared memory changes nothing of it, the size stands with one amount of that.

# Weights of few channels stay in 66 KiB, many of 16 bits in 227; others stream, in narrow tiles where there is less
# than 163, but double's, which are narrow anyway.
FORWARD_TILES = [(arithmetic, 66, 30, 40) for arithmetic in ARITHMETIC]
FORWARD_TILES += [(arithmetic, 227, 450, 100) for arithmetic in ("bf16", "fp16")]
FORWARD_TILES += [(arithmetic, 163, 450, 100) for arithmetic in ARITHMETIC]
FORWARD_TILES += [(arithmetic, 66, 450, 100) for arithmetic in ARITHMETIC if arithmetic != "double"]


@pytest.mark.parametrize(("arithmetic", "shared", "C", "N"), FORWARD_TILES)
def test_forward_with_several_tiles_in_a_block(kernels, monkeypatch, arithmetic, shared, C, N) -> None:
    torch.manual_seed(C)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_forward(kernels, *use(arithmetic), 300, C, N, orders=(5,))


# With 99 KiB tiles have 64 output channels, as double's and those of few channels have with more of it.
WIDER = [(140, 100, True), (40, 150, True), (40, 150, False)]
BACKWARD_TILES = [(arithmetic, 99, *size) for arithmetic in ARITHMETIC for size in ((40, 30, True), *WIDER)]
BACKWARD_TILES += [(arithmetic, 227, *size) for arithmetic in ARITHMETIC if arithmetic != "double" for size in WIDER]


@pytest.mark.parametrize(("arithmetic", "shared", "C", "N", "wgrad"), BACKWARD_TILES)
def test_backward_with_several_tiles_in_a_block(kernels, monkeypatch, arithmetic, shared, C, N, wgrad) -> None:
    torch.manual_seed(C + N)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_backward(kernels, *use(arithmetic), 200, C, N, wgrad=wgrad, into="accumulate", orders=(5,))


@pytest.mark.parametrize("arithmetic", ["tf32", "bf16"])
def test_backward_with_streamed_weights(kernels, monkeypatch, arithmetic) -> None:
    """The turns' weights come one after another where shared memory has no place for all."""
    torch.manual_seed(10)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(99 * 1024))
    run_backward(kernels, *use(arithmetic), 150, 36, 330, wgrad=False, orders=(5,))


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


@pytest.mark.parametrize("arithmetic", SHIPPED)
@pytest.mark.parametrize("N", [96, 150, 192])
def test_forward_in_tiles_of_96_channels(kernels, monkeypatch, arithmetic, N) -> None:
    torch.manual_seed(N)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    run_forward(kernels, *use(arithmetic), 300, 72, N, bias=N == 96, orders=(5,))


@pytest.mark.parametrize("arithmetic", SHIPPED)
@pytest.mark.parametrize(
    ("shared", "N", "wgrad"),
    [
        (163, 96, True),
        *((shared, N, wgrad) for shared in (227, 163) for N, wgrad in ((150, True), (192, True), (192, False))),
    ],
)
def test_backward_in_tiles_of_96_or_192_channels(kernels, monkeypatch, arithmetic, shared, N, wgrad) -> None:
    """192 at once where a block can have 227 KiB of shared memory, else 96 in two turns, and dW by itself."""
    torch.manual_seed(N)
    monkeypatch.setenv("DENSENET_EXT_TEST_MULTIPROCESSORS", "2")
    monkeypatch.setenv("DENSENET_EXT_TEST_SHARED", str(shared * 1024))
    run_backward(kernels, *use(arithmetic), 200, 72, N, wgrad=wgrad, orders=(5,))


def test_sums_of_many_blocks(kernels) -> None:
    torch.manual_seed(4)
    check_many_blocks(kernels)


def test_backward_of_no_rows(kernels) -> None:
    check_backward_of_no_rows(kernels)


# ---- numbers that are not ordinary -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arithmetic", ["double", "float", "tf32", "bf16"])
def test_forward_nan_and_infinity(kernels, arithmetic) -> None:
    """A NaN or infinity reaches the outputs of its row as on the CPU, and no other row."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(1)
    x, norm = make_rows(40, 20, dtype), make_norm(20, dtype)
    x[3, 5], x[7, 19], x[39, 0] = float("nan"), float("inf"), -float("inf")
    weight = torch.randn(10, 20, dtype=acc(dtype))
    got, want = forward_of(kernels, x, norm, weight, tf32), torch.zeros(40, 10, dtype=dtype)
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
    got = backward_of(kernels, x, norm, weight, grad, tf32)
    want = backward_of(None, x, norm, weight, grad, tf32)
    for name in got:
        assert torch.equal(got[name].isnan(), want[name].isnan()), name


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "double"])
def test_a_large_mean_costs_no_digits(kernels, arithmetic) -> None:
    """The mean is 1e5 deviations: x * scale + shift would have two digits left in float."""
    torch.manual_seed(6)
    run_forward(kernels, *use(arithmetic), 70, 20, 30, mean_and_deviation=(1e4, 0.1))
    run_backward(kernels, *use(arithmetic), 70, 20, 30, mean_and_deviation=(1e4, 0.1))


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "fp16"])
def test_constant_channels_are_exact(kernels, arithmetic) -> None:
    """x - mean is zero there and the norm's bias all that is left, in the ReLU's mask too."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(7)
    M, C = 100, 37
    x = (torch.linspace(-1e4, 1e4, C) / 3).to(dtype).expand(M, C).contiguous()
    bias = torch.randn(C).bfloat16().float()  # which TF32 holds as well
    bias[::3] = 0
    norm = {"mean": x[0].float(), "var": torch.zeros(C), "weight": torch.randn(C), "bias": bias, "eps": 1e-5}
    out = forward_of(kernels, x, norm, torch.eye(C), tf32)
    assert torch.equal(out, bias.relu().to(dtype).expand(M, C))
    got = backward_of(kernels, x, norm, torch.eye(C), torch.ones_like(x), tf32)
    assert torch.equal(got["grad_bias"], M * (bias > 0).float()) and not got["grad_weight"].any()


@pytest.mark.parametrize("arithmetic", ["float", "tf32", "bf16"])
def test_infinite_channels_are_as_on_the_cpu(kernels, arithmetic) -> None:
    """Infinite values, infinite statistics, and values whose product with the scale alone overflows."""
    dtype, tf32, _ = use(arithmetic)
    torch.manual_seed(8)
    inf, nan = float("inf"), float("nan")
    huge = torch.tensor(2e38).to(dtype).float().item()
    x = torch.randn(50, 12).to(dtype)
    x[3, 0], x[4, 1], x[5, 2], x[6, 3], x[:, 6] = inf, -inf, inf, nan, huge
    norm = make_norm(12, dtype)
    norm["mean"][4], norm["mean"][5], norm["mean"][6] = inf, -inf, huge
    norm["var"][5], norm["weight"][2], norm["weight"][6] = nan, 0.0, 100.0
    for columns in range(12):  # each alone with the ordinary last one: a NaN of one row hides nothing of another
        few = torch.tensor([columns, 11])
        own = {name: value[few] if isinstance(value, Tensor) else value for name, value in norm.items()}
        rows, weight = x[:, few].contiguous(), torch.rand(10, 2)
        got, want = forward_of(kernels, rows, own, weight, tf32), torch.empty(50, 10, dtype=dtype)
        ops.bn_relu_conv1x1(rows, *own.values(), weight, None, False, want, None, None)
        assert_same_kind(got, want, f"out of {columns}")
        grad = torch.rand(50, 10).to(dtype)
        got = backward_of(kernels, rows, own, weight, grad, tf32)
        for name, value in backward_of(None, rows, own, weight, grad, tf32).items():
            assert_same_kind(got[name], value, f"{name} of {columns}")


def test_backward_of_dead_channels(kernels) -> None:
    check_backward_of_dead_channels(kernels)


@pytest.mark.parametrize("frozen", [False, True])
def test_an_infinite_bottleneck_is_as_on_the_cpu(kernels, frozen) -> None:
    torch.manual_seed(9)
    x, z, grad, weight = torch.randn(40, 6), torch.randn(40, 5), torch.randn(40, 5), torch.rand(5, 6)
    z[3, 1], z[4, 2], z[5, 3] = float("inf"), -float("inf"), float("nan")
    z_norm = {f"z_{name}": value for name, value in make_norm(5, F64).items()}
    z_norm = {name: value.float() if isinstance(value, Tensor) else value for name, value in z_norm.items()}
    sums = None if frozen else torch.tensor([0.0, 1.0, 0.0, 2.0, 3.0])
    behind = {"z": z, **z_norm, "z_grad_weight": sums, "z_grad_bias": sums}
    norm = make_norm(6, torch.float32)
    got = backward_of(kernels, x, norm, weight, grad, False, **behind)
    for name, value in backward_of(None, x, norm, weight, grad, False, **behind).items():
        assert_same_kind(got[name], value, name)


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


# ---- what a launch asks of the driver --------------------------------------------------------------------------------
def test_shared_memory_is_asked_for_once(kernels) -> None:
    """For each kernel and device, and again by a call that wants more; a launch with more than was allowed fails."""

    def asked(C: int, device: int) -> int:
        kernels.c.dx_set_device(device)
        before = kernels.c.dx_allowances()
        run_forward(kernels, *use("bf16"), 20, C, 100)
        return kernels.c.dx_allowances() - before

    try:
        assert [asked(C, 1) for C in (64, 64, 136, 64, 136)] == [1, 0, 1, 0, 0]
        assert [asked(C, 2) for C in (136, 64, 136)] == [1, 0, 0]
        assert asked(136, 1) == 0
    finally:
        kernels.c.dx_set_device(0)


# ---- do these tests see faults? --------------------------------------------------------------------------------------
@pytest.mark.slow
def test_mutations_are_caught() -> None:
    """A few of them; ``python -m tests.cuda.emulation.mutations`` runs all."""
    few = [mutation for mutation in mutations.MUTATIONS if mutation.name in mutations.FEW]
    assert len(few) == len(mutations.FEW) and mutations.run(few) == []


def test_every_mutation_can_be_made() -> None:
    assert len({mutation.name for mutation in mutations.MUTATIONS}) == len(mutations.MUTATIONS) >= 60
    for mutation in mutations.MUTATIONS:
        text = mutations.place(mutation).read_text()
        assert text.count(mutation.old) == 1 and mutation.new != mutation.old, mutation.name
