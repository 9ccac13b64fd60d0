"""Large pages for what the operators write: asked for where there are whole ones, and for nothing beyond."""

from __future__ import annotations

import mmap
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from densenet_ext import _extension
from tests.support.helpers import DEVICE

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    _extension.module is None or DEVICE.type != "cpu" or not sys.platform.startswith("linux") or not SETTING.exists(),
    reason="calls the compiled CPU operators, on a system that has large pages on request",
)
PAGE = 2 << 20


@pytest.fixture
def memory() -> Iterator[Tensor]:
    """Bytes that begin with a large page, in a mapping of their own: 8 pages and a small one more."""
    with mmap.mmap(-1, 10 * PAGE) as mapped:
        whole = torch.frombuffer(mapped, dtype=torch.uint8)
        begin = -whole.data_ptr() % PAGE
        yield whole[begin : begin + 8 * PAGE + 4096]
        del whole


def wished(address: int) -> bool:
    """Whether the mapping that has the address is marked for large pages."""
    found = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *_ = line.split()
        if "-" in first and not first.endswith(":"):
            begin, end = (int(x, 16) for x in first.split("-"))
            found = begin <= address < end
        elif found and first == "VmFlags:":
            return "hg" in line.split()
    return False


def relu(out: Tensor) -> None:
    """Writes relu(x) of as many rows of 64 values as ``out`` [M, 64] has."""
    x = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    ones, zeros = torch.ones(64), torch.zeros(64)
    torch.ops.densenet_ext.bn_relu(x, zeros, ones, ones, zeros, 0.0, out)
    torch.testing.assert_close(out, x.relu(), rtol=0, atol=0)


def test_whole_pages_of_what_is_written_are_asked_for(memory: Tensor) -> None:
    rows = memory.view(torch.float32).view(-1, 64)
    begin = memory.data_ptr()
    inner = rows[4 : 4 + 3 * PAGE // 256]  # from behind the first page's beginning into the fourth
    relu(inner)
    assert [wished(begin + i * PAGE) for i in range(8)] == [False, True, True, *[False] * 5]


def test_less_than_a_page_is_left_alone(memory: Tensor) -> None:
    rows = memory.view(torch.float32).view(-1, 64)
    relu(rows[4 : PAGE // 256])
    assert not wished(memory.data_ptr())


def test_what_is_read_is_left_alone(memory: Tensor) -> None:
    rows = memory.view(torch.float32).view(-1, 64)
    torch.ops.densenet_ext.channel_stats(rows, torch.empty(64), torch.empty(64))
    assert not wished(memory.data_ptr())
