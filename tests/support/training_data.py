"""Small data sets in the formats of the real ones, made on the spot, and processes that are threads."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from densenet_ext import errors, vision
from densenet_ext.training.data import datasets
from densenet_ext.training.options import Options
from densenet_ext.training.running import load_data


def is_there(path: str, checksum: str | None = None) -> bool:
    """Stands for torchvision's check of checksums: archives that tests make have others."""
    return Path(path).is_file()


def needs_torchvision() -> None:
    """Skips the test file where torchvision can't be imported; pytest.importorskip lets its RuntimeError through."""
    try:
        vision.import_torchvision()
    except errors.UserError as error:
        pytest.skip(str(error), allow_module_level=True)


@dataclass
class Process:
    """One of ``size`` processes; alone unless :func:`in_processes` made it."""

    global_rank: int = 0
    world_size: int = 1
    _values: list[Any] = field(default_factory=lambda: [None])
    _barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    device = torch.device("cpu")

    @property
    def is_global_zero(self) -> bool:
        return self.global_rank == 0

    def gather(self, value: Any) -> list[Any]:
        self._values[self.global_rank] = value
        self._barrier.wait(60)
        values = list(self._values)
        self._barrier.wait(60)
        return values


def in_processes(size: int, call: Callable[[Process], Any]) -> list[Any]:
    """What ``call`` gives or raises in each of ``size`` processes that run at the same time."""
    values, barrier = [None] * size, threading.Barrier(size)

    def outcome(rank: int) -> Any:
        try:
            return call(Process(rank, size, values, barrier))
        except Exception as error:
            return error

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(outcome, range(size)))


def data_of(name: str, root: Path | None = None, process: Process | None = None, **options: Any) -> datasets.Data:
    """The data set ``name``, with the usual options but for those that are given."""
    given = {"data": name, "root": None if root is None else str(root), "workers": 2, **options}
    download = given.pop("download", False)
    return load_data(Options.of(given), process or Process(), download)


def message_of(name: str, root: Path | None = None, **options: Any) -> str:
    """The one sentence that refuses such a data set."""
    with pytest.raises(errors.UserError) as error:
        data_of(name, root, **options)
    text = str(error.value)
    assert "\n" not in text and len(text) < 1500
    return text


def pictures(labels: list[int], height: int, width: int, seed: int = 0) -> np.ndarray:
    """Noise [N, height, width, 3] uint8 around a colour for each label: easy to learn, and no two are alike."""
    random = np.random.default_rng(seed)
    colours = np.random.default_rng(2017).integers(40, 216, (max(labels) + 1, 3))
    noise = random.integers(-40, 40, (len(labels), height, width, 3))
    return (colours[labels][:, None, None] + noise).astype(np.uint8)


def cifar(root: Path, name: str = "cifar10", per_batch: int = 20, test: int = 20) -> Path:
    """Puts an archive into ``root`` as torchvision expects it there, but for the checksums. Returns its folder.

    Each file to train on has ``per_batch`` images; CIFAR-10 has five of them, CIFAR-100 has one.
    """
    classes, folder, batches, last, labels, names, meta = {
        "cifar10": (
            *(10, "cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch"),
            *("labels", "label_names", "batches.meta"),
        ),
        "cifar100": (100, "cifar-100-python", ["train"], "test", "fine_labels", "fine_label_names", "meta"),
    }[name]
    (root / folder).mkdir(parents=True, exist_ok=True)
    for number, (batch, count) in enumerate([*((batch, per_batch) for batch in batches), (last, test)]):
        values = [(7 * i + number) % classes for i in range(count)]
        data = pictures(values, 32, 32, number).transpose(0, 3, 1, 2).reshape(count, -1)
        (root / folder / batch).write_bytes(pickle.dumps({labels: values, "data": data}))
    (root / folder / meta).write_bytes(pickle.dumps({names: [f"thing_{i}" for i in range(classes)]}))
    return root / folder


def image_folder(root: Path, classes: tuple[str, ...] = ("ant", "bee", "cat"), per_class: int = 6) -> Path:
    """``root`` with a folder of PNG and JPEG files of several sizes and modes for each of ``classes``."""
    for label, name in enumerate(classes):
        (root / name).mkdir(parents=True, exist_ok=True)
        for number in range(per_class):
            height, width = 40 + 3 * (number % 10), 50 - 2 * (number % 10)
            image = Image.fromarray(pictures([label], height, width, number)[0])
            if number % 3 == 1:
                image = image.convert("L")
            image.save(root / name / f"{number}.{'png' if number % 2 else 'jpg'}")
    return root


def truncate(path: Path) -> Path:
    """Cuts the file in the middle, as a download that broke off."""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return path


def corrupt_files(folder: Path) -> dict[str, Path]:
    """Adds files with the names of images to ``folder`` that are none: by the kind of damage."""
    image = Image.fromarray(pictures([0], 60, 60)[0])
    image.save(folder / "truncated.jpg")
    image.save(folder / "truncated.png")
    (folder / "text.jpg").write_text("this is no image")
    (folder / "empty.png").touch()
    (folder / "gone.jpg").symlink_to(folder / "nowhere.jpg")
    truncate(folder / "truncated.jpg")
    truncate(folder / "truncated.png")
    return {path.name: path for path in sorted(folder.iterdir()) if path.name[0] in "teg"}
