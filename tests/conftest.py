"""Fixtures for every test: a fixed seed, two threads, and the kernels that a test runs on."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from densenet_ext import _extension, kernels


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["compiled", "plain"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test on the compiled kernels and on plain PyTorch; the former is skipped while nothing is compiled."""
    if request.param == "compiled":
        if _extension.module is None:
            pytest.skip(f"no compiled part: {_extension.why_missing}")
        yield "compiled"
    else:
        with kernels.force_plain():
            yield "plain"
