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


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in one step. Raises TrainingError when it can't; ``path`` then holds what it held."""
    try:
        replace_file(memoryview(text.encode("utf-8")), path)
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror or error}") from error


def replace_file(data: memoryview, path: Path) -> None:
    """Writes ``data`` beside ``path``, waits until it is on the disk, and renames it. Raises OSError."""
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


def locked(path: Path) -> IO[bytes]:
    """Returns ``path`` opened and locked: while it is open, no other process locks it.

    A lock of the process alone: workers that load images do not inherit it, and a killed process leaves none behind.
    Raises UserError when another process has it, or when ``path`` can't be written.
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
    """Writes ``state`` to each of ``paths`` in one step.

    Raises TrainingError when a file can't be written, as on a full disk. It then holds what it held.
    """
    # Serialised first: torch.save into a file that fails half-way hides the operating system's error behind its own.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getbuffer()
    for path in paths:
        try:
            replace_file(data, path)
        except OSError as error:
            good = next((path.name for path in reversed(paths) if path.exists()), None)
            kept = f"--resume goes on from {good}, which is whole" if good else "nothing was written"
            reason = error.strerror or str(error)
            size = f"{len(data) / 2**20:.1f} MiB"
            raise TrainingError(f"cannot write the checkpoint {path} ({size}): {reason}; {kept}") from error


def check_last(folder: Path) -> None:
    """Raises UserError unless ``folder`` has a checkpoint to go on from, which is :data:`LAST`.

    Where the disk was full, or the run killed, before the first epoch was in both files, it is made from :data:`BEST`.
    """
    last, best = folder / LAST, folder / BEST
    if not last.exists() and best.exists():
        save_checkpoint(load_checkpoint(best), last)
    if not last.exists():
        raise UserError(
            f"--resume: expected {LAST} in {folder}, and it is not there: a run that ended before its first "
            "checkpoint has to be started anew, with another --out"
        )


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
    refused = f"cannot read the checkpoint {path}"
    try:
        check_archive(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"{refused}: {error.strerror or error}") from error
    except Exception as error:  # damaged archives and foreign pickles raise several kinds
        # torch.load's own words would be advice to load it without weights_only
        reason = f"it is damaged: {error}" if isinstance(error, zipfile.BadZipFile) else "it holds something else"
        raise UserError(f"{refused}: expected one of train, and {reason}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"{refused}: expected one of train, and it holds no model")
    return state
