"""What tests of the command line share: running it, here or in a process beside, and comparing what it leaves."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("lightning_fabric")

from densenet_ext import vision
from densenet_ext.cli import main
from densenet_ext.errors import UserError
from tests.support import command_line
from tests.support.command_line import Ended
from tests.support.forks import Fork, torchrun

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


@contextlib.contextmanager
def without_pictures() -> Iterator[None]:
    """Draws nothing at the end of runs in this process: a third of a small run's time."""
    from densenet_ext.training import running  # needs torchvision

    with mock.patch.object(running.curves, "draw_curves"), mock.patch.object(running, "draw_connections"):
        yield


def run(command: str, *arguments: Any) -> Ended:
    """The command in this process."""
    with made_archives():
        return command_line.run(command, *arguments)


def start(command: str, *arguments: Any, processes: int = 0) -> Fork:
    """The command in a process of its own, or in several ones under torchrun."""
    words = [command, *map(str, arguments)]
    return Fork(torchrun, processes, _command, words) if processes else Fork(_command, words)


def _command(words: list[str]) -> None:
    with made_archives():
        main(words)


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
