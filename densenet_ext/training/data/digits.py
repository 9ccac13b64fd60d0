"""The handwritten digits inside scikit-learn."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from densenet_ext.training.data import vision
from densenet_ext.training.data.examples import SPLIT_SEED, Data, Examples, split
from densenet_ext.training.errors import UserError

SIZE = 16
_TEST = 360  # a fifth of the 1797 images


def load(image_size: int | None, validation: float) -> Data:
    """The 1797 digits of 8x8 pixels (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits"), at 16x16.

    A fifth is for the test, and of the rest the fraction ``validation`` is held out; training images are shifted by at
    most one pixel. Raises UserError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UserError("the digits are inside scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    size = image_size or SIZE
    # Two transitions would leave 2x2 of 8x8 pixels; and a shift by one pixel is half of an original one.
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    images = F.interpolate(images, size=(size, size), mode="bilinear")
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(SPLIT_SEED))
    test, rest = order[:_TEST], order[_TEST:]
    kept, held_out = (rest[part] for part in split(len(rest), validation))
    pixels = images[kept].double()
    images = ((images - pixels.mean()) / pixels.std()).float()

    def examples(indices: Tensor, augmented: bool = False) -> Examples:
        augmentation = functools.partial(_shift, size) if augmented else None
        return Examples(images[indices], labels[indices], (1, size, size), _as_it_is, augmentation)

    return Data(
        name="digits",
        classes=tuple(str(digit) for digit in range(10)),
        channels=1,
        image_size=size,
        train=examples(kept, augmented=True),
        validation=examples(held_out) if len(held_out) else None,
        test=examples(test),
        notes=(),
    )


def _as_it_is() -> Callable[[Any], Tensor]:
    return _identity


def _identity(image: Tensor) -> Tensor:
    return image


def _shift(size: int) -> Callable[[Any], Tensor]:
    return vision.transforms().RandomCrop(size, padding=max(1, size // SIZE), padding_mode="edge")
