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


@pytest.mark.skipif(_extension.module is None, reason="no compiled part")
def test_the_variable_chooses_the_simd_level() -> None:
    def imported(level: str) -> subprocess.CompletedProcess[str]:
        code = "import densenet_ext as dx; print(dx.build_info()['simd'])"
        environ = {**os.environ, "DENSENET_EXT_SIMD": level}
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environ, capture_output=True, text=True)

    available = dx.build_info()["simd_available"]
    for level in available:
        assert imported(level).stdout.strip() == level
    assert imported("").stdout.strip() == available[-1]
    refused = imported("sse9")
    assert refused.returncode == 1
    expected = f"DENSENET_EXT_SIMD: expected one of the levels of this build on this processor ({', '.join(available)})"
    assert refused.stderr.splitlines()[-1] == f"RuntimeError: {expected}, got 'sse9'"
