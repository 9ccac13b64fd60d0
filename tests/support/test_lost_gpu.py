"""A test that leaves the GPU with an error does not take those behind it along."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from xml.etree import ElementTree

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONFTEST = """
    import torch
    from tests.support.lost_gpu import pytest_runtest_protocol

    faults = []

    def synchronize():
        if faults:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    torch.get_default_device = lambda: torch.device("cuda")
    torch.cuda.synchronize = synchronize
    """
TESTS = """
    import pytest
    import torch
    from conftest import faults

    @pytest.mark.parametrize("number", range(6))
    def test_a_kernel(number):
        torch.cuda.synchronize()
        if number == 1:
            faults.append(number)
    """


@pytest.mark.parametrize("processes", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_fault_is_one_failure(tmp_path: Path, processes: int) -> None:
    if processes:
        pytest.importorskip("xdist")
    for name, text in {"conftest.py": CONFTEST, "test_kernels.py": TESTS}.items():
        (tmp_path / name).write_text(textwrap.dedent(text))
    options = ["-n", str(processes)] if processes else []
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-v", "-p", "no:cacheprovider", f"--junit-xml={tmp_path}/out.xml", *options]
        + [f"--rootdir={tmp_path}", str(tmp_path)],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")},
        capture_output=True,
        text=True,
    )
    said = run.stdout + run.stderr
    assert "test_a_kernel[1] left the GPU with an error: CUDA error: an illegal memory access" in said, said
    cases = list(ElementTree.parse(tmp_path / "out.xml").iter("testcase"))
    failed = {case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None}
    if processes:
        assert failed <= {"test_a_kernel[1]", "test_kernels.py::test_a_kernel[1]"} and failed and run.returncode == 1
        assert {f"test_a_kernel[{number}]" for number in range(6)} <= {case.get("name") for case in cases}
    else:
        assert not failed and run.returncode == 3  # a process of its own cannot go on
