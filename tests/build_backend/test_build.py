"""The build: its decisions, its one-sentence errors, what it needs of its environment, and life without the result."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

import build_backend
import densenet_ext as dx
from build_backend import environment, extension
from densenet_ext import _extension

ROOT = Path(__file__).resolve().parents[2]


def run_python(code: str, **environ: str) -> str:
    """The standard output of a fresh interpreter in the source folder."""
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=ROOT,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_build_info_describes_the_compiled_part() -> None:
    info = dx.build_info()
    assert info["version"] == dx.__version__
    assert info["torch_running"] == str(torch.__version__)
    assert info["compiled"] == (info["why_missing"] is None)
    if not info["compiled"]:
        pytest.skip(info["why_missing"])
    assert info["torch_built_with"] and info["compiler"]
    assert info["simd"] in info["simd_available"]
    assert info["simd_available"][0] == "portable"
    assert bool(info["cuda"]) == bool(info["cuda_architectures"]) == _extension.has_cuda


def test_the_compiled_part_is_there_wherever_the_tests_run_after_an_install() -> None:
    try:
        importlib.metadata.version("densenet_ext")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("densenet_ext is not installed here")
    assert dx.build_info()["why_missing"] is None


def test_import_works_without_the_compiled_part_and_says_why() -> None:
    out = run_python("""
        import json, sys
        sys.modules["densenet_ext._C"] = None      # makes its import fail
        import torch, densenet_ext as dx
        block = dx.DenseBlock(2, 4, 2, 3, 0.0)
        y = block(torch.randn(2, 4, 5, 5))
        y.sum().backward()
        print(json.dumps([dx.build_info(), list(y.shape)]))
        """)
    info, shape = json.loads(out)
    assert shape == [2, 10, 5, 5]
    assert info["compiled"] is False and info["simd"] is None and info["simd_available"] == []
    assert "compiled part" in info["why_missing"]


def test_reasons_for_a_missing_compiled_part(tmp_path: Path) -> None:
    package = tmp_path / "densenet_ext"
    package.mkdir()
    error = ImportError("undefined symbol: f")
    assert "not installed beside the package: undefined symbol: f" in _extension._explain(error, package)
    (tmp_path / "csrc").mkdir()
    assert "pip install -e ." in _extension._explain(error, package)
    (package / "_C.cpython-27-other.so").touch()
    assert "another Python (_C.cpython-27-other.so" in _extension._explain(error, package)
    (package / f"_C{importlib.machinery.EXTENSION_SUFFIXES[0]}").touch()
    assert "does not load with torch" in _extension._explain(error, package)


@pytest.fixture(params=["pip", "another front end"])
def hook_error(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Calls the first hook that needs what is compiled with, and returns the one line with which it ends."""

    def call() -> str:
        if request.param == "pip":
            monkeypatch.setenv("PIP_BUILD_TRACKER", "somewhere")
        else:
            monkeypatch.delenv("PIP_BUILD_TRACKER", raising=False)
            build_backend.get_requires_for_build_wheel()
        with pytest.raises(SystemExit) as end:
            if request.param == "pip":
                build_backend.get_requires_for_build_wheel()
            build_backend.build_wheel("nowhere")
        message = str(end.value)
        assert message.startswith("densenet_ext: ") and message.endswith(".") and "\n" not in message
        return message

    return call


def test_no_torch_is_one_sentence(monkeypatch: pytest.MonkeyPatch, hook_error) -> None:
    monkeypatch.setattr(environment, "torch_version", lambda: None)
    message = hook_error()
    assert "torch is not installed" in message and "2.11" in message and sys.executable in message
    assert "uv pip install --no-build-isolation ." in message and "python -m build --no-isolation" in message


def test_an_old_torch_is_one_sentence(monkeypatch: pytest.MonkeyPatch, hook_error) -> None:
    monkeypatch.setattr(environment, "torch_version", lambda: "2.10.1+cu128")
    assert "torch >= 2.11 is needed" in (message := hook_error()) and "2.10.1+cu128" in message


@pytest.mark.parametrize("version", ["2.11.0", "2.11.0a0+git1234", "2.13.0+cpu", "3.0.0"])
def test_a_new_enough_torch_passes(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr(environment, "torch_version", lambda: version)
    monkeypatch.setattr(environment, "cxx_compiler", lambda: "c++")
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(ROOT))
    monkeypatch.setattr(environment.Path, "exists", lambda self: True)
    environment.check()


def test_no_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch, hook_error) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "CXX=no-such-compiler was not found" in hook_error()
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", "")
    assert "a C++ compiler is needed (no c++ on PATH)" in hook_error()


def test_torch_version_is_read_without_importing_torch() -> None:
    out = run_python("""
        import sys
        from build_backend import environment
        print(environment.torch_version(), "torch" in sys.modules)
        """)
    assert out.split() == [str(torch.__version__), "False"]


def test_own_packages_come_back_behind_those_of_the_build(tmp_path: Path) -> None:
    # As in pip's isolated build: site-packages are gone, and the build's folder is on PYTHONPATH.
    out = run_python(
        """
        import sys
        sys.path = [path for path in sys.path if "-packages" not in path]
        from build_backend import environment
        isolated, before = list(sys.path), environment.torch_version()
        environment.restore_own_packages()
        print(before, environment.torch_version(), [path for path in sys.path if path in isolated] == isolated)
        """,
        PYTHONPATH=str(tmp_path),
        PYTHONNOUSERSITE="1",
    )
    assert out.split() == ["None", str(torch.__version__), "True"]


def test_ninja_is_found_in_a_venv_that_is_not_activated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    ninja = tmp_path / "ninja"
    ninja.write_text("#!/bin/sh\necho 1.11\n")
    ninja.chmod(0o755)
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "ninja").write_text("#!/bin/sh\nexit 1\n")
    (broken / "ninja").chmod(0o755)
    monkeypatch.setenv("PATH", f"{broken}:/usr/bin/../bin/nowhere")
    monkeypatch.setattr(environment.sysconfig, "get_path", lambda name: str(tmp_path))
    assert environment.find_ninja() == str(ninja)
    environment.put_ninja_on_path()
    assert os.environ["PATH"].startswith(f"{tmp_path}{os.pathsep}")


def test_only_what_is_missing_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "find_ninja", lambda: "ninja")
    monkeypatch.setattr(environment, "setuptools_versions", lambda: [(80, "a")])
    assert environment.missing_requirements() == []
    monkeypatch.setattr(environment, "setuptools_versions", lambda: [(65, "a"), (80, "b")])
    assert environment.missing_requirements() == ["setuptools>=77"]
    monkeypatch.setattr(environment, "setuptools_versions", list)
    monkeypatch.setattr(environment, "find_ninja", lambda: None)
    assert environment.missing_requirements() == ["setuptools>=77", "ninja"]
    assert environment.missing_requirements(compiles=False) == ["setuptools>=77"]


@pytest.mark.parametrize(("installed", "found"), [([], "none"), ([(65, "a")], "an older one (65)")])
def test_no_setuptools_or_an_old_one_is_one_sentence(monkeypatch: pytest.MonkeyPatch, installed, found: str) -> None:
    monkeypatch.setattr(environment, "restore_own_packages", lambda: None)
    monkeypatch.setattr(environment, "setuptools_versions", lambda: installed)
    with pytest.raises(
        SystemExit, match=r"^densenet_ext: setuptools >= 77 is needed, and .*setuptools>=77'\)\.$"
    ) as end:
        build_backend.build_sdist("nowhere")
    assert f"has {found}; install it first" in str(end.value)


def test_a_good_setuptools_wins_over_the_old_one_of_a_new_venv(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for folder, version in (("venv", "65.5.0"), ("shared", "80.9.0")):
        metadata = tmp_path / folder / f"setuptools-{version}.dist-info" / "METADATA"
        metadata.parent.mkdir(parents=True)
        metadata.write_text(f"Metadata-Version: 2.1\nName: setuptools\nVersion: {version}\n")
    old, good = str(tmp_path / "venv"), str(tmp_path / "shared")
    monkeypatch.setattr(environment, "own_paths", list)
    monkeypatch.setattr(sys, "path", [old, good])
    assert environment.setuptools_versions() == [(65, old), (80, good)]
    environment.restore_own_packages()
    assert sys.path == [good, old, good]


TOOLKIT = Path("/toolkit")


@pytest.mark.parametrize(
    ("forced", "torch_cuda", "toolkit", "build", "why"),
    [
        (None, "13.0", TOOLKIT, True, "torch has CUDA 13.0"),
        (None, "13.0", None, False, "no CUDA toolkit was found"),
        (None, None, TOOLKIT, False, "torch without CUDA"),
        ("", None, TOOLKIT, False, "torch without CUDA"),
        ("0", "13.0", TOOLKIT, False, "DENSENET_EXT_CUDA=0"),
        ("1", None, TOOLKIT, True, "does not load here"),
        ("1", "13.0", TOOLKIT, True, "DENSENET_EXT_CUDA=1"),
        (None, "12.9", TOOLKIT, False, "is 13.1, of another major version"),
    ],
)
def test_cuda_decision(monkeypatch: pytest.MonkeyPatch, forced, torch_cuda, toolkit, build, why) -> None:
    monkeypatch.setattr(extension, "toolkit_version", lambda toolkit: (13, 1))
    decision = extension.decide_cuda(forced, torch_cuda, toolkit)
    assert decision.build is build and why in decision.why
    assert decision.home == (toolkit if build else None)


def test_cuda_cannot_be_forced_without_a_toolkit_nor_by_another_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "toolkit_version", lambda toolkit: (13, 1))
    with pytest.raises(environment.BuildError, match="of another major version; set CUDA_HOME"):
        extension.decide_cuda("1", "12.9", TOOLKIT)
    with pytest.raises(environment.BuildError, match="no CUDA toolkit was found; set CUDA_HOME"):
        extension.decide_cuda("1", "13.0", None)
    with pytest.raises(environment.BuildError, match="must be 0 or 1, and is 'yes'"):
        extension.decide_cuda("yes", "13.0", TOOLKIT)


def test_a_launcher_on_path_does_not_pass_for_a_toolkit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    home = tmp_path / "cuda"
    for folder in (home / "bin", home / "include", tmp_path / "bin"):
        folder.mkdir(parents=True)
    for nvcc in (home / "bin" / "nvcc", tmp_path / "bin" / "nvcc"):
        nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.9, V12.9.1'\n")
        nvcc.chmod(0o755)
    (home / "include" / "cuda_runtime.h").touch()
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(home))
    assert extension.find_toolkit() == home
    assert extension.toolkit_version(home) == (12, 9)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert extension.find_toolkit() is None
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    assert extension.find_toolkit() != tmp_path


def test_architectures(monkeypatch: pytest.MonkeyPatch) -> None:
    assert extension.default_architectures((12, 4)) == ["8.0", "9.0+PTX"]
    assert extension.default_architectures((12, 8)) == ["8.0", "9.0", "10.0", "12.0+PTX"]
    assert extension.default_architectures((13, 0)) == ["8.0", "9.0", "10.0", "11.0", "12.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "9.0 10.0+PTX")
    assert extension.choose_architectures(TOOLKIT) == ["9.0", "10.0+PTX"]
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "Ampere;9.0a")
    assert extension.choose_architectures(TOOLKIT) == ["Ampere", "9.0a"]
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: [(10, 0), (9, 0)][index])
    assert extension.choose_architectures(TOOLKIT) == ["9.0", "10.0+PTX"]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(extension, "toolkit_version", lambda toolkit: (12, 4))
    assert extension.choose_architectures(TOOLKIT) == ["8.0", "9.0+PTX"]


@pytest.mark.parametrize("early", ["7.5", "7.5+PTX", "Turing", "Volta+PTX", "6.1"])
def test_an_early_gpu_is_one_sentence_and_the_pure_form(early: str) -> None:
    yes = extension.Cuda(True, "torch has CUDA 13.0", TOOLKIT)
    mixed = extension.without_early_architectures(yes, [early, "8.6", "9.0a+PTX"], forced=True)
    assert mixed.build and mixed.architectures == "8.6;9.0a+PTX"
    assert mixed.why == f"torch has CUDA 13.0; not for {early}: the kernels need compute capability 8.0 or later"
    alone = extension.without_early_architectures(yes, [early], forced=False)
    assert alone == (False, f"not for {early}: the kernels need compute capability 8.0 or later", None, "")
    with pytest.raises(environment.BuildError, match=r"DENSENET_EXT_CUDA=1, and .*capability 8.0 or later"):
        extension.without_early_architectures(yes, [early], forced=True)


def test_later_gpus_are_no_early_ones() -> None:
    yes = extension.Cuda(True, "torch has CUDA 13.0", TOOLKIT)
    names = ["8.0", "9.0a", "10.0f", "12.0+PTX", "Ampere", "Hopper"]
    assert extension.without_early_architectures(yes, names, False) == yes._replace(architectures=";".join(names))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("sm_90", "got 'sm_90' (write 9.0)"),
        ("8.0 sm_100a", "got 'sm_100a' (write 10.0a)"),
        ("compute_80", "(write 8.0)"),
        ("90", "got '90'."),
        ("9.0+ptx", "got '9.0+ptx'."),
    ],
)
def test_other_spellings_of_architectures_are_one_sentence(monkeypatch, given: str, message: str) -> None:
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
    with pytest.raises(environment.BuildError, match="expected compute capabilities such as 9.0") as error:
        extension.choose_architectures(TOOLKIT)
    assert message in str(error.value)
    for known in ("9.0a", "Hopper", "Volta;8.0+PTX", "12.0f"):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", known)
        assert extension.choose_architectures(TOOLKIT) == known.split(";")


def test_clang_is_known_by_what_it_says(tmp_path: Path) -> None:
    for text, expected in (("Debian clang version 14.0.6", True), ("c++ (Debian 12.2.0) 12.2.0", False)):
        compiler = tmp_path / "c++"
        compiler.write_text(f"#!/bin/sh\necho '{text}'\n")
        compiler.chmod(0o755)
        assert environment.is_clang(str(compiler)) == expected
    gcc, clang = extension.optimisation_flags({}), extension.optimisation_flags({}, clang=True)
    assert set(gcc) - set(clang) == {"-Wno-uninitialized", "-Wno-maybe-uninitialized"}


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("clang++") is None, reason="no clang")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.name)
def test_clang_compiles_the_kernels_without_a_warning(source: Path) -> None:
    command = ["clang++", "-std=c++20", "-O1", "-Wall", "-Werror", f"-I{ROOT / 'csrc'}", "-S", "-o", "/dev/null"]
    run = subprocess.run([*command, str(source)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[:2000]


def test_the_standard_variables_win() -> None:
    assert extension.optimisation_flags({})[:2] == ["-O3", "-g0"]
    flags = extension.optimisation_flags({"CXXFLAGS": "-O1 -march=native", "CFLAGS": "-g"})
    assert "-O3" not in flags and "-g0" not in flags and flags[-2:] == ["-O1", "-march=native"]
    for forbidden in ("-std", "-gencode", "--use_fast_math"):
        assert not any(flag.startswith(forbidden) for flag in extension.optimisation_flags({}))


def test_sources_are_found_in_a_fixed_order() -> None:
    files = extension.sources(ROOT, cuda=False)
    assert files[0] == "csrc/module.cpp" and files == list(dict.fromkeys(files))
    assert all(name.startswith(("csrc/module", "csrc/ops/", "csrc/cpu/")) for name in files)
    assert set(files) <= set(extension.sources(ROOT, cuda=True))
