"""Images with labels, one at a time: the same image for the same key, in every process and whatever came before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from densenet_ext.training.data import vision
from densenet_ext.training.errors import UserError

if TYPE_CHECKING:
    from densenet_ext.training.processes import Processes

vision.import_torchvision()  # before a spawned worker unpickles transforms

SPLIT_SEED = 2017  # not the run's seed: every run is measured on the same images

Transform = Callable[[Any], Tensor]
T = TypeVar("T")


class Examples(Dataset[tuple[Tensor, int]]):
    """Images [C, H, W] float32 as the network gets them, each with its label.

    The key is an index, for the image as in evaluation, or (index, seed), for the image augmented: a function of that
    key alone. torch's random numbers outside are what they were before.
    """

    def __init__(
        self,
        images: Any,  # a tensor [N, C, H, W], or files: by index, an image as the transforms take it
        labels: Tensor,  # [N] int64
        shape: tuple[int, int, int],  # C, H, W
        evaluation: Transform,
        augmentation: Transform | None = None,
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

    name: str
    classes: tuple[str, ...]  # names; the index is the label
    channels: int
    image_size: int  # height and width
    train: Examples  # augmented
    validation: Examples | None
    test: Examples | None
    notes: tuple[str, ...] = ()  # lines for the user: how it was split, which files were left out


def split(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Returns which of ``count`` images are trained on and which are held out: the same ones in every run.

    Indices, each part in ascending order, [count - n] and [n] int64. Raises UserError when ``fraction`` leaves nothing
    on one side, unless it is 0.
    """
    held_out = round(fraction * count)
    if fraction and not 0 < held_out < count:
        raise UserError(
            f"--validation: expected a fraction that leaves images on either side, got {fraction:g} of {count} images: "
            f"{count - held_out} to train on and {held_out} to validate with"
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(SPLIT_SEED))
    return order[held_out:].sort().values, order[:held_out].sort().values


def agreed(processes: Processes, find: Callable[[], T]) -> T:
    """Returns what ``find`` returns in this process. A UserError that any process raises is raised in all of them.

    All wait for the last one: a process that went on alone would wait for the others for ever.
    """
    found, message = None, None
    try:
        found = find()
    except UserError as error:
        message = str(error)
    for text in processes.gather(message):
        if text is not None:
            raise UserError(text)
    return cast(T, found)
