"""Checkpoints that are either the new one or the old one, never half of one."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import torch

from densenet_ext.training.errors import TrainingError, UserError
from densenet_ext.training.files import replace_file

LAST = "checkpoint.pt"
BEST = "best.pt"


def save_checkpoint(state: dict[str, Any], *paths: Path) -> None:
    """Writes ``state`` to each of ``paths`` in one step: a temporary file beside it, fsync, then os.replace.

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
    if not last.exists():
        if not best.exists():
            raise UserError(
                f"--resume: expected {LAST} in {folder}, and it is not there: a run that ended before its first "
                "checkpoint has to be started anew, with another --out"
            )
        save_checkpoint(load_checkpoint(best), last)
    load_checkpoint(last)


def load_checkpoint(path: Path) -> dict[str, Any]:
    """What :func:`save_checkpoint` wrote, on the CPU, read without running code from the file (``weights_only``).

    Raises UserError when the file is missing, damaged, or holds something else.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error.strerror or error}") from error
    except Exception as error:  # torch.load raises several kinds for damaged files
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot read the checkpoint {path}: expected one of train, got {first_line}") from error
    if not isinstance(state, dict) or "model" not in state:
        raise UserError(f"cannot read the checkpoint {path}: expected one of train, and it holds no model")
    return state
