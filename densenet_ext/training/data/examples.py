"""Images with labels, one at a time: the same image for the same key, in every process and whatever came before."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset

from densenet_ext.training.errors import UserError

SPLIT_SEED = 2017  # not the run's seed: every run is measured on the same images

Recipe = Callable[[], Callable[[Any], Tensor]]
"""Makes the transform of an image. Pickled by name, so that a spawned worker imports torchvision our way first."""
T = TypeVar("T")


class Images(Protocol):
    """A tensor [N, C, H, W], or files: by index, an image as the transforms take it."""

    def __getitem__(self, index: int, /) -> Any: ...


class Processes(Protocol):
    """The processes that train together."""

    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def is_first(self) -> bool: ...
    def gather(self, value: Any, /) -> list[Any]: ...


class Examples(Dataset[tuple[Tensor, int]]):
    """Images [C, H, W] float32 as the network gets them, each with its label.

    The key is an index, for the image as in evaluation, or (index, seed), for the image augmented: a function of that
    key alone. torch's random numbers outside are what they were before.
    """

    def __init__(
        self,
        images: Images,
        labels: Tensor,  # [N] int64
        shape: tuple[int, int, int],  # C, H, W
        evaluation: Recipe,
        augmentation: Recipe | None = None,
    ) -> None:
        self.images, self.labels, self.shape = images, labels, shape
        self._recipes = (evaluation, augmentation or evaluation)
        self._transforms: list[Callable[[Any], Tensor] | None] = [None, None]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int]:
        if isinstance(key, tuple):
            index, seed = key
            image = self._augmented(self.images[index], seed)
        else:
            index = key
            image = self._transform(0)(self.images[index])
        return image, int(self.labels[index])

    def _augmented(self, image: Any, seed: int) -> Tensor:
        transform = self._transform(1)
        # torch.manual_seed would seed every GPU as well.
        generator = torch.default_generator
        state = generator.get_state()
        generator.manual_seed(seed)
        try:
            return transform(image)
        finally:
            generator.set_state(state)

    def _transform(self, which: int) -> Callable[[Any], Tensor]:
        transform = self._transforms[which]
        if transform is None:
            transform = self._transforms[which] = self._recipes[which]()
        return transform

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_transforms": [None, None]}


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
    notes: tuple[str, ...]  # lines for the user: how it was split, which files were left out


def split(count: int, fraction: float) -> tuple[Tensor, Tensor]:
    """Which of ``count`` images are trained on and which are held out for validation: the same ones in every run.

    Returns their indices, each part in ascending order, [count - n] and [n] int64. Raises UserError when ``fraction``
    leaves nothing on one side, unless it is 0.
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
    """What ``find`` returns in this process. A UserError that it raises in any process is raised in all of them.

    All wait for the last one: a process that went on alone would wait for the others for ever.
    """
    found, message = None, None
    try:
        found = find()
    except UserError as error:
        message = str(error)
    messages = [text for text in processes.gather(message) if text is not None]
    if messages:
        raise UserError(messages[0])
    return cast(T, found)
