"""What tests of the command line share: running it, here or in a process of its own, and comparing what it leaves."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

if __name__ != "__main__":  # a process of the command line says itself what it lacks
    pytest.importorskip("lightning_fabric")

from densenet_ext.cli import main
from densenet_ext.training.data import vision
from densenet_ext.training.errors import UserError
from tests.support import command_line
from tests.support.command_line import Ended

ROOT = Path(__file__).resolve().parents[2]
TINY = ("--model", "densenet_bc:10,4", "--batch-size", 256)
"""The smallest network of the command line, in few steps."""


@contextlib.contextmanager
def made_archives() -> Iterator[None]:
    """Takes the archives that tests make for the original ones."""
    try:
        archives = vision.import_torchvision().datasets.cifar
    except UserError:  # without torchvision there is nothing to take
        yield
        return
    with mock.patch.object(archives, "check_integrity", lambda path, checksum=None: os.path.isfile(path)):
        yield


def run(command: str, *arguments: Any) -> Ended:
    """The command in this process."""
    with made_archives():
        return command_line.run(command, *arguments)


def environment() -> dict[str, str]:
    """Of a process of its own: this checkout, one thread."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


def start(command: str, *arguments: Any, processes: int = 0) -> subprocess.Popen[str]:
    """The command in a process of its own, or in several ones under torchrun."""
    return start_python(__file__, command, *arguments, processes=processes)


def start_python(*arguments: Any, processes: int = 0) -> subprocess.Popen[str]:
    """Python with ``arguments`` in a process of its own, or in several ones under torchrun."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)] if processes else []
    line = [sys.executable, *launcher, *map(str, arguments)]
    return subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen[str], timeout: float = 120) -> Ended:
    """Waits for ``process``; kills it when that takes too long."""
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Ended(process.returncode, output)


def checkpoint(folder: Path, name: str = "checkpoint.pt") -> dict[str, Any]:
    """What the run in ``folder`` has saved."""
    state: dict[str, Any] = torch.load(folder / name, weights_only=True)
    return state


MEASURED = ("epoch", "lr", "loss", "error", "validation_loss", "validation_error")


def differences(a: Path, b: Path) -> list[str]:
    """Where the last checkpoints of two runs differ in a bit, but for times and sizes in memory."""
    one, other = checkpoint(a), checkpoint(b)
    found = []
    for part in ("model", "optimizer", "schedule", "scaler", "steps", "sums", "step", "classes"):
        found += _differences(part, one[part], other[part])
    rows = [[{name: row[name] for name in MEASURED} for row in state["history"]] for state in (one, other)]
    return found + _differences("history", *rows)


def _differences(name: str, a: Any, b: Any) -> list[str]:
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [text for key in a for text in _differences(f"{name}.{key}", a[key], b[key])]
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        return [text for i in range(len(a)) for text in _differences(f"{name}[{i}]", a[i], b[i])]
    same = torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
    return [] if same else [name]


if __name__ == "__main__":  # the command line of a process that `start` has started
    with made_archives():
        main()
