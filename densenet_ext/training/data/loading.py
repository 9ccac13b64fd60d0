"""Batches in an order that depends on the seed and the epoch alone, and the seeds of whatever is drawn in a run.

The order is the same for any number of workers, and a whole batch is the same for any number of processes. Nothing is
drawn from torch's global generator.
"""

from __future__ import annotations

import functools
import hashlib
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, default_collate

from densenet_ext.errors import UserError
from densenet_ext.training.data.datasets import Examples

if TYPE_CHECKING:
    from densenet_ext.training.options import Options
    from densenet_ext.training.processes import Processes


def derived(*place: int | str) -> int:
    """Returns a seed of 63 bits for ``place``: the run's seed, what it is for, epoch, index.

    What is drawn at a place depends on that place alone: a resumed run draws what an uninterrupted one draws, whatever
    number of processes and workers it has, and no generator's state has to be kept.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


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
        # For each step of an epoch the images of its whole batch, over all processes.
        self.counts = [min(batch_size, images - first) for first in range(0, images, batch_size)]
        if shuffle and self.counts[-1] < min(batch_size, 2 * size):
            self.counts.pop()
        self._order = _Order(options.seed, shuffle, batch_size, images, len(self.counts), processes)
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

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yields this process's batches of epoch ``number`` from step ``start`` on: images [n, C, H, W], labels [n].

        They are on the process's device. One epoch at a time: asking for the next ends the one before. Raises the
        DataLoader's RuntimeError when a worker dies.
        """
        self._order.number, self._order.start = number, start
        device = self._order.processes.device
        for images, labels in self._loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)


@dataclass
class _Order:
    """The keys of one process's part of every batch of epoch ``number``, from step ``start`` on."""

    seed: int
    shuffle: bool
    batch_size: int
    images: int
    steps: int
    processes: Processes
    number: int = 0
    start: int = 0

    def __iter__(self) -> Iterator[list[Any]]:
        seed = derived(self.seed, "order", self.number)
        order = torch.arange(self.images)
        if self.shuffle:
            order = torch.randperm(self.images, generator=torch.Generator().manual_seed(seed))
        for batch in order.split(self.batch_size)[self.start : self.steps]:
            indices = batch.tensor_split(self.processes.world_size)[self.processes.global_rank].tolist()
            yield [(index, derived(seed, index)) for index in indices] if self.shuffle else indices


def _collated(shape: tuple[int, int, int], examples: list[tuple[Tensor, int]]) -> Any:
    return default_collate(examples) if examples else (torch.empty(0, *shape), torch.empty(0, dtype=torch.int64))


def _ignore_signals(_: int) -> None:
    """Leaves signals for the whole group to the main process, which ends its workers itself when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
