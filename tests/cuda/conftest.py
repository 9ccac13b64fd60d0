"""The emulated kernels, which several files call."""

from __future__ import annotations

import os
import shutil

import pytest

from tests.cuda.emulation.library import Library, compile_library


@pytest.fixture(scope="session")
def gpu() -> Library:
    """The CUDA kernels in the emulator (tests/cuda/emulation)."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    return Library(compile_library())
