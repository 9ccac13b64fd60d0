"""CIFAR-10 and CIFAR-100 as in the DenseNet paper (Huang et al. 2017, section 4.1): C10+ and C100+."""

from __future__ import annotations

import functools
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from densenet_ext.training.data.examples import Data, Examples, Processes, Recipe, agreed, split
from densenet_ext.training.data.vision import import_torchvision, transforms
from densenet_ext.training.errors import UserError

SIZE = 32
_CLASSES = {"cifar10": 10, "cifar100": 100}


def load(
    name: str, root: Path | None, image_size: int | None, validation: float, download: bool, processes: Processes
) -> Data:
    """CIFAR-10 or CIFAR-100 ("cifar10", "cifar100") in the files for Python that its authors give away.

    Training images are mirrored at random and shifted by at most 4 pixels. The fraction ``validation`` of them is held
    out; the test images are the test's. All are normalised by the training images' channel means and deviations.

    The files' checksums are verified after a download only: other images in the same format train as well, and a note
    tells them from the original ones. Raises UserError when files are missing or hold something else.
    """
    if root is None:
        raise UserError(f"--root: expected the folder that holds {name}, or that --download shall put it into")
    kind = getattr(import_torchvision().datasets, name.upper())
    if download:
        agreed(processes, lambda: _download(kind, root) if processes.is_first else None)
    archive = agreed(processes, lambda: _Archive(kind, root, _CLASSES[name]))
    kept, held_out = split(len(archive.labels), validation)
    size = image_size or SIZE
    means, deviations = channel_statistics(archive.images[kept])
    seen = functools.partial(_evaluation, means, deviations, size)
    augmented = functools.partial(_augmentation, means, deviations, size)

    def examples(images: Tensor, labels: Tensor, augmentation: Recipe | None = None) -> Examples:
        return Examples(images, labels, (3, size, size), seen, augmentation)

    return Data(
        name=name,
        classes=archive.names,
        channels=3,
        image_size=size,
        train=examples(archive.images[kept], archive.labels[kept], augmented),
        validation=examples(archive.images[held_out], archive.labels[held_out]) if len(held_out) else None,
        test=examples(archive.test_images, archive.test_labels),
        notes=archive.notes,
    )


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of every channel of ``images`` [N, C, H, W] uint8, on the scale from 0 to 1.

    From counts of the 256 values, so that they are exact whatever the number of threads.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    means, deviations = [], []
    for channel in images.unbind(1):
        share = torch.bincount(channel.flatten(), minlength=256).double() / channel.numel()
        mean = (share * values).sum()
        means.append(mean.item())
        deviations.append(max((share * (values - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return means, deviations


def _evaluation(means: list[float], deviations: list[float], size: int) -> Callable[[Any], Tensor]:
    v2 = transforms()
    resized = [] if size == SIZE else [v2.Resize(size, antialias=True)]
    return v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(means, deviations), *resized])


def _augmentation(means: list[float], deviations: list[float], size: int) -> Callable[[Any], Tensor]:
    v2 = transforms()
    normalised = _evaluation(means, deviations, SIZE)  # first, so that what is shifted in has the mean colour
    resized = [] if size == SIZE else [v2.Resize(size, antialias=True)]
    return v2.Compose([normalised, v2.RandomCrop(SIZE, padding=4), v2.RandomHorizontalFlip(), *resized])


def _download(kind: Any, root: Path) -> None:
    """Fetches and unpacks the archive, unless its files are there with the right checksums."""
    try:
        kind(str(root), train=False, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--download: cannot fetch {kind.url} into {root}: {reason}") from error


class _Archive:
    """The images [N, 3, 32, 32] uint8, labels [N] int64 and names of the files that torchvision's ``kind`` names."""

    def __init__(self, kind: Any, root: Path, classes: int) -> None:
        folder = root / kind.base_folder
        batches, test, meta = kind.train_list, kind.test_list, [[kind.meta["filename"], kind.meta["md5"]]]
        files = [*batches, *test, *meta]
        missing = [name for name, _ in files if not (folder / name).is_file()]
        if missing:
            found = "none of them" if len(missing) == len(files) else f"all but {', '.join(missing)}"
            raise UserError(
                f"--root: expected the files {', '.join(name for name, _ in files)} in {folder}, found "
                f"{found}: give another --root, or --download to fetch them (170 MB)"
            )
        self.images, self.labels = _read_all([folder / name for name, _ in batches], classes)
        self.test_images, self.test_labels = _read_all([folder / name for name, _ in test], classes)
        self.names = _names(folder / kind.meta["filename"], kind.meta["key"], classes)
        integrity = import_torchvision().datasets.utils.check_integrity
        original = all(integrity(str(folder / name), checksum) for name, checksum in files)
        self.notes = () if original else (f"{folder}: not the original images of {kind.__name__} (other checksums)",)


def _read_all(paths: list[Path], classes: int) -> tuple[Tensor, Tensor]:
    parts = [_read(path, classes) for path in paths]
    images = np.concatenate([data for data, _ in parts]).reshape(-1, 3, SIZE, SIZE)
    return torch.from_numpy(images), torch.tensor([label for _, labels in parts for label in labels])


def _read(path: Path, classes: int) -> tuple[Any, list[int]]:
    """The pixels [N, 3072] uint8 and the N labels of one file."""
    entry = _unpickled(path)
    data, labels = entry.get("data"), entry.get("labels", entry.get("fine_labels"))
    if not isinstance(data, np.ndarray):
        raise UserError(f"{path}: expected an array of pixels (data), got {type(data).__name__}")
    if data.shape[1:] != (3 * SIZE * SIZE,) or data.dtype != np.uint8 or not len(data):
        raise UserError(f"{path}: expected data of shape [N, 3072], uint8, got {list(data.shape)}, {data.dtype}")
    if not isinstance(labels, list) or len(labels) != len(data):
        count = len(labels) if isinstance(labels, list) else "none"
        raise UserError(f"{path}: expected {len(data)} labels, one for each image, got {count}")
    for index, label in enumerate(labels):
        if not isinstance(label, int) or not 0 <= label < classes:
            raise UserError(f"{path}: expected labels from 0 to {classes - 1}, got {label!r} for image {index}")
    return data, labels


def _names(path: Path, key: str, classes: int) -> tuple[str, ...]:
    names = _unpickled(path).get(key)
    if not isinstance(names, list) or len(names) != classes:
        count = len(names) if isinstance(names, list) else "none"
        raise UserError(f"{path}: expected {classes} names of classes ({key}), got {count}")
    return tuple(str(name) for name in names)


def _unpickled(path: Path) -> dict[str, Any]:
    try:
        with open(path, "rb") as file:
            entry = _Unpickler(file, encoding="latin1").load()  # Python 2 wrote the original ones
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except Exception as error:  # damaged bytes raise nearly every kind
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise UserError(f"{path}: expected a file of the CIFAR archive, and it can't be read ({reason})") from error
    if not isinstance(entry, dict):
        raise UserError(f"{path}: expected a file of the CIFAR archive, got a pickled {type(entry).__name__}")
    return entry


class _Unpickler(pickle.Unpickler):
    """Makes arrays and nothing else: a pickle may otherwise run any code, and checksums are not asked for."""

    _ARRAYS = {"_reconstruct", "_frombuffer", "ndarray", "dtype"}

    def find_class(self, module: str, name: str) -> Any:
        if (module.partition(".")[0] == "numpy" and name in self._ARRAYS) or (module, name) == ("_codecs", "encode"):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")
