"""The emulator's compiled files are kept: what has not changed is compiled once, what has is compiled again."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.cuda.emulation.library import EMULATOR, FAMILIES, ROOT, compile_library

COMPILER = """#!/bin/sh
while [ $# -gt 0 ]; do
    case "$1" in -c) echo "$(basename $2)" >> LOG ;; -shared) echo linked >> LOG ;; -o) touch "$2" ;; esac
    shift
done
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name in ("csrc", "tests/cuda/emulation"):
        shutil.copytree(ROOT / name, tmp_path / name)
    return tmp_path


def test_only_what_has_changed_is_compiled_again(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log, compiler = project / "log", project / "c++"
    compiler.write_text(COMPILER.replace("LOG", str(log)))
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))

    def compiled() -> list[str]:
        log.unlink(missing_ok=True)
        compile_library(root=project, cache=project / "build")
        return sorted(log.read_text().split()) if log.exists() else []

    everything = compiled()
    assert set(everything) > {*sum(FAMILIES.values(), []), *EMULATOR, "linked"}
    assert compiled() == []
    source = project / "csrc" / "cuda" / "avg_pool.cu"
    before = source.read_text()
    source.write_text(before + "// changed\n")
    assert compiled() == ["avg_pool.cu", "linked"]
    source.write_text(before)
    assert compiled() == []  # what was there before is there still
    header = project / "csrc" / "cuda" / "conv1x1_common.h"
    header.write_text(header.read_text() + "// changed\n")
    again = compiled()
    assert {"conv1x1.cu", "conv1x1_backward.cu", "linked"} <= set(again) and "max_pool.cu" not in again
    header = project / "csrc" / "common.h"  # under conditions, deep down
    header.write_text(header.read_text() + "// changed\n")
    assert set(everything) - set(compiled()) == set(EMULATOR)
    monkeypatch.setenv("CXX", f"{compiler} -O3")
    assert compiled() == everything
