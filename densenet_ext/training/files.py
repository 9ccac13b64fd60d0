"""The files of a run: either the new one or the old one, never half of one; checkpoints, and who may write them."""

from __future__ import annotations

import contextlib
import fcntl
import io
import os
import zipfile
from pathlib import Path
from typing import IO, Any

import torch

from densenet_ext.training.errors import TrainingError, UserError

LAST, BEST = "checkpoint.pt", "best.pt"


def replace_file(data: bytes | memoryview, path: Path) -> None:
    """Writes ``data`` beside ``path``, waits until it is on the disk, and renames it.

    Raises TrainingError when it can't, as on a full disk; ``path`` then holds what it held.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:  # an interrupt, too, has to leave no file behind
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError):
            kept = "; what it held before is kept" if path.exists() else ""
            raise TrainingError(f"cannot write {path}: {error.strerror or error}{kept}") from error
        raise
    # The rename itself lasts when the directory is on the disk, too; not every file system can be asked for that.
    with contextlib.suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in one step. Raises TrainingError as :func:`replace_file`."""
    replace_file(text.encode("utf-8"), path)


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


def check_archive(path: Path) -> None:
    """Raises zipfile.BadZipFile when a part of the archive of torch.save is not what was written, by its checksum."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} has another checksum")


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Returns what :func:`save_checkpoint` wrote, on the CPU, read without running code from it (``weights_only``).

    Raises UserError when the file is missing, damaged (by the archive's own checksums), or holds something else.
    """
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged archives and foreign pickles raise several kinds
        # torch.load's own words would be advice to load it without weights_only
        reason = str(error) if isinstance(error, zipfile.BadZipFile) else "it holds something else"
        raise UserError(f"the checkpoint {path} is damaged, or none of train: {reason}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"the checkpoint {path} is none of train: it holds no model")
    return state
