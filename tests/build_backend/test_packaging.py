"""What the package is to others: its metadata, its source archive, an import under a torch that does not fit."""

from __future__ import annotations

import ast
import fnmatch
import os
import re
import shutil
import subprocess
import sys
import tarfile
import textwrap
from pathlib import Path

import pytest

import densenet_ext as dx
from densenet_ext import _extension

ROOT = Path(__file__).resolve().parents[2]
WITHOUT_TORCH = """
    import sys
    sys.modules["torch"] = None  # makes its import fail, and find_spec find none
    import build_backend
"""


def run_python(folder: Path, code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    code = textwrap.dedent(code)
    environ = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PIP_BUILD_TRACKER")}
    command = [sys.executable, *arguments, "-c", code]
    return subprocess.run(command, cwd=folder, env=environ, capture_output=True, text=True)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a source archive is made of: setuptools writes beside it."""
    folder = tmp_path_factory.mktemp("source") / "densenet_ext"
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    for name in ("csrc", "densenet_ext", "build_backend", "tests", "benchmarks", "docs", "tools"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for path in ROOT.iterdir():
        if path.is_file() and path.name != ".git":
            shutil.copy(path, folder / path.name)
    return folder


def test_metadata_need_no_torch(source: Path, tmp_path: Path) -> None:
    code = f"{WITHOUT_TORCH}\n    print(build_backend.get_requires_for_build_wheel(), file=sys.stderr)"
    code += f"\n    print(build_backend.prepare_metadata_for_build_wheel({str(tmp_path)!r}))"
    run = run_python(source, code)
    assert run.returncode == 0, run.stderr
    metadata = (tmp_path / run.stdout.splitlines()[-1] / "METADATA").read_text()
    assert f"\nVersion: {dx.__version__}\n" in metadata
    assert "\nLicense-Expression: MIT\n" in metadata and "\nLicense-File: LICENSE\n" in metadata
    assert "\nDescription-Content-Type: text/markdown\n" in metadata and "\n## Install\n" in metadata
    assert not re.search(r"\]\((?!https?:)", metadata), "a link that leads nowhere on the page of a package index"
    assert "Classifier: Typing :: Typed" in metadata and "Classifier: License" not in metadata
    assert "\nRequires-Dist: torch>=2.11" in metadata and "\nRequires-Python: >=3.10\n" in metadata


def test_a_source_archive_needs_no_torch_and_holds_everything(source: Path, tmp_path: Path) -> None:
    run = run_python(source, f"{WITHOUT_TORCH}\n    print(build_backend.build_sdist({str(tmp_path)!r}))")
    assert run.returncode == 0, run.stderr
    with tarfile.open(tmp_path / run.stdout.splitlines()[-1]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    listed = {
        str(path.relative_to(ROOT)) for folder in ("csrc", "build_backend") for path in (ROOT / folder).rglob("*.*")
    }
    assert {name for name in listed if not name.endswith(".pyc")} <= names
    assert {"CITATION.cff", "LICENSE", "Makefile", "constraints.txt", "densenet_ext/py.typed", "setup.py"} <= names


def test_a_wheel_without_torch_says_which_flag_its_front_end_has(source: Path) -> None:
    run = run_python(source, f"{WITHOUT_TORCH}\n    build_backend.build_wheel('nowhere')")
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert "torch is not installed" in run.stderr and "--no-isolation" in run.stderr


def test_an_old_python_is_one_sentence() -> None:
    for start in ("import build_backend", "import runpy; runpy.run_path('tools/prepare_venv.py', run_name='__main__')"):
        run = run_python(ROOT, f"import sys; sys.version_info = (3, 9, 7, 'final', 0); {start}")
        assert run.returncode == 1
        assert run.stderr == f"densenet_ext: Python 3.10 or newer is needed, and {sys.executable} is Python 3.9.\n"
    for name in ("build_backend/__init__.py", "tools/prepare_venv.py", "setup.py"):
        ast.parse((ROOT / name).read_text(), feature_version=(3, 8))


def test_a_compiled_part_that_does_not_load_warns_once(tmp_path: Path) -> None:
    """A CUDA build under a torch without CUDA, say: here an empty file."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    package = shutil.copytree(ROOT / "densenet_ext", tmp_path / "densenet_ext", ignore=ignored)
    code = """
        import densenet_ext as dx, torch
        print(dx.build_info()["why_missing"], dx.DenseBlock(2, 4, 2, 3, 0.0)(torch.randn(2, 4, 5, 5)).shape[1])
        """
    quiet = run_python(tmp_path, code, "-W", "error::RuntimeWarning")
    assert quiet.returncode == 0 and "densenet_ext" not in quiet.stderr, quiet.stderr
    _extension._path_in(package).touch()
    loud = run_python(tmp_path, code)
    assert loud.stdout.rstrip().endswith("10") and "does not load with torch" in loud.stdout
    assert loud.stderr.count("RuntimeWarning: densenet_ext runs in plain PyTorch: the compiled part does not load") == 1


@pytest.mark.skipif(_extension.module is None, reason="no compiled part")
def test_a_compiled_part_of_another_version_is_told(tmp_path: Path) -> None:
    package = shutil.copytree(
        ROOT / "densenet_ext", tmp_path / "densenet_ext", ignore=shutil.ignore_patterns("__pycache__")
    )
    operators = package / "kernels" / "__init__.py"
    operators.write_text(operators.read_text().replace("OPS = (\n", 'OPS = (\n    "later_operator",\n', 1))
    run = run_python(tmp_path, "import densenet_ext")
    last = run.stderr.splitlines()[-1]
    assert last.startswith("ImportError: the compiled part is of another version (") and "later_operator" in last
    assert last.endswith("; build densenet_ext again")


def test_why_there_are_no_gpu_kernels_depends_on_the_torch_that_runs() -> None:
    built = {"why_no_cuda": "built with a torch without CUDA"}
    assert _extension._explain_no_cuda(built, None) == "built with a torch without CUDA"
    text = _extension._explain_no_cuda(built, "13.0")
    assert text.startswith("built with a torch without CUDA") and text.endswith("build densenet_ext again")
    assert _extension._explain_no_cuda({"why_no_cuda": "DENSENET_EXT_CUDA=0"}, "13.0") == "DENSENET_EXT_CUDA=0"


def test_the_citation_is_of_this_version() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    assert re.search(r"^version: (.*)$", text, re.MULTILINE)[1] == dx.__version__
    assert re.search(r"^license: (.*)$", text, re.MULTILINE)[1] == "MIT"


def _module_bytes() -> bytes:
    assert _extension.module is not None and _extension.module.__file__ is not None
    return Path(_extension.module.__file__).read_bytes()


@pytest.mark.skipif(_extension.module is None, reason="no compiled part")
def test_the_compiled_part_loads_under_the_oldest_torch() -> None:
    """It asks for no function of the stable ABI that came after torch 2.11, whichever torch it was built with."""
    import torch

    stable = Path(torch.__file__).parent / "include" / "torch" / "csrc" / "stable" / "c" / "shim.h"
    versions = re.compile(
        r"^#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0\n(.*?)^#endif // TORCH_FEATURE", re.M | re.S
    )
    blocks = versions.findall(stable.read_text())
    later = {name for minor, block in blocks if int(minor) > 11 for name in re.findall(r"(torch_\w+)\(", block)}
    needed = set(re.findall(rb"\0(\w+)(?=\0)", _module_bytes()))
    assert not {name for name in later if name.encode() in needed}


@pytest.mark.skipif(_extension.module is None, reason="no compiled part")
def test_wheels_have_no_copy_of_what_torch_brings() -> None:
    import torch

    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    excluded = re.findall(r"--exclude '([^']+)'", workflow)
    linked = {name.decode() for name in re.findall(rb"\0(lib[\w+-]+\.so[.\d]*)(?=\0)", _module_bytes())}
    brought = linked & {path.name for path in (Path(torch.__file__).parent / "lib").iterdir()}
    assert {"libc10.so", "libtorch_cpu.so"} <= brought
    for name in brought | {
        "libtorch_cuda.so",
        "libc10_cuda.so",
        "libcudart.so.13",
        "libtorch_python.so",
        "libgomp.so.1",
    }:
        assert any(fnmatch.fnmatch(name, pattern) for pattern in excluded), name
    # The manylinux policy says what the system brings; anything else a wheel has to have with it.
    assert not any(fnmatch.fnmatch("libstdc++.so.6", pattern) for pattern in excluded)


@pytest.mark.skipif(_extension.module is None, reason="no compiled part")
def test_messages_name_no_folder_of_the_build() -> None:
    import torch

    with pytest.raises(RuntimeError, match="mean: expected") as error:
        torch.ops.densenet_ext.channel_stats(torch.ones(2, 3), torch.ones(2), torch.ones(3))
    assert str(ROOT) not in str(error.value) and "csrc/ops/tensors.h" in str(error.value)
