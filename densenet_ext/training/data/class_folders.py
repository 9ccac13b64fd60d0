"""Which images there are under a folder with a folder for each class."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch

from densenet_ext.training.data.examples import SPLIT_SEED, Processes
from densenet_ext.training.data.vision import import_torchvision
from densenet_ext.training.errors import UserError
from densenet_ext.training.seeds import derived

_VALIDATION = ("val", "valid", "validation")
NAMED = 10  # at most so many names stand in a message


@dataclass(frozen=True)
class Part:
    """The files of one folder and their labels, in ascending order of class and name."""

    folder: Path
    classes: tuple[str, ...]
    paths: list[str]
    labels: list[int]

    @classmethod
    def of(cls, folder: Path) -> Part:
        """What torchvision's ImageFolder finds in ``folder``. Raises UserError when a class has no image."""
        classes = _classes(folder)
        if len(classes) < 2:
            found = f"only {classes[0]!r}" if classes else "no folder"
            raise UserError(f"--root: expected a folder for each of at least two classes in {folder}, found {found}")
        finder = import_torchvision().datasets
        extensions, labels = finder.folder.IMG_EXTENSIONS, {name: label for label, name in enumerate(classes)}
        samples = finder.ImageFolder.make_dataset(str(folder), labels, extensions, allow_empty=True)
        part = cls(folder, tuple(classes), [path for path, _ in samples], [label for _, label in samples])
        part._check(f"expected at least one image ({', '.join(extensions)}), found none")
        return part

    def without(self, corrupt: Collection[str]) -> Part:
        """This without the files ``corrupt``. Raises UserError when a class has no image then."""
        part = self._taken([index for index, path in enumerate(self.paths) if path not in corrupt])
        part._check("none of its images can be read")
        return part

    def other_files(self) -> list[str]:
        """Files of the classes that are no images by their ending, from ``folder`` on; hidden ones don't count."""
        known = set(self.paths)
        return sorted(
            os.path.relpath(path, self.folder)
            for name in self.classes
            for place, _, names in os.walk(self.folder / name, followlinks=True)
            for path in (os.path.join(place, each) for each in names if not each.startswith("."))
            if path not in known
        )

    def split(self, fraction: float) -> tuple[Part, Part]:
        """What is trained on and what is held out: ``fraction`` of each class, the same files in every run.

        A class keeps at least one image to train on. Raises UserError when nothing would be held out.
        """
        counts = Counter(self.labels)
        held_out: set[int] = set()
        first = 0
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
        kept = [index for index in range(len(self.paths)) if index not in held_out]
        return self._taken(kept), self._taken(sorted(held_out))

    def _taken(self, indices: list[int]) -> Part:
        paths, labels = [self.paths[index] for index in indices], [self.labels[index] for index in indices]
        return Part(self.folder, self.classes, paths, labels)

    def _check(self, message: str) -> None:
        """Raises UserError with ``message`` when a class has no image."""
        empty = [repr(self.classes[label]) for label in sorted(set(range(len(self.classes))) - set(self.labels))]
        if empty:
            which = f"{'class' if len(empty) == 1 else 'classes'} {listed(empty)} in {self.folder}"
            raise UserError(f"--root: {which}: {message}")


def find(root: Path) -> tuple[dict[str, Part], list[str]]:
    """The parts of the data under ``root``, "train" and maybe "validation" and "test", and notes for the user.

    Raises UserError.
    """
    try:
        parts, notes = _find(root)
    except OSError as error:
        raise UserError(f"--root: cannot read {error.filename or root}: {error.strerror or error}") from error
    for part in parts.values():
        _check_classes(parts["train"], part)
        others = part.other_files()
        if others:
            are = "is 1 file that does" if len(others) == 1 else f"are {len(others)} files that do"
            notes.append(f"left out in {part.folder} {are} not end as an image: {listed(others)}")
    return parts, notes


def _find(root: Path) -> tuple[dict[str, Part], list[str]]:
    if not root.is_dir():
        instead = "a file" if root.exists() else "not there"
        raise UserError(f"--root: expected a folder, got {root}, which is {instead}")
    train, test = root / "train", root / "test"
    if not _has_parts(root):
        return {"train": Part.of(root)}, []
    parts, notes = {"train": Part.of(train)}, []
    for folder in [root / name for name in _VALIDATION if (root / name).is_dir()][:1]:
        parts["validation"] = Part.of(folder)
        notes.append(f"the images for validation are those in {folder}")
    if test.is_dir():
        if _classes(test):
            parts["test"] = Part.of(test)
        else:
            notes.append(f"no test: {test} has no folders for classes")
    return parts, notes


def _has_parts(root: Path) -> bool:
    # A class may be called "train" as well; but then it holds images, not folders.
    return (root / "train").is_dir() and bool(_classes(root / "train"))


def image_parts(root: Path) -> list[Path]:
    """The folders below ``root`` in which every folder is a class: root/train and its like, or ``root`` itself."""
    return [root / name for name in ("train", *_VALIDATION, "test")] if _has_parts(root) else [root]


def same_everywhere(root: Path, parts: dict[str, Part], processes: Processes) -> None:
    """Raises UserError in every process when one sees other files under ``root`` than the first."""
    names = [os.path.relpath(path, root) for part in parts.values() for path in part.paths]
    digest = hashlib.blake2b("\0".join(names).encode(errors="surrogateescape")).hexdigest()
    found = processes.gather((len(names), digest))
    for rank, other in enumerate(found):
        if other != found[0]:
            raise UserError(
                f"--root: expected the same images for every process in {root}, got {found[0][0]} for process 0 and "
                f"{other[0]}{', with other names,' if other[0] == found[0][0] else ''} for process {rank}"
            )


def listed(names: list[str]) -> str:
    """The first ``names``, and how many more there are."""
    return ", ".join(names[:NAMED]) + (f" and {len(names) - NAMED} more" if len(names) > NAMED else "")


def _classes(folder: Path) -> list[str]:
    """Names of the folders in ``folder``; those that begin with a dot are no classes."""
    return sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))


def _check_classes(train: Part, other: Part) -> None:
    differing = sorted(set(train.classes) ^ set(other.classes))
    if differing:
        there, not_there = (train, other) if differing[0] in train.classes else (other, train)
        raise UserError(
            f"--root: expected the same classes in {train.folder} and {other.folder}, and {listed(differing)} "
            f"{'differs' if len(differing) == 1 else 'differ'}: {differing[0]!r} is in {there.folder} and not in "
            f"{not_there.folder}"
        )
