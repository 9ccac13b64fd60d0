"""Images of any size in folders, one folder for each class, as they are usual for ImageNet."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from densenet_ext.training.data.class_folders import Part, find, listed, same_everywhere
from densenet_ext.training.data.examples import Data, Examples, Processes, Recipe, agreed
from densenet_ext.training.data.loading import share
from densenet_ext.training.data.vision import transforms
from densenet_ext.training.errors import TrainingError, UserError

SIZE = 224
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_CHUNK = 32  # files that a thread takes at once


def load(
    root: Path | None, image_size: int | None, validation: float, on_corrupt: str, workers: int, processes: Processes
) -> Data:
    """The images root/train/CLASS/*, with root/val and root/test if they are there, or root/CLASS/*.

    Without a folder for validation (val, valid or validation) the fraction ``validation`` of each class is held out.
    Every file is decoded once, by ``workers`` threads of each process; of those that can't be, ``on_corrupt`` "refuse"
    raises UserError with their names and "skip" leaves them out. UserError, too, for a class without an image.
    """
    if root is None:
        raise UserError("--root: expected the folder that holds a folder of images for each class, or train and val")
    parts, notes = agreed(processes, lambda: find(root))
    same_everywhere(root, parts, processes)
    paths = [path for part in parts.values() for path in part.paths]
    corrupt = _corrupt(paths, workers, processes)
    if corrupt:
        names = listed([f"{path} ({reason})" for path, reason in corrupt.items()])
        which = f"{len(corrupt)} of the {len(paths)} images in {root} can't be read: {names}"
        if on_corrupt == "refuse":
            raise UserError(f"--root: {which}; mend or delete them, or leave them out with --on-corrupt skip")
        notes.append(f"left out: {which}")
        parts = {name: part.without(corrupt) for name, part in parts.items()}
    if "validation" not in parts:
        parts["train"], held_out = parts["train"].split(validation)
        if held_out.paths:
            parts["validation"] = held_out
    size = image_size or SIZE

    def examples(part: Part, augmentation: Recipe | None = None) -> Examples:
        evaluation = functools.partial(_evaluation, size)
        return Examples(Files(part.paths), torch.tensor(part.labels), (3, size, size), evaluation, augmentation)

    return Data(
        name="imagefolder",
        classes=parts["train"].classes,
        channels=3,
        image_size=size,
        train=examples(parts["train"], functools.partial(_augmentation, size)),
        validation=examples(parts["validation"]) if "validation" in parts else None,
        test=examples(parts["test"]) if "test" in parts else None,
        notes=tuple(notes),
    )


class Files:
    """Images by the index of their file, in RGB."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int, /) -> Any:
        path = self.paths[index]
        try:
            return _in_rgb(path)
        except Exception as error:
            reason = _reason(error)
            raise TrainingError(
                f"cannot read the image {path} any more: {reason}; the last checkpoint is kept"
            ) from error


def _corrupt(paths: list[str], workers: int, processes: Processes) -> dict[str, str]:
    """Which of ``paths`` can't be decoded, and why; each process looks at its share of them."""
    mine = share(len(paths), processes.rank, processes.size)
    chunks = [paths[i : min(i + _CHUNK, mine.stop)] for i in range(mine.start, mine.stop, _CHUNK)]
    found: dict[str, str] = {}
    threads = ThreadPoolExecutor(max(1, workers))  # the decoders work without the interpreter's lock
    hidden = None if processes.is_first else True  # None: unless on a terminal
    try:
        with tqdm(total=len(mine), desc="checking", unit="img", delay=2, leave=False, disable=hidden) as bar:
            for chunk, reasons in zip(chunks, threads.map(_reasons, chunks), strict=True):
                found.update(reasons)
                bar.update(len(chunk))
    finally:
        threads.shutdown(cancel_futures=True)
    return {path: reason for part in processes.gather(found) for path, reason in part.items()}


def _reasons(paths: list[str]) -> dict[str, str]:
    found = {}
    for path in paths:
        try:
            _in_rgb(path, coarse=True)
        except Exception as error:  # Pillow's decoders raise nearly every kind
            found[path] = _reason(error)
    return found


def _in_rgb(path: str, coarse: bool = False) -> Any:
    """The image in a file; ``coarse``: decoded as far as it takes to know that all of it can be."""
    from PIL import Image

    with open(path, "rb") as file:
        image = Image.open(file)
        if coarse:
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, and its pixels are made at an eighth of the size
        # Of pixels with more than 8 bits Pillow would make white ones: it clips them at 255.
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):  # which has at most 16
            return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            raise ValueError("its pixels have 32 bits, expected 8 or 16")
        return image.convert("RGB")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = str(error).strip().partition("\n")[0]
    return "no image" if "cannot identify image file" in text else text or type(error).__name__


def _evaluation(size: int) -> Callable[[Any], Tensor]:
    v2 = transforms()
    return v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size), _normalised()])


def _augmentation(size: int) -> Callable[[Any], Tensor]:
    v2 = transforms()
    return v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), _normalised()])


def _normalised() -> Callable[[Any], Tensor]:
    v2 = transforms()
    return v2.Compose([v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEANS, _DEVIATIONS)])
