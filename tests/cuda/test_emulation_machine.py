"""The emulator of the GPU itself (tests/cuda/emulation): it sees faults, and multiplies and rounds as a GPU does."""

from __future__ import annotations

import shutil

import pytest
import torch

from tests.cuda.emulation import mutations
from tests.cuda.emulation.compare import assert_close
from tests.cuda.emulation.library import EmulationError, Library

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")


FAULTS = {
    "none": None,
    "none in warp": None,
    "none in copy": None,
    "no barrier": "race|nobody wrote",
    "beyond the end": "outside|beyond",
    "write to input": "read-only",
    "shared for global": "an address of shared memory",
    "misaligned": "misaligned",
    "two writers": "race: two writes",
    "two blocks": "another block",
    "unwritten": "nobody wrote",
    "half a barrier": "deadlock",
    "diverged warp": "different operations",
    "copy not waited for": "not waited for",
}


@pytest.mark.parametrize("order", [0, 1, 5])
@pytest.mark.parametrize("name", FAULTS)
def test_emulator_sees_faults(gpu: Library, name: str, order: int) -> None:
    source, out = torch.arange(64.0), torch.zeros(64)
    gpu.set_order(order)
    try:
        if FAULTS[name] is None:
            gpu.fault(name, source, out)
        else:
            with pytest.raises(EmulationError, match=FAULTS[name]):
                gpu.fault(name, source, out)
    finally:
        gpu.set_order(0)
    if name == "none":
        assert torch.equal(out, source.flip(0))


@pytest.mark.parametrize("name", ["bfloat16", "float16", "tf32"])
def test_tensor_cores_multiply(gpu: Library, name: str) -> None:
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.zeros(16, 16)
    gpu.warp(name, a, b, d)
    expected = a.double() @ b.double()
    error = (d - expected).abs().max().item()
    if name == "tf32":  # ten bits of fraction are left: it must not be exact
        assert 1e-5 < error < 16 * 2**-10
    else:  # each product's last bit is cut off
        assert 0 < error < 16 * 2**-23 * expected.abs().max()


@pytest.mark.parametrize("name", ["bfloat16", "float16", "tf32"])
def test_tensor_cores_cut_off(gpu: Library, name: str) -> None:
    """What lies below the 24 bits of the largest product or sum is lost, where a rounded sum would have it."""
    dtype = torch.float32 if name == "tf32" else getattr(torch, name)
    a, b, d = torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 16, dtype=dtype), torch.zeros(16, 16)
    a[:, 0], a[:, 1:4], a[:, 15] = 1, 2**-12, 1  # products of 1, three of 2^-24 and, later, one of 2^-23
    b[0], b[1:4], b[15] = 1, 2**-12, 2**-23
    b[:, 1] *= -1
    gpu.warp(name, a, b, d)
    assert (d[:, 0] == 1 + 2**-23).all() and (d[:, 1] == -1 - 2**-23).all()


def test_exchanges_between_lanes(gpu: Library) -> None:
    a, d = torch.randn(32), torch.zeros(2, 32)
    gpu.warp("exchanges", a, a, d)
    assert_close(d[0], a.double().sum().float().expand(32), 32, "shuffle_xor")
    assert torch.equal(d[1], torch.cat([a[3:], a[29:]]))


def test_every_rounding(gpu: Library) -> None:
    """The emulator's own fp16 and bf16 round as PyTorch's, through a BatchNorm that changes nothing."""
    values = torch.cat([torch.randn(2000), torch.randn(2000) * 1e-5, torch.randn(96) * 1e5]).abs()[:, None]
    one, zero = torch.ones(1), torch.zeros(1)
    for dtype in (torch.bfloat16, torch.float16):
        x, out = values.to(dtype), torch.empty(4096, 1, dtype=dtype)
        gpu("bn_relu", x=x, mean=zero, var=one, weight=one, bias=zero, eps=0.0, out=out)
        assert torch.equal(x, out)


# ---- do the tests of kernels see faults? ----------------------------------------------------------------------------
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
