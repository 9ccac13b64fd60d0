"""Fixtures for every test: a fixed seed, two threads, and the kernels that a test runs on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from emulation import library

from densenet_ext import _extension, kernels


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated_operators(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The CUDA operators over emulated kernels (tests/emulation), for CPU tensors."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    torch.ops.load_library(library.compile_operators(tmp_path_factory.mktemp("operators")))
    return SimpleNamespace(**{name: getattr(torch.ops.densenet_ext_emulated, name).default for name in kernels.OPS})


@pytest.fixture(params=["compiled", "plain", "emulated"])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on the compiled kernels, on plain PyTorch, and on the GPU's kernels as they are emulated.

    The first is skipped while nothing is compiled.
    """
    if request.param == "plain":
        with kernels.force_plain():
            yield "plain"
        return
    if _extension.module is None:
        pytest.skip(f"no compiled part: {_extension.why_missing}")
    if request.param == "emulated":
        monkeypatch.setattr(kernels, "_compiled", request.getfixturevalue("emulated_operators"))
    yield request.param
