"""The handwritten digits inside scikit-learn, split once and for all, and their batches."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

HELD_OUT = 360  # a fifth of the 1797 images
_SPLIT_SEED = 2017  # not the run's seed: every run is measured on the same images


class Split(NamedTuple):
    """Images and labels to train on, and others that are held out."""

    images: Tensor  # [N, 1, H, W] float32, mean 0 and deviation 1 over the training images
    labels: Tensor  # [N] int64
    held_out_images: Tensor  # [M, 1, H, W] float32
    held_out_labels: Tensor  # [M] int64


def load_digits() -> Split:
    """The 1797 digits of 8x8 pixels (Alpaydin and Kaynak, UCI "Optical Recognition of Handwritten Digits"), at 16x16.

    Raises ModuleNotFoundError with what to install when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits as load
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("the digits are inside scikit-learn: pip install scikit-learn") from error
    digits = load()
    images = torch.from_numpy(digits.images).float().unsqueeze(1)
    # Two transitions would leave 2x2 of 8x8 pixels; and a shift by one pixel is half of an original one.
    images = F.interpolate(images, scale_factor=2, mode="bilinear")
    labels = torch.from_numpy(digits.target).long()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    held_out, kept = order[:HELD_OUT], order[HELD_OUT:]
    images = (images - images[kept].mean()) / images[kept].std()
    return Split(images[kept], labels[kept], images[held_out], labels[held_out])


def batches(images: Tensor, labels: Tensor, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order, every image shifted by at most one pixel; the last batch may be smaller.

    Yields images [n, C, H, W] and labels [n] with n <= ``size``.
    """
    order = torch.randperm(len(labels), generator=generator)
    for index in order.split(size):
        yield shifted(images[index], generator), labels[index]


def shifted(images: Tensor, generator: torch.Generator) -> Tensor:
    """Each of ``images`` [N, C, H, W] moved by -1, 0 or 1 pixel along either side, the border repeated."""
    height, width = images.shape[2:]
    padded = F.pad(images, (1, 1, 1, 1), mode="replicate")
    dy, dx = torch.randint(0, 3, (2, len(images)), generator=generator)
    rows = (dy[:, None] + torch.arange(height))[:, None, :, None]
    columns = (dx[:, None] + torch.arange(width))[:, None, None, :]
    sample = torch.arange(len(images))[:, None, None, None]
    channel = torch.arange(images.shape[1])[None, :, None, None]
    return padded[sample, channel, rows, columns]
