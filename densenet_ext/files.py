"""Files that are written whole: either the new one is there or the old one, never half of one."""

from __future__ import annotations

import contextlib
import os
import zipfile
from pathlib import Path

from densenet_ext.errors import TrainingError


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


def write_text(path: Path, text: str) -> None:
    """Writes ``text`` to ``path`` in one step. Raises TrainingError as :func:`replace_file`."""
    replace_file(text.encode("utf-8"), path)


def check_archive(path: Path) -> None:
    """Raises zipfile.BadZipFile when a part of the archive of torch.save is not what was written, by its checksum."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(f"{damaged} has another checksum")
