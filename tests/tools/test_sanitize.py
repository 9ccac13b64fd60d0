"""`make sanitize`: the copy that it builds in, and the SIMD level that each of its runs asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sanitize

import densenet_ext as dx
from densenet_ext import _extension

ROOT = Path(__file__).resolve().parents[2]


def test_the_copy_follows_its_source_and_keeps_what_was_built(tmp_path: Path) -> None:
    root, target = tmp_path / "root", tmp_path / "copy"
    for name in ("csrc/a.cpp", "csrc/deep/b.h", "tests/c.py", "setup.py"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    for name in sanitize.COPIED:
        if not (root / name).exists():
            (root / name).touch() if "." in name or name == "LICENSE" else (root / name).mkdir()
    sanitize.copy(root, target)
    assert (target / "csrc/deep/b.h").read_text() == "csrc/deep/b.h"
    built = target / "densenet_ext" / "_C.so"
    built.parent.mkdir(exist_ok=True)
    built.touch()
    os.utime(target / "csrc/a.cpp", (1, 1))
    (root / "csrc/deep/b.h").write_text("changed")
    (root / "tests/c.py").unlink()
    sanitize.copy(root, target)
    assert (target / "csrc/a.cpp").stat().st_mtime == 1  # the compiler is not called for it again
    assert (target / "csrc/deep/b.h").read_text() == "changed"
    assert built.exists() and not (target / "tests/c.py").exists()


def test_a_compiler_without_sanitizers_is_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho libasan.so\n")  # what GCC says of a file that it does not have
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(SystemExit, match=r"densenet_ext: .*c\+\+ has no libasan.so"):
        sanitize.runtime("libasan.so")


@pytest.mark.skipif(_extension.module is None, reason="no compiled part")
def test_a_variable_chooses_winograds_products(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[str] = []
    module: Any = SimpleNamespace(set_winograd=chosen.append)
    for wanted in (None, "", "never"):
        _extension._choose_winograd(module, wanted)
    assert chosen == ["never"]
    expected = "DENSENET_EXT_WINOGRAD: expected 'faster', 'always' or 'never', got 'no'"
    with pytest.raises(RuntimeError, match=expected):
        _extension._choose_winograd(_extension.module, "no")


def dots_are_slow() -> bool:
    """Whether the processor multiplies floats faster than pairs of bf16 numbers: Intel's since Sapphire Rapids."""
    about = Path("/proc/cpuinfo")
    words = about.read_text().split() if about.exists() else []
    return "GenuineIntel" in words and "avx512_vbmi2" in words


@pytest.mark.skipif(_extension.module is None, reason="no compiled part")
def test_the_variable_chooses_the_simd_level() -> None:
    """Read once, by the import: one fresh interpreter shows that, for a level that is not the fastest."""
    available, before = dx.build_info()["simd_available"], dx.build_info()["simd"]
    fastest = "avx512" if dots_are_slow() and available[-1] == "avx512_bf16" else available[-1]
    assert before == (os.environ.get("DENSENET_EXT_SIMD") or fastest)
    code = "import densenet_ext as dx; print(dx.build_info()['simd'])"
    environ = {**os.environ, "DENSENET_EXT_SIMD": available[0]}
    fresh = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)
    assert fresh.stdout.strip() == available[0], fresh.stderr
    try:
        for level in available:
            for wanted in (level, "", None):  # without a wish it stays
                _extension._choose_simd_level(_extension.module, wanted)
                assert dx.build_info()["simd"] == level
        expected = "DENSENET_EXT_SIMD: expected one of the levels of this build on this processor"
        with pytest.raises(RuntimeError, match=rf"{expected} \({', '.join(available)}\), got 'sse9'$"):
            _extension._choose_simd_level(_extension.module, "sse9")
    finally:
        _extension.module.set_simd_level(before)
