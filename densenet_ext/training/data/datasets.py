"""The data sets of the command line, each split, augmented and normalised as it is usual for it."""

from __future__ import annotations

from pathlib import Path

from densenet_ext.training.data import cifar, digits, image_folder
from densenet_ext.training.data.examples import Data, Examples, Processes
from densenet_ext.training.errors import UserError
from densenet_ext.training.options import DATA

__all__ = ["Data", "Examples", "load"]


def load(
    name: str,
    *,
    root: Path | None,
    image_size: int | None,
    validation: float,
    download: bool,
    on_corrupt: str,
    workers: int,
    processes: Processes,
) -> Data:
    """The data set ``name``, the same in all ``processes``.

    Raises UserError.
    """
    if name not in DATA:
        raise UserError(f"--data: expected one of {', '.join(DATA)}, got {name!r}")
    if not 0 <= validation < 1:
        raise UserError(f"--validation: expected a fraction of at least 0 and below 1, got {validation:g}")
    if name == "digits":
        return digits.load(image_size, validation)
    if name == "imagefolder":
        return image_folder.load(root, image_size, validation, on_corrupt, workers, processes)
    return cifar.load(name, root, image_size, validation, download, processes)
