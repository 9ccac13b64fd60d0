"""The data sets of the command line, each split, augmented and normalised as it is usual for it."""

from __future__ import annotations

import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext.training.data import image_folder, vision
from densenet_ext.training.data.examples import SPLIT_SEED, Data, Examples, agreed, split
from densenet_ext.training.errors import UserError
from densenet_ext.training.options import Options

if TYPE_CHECKING:
    from densenet_ext.training.processes import Processes

__all__ = ["Data", "Examples", "load"]

v2 = vision.transforms()

_DIGITS, _DIGITS_TEST = 16, 360  # height and width; a fifth of the 1797 images
_CIFAR = 32


def load(chosen: Options, processes: Processes, download: bool = False) -> Data:
    """Returns the data set that was ``chosen``, the same in all ``processes``. Raises UserError."""
    name, validation, root = chosen.data, chosen.validation, None if chosen.root is None else Path(chosen.root)
    if not 0 <= validation < 1:
        raise UserError(f"--validation: expected a fraction of at least 0 and below 1, got {validation:g}")
    if name == "digits":
        return digits(chosen.image_size or _DIGITS, validation)
    if name == "imagefolder":
        return image_folder.load(root, chosen.image_size, validation, chosen.on_corrupt, chosen.workers, processes)
    return cifar(name, root, chosen.image_size or _CIFAR, validation, download, processes)


def digits(size: int, validation: float) -> Data:
    """Returns the 1797 digits of 8x8 pixels (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits").

    They are scaled to ``size``, 16 by default, and shifted by at most one pixel. A fifth is for the test, and of the
    rest the fraction ``validation`` is held out. Raises UserError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError("the digits are inside scikit-learn: pip install scikit-learn") from error
    found = load_digits()
    # Two transitions would leave 2x2 of 8x8 pixels; and a shift by one pixel is half of an original one.
    images = F.interpolate(torch.from_numpy(found.images).float().unsqueeze(1), size=(size, size), mode="bilinear")
    labels = torch.from_numpy(found.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, rest = order[:_DIGITS_TEST], order[_DIGITS_TEST:]
    kept, held_out = (rest[part] for part in split(len(rest), validation))
    pixels = images[kept].double()
    images = ((images - pixels.mean()) / pixels.std()).float()
    shifted = v2.RandomCrop(size, padding=max(1, size // _DIGITS), padding_mode="edge")

    def examples(indices: Tensor, augmentation: Any = None) -> Examples:
        return Examples(images[indices], labels[indices], (1, size, size), v2.Identity(), augmentation)

    validated = examples(held_out) if len(held_out) else None
    names = tuple(str(digit) for digit in range(10))
    return Data("digits", names, 1, size, examples(kept, shifted), validated, examples(test))


def cifar(name: str, root: Path | None, size: int, validation: float, download: bool, processes: Processes) -> Data:
    """Returns CIFAR-10 or CIFAR-100 as the DenseNet paper has it (Huang et al. 2017, section 4.1): C10+ and C100+.

    Training images are mirrored at random and shifted by at most 4 pixels. The fraction ``validation`` of them is held
    out. All are normalised by the training images' channel means and deviations. Raises UserError unless the files of
    torchvision's archive are there, with their checksums.
    """
    if root is None:
        raise UserError(f"--root: expected the folder that holds {name}, or that --download shall put it into")
    kind = getattr(vision.import_torchvision().datasets, name.upper())
    if download:
        agreed(processes, lambda: _download(kind, root) if processes.is_first else None)
    train, test = agreed(processes, lambda: [_archive(kind, root, of_training) for of_training in (True, False)])
    images, labels = (torch.from_numpy(train.data).permute(0, 3, 1, 2), torch.tensor(train.targets))
    kept, held_out = split(len(labels), validation)
    normalised = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(*channel_statistics(images[kept]))]
    # Normalised first, so that what is shifted in has the mean colour.
    shifted = [v2.RandomCrop(_CIFAR, padding=4), v2.RandomHorizontalFlip()]
    resized = [] if size == _CIFAR else [v2.Resize(size, antialias=True)]
    seen, augmented = v2.Compose([*normalised, *resized]), v2.Compose([*normalised, *shifted, *resized])

    def examples(images: Tensor, labels: Tensor, augmentation: Any = None) -> Examples:
        return Examples(images, labels, (3, size, size), seen, augmentation)

    trained = examples(images[kept], labels[kept], augmented)
    validated = examples(images[held_out], labels[held_out]) if len(held_out) else None
    tested = examples(torch.from_numpy(test.data).permute(0, 3, 1, 2), torch.tensor(test.targets))
    return Data(name, tuple(train.classes), 3, size, trained, validated, tested)


def channel_statistics(images: Tensor) -> tuple[list[float], list[float]]:
    """Returns mean and deviation of every channel of ``images`` [N, C, H, W] uint8, on the scale from 0 to 1.

    From counts of the 256 values, so that they are exact whatever the number of threads.
    """
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]).double()
    shares = counts / counts.sum(1, keepdim=True)  # [C, 256]
    means = shares @ values
    variances = (shares * (values - means[:, None]) ** 2).sum(1)
    return means.tolist(), variances.sqrt().clamp(min=1 / 255).tolist()


def _download(kind: Any, root: Path) -> None:
    """Fetches and unpacks the archive, unless its files are there with the right checksums."""
    try:
        kind(str(root), train=False, download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--download: cannot fetch {kind.url} into {root}: {reason}") from error


def _archive(kind: Any, root: Path, train: bool) -> Any:
    """Returns torchvision's data set; of other files than the original ones torchvision reads none, as pickles are."""
    files = [*kind.train_list, *kind.test_list, [kind.meta["filename"], kind.meta["md5"]]]
    intact = vision.import_torchvision().datasets.cifar.check_integrity
    folder = root / kind.base_folder
    wrong = [name for name, checksum in files if not intact(str(folder / name), checksum)]
    if wrong:
        raise UserError(
            f"--root: expected the original files of {kind.__name__} in {folder}, and {', '.join(wrong)} "
            f"{'is' if len(wrong) == 1 else 'are'} missing or damaged (another checksum): give another --root, or "
            "--download to fetch them (170 MB)"
        )
    return kind(str(root), train=train)
