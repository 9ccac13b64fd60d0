"""Batches in an order that depends on the seed and the epoch alone.

It is the same for any number of workers, and a whole batch is the same for any number of processes. Nothing is drawn
from torch's global generator.
"""

from __future__ import annotations

import functools
import signal
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Sampler, default_collate

from densenet_ext.errors import UserError
from densenet_ext.training.data.datasets import Examples
from densenet_ext.training.seeds import derived

if TYPE_CHECKING:
    from densenet_ext.training.options import Options
    from densenet_ext.training.processes import Processes

_Key = int | tuple[int, int]


class Batches:
    """This one of the ``processes``' part of the batches of ``examples``, as ``options`` ask for them.

    The batch size is that of the whole batch, over all processes; each gets a contiguous part of it, and parts differ
    by at most one image. With ``shuffle`` (training) every epoch has its own order, images are augmented, and a last
    batch with fewer than two images per process is dropped: BatchNorm can't learn from one. Without it (evaluation) the
    images come in their own order, as they are, and a part may be empty.

    Raises UserError when the batch size is more than the training images or less than the processes.
    """

    def __init__(self, examples: Examples, options: Options, processes: Processes, shuffle: bool = False) -> None:
        images, batch_size, size = len(examples), options.batch_size, processes.world_size
        if shuffle and batch_size > images:
            raise UserError(f"--batch-size: expected at most {images}, the training images, got {batch_size}")
        if shuffle and batch_size < size:
            raise UserError(f"--batch-size: expected at least {size}, an image for each process, got {batch_size}")
        self._order = _Order(images, batch_size, options.seed, shuffle, processes.global_rank, size)
        self._loader = DataLoader(
            examples,
            batch_sampler=self._order,
            num_workers=options.workers,
            collate_fn=functools.partial(_collated, examples.shape),
            pin_memory=processes.device.type == "cuda",
            worker_init_fn=_ignore_signals,
            persistent_workers=options.workers > 0,
            generator=torch.Generator(),  # otherwise every epoch draws a number from the global one
        )

    def __len__(self) -> int:
        """Returns the steps of an epoch."""
        return self._order.steps

    @property
    def images(self) -> int:
        """How many images an epoch has, over all processes."""
        return sum(map(self.count, range(len(self))))

    def count(self, step: int) -> int:
        """Returns how many images the whole batch of ``step`` has, over all processes."""
        return self._order.count(step)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's batches of epoch ``number`` from step ``start`` on: images [n, C, H, W], labels [n].

        One epoch at a time: asking for the next ends the one before. Raises the DataLoader's RuntimeError when a worker
        dies.
        """
        self._order.number, self._order.start = number, start
        yield from self._loader


class _Order(Sampler[list[_Key]]):
    """The keys of one process's part of every batch of epoch ``number``, from step ``start`` on."""

    def __init__(self, images: int, batch_size: int, seed: int, shuffle: bool, rank: int, size: int) -> None:
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._shuffle, self._rank, self._size = shuffle, rank, size
        whole, rest = divmod(images, batch_size)
        self.steps = whole + (rest >= 2 * size if shuffle else rest > 0)
        self.number = self.start = 0

    def count(self, step: int) -> int:
        return min(self._batch_size, self._images - step * self._batch_size)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[_Key]]:
        epoch_seed = derived(self._seed, "order", self.number)
        order = torch.arange(self._images)
        if self._shuffle:
            order = torch.randperm(self._images, generator=torch.Generator().manual_seed(epoch_seed))
        for step in range(self.start, self.steps):
            first, part = step * self._batch_size, share(self.count(step), self._rank, self._size)
            indices = order[first + part.start : first + part.stop].tolist()
            yield [(index, derived(epoch_seed, index)) for index in indices] if self._shuffle else indices


def share(count: int, rank: int, size: int) -> range:
    """Returns which of ``count`` things process ``rank`` of ``size`` takes: the first ones may take one more."""
    least, more = divmod(count, size)
    start = rank * least + min(rank, more)
    return range(start, start + least + (rank < more))


def _collated(shape: tuple[int, int, int], examples: list[tuple[Tensor, int]]) -> Any:
    return default_collate(examples) if examples else (torch.empty(0, *shape), torch.empty(0, dtype=torch.int64))


def _ignore_signals(_: int) -> None:
    """Leaves signals for the whole group to the main process, which ends its workers itself when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
