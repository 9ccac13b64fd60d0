"""Images of any size in folders, one folder for each class, as they are usual for ImageNet."""

from __future__ import annotations

import hashlib
import os
import stat
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm import tqdm

from densenet_ext.training.data import vision
from densenet_ext.training.data.examples import SPLIT_SEED, Data, Examples, agreed
from densenet_ext.training.data.loading import share
from densenet_ext.training.errors import TrainingError, UserError
from densenet_ext.training.seeds import derived

if TYPE_CHECKING:
    from densenet_ext.training.processes import Processes

v2 = vision.transforms()

SIZE = 224
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_ENDINGS: tuple[str, ...] = vision.import_torchvision().datasets.folder.IMG_EXTENSIONS
_VALIDATION = ("val", "valid", "validation")
_NAMED = 10  # at most so many names stand in a message
_CHUNK = 32  # files that a thread takes at once


@dataclass(frozen=True)
class Part:
    """The files of one folder and their labels, in ascending order of class and name."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]

    def taken(self, indices: Collection[int]) -> Part:
        """Returns this with the files at ``indices`` alone."""
        return replace(self, paths=[self.paths[i] for i in indices], labels=[self.labels[i] for i in indices])

    def check(self, message: str) -> Part:
        """Returns this. Raises UserError with ``message`` when a class has no image."""
        full = set(self.labels)
        empty = [repr(name) for label, name in enumerate(self.classes) if label not in full]
        if empty:
            which = f"{'class' if len(empty) == 1 else 'classes'} {listed(empty)} in {self.folder}"
            raise UserError(f"--root: {which}: {message}")
        return self

    def split(self, fraction: float) -> tuple[Part, Part]:
        """Returns what is trained on and what is held out: ``fraction`` of each class, the same files in every run.

        A class keeps at least one image to train on. Raises UserError when nothing would be held out.
        """
        counts, held_out, first = Counter(self.labels), set[int](), 0
        for label in range(len(self.classes)):
            last = first + counts[label]
            # Rounded over all classes, not each for itself: a tenth of many classes of four images is not nothing.
            wanted = min(round(last * fraction) - round(first * fraction), counts[label] - 1)
            order = torch.randperm(counts[label], generator=torch.Generator().manual_seed(derived(SPLIT_SEED, label)))
            held_out.update((first + order[:wanted]).tolist())
            first = last
        if fraction and not held_out:
            raise UserError(
                f"--validation: expected a fraction that leaves images on either side, got {fraction:g}, which holds "
                f"out none of {len(self.paths)} images in {len(self.classes)} classes"
            )
        return self.taken([i for i in range(len(self.paths)) if i not in held_out]), self.taken(sorted(held_out))


def load(
    root: Path | None, image_size: int | None, validation: float, on_corrupt: str, workers: int, processes: Processes
) -> Data:
    """Returns the images root/train/CLASS/*, with root/val and root/test if they are there, or root/CLASS/*.

    Without a folder for validation (val, valid or validation) the fraction ``validation`` of each class is held out.
    Every file is decoded once, by ``workers`` threads of each process; of those that can't be, ``on_corrupt`` "refuse"
    raises UserError with their names and "skip" leaves them out. UserError, too, for a class without an image.
    """
    if root is None:
        raise UserError("--root: expected the folder that holds a folder of images for each class, or train and val")
    parts, notes = agreed(processes, lambda: find(root))
    paths = [path for part in parts.values() for path in part.paths]
    _check_same_everywhere(root, paths, processes)
    corrupt = _corrupt(paths, workers, processes)
    if corrupt:
        names = listed([f"{path} ({reason})" for path, reason in corrupt.items()])
        which = f"{len(corrupt)} of the {len(paths)} images in {root} can't be read: {names}"
        if on_corrupt == "refuse":
            raise UserError(f"--root: {which}; mend or delete them, or leave them out with --on-corrupt skip")
        notes.append(f"left out: {which}")
        for name, part in parts.items():
            whole = part.taken([index for index, path in enumerate(part.paths) if path not in corrupt])
            parts[name] = whole.check("none of its images can be read")
    if "validation" not in parts:
        parts["train"], held_out = parts["train"].split(validation)
        if held_out.paths:
            parts["validation"] = held_out
    size = image_size or SIZE
    normalised = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEANS, _DEVIATIONS)]
    seen = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size), *normalised])
    drawn = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *normalised])

    def examples(part: Part, augmentation: Any = None) -> Examples:
        return Examples(Files(part.paths), torch.tensor(part.labels), (3, size, size), seen, augmentation)

    return Data(
        name="imagefolder",
        classes=parts["train"].classes,
        channels=3,
        image_size=size,
        train=examples(parts["train"], drawn),
        validation=examples(parts["validation"]) if "validation" in parts else None,
        test=examples(parts["test"]) if "test" in parts else None,
        notes=tuple(notes),
    )


class Files:
    """Images by the index of their file, in RGB."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Any:
        path = self.paths[index]
        try:
            return _in_rgb(path)
        except Exception as error:
            reason = _reason(error)
            raise TrainingError(
                f"cannot read the image {path} any more: {reason}; the last checkpoint is kept"
            ) from error


# ---- which files there are -------------------------------------------------------------------------------------------


def find(root: Path) -> tuple[dict[str, Part], list[str]]:
    """Returns the parts of the data under ``root``, "train" and maybe "validation" and "test", and notes for the user.

    Raises UserError.
    """
    notes: list[str] = []
    try:
        if not root.is_dir():
            raise UserError(
                f"--root: expected a folder, got {root}, which is {'a file' if root.exists() else 'not there'}"
            )
        if not _has_parts(root):
            return {"train": _part(root, notes)}, notes
        parts = {"train": _part(root / "train", notes)}
        for folder in [root / name for name in _VALIDATION if (root / name).is_dir()][:1]:
            parts["validation"] = _part(folder, notes)
            notes.append(f"the images for validation are those in {folder}")
        if (root / "test").is_dir():
            if _classes(root / "test"):
                parts["test"] = _part(root / "test", notes)
            else:
                notes.append(f"no test: {root / 'test'} has no folders for classes")
    except OSError as error:
        raise UserError(f"--root: cannot read {error.filename or root}: {error.strerror or error}") from error
    for part in parts.values():
        _check_classes(parts["train"], part)
    return parts, notes


def image_parts(root: Path) -> list[Path]:
    """Returns the folders below ``root`` in which every folder is a class: root/train and its like, or ``root``."""
    return [root / name for name in ("train", *_VALIDATION, "test")] if _has_parts(root) else [root]


def _has_parts(root: Path) -> bool:
    # A class may be called "train" as well; but then it holds images, not folders.
    return (root / "train").is_dir() and bool(_classes(root / "train"))


def _part(folder: Path, notes: list[str]) -> Part:
    """Returns the images in ``folder``. Raises UserError when a class has none."""
    classes = _classes(folder)
    if len(classes) < 2:
        found = f"only {classes[0]!r}" if classes else "no folder"
        raise UserError(f"--root: expected a folder for each of at least two classes in {folder}, found {found}")
    files = [(path, label) for label, name in enumerate(classes) for path in sorted(_files(folder / name, folder))]
    images = [(path, label) for path, label in files if path.lower().endswith(_ENDINGS)]
    others = [os.path.relpath(path, folder) for path, _ in files if not path.lower().endswith(_ENDINGS)]
    if others:
        are = "is 1 file that does" if len(others) == 1 else f"are {len(others)} files that do"
        notes.append(f"left out in {folder} {are} not end as an image: {listed(others)}")
    part = Part(folder, tuple(classes), [path for path, _ in images], [label for _, label in images])
    return part.check(f"expected at least one image ({', '.join(_ENDINGS)}), found none")


def _classes(folder: Path) -> list[str]:
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and _counts(entry, folder))


def _files(place: Path, folder: Path) -> Iterator[str]:
    for entry in os.scandir(place):
        if _counts(entry, folder):
            if entry.is_dir():
                yield from _files(Path(entry.path), folder)
            else:
                yield entry.path


def _counts(entry: os.DirEntry[str], folder: Path) -> bool:
    """Returns whether it is neither hidden nor a link that leads back: to a folder inside ``folder`` or above it."""
    if entry.name.startswith("."):
        return False
    if not (entry.is_symlink() and entry.is_dir()):
        return True
    target, above = Path(entry.path).resolve(), (folder.resolve(), Path(entry.path).parent.resolve())
    return not any(target.is_relative_to(place) or place.is_relative_to(target) for place in above)


def _check_classes(train: Part, other: Part) -> None:
    differing = sorted(set(train.classes) ^ set(other.classes))
    if differing:
        there, not_there = (train, other) if differing[0] in train.classes else (other, train)
        raise UserError(
            f"--root: expected the same classes in {train.folder} and {other.folder}, and {listed(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}: {differing[0]!r} is in {there.folder} and not in "
            f"{not_there.folder}"
        )


def _check_same_everywhere(root: Path, paths: list[str], processes: Processes) -> None:
    """Raises UserError in every process when one sees other files under ``root`` than the first."""
    names = "\0".join(os.path.relpath(path, root) for path in paths).encode(errors="surrogateescape")
    found = processes.gather((len(paths), hashlib.blake2b(names).hexdigest()))
    if len(set(found)) > 1:
        counts = ", ".join(str(count) for count, _ in found)
        raise UserError(f"--root: expected the same images for every process in {root}, got other ones ({counts})")


def listed(names: list[str]) -> str:
    """Returns the first ``names``, and how many more there are."""
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


# ---- whether they can be read ----------------------------------------------------------------------------------------


def _corrupt(paths: list[str], workers: int, processes: Processes) -> dict[str, str]:
    """Returns which of ``paths`` can't be decoded, and why; each process looks at its share of them."""
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
    """Returns the image in a file; ``coarse``: decoded as far as it takes to know that all of it can be."""
    from PIL import Image

    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("no file but a pipe or a device")  # which would be waited for
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
