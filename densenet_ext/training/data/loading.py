"""Batches in an order that depends on the seed and the epoch alone.

It is the same for any number of workers, and a whole batch is the same for any number of processes. Nothing is drawn
from torch's global generator.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, get_worker_info

from densenet_ext.training.data.examples import Examples
from densenet_ext.training.errors import TrainingError, UserError
from densenet_ext.training.seeds import derived

_Key = int | tuple[int, int]
_Batch = tuple[Tensor, Tensor]
_KEPT = "the last checkpoint is kept"
_IDLE = 5.0  # seconds; after a SIGTERM a worker goes on as long as it is asked for batches


class Batches:
    """One process's part of the batches of ``examples``.

    ``batch_size`` is that of the whole batch, over all processes; process ``rank`` of ``size`` gets a contiguous part
    of each, and parts differ by at most one image. With ``shuffle`` (training) every epoch has its own order, images
    are augmented, and a last batch with fewer than two images per process is dropped: BatchNorm can't learn from one.
    Without it (evaluation) the images come in their own order, as they are, and a part may be empty.

    Raises UserError when ``batch_size`` is more than the training images or less than the processes.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        size: int = 1,
        workers: int = 0,
        pin_memory: bool = False,
    ) -> None:
        images = len(examples)
        if shuffle and batch_size > images:
            raise UserError(f"--batch-size: expected at most {images}, the training images, got {batch_size}")
        if shuffle and batch_size < size:
            raise UserError(f"--batch-size: expected at least {size}, an image for each process, got {batch_size}")
        self._examples, self._workers, self._pin_memory = examples, workers, pin_memory
        self._order = _Order(images, batch_size, seed, shuffle, rank, size)
        self._loader: DataLoader[_Batch] | None = None
        self._iterator: Iterator[Any] | None = None

    def __len__(self) -> int:
        """The steps of an epoch."""
        return self._order.steps

    def count(self, step: int) -> int:
        """Images of the whole batch of ``step``, over all processes."""
        return self._order.count(step)

    def epoch(self, number: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """This process's images [n, C, H, W] float32 and labels [n] int64 of epoch ``number``, from step ``start`` on.

        One epoch at a time: asking for the next ends the one before. Raises TrainingError when an image can't be loaded
        or a worker dies.
        """
        self._order.number, self._order.start = number, start
        with self._explained(), _sigchld_as_before():
            self._iterator = iter(self._data_loader())
        while (batch := self._next()) is not None:
            yield batch

    def close(self) -> None:
        """Ends the worker processes; a later epoch would start new ones."""
        self._iterator = self._loader = None  # the last references: the loader ends its workers when it is collected

    def _data_loader(self) -> DataLoader[_Batch]:
        if self._loader is None:
            self._loader = DataLoader(
                _Parts(self._examples),
                batch_size=None,  # the sampler's items are batches
                sampler=self._order,
                num_workers=self._workers,
                collate_fn=_unchanged,
                pin_memory=self._pin_memory,
                worker_init_fn=_start_worker,
                persistent_workers=self._workers > 0,
                generator=torch.Generator(),  # otherwise every epoch draws a number from the global one
            )
        return self._loader

    def _next(self) -> _Batch | None:
        if self._iterator is None:  # closed
            return None
        with self._explained():
            batch = next(self._iterator, None)
        if isinstance(batch, Exception):
            raise batch
        return batch

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        """Says what the loader's own errors mean."""
        try:
            yield
        except (RuntimeError, OSError, EOFError) as error:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            # Whoever receives from a worker that has just been killed may see the broken connection first.
            died = isinstance(error, (ConnectionError, EOFError, FileNotFoundError))
            if not died and "exited unexpectedly" not in reason and "killed by signal" not in reason:
                raise TrainingError(f"loading images (--workers {self._workers}) failed: {reason}; {_KEPT}") from error
            workers = "the worker" if self._workers == 1 else f"one of the {self._workers} workers"
            raise TrainingError(
                f"{workers} that load images died ({reason}), probably killed by signal for want of memory or shared "
                f"memory: try fewer --workers; {_KEPT}"
            ) from error


class _Order(Sampler[list[_Key]]):
    """The keys of one process's part of every batch of epoch ``number``, from step ``start`` on."""

    def __init__(self, images: int, batch_size: int, seed: int, shuffle: bool, rank: int, size: int) -> None:
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._shuffle, self._rank, self._size = shuffle, rank, size
        whole, rest = divmod(images, batch_size)
        self.steps = whole + (rest >= 2 * size if shuffle else rest > 0)
        self.number = self.start = 0

    def count(self, step: int) -> int:
        """Images of the whole batch of ``step``."""
        return min(self._batch_size, self._images - step * self._batch_size)

    def __len__(self) -> int:
        return self.steps - self.start

    def __iter__(self) -> Iterator[list[_Key]]:
        epoch_seed = derived(self._seed, "order", self.number)
        if self._shuffle:
            order = torch.randperm(self._images, generator=torch.Generator().manual_seed(epoch_seed))
        else:
            order = torch.arange(self._images)
        for step in range(self.start, self.steps):
            first, part = step * self._batch_size, share(self.count(step), self._rank, self._size)
            indices = order[first + part.start : first + part.stop].tolist()
            yield [(index, derived(epoch_seed, index)) for index in indices] if self._shuffle else indices


def share(count: int, rank: int, size: int) -> range:
    """Which of ``count`` things process ``rank`` of ``size`` takes: contiguous, the first ones take one more."""
    least, more = divmod(count, size)
    start = rank * least + min(rank, more)
    return range(start, start + least + (rank < more))


class _Parts(Dataset[Any]):
    """Whole batches by their keys; an error is a value, since the loader would put a worker's traceback around it."""

    asked = 0.0  # when the last batch was asked for in this process, in seconds of the monotonic clock

    def __init__(self, examples: Examples) -> None:
        self._examples = examples

    def __getitem__(self, keys: list[_Key]) -> _Batch | Exception:
        _Parts.asked = time.monotonic()
        try:
            loaded = [self._examples[key] for key in keys]
            images = torch.stack([image for image, _ in loaded]) if loaded else torch.empty(0, *self._examples.shape)
            labels = torch.tensor([label for _, label in loaded], dtype=torch.int64)
        except (UserError, TrainingError) as error:
            return error
        except Exception as error:
            reason = str(error).strip().partition("\n")[0]
            return TrainingError(f"images can't be loaded: {type(error).__name__}: {reason}; {_KEPT}")
        return (images, labels) if get_worker_info() is None else _shared(images, labels)


def _shared(images: Tensor, labels: Tensor) -> _Batch | Exception:
    """The batch in shared memory. Otherwise the loader's own thread moves it there; it would lose it, and all wait."""
    try:
        return images.share_memory_(), labels
    except (RuntimeError, OSError) as error:
        size, reason = f"{images.nbytes / 2**20:.1f} MiB", str(error).strip().partition("\n")[0]
        return TrainingError(f"no shared memory for a batch of {size} ({reason}): try --workers 0; {_KEPT}")


def _unchanged(batch: Any) -> Any:
    return batch


def _start_worker(_: int) -> None:
    """Leaves signals for the whole group to the main process, which ends its workers itself when it has saved."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _end_when_idle)


def _end_when_idle(number: int, frame: object) -> None:
    threading.Thread(target=_wait_and_end, daemon=True).start()


def _wait_and_end() -> None:
    while time.monotonic() - _Parts.asked < _IDLE:
        time.sleep(0.1)
    os._exit(0)


@contextlib.contextmanager
def _sigchld_as_before() -> Iterator[None]:
    """Takes back the handler of SIGCHLD that the loader sets.

    It would raise wherever the main process is when a worker dies, in the middle of a step; without it the death is
    found where the next batch is asked for.
    """
    handler = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if handler is not None and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGCHLD, handler)
