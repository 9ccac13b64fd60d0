"""Runs a library's own tests of its DenseNets with every one of them fused, and compares with the tests unfused.

    python tools/peers_on_fused.py monai|timm CHECKOUT [arguments for pytest]

CHECKOUT is a clone of Project-MONAI/MONAI or huggingface/pytorch-image-models. Only its tests are taken from it: they
run against the library that is installed, in a temporary folder, once as they are and once with `fuse` called at the
end of each constructor. Exits 1 where a test passes unfused and not fused.

Needs the library, pytest and what the library's tests import (parameterized for MONAI's).
"""

from __future__ import annotations

import functools
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
SWITCH = "DENSENET_EXT_FUSE_PEER"  # set in the environment of pytest: the module whose DenseNet is fused


class Library(NamedTuple):
    """Whose tests are run."""

    module: str  # where its class DenseNet stands
    needed: tuple[str, ...]  # files and folders of the checkout
    tests: tuple[str, ...]  # arguments for pytest


LIBRARIES = {
    "monai": Library(
        "monai.networks.nets.densenet",
        ("tests/__init__.py", "tests/test_utils.py", "tests/networks", "tests/visualize"),
        (
            "tests/networks/nets/test_densenet.py",
            *(f"tests/visualize/test_{name}.py" for name in ("vis_cam", "vis_gradcam", "occlusion_sensitivity")),
            *("-k", "not pretrain"),  # those would download weights
        ),
    ),
    "timm": Library(
        "timm.models.densenet",
        ("tests/__init__.py", "tests/test_models.py"),
        ("tests", "-k", "(densenet121 or densenetblur121d) and not pretrained"),
    ),
}

# ---- as a plugin of pytest -------------------------------------------------------------------------------------------

_fused: Counter[str] = Counter()


def pytest_configure(config: pytest.Config) -> None:
    declare_torchvision_operators()
    if SWITCH in os.environ:
        fuse_at_construction(importlib.import_module(os.environ[SWITCH]).DenseNet)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call" or report.outcome != "passed":
        print(f"\n[{report.outcome}] {report.nodeid}")


def pytest_sessionfinish() -> None:
    print("\n[fused] " + ", ".join(f"{count} {kind}" for kind, count in sorted(_fused.items())))


def declare_torchvision_operators() -> None:
    """Lets torchvision import beside a CPU build of torch, which lacks two of its operators."""
    from densenet_ext.errors import UserError
    from densenet_ext.vision import import_torchvision

    try:
        import_torchvision()
    except UserError:
        pass


def fuse_at_construction(kind: Any) -> None:
    """Makes every new ``kind``, and what derives from it, a fused network, and counts what the report says of it."""
    import densenet_ext as dx

    original = kind.__init__

    @functools.wraps(original)
    def construct(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        dx.fuse(self)
        _fused["networks"] += 1
        for row in dx.report(self):
            _fused[("fused " if row.fused else "unfused ") + f"{row.kind}s"] += 1

    kind.__init__ = construct


# ---- as a program ----------------------------------------------------------------------------------------------------


def outcomes(library: Library, folder: Path, fused: bool, arguments: list[str]) -> tuple[dict[str, str], str]:
    """The outcome of each test by name, and what was fused."""
    places = [str(ROOT), str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(places)}
    if fused:
        environment[SWITCH] = library.module
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-s",
        "-q",
        "-p",
        Path(__file__).stem,
        "-p",
        "no:cacheprovider",
        "--durations=10",
    ]
    run = subprocess.run(
        [*command, "--rootdir", ".", *library.tests, *arguments],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    found = {name: outcome for outcome, name in re.findall(r"^\[(passed|failed|skipped)\] (.*)$", run.stdout, re.M)}
    if not found:
        raise SystemExit(f"no test was run:\n{run.stdout[-3000:]}")
    lines = re.findall(r"^\[fused\] (.*)$", run.stdout, re.MULTILINE)
    if fused and "failed" in found.values():
        print(run.stdout[-20000:])
    return found, lines[-1] if lines else ""


def main() -> None:
    if len(sys.argv) < 3 or sys.argv[1] not in LIBRARIES:
        raise SystemExit(__doc__)
    library, checkout = LIBRARIES[sys.argv[1]], Path(sys.argv[2])
    with tempfile.TemporaryDirectory() as name:
        for path in library.needed:
            source, target = checkout / path, Path(name) / path
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target)
            else:
                shutil.copy(source, target)
        (Path(name) / "pytest.ini").write_text("[pytest]\n")
        results = [outcomes(library, Path(name), fused, sys.argv[3:]) for fused in (False, True)]
    for title, (found, counted) in zip(("unfused", "fused"), results, strict=True):
        print(f"{title}: " + ", ".join(f"{n} {outcome}" for outcome, n in sorted(Counter(found.values()).items())))
        if title == "fused":
            print(counted)
    unfused, fused = results[0][0], results[1][0]
    worse = [name for name, outcome in unfused.items() if outcome == "passed" and fused.get(name) != "passed"]
    print("\n".join(f"passes unfused only: {name}" for name in worse))
    raise SystemExit(1 if worse else 0)


if __name__ == "__main__":
    main()
