"""Images with labels, one at a time, and the data sets digits and CIFAR."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from densenet_ext import vision
from densenet_ext.errors import UserError
from densenet_ext.training.processes import agreed

if TYPE_CHECKING:
    from densenet_ext.training.options import Options
    from densenet_ext.training.processes import Processes

v2 = vision.import_torchvision().transforms.v2  # before a spawned worker unpickles transforms

SPLIT_SEED = 2017  # not the run's seed: every run is measured on the same images
_DIGITS_SIZE, _CIFAR_SIZE = 16, 32  # height and width
_DIGITS_TEST = 360  # a fifth of the 1797 images


class Examples(Dataset[tuple[Tensor, int]]):
    """Images [C, H, W] float32 as the network gets them, each with its label.

    The key is an index, for the image as in evaluation, or (index, seed), for the image augmented: a function of that
    key alone, the same in every process and whatever came before. torch's random numbers outside are what they were.
    """

    def __init__(
        self,
        images: Any,  # a tensor [N, C, H, W], or files: by index, an image as the transforms take it
        labels: Tensor,  # [N] int64
        shape: tuple[int, int, int],  # C, H, W
        evaluation: Callable[[Any], Tensor],
        augmentation: Callable[[Any], Tensor] | None = None,
    ) -> None:
        self.images, self.labels, self.shape = images, labels, shape
        self.evaluation, self.augmentation = evaluation, augmentation or evaluation

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        if not isinstance(key, tuple):
            return self.evaluation(self.images[key]), int(self.labels[key])
        index, seed = key
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed every GPU as well
            return self.augmentation(self.images[index]), int(self.labels[index])


@dataclass(frozen=True)
class Data:
    """A data set as a network gets it."""

    classes: tuple[str, ...]  # names; the index is the label
    train: Examples  # augmented
    validation: Examples | None
    test: Examples | None
    notes: tuple[str, ...] = ()  # lines for the user: which files were left out


def split(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Returns which of ``count`` images are trained on and which are held out: the same ones in every run.

    Indices, each part in ascending order, [count - n] and [n] int64. Raises UserError when ``fraction`` leaves nothing
    on one side, unless it is 0.
    """
    held_out = round(fraction * count)
    if fraction and not 0 < held_out < count:
        raise UserError(
            f"--validation: a part of {fraction:g} of {count} images leaves none to validate with, or to train on"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[held_out:].sort().values, order[:held_out].sort().values


def digits(chosen: Options) -> Data:
    """Returns the 1797 digits of 8x8 pixels (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits").

    They are scaled to 16x16, or the size that was ``chosen``, and shifted by at most one pixel. A fifth is for the
    test, and of the rest a fraction is held out.
    """
    from sklearn.datasets import load_digits

    found, size = load_digits(), chosen.image_size or _DIGITS_SIZE
    # Two transitions would leave 2x2 of 8x8 pixels; and a shift by one pixel is half of an original one.
    images = F.interpolate(torch.from_numpy(found.images).float().unsqueeze(1), size=(size, size), mode="bilinear")
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, rest = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    kept, held_out = (rest[part] for part in split(len(rest), chosen.validation))
    pixels = images[kept].double()
    images = ((images - pixels.mean()) / pixels.std()).float()
    shifted = v2.RandomCrop(size, padding=max(1, size // _DIGITS_SIZE), padding_mode="edge")

    def examples(indices: Tensor, augmentation: Any = None) -> Examples:
        return Examples(images[indices], labels[indices], (1, size, size), v2.Identity(), augmentation)

    validated = examples(held_out) if len(held_out) else None
    return Data(tuple("0123456789"), examples(kept, shifted), validated, examples(test))


def cifar(chosen: Options, processes: Processes, download: bool) -> Data:
    """Returns CIFAR-10 or CIFAR-100 as the DenseNet paper has it (Huang et al. 2017, section 4.1): C10+ and C100+.

    Training images are mirrored at random and shifted by at most 4 pixels. A fraction of them is held out. All are
    normalised by the training images' channel means and deviations. Raises UserError unless the files of torchvision's
    archive are there, with their checksums.
    """
    name, root, size = chosen.data, Path(chosen.root or "."), chosen.image_size or _CIFAR_SIZE
    kind = getattr(vision.import_torchvision().datasets, name.upper())

    def archives(fetch: bool) -> tuple[Any, Any]:
        try:
            return kind(str(root), train=True, download=fetch), kind(str(root), train=False)
        except (OSError, RuntimeError) as error:  # torchvision looks at every file's checksum before it reads one
            words = "cannot fetch it" if fetch else "missing, or with other checksums: --download fetches it"
            raise UserError(f"--root: {name} in {root / kind.base_folder}: {words} ({error})") from error

    if download:
        agreed(processes, lambda: archives(True) if processes.is_global_zero else None)
    train, test = agreed(processes, lambda: archives(False))
    kept, held_out = split(len(train.data), chosen.validation)
    channels = train.data[kept.numpy()].transpose(3, 0, 1, 2)  # [3, n, 32, 32] uint8; summed in float64
    means, deviations = [channel.mean() / 255 for channel in channels], [channel.std() / 255 for channel in channels]
    normalised = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(means, deviations)]
    # Normalised first, so that what is shifted in has the mean colour.
    shifted = [v2.RandomCrop(_CIFAR_SIZE, padding=4), v2.RandomHorizontalFlip()]
    resized = [] if size == _CIFAR_SIZE else [v2.Resize(size, antialias=True)]
    seen, augmented = v2.Compose([*normalised, *resized]), v2.Compose([*normalised, *shifted, *resized])

    def examples(archive: Any, indices: Any, augmentation: Any = None) -> Examples:
        images = torch.from_numpy(archive.data).permute(0, 3, 1, 2)[indices]
        return Examples(images, torch.tensor(archive.targets)[indices], (3, size, size), seen, augmentation)

    validated = examples(train, held_out) if len(held_out) else None
    return Data(tuple(train.classes), examples(train, kept, augmented), validated, examples(test, slice(None)))
