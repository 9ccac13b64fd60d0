"""Images of any size in folders, one folder for each class, as they are usual for ImageNet."""

from __future__ import annotations

import os
import stat
from collections import Counter
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image, UnidentifiedImageError
from tqdm import tqdm

from densenet_ext import vision
from densenet_ext.errors import UserError
from densenet_ext.training.data.datasets import SPLIT_SEED, Data, Examples
from densenet_ext.training.data.loading import share
from densenet_ext.training.processes import agreed
from densenet_ext.training.seeds import derived

if TYPE_CHECKING:
    from densenet_ext.training.options import Options
    from densenet_ext.training.processes import Processes

v2 = vision.import_torchvision().transforms.v2

SIZE = 224
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's
_ENDINGS: tuple[str, ...] = vision.import_torchvision().datasets.folder.IMG_EXTENSIONS
_FOLDERS = {"validation": ("val", "valid", "validation"), "test": ("test",)}
_NAMED = 10  # at most so many names stand in a message


def load(chosen: Options, processes: Processes) -> Data:
    """Returns the images root/train/CLASS/*, with root/val and root/test if they are there, or root/CLASS/*.

    Without a folder for validation (val, valid or validation) a fraction of each class is held out. Every file is
    decoded once, by as many threads of each process as there are workers; of those that can't be, ``on_corrupt``
    "refuse" raises UserError with their names and "skip" leaves them out. UserError, too, for a class without an image.
    """
    root, notes = Path(chosen.root or "."), list[str]()
    parts = agreed(processes, lambda: find(root))
    paths = [path for part in parts.values() for path in part.paths]
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
        parts = {
            name: part.taken([i for i, path in enumerate(part.paths) if path not in corrupt]).check()
            for name, part in parts.items()
        }
    if "validation" not in parts and chosen.validation:
        parts["train"], parts["validation"] = parts["train"].split(chosen.validation)
    size = chosen.image_size or SIZE
    normalised = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(_MEANS, _DEVIATIONS)]
    seen = v2.Compose([v2.Resize(round(size * 256 / 224), antialias=True), v2.CenterCrop(size), *normalised])
    drawn = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *normalised])

    def examples(part: Part, augmentation: Any = None) -> Examples:
        return Examples(Files(part.paths), torch.tensor(part.labels), (3, size, size), seen, augmentation)

    train = parts["train"]
    validation, test = (examples(parts[name]) if name in parts else None for name in ("validation", "test"))
    return Data("imagefolder", train.classes, 3, size, examples(train, drawn), validation, test, tuple(notes))


class Files:
    """Images by the index of their file, in RGB."""

    def __init__(self, paths: list[str]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> Image.Image:
        return in_rgb(self.paths[index])


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

    def check(self) -> Part:
        """Returns this. Raises UserError when a class has no image."""
        empty = [name for label, name in enumerate(self.classes) if label not in set(self.labels)]
        if len(self.classes) < 2 or empty:
            raise UserError(
                f"--root: expected a folder with images ({', '.join(_ENDINGS)}) for each of at least two classes in "
                f"{self.folder}, found {f'none that can be read in {empty}' if empty else list(self.classes)}"
            )
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
        if not held_out:
            raise UserError(
                f"--validation: {fraction:g} of the {len(self.paths)} images in {self.folder} holds none out"
            )
        return self.taken([i for i in range(len(self.paths)) if i not in held_out]), self.taken(sorted(held_out))


# ---- which files there are -------------------------------------------------------------------------------------------


def find(root: Path) -> dict[str, Part]:
    """Returns the parts of the data under ``root``: "train" and maybe "validation" and "test". Raises UserError."""
    try:
        # A class may be called "train" as well; but then it holds images, not folders.
        if not (root / "train").is_dir() or not _classes(root / "train"):
            return {"train": _part(root)}
        parts = {"train": _part(root / "train")}
        for name, folders in _FOLDERS.items():
            for folder in [root / each for each in folders if (root / each).is_dir()][:1]:
                parts[name] = _part(folder)
    except OSError as error:
        raise UserError(f"--root: cannot read {error.filename or root}: {error.strerror or error}") from error
    for part in parts.values():
        differing = set(part.classes) ^ set(parts["train"].classes)
        if differing:
            raise UserError(
                f"--root: expected the same classes in {root / 'train'} and {part.folder}, not {sorted(differing)}"
            )
    return parts


def _part(folder: Path) -> Part:
    classes = _classes(folder)
    found = [(path, label) for label, name in enumerate(classes) for path in _images(folder / name)]
    return Part(folder, tuple(classes), [path for path, _ in found], [label for _, label in found]).check()


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
    mine = share(len(paths), processes.global_rank, processes.world_size)
    threads = ThreadPoolExecutor(max(1, workers))  # the decoders work without the interpreter's lock
    hidden = None if processes.is_global_zero else True  # None: unless on a terminal
    try:
        reasons = threads.map(_reason, (paths[i] for i in mine))
        shown = tqdm(reasons, "checking", len(mine), unit="img", delay=2, leave=False, disable=hidden)
        found = {paths[i]: reason for i, reason in zip(mine, shown, strict=True) if reason is not None}
    finally:
        threads.shutdown(cancel_futures=True)
    return {path: reason for part in processes.gather(found) for path, reason in part.items()}


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
