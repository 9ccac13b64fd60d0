"""The checkpoints of a run, and the lock that lets one process write them."""

from __future__ import annotations

import fcntl
import io
from pathlib import Path
from typing import IO, Any

import torch

from densenet_ext.errors import UserError
from densenet_ext.files import replace_file

LAST, BEST = "checkpoint.pt", "best.pt"


def locked(path: Path) -> IO[bytes]:
    """Returns ``path`` opened and locked: while it is open, no other process locks it.

    Workers that load images do not inherit the lock, and a killed process leaves none behind. Raises UserError when
    another process has it, or when ``path`` can't be written.
    """
    try:
        file = open(path, "r+b")
    except OSError as error:
        raise UserError(f"--out: cannot write {path}: {error.strerror or error}") from error
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.close()
        raise UserError(f"--out: another process is training in {path.parent}: wait for its end, or stop it") from error
    except OSError:  # a file system without locks
        pass
    return file


def save_checkpoint(state: dict[str, Any], *paths: Path) -> None:
    """Writes ``state`` to each of ``paths`` in one step. Raises TrainingError as :func:`replace_file`."""
    # Serialised first: torch.save into a file that fails half-way hides the operating system's error behind its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    for path in paths:
        replace_file(buffer.getbuffer(), path)
