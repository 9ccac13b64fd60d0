"""Files that are either the new one or the old one, never half of one."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from densenet_ext.training.errors import TrainingError


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
