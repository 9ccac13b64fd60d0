"""Images and labels: data sets, their augmentation, and batches in an order that follows from the seed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from densenet_ext.errors import UserError

if TYPE_CHECKING:
    from densenet_ext.training.data.datasets import Data
    from densenet_ext.training.options import Options
    from densenet_ext.training.processes import Processes


def load(chosen: Options, processes: Processes, download: bool = False) -> Data:
    """Returns the data set that was ``chosen``, the same in all ``processes``. Raises UserError."""
    from densenet_ext.training.data import datasets, image_folder

    name, validation = chosen.data, chosen.validation
    if name == "digits":
        return datasets.digits(chosen.image_size or datasets.DIGITS_SIZE, validation)
    if chosen.root is None:
        raise UserError(f"--root: expected the folder of the images, or where --download shall put {name}")
    if name == "imagefolder":
        return image_folder.load(chosen, processes)
    size = chosen.image_size or datasets.CIFAR_SIZE
    return datasets.cifar(name, Path(chosen.root), size, validation, download, processes)
