"""Blocks that go through their layers with some images after the others: what they give is what each image gives."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from densenet_ext import DenseBlock, _extension

pytestmark = pytest.mark.skipif(_extension.module is None, reason="without the compiled part")

CACHED = 2 * 1024 * 1024  # bytes of features that lie in the caches of one thread, as csrc/ops/cpu.h has it


@pytest.fixture(autouse=True)
def one_thread_without_winograd() -> Iterator[None]:
    """Sets both back. Whether Winograd's products are taken may depend on how many images there are."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    _extension.module.set_winograd("never")
    yield
    torch.set_num_threads(before)
    _extension.module.set_winograd("faster")


def made(kind: str, dtype: torch.dtype) -> tuple[DenseBlock, Tensor]:
    """A block whose norms have learned something, and 11 images of which two or three fill the caches."""
    torch.manual_seed(0)
    block = DenseBlock(3, 24, 4 if kind == "dense" else None, 12, 0.0).to(dtype)
    for buffer in block.buffers():
        if buffer.is_floating_point():
            torch.nn.init.uniform_(buffer, 0.5, 1.5)
    pixels = CACHED // (3 * 60 * torch.finfo(dtype).bits // 8)
    return block.eval(), torch.randn(11, 24, 8, pixels // 8, dtype=dtype)


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["dense", "basic"])
def test_each_image_gives_the_same(kind: str, dtype: torch.dtype, grad: bool) -> None:
    block, x = made(kind, dtype)
    with torch.set_grad_enabled(grad):
        together, each = block(x), torch.cat([block(image[None]) for image in x])
    assert torch.equal(together, each)


def test_gradients_of_parts_are_those_of_all() -> None:
    """With save="features" a block keeps nothing but its features, and may take them in parts with gradients, too."""
    block, x = made("dense", torch.float64)
    block.save = "features"
    found = []
    for images in (x, x[:1]):
        images = images.clone().requires_grad_()
        out = block(images)
        out[:1].square().sum().backward()
        assert images.grad is not None
        found.append(images.grad[:1])
    assert torch.equal(*found)
