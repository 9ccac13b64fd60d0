"""Checkpoints that are either the new one or the old one, never half of one."""

from __future__ import annotations

import contextlib
import io
import os
from pathlib import Path
from typing import Any

import torch


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message names the file and the cause."""


def save_checkpoint(state: dict[str, Any], path: Path) -> None:
    """Writes ``state`` to ``path`` in one step: a temporary file beside it, fsync, then os.replace.

    Raises CheckpointError when the file can't be written, as on a full disk. ``path`` then holds what it held.
    """
    # Serialised first: torch.save into a file that fails half-way hides the operating system's error behind its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    try:
        _replace(data, path)
    except OSError as error:
        kept = "the last good checkpoint is still there" if path.exists() else "nothing was written"
        reason = error.strerror or str(error)
        size = f"{len(data) / 2**20:.1f} MiB"
        raise CheckpointError(f"cannot write the checkpoint {path} ({size}): {reason}; {kept}") from error


def _replace(data: memoryview, path: Path) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:  # an interrupt, too, has to leave no file behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    # The rename itself lasts when the directory is on the disk, too; not every file system can be asked for that.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, on the CPU, read without running code from the file (``weights_only``).

    Raises CheckpointError when the file is missing, damaged, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise CheckpointError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises several kinds for damaged files
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"cannot read the checkpoint {path}: expected one of train, got {first_line}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise CheckpointError(f"cannot read the checkpoint {path}: expected one of train, and it holds no model")
    return state
