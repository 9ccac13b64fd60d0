"""Images of any size in folders, one folder for each class, as they are usual for ImageNet."""

from __future__ import annotations

import itertools
import os
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from densenet_ext import vision
from densenet_ext.errors import UserError
from densenet_ext.training.data.datasets import SPLIT_SEED, Data, Examples
from densenet_ext.training.data.loading import derived
from densenet_ext.training.processes import agreed

if TYPE_CHECKING:
    from densenet_ext.training.options import Options
    from densenet_ext.training.processes import Processes

v2 = vision.import_torchvision().transforms.v2

SIZE = 224
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_ENDINGS: tuple[str, ...] = vision.import_torchvision().datasets.folder.IMG_EXTENSIONS
_FOLDERS = {"train": "train", "val": "validation", "valid": "validation", "validation": "validation", "test": "test"}
_NAMED = 10  # at most so many names stand in a message

Samples = list[tuple[str, int]]
"""Paths of images and their labels, in ascending order of class and path."""


def load(chosen: Options, processes: Processes) -> Data:
    """Returns the images root/train/CLASS/*, with root/val and root/test if they are there, or root/CLASS/*.

    Without a folder for validation (val, valid or validation) a fraction of each class is held out. Every file is
    decoded once, by as many threads of each process as there are workers; of those that can't be, ``on_corrupt``
    "refuse" raises UserError with their names and "skip" leaves them out. UserError, too, for a class without an image.
    """
    root, notes = Path(chosen.root or "."), list[str]()
    classes, parts = agreed(processes, lambda: find(root))
    paths = [path for samples in parts.values() for path, _ in samples]
    if len(set(processes.gather(derived(*paths)))) > 1:
        raise UserError(f"--root: expected the same images for every process in {root}, found different ones")
    corrupt = _corrupt(paths, chosen.workers, processes)
    if corrupt:
        names = [f"{path} ({reason})" for path, reason in corrupt.items()]
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        which = f"{len(names)} of the {len(paths)} images in {root} can't be read: {', '.join(names[:_NAMED])}{more}"
        if chosen.on_corrupt == "refuse":
            raise UserError(f"--root: {which}; mend or delete them, or leave them out with --on-corrupt skip")
        notes.append(f"left out: {which}")
        for name, samples in parts.items():
            parts[name] = [each for each in samples if each[0] not in corrupt]
            _check(root, classes, parts[name])
    if "validation" not in parts and chosen.validation:
        parts["train"], parts["validation"] = split(parts["train"], chosen.validation)
    size = chosen.image_size or SIZE
    normalised = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEANS, _DEVIATIONS)]
    resized = [v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size)]
    drawn = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    seen, augmented = (v2.Compose([in_rgb, *each, *normalised]) for each in (resized, drawn))

    def examples(samples: Samples, augmentation: Any = None) -> Examples:
        paths, labels = zip(*samples, strict=True)
        return Examples(paths, torch.tensor(labels), (3, size, size), seen, augmentation)

    train = examples(parts.pop("train"), augmented)
    held = {name: examples(samples) for name, samples in parts.items()}
    return Data(tuple(classes), train, held.get("validation"), held.get("test"), tuple(notes))


def split(samples: Samples, fraction: float) -> tuple[Samples, Samples]:
    """Returns what is trained on and what is held out: ``fraction`` of each class, the same files in every run.

    A class keeps at least one image to train on. Raises UserError when nothing would be held out.
    """
    kept, held_out, first = Samples(), Samples(), 0
    for label, group in itertools.groupby(samples, lambda sample: sample[1]):
        images = list(group)
        last = first + len(images)
        # Rounded over all classes, not each for itself: a tenth of many classes of four images is not nothing.
        wanted = min(round(last * fraction) - round(first * fraction), len(images) - 1)
        draw = torch.Generator().manual_seed(derived(SPLIT_SEED, label))
        order = torch.randperm(len(images), generator=draw).tolist()
        held_out += [images[i] for i in sorted(order[:wanted])]
        kept += [images[i] for i in sorted(order[wanted:])]
        first = last
    if not held_out:
        raise UserError(f"--validation: a part of {fraction:g} of the {len(samples)} images to train on holds none out")
    return kept, held_out


# ---- which files there are -------------------------------------------------------------------------------------------


def find(root: Path) -> tuple[list[str], dict[str, Samples]]:
    """Returns the classes under ``root``, and the images of "train" and maybe of "validation" and "test".

    Raises UserError for a folder that can't be read, and for a class that has no image in one of the parts.
    """
    try:
        folders = dict[str, Path]()
        # A class may be called "train" as well; but then it holds images, not folders.
        if (root / "train").is_dir() and _classes(root / "train"):
            for name, part in _FOLDERS.items():
                if (root / name).is_dir():
                    folders.setdefault(part, root / name)
        folders.setdefault("train", root)
        classes, parts = sorted(set[str]().union(*map(_classes, folders.values()))), dict[str, Samples]()
        for part, folder in folders.items():
            parts[part] = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
            _check(folder, classes, parts[part])
    except OSError as error:
        raise UserError(f"--root: cannot read {error.filename or root}: {error.strerror or error}") from error
    return classes, parts


def _check(folder: Path, classes: list[str], samples: Samples) -> None:
    """Raises UserError when there is no choice of classes, or one of them has no image."""
    labels = {label for _, label in samples}
    empty = [name for label, name in enumerate(classes) if label not in labels]
    if len(classes) < 2 or empty:
        raise UserError(
            f"--root: expected a folder with images ({', '.join(_ENDINGS)}) for each of at least two classes in "
            f"{folder}, found {f'none that can be read in {empty}' if empty else classes}"
        )


def _classes(folder: Path) -> list[str]:
    """Names of the folders in ``folder``, but for hidden ones and links that lead back: into it or above it."""
    home = folder.resolve()

    def counts(path: Path) -> bool:
        target = path.resolve()
        leads_back = path.is_symlink() and (target.is_relative_to(home) or home.is_relative_to(target))
        return path.is_dir() and not path.name.startswith(".") and not leads_back

    return sorted(path.name for path in folder.iterdir() if counts(path))


def _images(folder: Path) -> list[str]:
    """Paths of the images in the folder of a class and below; links to other folders are not followed."""
    found = []
    for here, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [f"{here}/{name}" for name in names if name.lower().endswith(_ENDINGS) and not name.startswith(".")]
    return sorted(found)


# ---- whether they can be read ----------------------------------------------------------------------------------------


def _corrupt(paths: list[str], workers: int, processes: Processes) -> dict[str, str]:
    """Returns which of ``paths`` can't be decoded, and why; each process looks at its share of them."""
    mine = paths[processes.global_rank :: processes.world_size]
    threads = ThreadPoolExecutor(max(1, workers))  # the decoders work without the interpreter's lock
    hidden = None if processes.is_global_zero else True  # None: unless on a terminal
    try:
        reasons = threads.map(_reason, mine)
        shown = tqdm(reasons, "checking", len(mine), unit="img", delay=2, leave=False, disable=hidden)
        corrupt = {path: reason for path, reason in zip(mine, shown, strict=True) if reason is not None}
    finally:
        threads.shutdown(cancel_futures=True)
    found = {path: reason for part in processes.gather(corrupt) for path, reason in part.items()}
    return {path: found[path] for path in paths if path in found}


def _reason(path: str) -> str | None:
    try:
        in_rgb(path, coarse=True)
        return None
    except UnidentifiedImageError:
        return "no image"
    except Exception as error:  # Pillow's decoders raise nearly every kind
        return getattr(error, "strerror", None) or str(error).partition("\n")[0] or type(error).__name__


def in_rgb(path: str, coarse: bool = False) -> Image.Image:
    """Returns the image in a file; ``coarse``: decoded as far as it takes to know that all of it can be.

    Raises ValueError for a pipe, and for pixels of more than 8 bits, which Pillow would clip; else Pillow's errors.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no file but a pipe or a device")  # which would be waited for
    with open(path, "rb") as file:
        image = Image.open(file)
        if coarse:
            image.draft("RGB", (1, 1))  # a JPEG is read to its end, and its pixels are made at an eighth of the size
        if image.mode[0] in "IF":
            raise ValueError(f"pixels of more than 8 bits ({image.mode})")
        return image.convert("RGB")
