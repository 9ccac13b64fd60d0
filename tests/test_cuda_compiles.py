"""The CUDA kernels compile, and ptxas finds registers for all of them: no spills, no local memory."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest

KERNELS = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a")


class Kernel(NamedTuple):
    name: str  # demangled, without its arguments
    architecture: str
    registers: int
    stack: int  # bytes of local memory
    spilled: int  # bytes stored and loaded
    shared: int  # bytes, static

    @property
    def is_double(self) -> bool:
        return re.search(r"<double\b", self.name) is not None


def read_report(text: str) -> list[Kernel]:
    """The kernels of what ptxas prints with -v."""
    found = re.findall(
        r"Compiling entry function '(\w+)' for '(\w+)'.*?"
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads.*?"
        r"Used (\d+) registers([^\n]*)",
        text,
        flags=re.DOTALL,
    )
    kernels = []
    for mangled, architecture, stack, stores, loads, registers, rest in found:
        shared = re.search(r"(\d+) bytes smem", rest)
        name = subprocess.run(["c++filt", mangled], capture_output=True, text=True, check=True).stdout.strip()
        name = re.sub(r"^void |dx::cuda::|dx::|\(anonymous namespace\)::|\(.*\)$", "", name)
        used = int(stores) + int(loads)
        kernels.append(
            Kernel(name, architecture, int(registers), int(stack), used, int(shared.group(1)) if shared else 0)
        )
    return kernels


def test_reading_a_report() -> None:
    if shutil.which("c++filt") is None:
        pytest.skip("no c++filt")
    report = """ptxas info    : Compiling entry function '_Z3fooIdEvT_' for 'sm_80'
ptxas info    : Function properties for _Z3fooIdEvT_
    16 bytes stack frame, 4 bytes spill stores, 8 bytes spill loads
ptxas info    : Used 30 registers, used 1 barriers, 128 bytes smem, 360 bytes cmem[0]
"""
    (kernel,) = read_report(report)
    assert kernel == ("foo<double>", "sm_80", 30, 16, 12, 128) and kernel.is_double


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted(KERNELS.glob("*.cu")), ids=lambda p: p.name)
def test_compiles_without_spills(source: Path, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None or shutil.which("c++filt") is None:
        pytest.skip("no CUDA toolkit")
    command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-c", str(source), "-o", str(tmp_path / "kernels.o")]
    command += [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "warning" not in run.stderr, run.stderr
    kernels = read_report(run.stderr)
    assert {kernel.architecture for kernel in kernels} == {f"sm_{a}" for a in ARCHITECTURES}
    for kernel in sorted(kernels):
        print(f"{kernel.architecture:7} {kernel.registers:4} registers {kernel.stack:4} B local  {kernel.name}")
    bad = [kernel for kernel in kernels if (kernel.stack or kernel.spilled) and not kernel.is_double]
    assert not bad, bad
