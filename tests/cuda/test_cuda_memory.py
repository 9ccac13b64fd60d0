"""Memory on a GPU: the peaks that the design promises, and what is left after running out of it."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densenet_ext as dx
from tests.support import lookalikes
from tests.support.helpers import DEVICE

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.xdist_group("memory"),
    pytest.mark.skipif(DEVICE.type != "cuda", reason="runs with --device cuda"),
]


def free_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


@contextmanager
def limited_to(size: int) -> Iterator[None]:
    """At most ``size`` bytes for this process' tensors."""
    free_memory()
    torch.cuda.set_per_process_memory_fraction(size / torch.cuda.get_device_properties(DEVICE).total_memory)
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def step(model: nn.Module, x: Tensor, labels: Tensor, autocast: bool) -> None:
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        loss = F.cross_entropy(model(x), labels)
    loss.backward()
    model.zero_grad(set_to_none=True)


def peak_of_a_step(model: nn.Module, x: Tensor, autocast: bool) -> int:
    """Bytes: the most that is allocated at once in a training step, parameters and images included."""
    labels = torch.zeros(len(x), dtype=torch.int64)
    step(model, x[:2], labels[:2], autocast)  # what is allocated once and for all
    free_memory()
    torch.cuda.reset_peak_memory_stats()
    step(model, x, labels, autocast)
    return torch.cuda.max_memory_allocated()


@pytest.mark.slow
def test_the_peak_of_densenet121_is_a_fraction_of_eagers() -> None:
    if torch.cuda.mem_get_info()[0] < 30 * 2**30:
        pytest.skip("eager needs about 20 GiB")
    x = torch.randn(64, 3, 224, 224).contiguous(memory_format=torch.channels_last)
    usual = lookalikes.DenseNet(32, (6, 12, 24, 16), num_init_features=64, num_classes=1000, small_inputs=False)
    peaks = {"eager": peak_of_a_step(usual.to(memory_format=torch.channels_last), x, True)}
    del usual
    for save in ("bottlenecks", "features"):
        model = dx.densenet121(save=save).to(memory_format=torch.channels_last)
        peaks[save] = peak_of_a_step(model, x, True)
        del model
    print({name: f"{peak / 2**30:.2f} GiB" for name, peak in peaks.items()})
    assert 3 * peaks["bottlenecks"] <= peaks["eager"]
    assert 5 * peaks["features"] <= peaks["eager"]


@pytest.mark.slow
def test_a_thousand_layers_train_inside_12_gb() -> None:
    model = dx.densenet_bc(1000, 12)
    x, labels = torch.randn(64, 3, 32, 32), torch.arange(64) % 10
    with limited_to(12 * 10**9):
        step(model, x, labels, autocast=False)
        assert torch.cuda.max_memory_allocated() < 12 * 10**9
    assert all(b.isfinite().all() for b in model.buffers())


def trained(block: nn.Module, x: Tensor) -> None:
    block(x).square().sum().backward()


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_running_out_of_memory_inside_a_block_leaves_it_as_it_was(save: str) -> None:
    # 16 MiB of input; the buffer takes 80 MiB, the bottlenecks of each layer 32
    block, x = dx.DenseBlock(8, 64, 4, 32, 0.0, save=save), torch.randn(64, 64, 32, 32, requires_grad=True)
    trained(block, x[:4])  # what is allocated once and for all
    block.zero_grad()
    x.grad = None
    free_memory()
    start = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = block(x)
    in_forward = torch.cuda.max_memory_allocated()
    out.square().sum().backward()
    in_all = torch.cuda.max_memory_allocated()
    del out
    block.zero_grad()
    x.grad = None

    before = {name: value.clone() for name, value in block.state_dict().items()}
    for part in (0.3, 0.6, 0.9):  # before the first layer and behind it
        with limited_to(start + int(part * (in_forward - start))), pytest.raises(torch.cuda.OutOfMemoryError):
            block(x)
        assert all(torch.equal(value, before[name]) for name, value in block.state_dict().items())

    slack = 32 * 2**20  # the allocator takes memory in larger pieces than it gives away
    assert in_all > in_forward + 2 * slack, "the backward pass has to need more, or what follows tests nothing"
    with limited_to(in_forward + slack), pytest.raises(torch.cuda.OutOfMemoryError):
        trained(block, x)
    # the forward pass was complete: statistics moved, once
    assert block.denselayer1.norm1.num_batches_tracked == before["denselayer1.norm1.num_batches_tracked"] + 1
    assert all(torch.equal(p, before[name]) for name, p in block.named_parameters())
    assert all(p.grad is None for p in block.parameters())

    with limited_to(start + (in_forward - start) // 2):
        trained(block, x[:8])
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
