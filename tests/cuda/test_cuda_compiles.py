"""The CUDA backend is built as a user builds it, on a machine that may have no GPU: `pip wheel` with nvcc.

From the same build comes ptxas' report: it found registers for all kernels, without spills and local memory; for later
generations the kernels that need most are compiled alone. And the machine code shows what became of the sources.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
import zipfile
from collections.abc import Callable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple, NoReturn

import pytest
import torch

from build_backend import extension
from densenet_ext import kernels
from tests.cuda import machine_code

ROOT = Path(__file__).resolve().parents[2]
ARCHITECTURES = ("8.0", "9.0a")
# Both from the PTX of the first, which takes longer to make than all code from it: the sources do not ask for the
# architecture (a test below), and what nvcc 13.0 makes of each file for either differs in the line that names it.
NVCC_FLAGS = "-Xptxas=-v -gencode=arch=compute_80,code=sm_90a"
WITHOUT_KERNELS = ("conv3x3_choice.cu",)


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
    names = machine_code.demangled(entry[0] for entry in found)
    report = []
    for name, (_, architecture, stack, stores, loads, registers, rest) in zip(names, found, strict=True):
        shared = re.search(r"(\d+) bytes smem", rest)
        used = int(stores) + int(loads)
        report.append(
            Kernel(name, architecture, int(registers), int(stack), used, int(shared.group(1)) if shared else 0)
        )
    return report


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


def leave_out(missing: str) -> NoReturn:
    """Skips the test, but fails where the environment asks for GPU kernels, as in CI."""
    if os.environ.get("DENSENET_EXT_CUDA") == "1":
        pytest.fail(f"DENSENET_EXT_CUDA=1, and there is {missing}")
    pytest.skip(missing)


def find_toolkit() -> Path:
    toolkit = extension.find_toolkit()
    if toolkit is None or shutil.which("c++filt") is None:
        leave_out("no c++filt" if toolkit else "no CUDA toolkit")
    return toolkit


def test_what_is_asked_for_is_not_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "find_toolkit", lambda: None)
    monkeypatch.setenv("DENSENET_EXT_CUDA", "1")
    with pytest.raises(pytest.fail.Exception, match="DENSENET_EXT_CUDA=1, and there is no CUDA toolkit"):
        find_toolkit()
    monkeypatch.delenv("DENSENET_EXT_CUDA")
    with pytest.raises(pytest.skip.Exception, match="no CUDA toolkit"):
        find_toolkit()


class Build(NamedTuple):
    log: str
    wheel: Path


def key_of_build(toolkit: Path) -> str:
    """All that the compiled part is made from: its sources, what decides how they are compiled, and with what."""
    files = [ROOT / "setup.py", ROOT / "pyproject.toml"]
    files += sorted(path for name in ("csrc", "build_backend") for path in (ROOT / name).rglob("*.*") if path.is_file())
    texts = [path.read_bytes() for path in files if path.suffix != ".pyc"]
    nvcc = subprocess.run([f"{toolkit}/bin/nvcc", "--version"], capture_output=True).stdout
    with_what = [sys.version, torch.__version__, ARCHITECTURES, NVCC_FLAGS, os.environ.get("CXX"), nvcc]
    return hashlib.sha256(repr([texts, with_what]).encode()).hexdigest()[:16]


@pytest.fixture(scope="module")
def build() -> Build:
    """The wheel, which stays in build/cuda-wheel until something of it changes: compiling takes minutes."""
    toolkit = find_toolkit()
    folder = ROOT / "build" / "cuda-wheel" / key_of_build(toolkit)
    log = folder / "log.txt"
    if not log.exists():
        shutil.rmtree(folder.parent, ignore_errors=True)
        log.write_text(made_wheel(folder), encoding="utf-8")
    (wheel,) = folder.glob("densenet_ext-*.whl")
    return Build(log.read_text(encoding="utf-8"), wheel)


def made_wheel(folder: Path) -> str:
    """Builds the wheel into ``folder`` as a user would; returns what pip and the compilers print."""
    source = folder / "source"
    source.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("csrc", "build_backend", "densenet_ext"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--verbose", "--no-deps", "--wheel-dir", str(folder), str(source)]
    settings = {
        "DENSENET_EXT_CUDA": "1",
        "TORCH_CUDA_ARCH_LIST": ARCHITECTURES[0],
        "NVCC_APPEND_FLAGS": NVCC_FLAGS,
        # What is looked at is the GPU's code; the CPU's, at each SIMD level, would take as long again at -O3.
        "CXXFLAGS": f"{os.environ.get('CXXFLAGS', '')} -O0",
    }
    run = subprocess.run(
        command, env={**os.environ, **settings}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert run.returncode == 0, run.stdout[-10000:]
    shutil.rmtree(source)
    return run.stdout


def test_the_sources_do_not_ask_for_the_architecture() -> None:
    """Nor for what an architecture has alone: of one PTX is made the code of several."""
    asking = re.compile(r"__CUDA_ARCH|__NVCC_ARCH|NV_IF_TARGET|NV_IF_ELSE_TARGET|NV_DISPATCH_TARGET")
    files = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    assert files and [str(path) for path in files if asking.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.slow
def test_the_build_says_what_it_decided(build: Build) -> None:
    assert "GPU kernels: yes (DENSENET_EXT_CUDA=1" in build.log
    assert f"GPU architectures: {ARCHITECTURES[0]}\n" in build.log
    ours = [line for line in build.log.splitlines() if "warning" in line and "csrc" in line]
    assert not ours, ours


@pytest.mark.slow
def test_no_kernel_spills(build: Build, record_property: Callable[[str, object], None]) -> None:
    report = read_report(build.log)
    assert {kernel.architecture for kernel in report} == {f"sm_{a.replace('.', '')}" for a in ARCHITECTURES}
    lines = [
        f"{kernel.architecture:7} {kernel.registers:4} registers {kernel.stack:4} B local "
        f"{kernel.shared:6} B static shared  {kernel.name}"
        for kernel in sorted(report)
    ]
    record_property("ptxas", "\n".join(lines))  # printed at the end of the run
    bad = [kernel for kernel in report if (kernel.stack or kernel.spilled) and not kernel.is_double]
    assert not bad, bad


# The newer generations that the toolkit knows: each file by itself, as a wheel for all four would take twice as long.
LATER_ARCHITECTURES = ("sm_100", "sm_120")
SOURCES = sorted(path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu") if path.name not in WITHOUT_KERNELS)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_spills_on_later_generations(source: str, record_property: Callable[[str, object], None]) -> None:
    """One process of nvcc, a thread of it for each architecture: 10 to 30 seconds a file. Its report stays in build."""
    toolkit = find_toolkit()
    known = subprocess.run([f"{toolkit}/bin/nvcc", "--list-gpu-code"], capture_output=True, text=True).stdout.split()
    wanted = [architecture for architecture in LATER_ARCHITECTURES if architecture in known]
    if not wanted:
        pytest.skip(f"this nvcc knows neither of {', '.join(LATER_ARCHITECTURES)}")
    kept = ROOT / "build" / "ptxas" / f"{Path(source).stem}-{'-'.join(wanted)}-{key_of_build(toolkit)}.txt"
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        for old in kept.parent.glob(f"{Path(source).stem}-*.txt"):
            old.unlink()
        command = [f"{toolkit}/bin/nvcc", "-std=c++17", "-O3", "--threads", str(len(wanted)), "-Xptxas=-v"]
        # PTX once, which takes longest: from that of sm_100 kernels have as many registers on sm_120 as from their own.
        command += [f"-gencode=arch={wanted[0].replace('sm', 'compute')},code=[{','.join(wanted)}]"]
        # Without the host's part, which is the same for all.
        command += ["-fatbin", str(ROOT / "csrc" / "cuda" / source), "-o", os.devnull]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, run.stderr[-5000:]
        kept.write_text(run.stderr, encoding="utf-8")
    report = read_report(kept.read_text(encoding="utf-8"))
    assert {kernel.architecture for kernel in report} == set(wanted)
    lines = [f"{kernel.architecture:7} {kernel.registers:4} registers  {kernel.name}" for kernel in sorted(report)]
    record_property("ptxas", "\n".join(lines))
    bad = [kernel for kernel in report if (kernel.stack or kernel.spilled) and not kernel.is_double]
    assert not bad, bad


@pytest.mark.slow
def test_the_machine_code_is_what_was_meant(build: Build, tmp_path: Path) -> None:
    """Whole stores, nothing in local memory, products on the tensor cores, asynchronous copies (machine_code.py)."""
    programs = machine_code.find_programs(find_toolkit())
    if programs is None:
        leave_out(f"no {' and '.join(machine_code.PROGRAMS)}")
    kernels = machine_code.disassemble(build.wheel, programs, tmp_path)
    architectures = [f"sm_{a.replace('.', '')}" for a in ARCHITECTURES]
    assert machine_code.narrow_stores(kernels, architectures) == []
    assert machine_code.local_memory([kernel for kernel in kernels if "<double" not in kernel.name]) == []
    assert machine_code.wrong_products(kernels, architectures) == []
    assert machine_code.missing_copies(kernels, architectures) == []


# What every Linux that runs a manylinux wheel has: C's and C++'s own.
OF_THE_SYSTEM = (
    "libc.so.*",
    "libm.so.*",
    "libstdc++.so.*",
    "libgcc_s.so.*",
    "ld-linux*",
    "libpthread.so.*",
    "libdl.so.*",
)


@pytest.mark.slow
def test_the_wheel_brings_no_library_along(build: Build, tmp_path: Path) -> None:
    """It needs torch's and the toolkit's, which torch loads; a copy of these beside it would be a second torch. What CI
    has auditwheel leave out of wheels names all of them."""
    zipfile.ZipFile(build.wheel).extractall(tmp_path)
    (library,) = tmp_path.rglob("*.so*")
    assert library.parent == tmp_path / "densenet_ext" and library.name.startswith("_C.")
    readelf = shutil.which("readelf")
    if readelf is None:
        leave_out("no readelf")
    dynamic = subprocess.run([readelf, "-dW", str(library)], capture_output=True, text=True, check=True).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert any(name.startswith("libcudart.so") for name in needed) and any("torch" in name for name in needed), needed
    assert not re.search(r"\((RPATH|RUNPATH)\)", dynamic), dynamic  # of the machine that built it
    left_out = re.findall(r"--exclude '([^']+)'", (ROOT / ".github" / "workflows" / "ci.yml").read_text())
    known = (*OF_THE_SYSTEM, *left_out)
    assert [name for name in needed if not any(fnmatch(name, pattern) for pattern in known)] == []


@pytest.mark.slow
def test_the_result_loads_or_says_why_not(build: Build, tmp_path: Path) -> None:
    """With a torch that has CUDA every operator is there for GPUs; without, the package goes on in plain PyTorch."""
    zipfile.ZipFile(build.wheel).extractall(tmp_path)
    # The wheel may be older than today's Python.
    python = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "densenet_ext", tmp_path / "densenet_ext", ignore=python, dirs_exist_ok=True)
    code = """
        import json, torch, densenet_ext as dx
        from densenet_ext import kernels
        info = dx.build_info()
        has = torch._C._dispatch_has_kernel_for_dispatch_key
        registered = [name for name in kernels.OPS if info["compiled"] and has(f"densenet_ext::{name}", "CUDA")]
        y = dx.DenseBlock(2, 4, 2, 3, 0.0)(torch.randn(2, 4, 5, 5)).sum()
        print(json.dumps([info["why_missing"], registered, y.isfinite().item(), kernels.why_plain("cuda")]))
        """
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    why_missing, registered, finite, why_plain = json.loads(run.stdout)
    assert finite
    if torch.version.cuda is None:
        assert "does not load with torch" in why_missing and "cuda_stream" in why_missing and why_plain == why_missing
    else:
        assert why_missing is None and registered == [name for name in kernels.OPS if name not in kernels.CPU_OPS]
        assert torch.cuda.is_available() or why_plain == "there is no GPU here"
