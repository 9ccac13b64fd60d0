"""The loop over epochs: steps, validation, metrics, checkpoints, and going on where a run has stopped.

What a run computes at a place (epoch, step) follows from its options and from its state there, never from how it came
there: the order of the images and what is drawn at random are functions of the seed and the place. So a run that was
stopped or killed and then resumed ends with the same numbers as one that was not.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from densenet_ext.training import metrics
from densenet_ext.training.data.datasets import Data, Examples
from densenet_ext.training.data.loading import Batches
from densenet_ext.training.errors import Interrupted, LossError, UserError
from densenet_ext.training.files import BEST, LAST, load_checkpoint, save_checkpoint
from densenet_ext.training.interruption import Interruption
from densenet_ext.training.learner import Learner
from densenet_ext.training.metrics import Epoch, Sums
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes
from densenet_ext.training.progress import Progress, peak_memory

# On a GPU the host reads the losses of so many steps at once: reading waits for the GPU.
_READ_EVERY = 16


@dataclass(frozen=True)
class Result:
    """The end of a run."""

    history: list[Epoch]
    best: Epoch | None  # with the smallest validation error; None without validation images
    test: Sums | None  # of the last weights; None without test images


class Run:
    """The training of ``learner`` on ``data``, whose state is kept in ``folder``, which has to exist."""

    def __init__(self, learner: Learner, data: Data, folder: Path, shown: bool = True) -> None:
        self.learner, self.data, self.folder = learner, data, folder
        self.options: Options = learner.options
        self.processes: Processes = learner.processes
        self.history: list[Epoch] = []
        self._sums, self._step, self._seconds = Sums(), 0, 0.0  # of the current epoch's training so far
        self._every = 1 if learner.device.type == "cpu" else _READ_EVERY
        self._shown = shown and self.processes.is_first
        self._train = batches(data.train, self.options, self.processes, shuffle=True)
        self._validation, self._test = (
            None if examples is None else batches(examples, self.options, self.processes)
            for examples in (data.validation, data.test)
        )

    def resume(self) -> None:
        """Takes the state that the folder keeps. Raises UserError when there is none, or it is another network's."""
        path = self.folder / LAST
        state = load_checkpoint(path)
        try:
            self._check_images(state["data"])
            self.learner.load_state(state)
            self.history = [Epoch(**row) for row in state["history"]]
            self._sums, self._step, self._seconds = Sums(**state["sums"]), state["step"], state["seconds"]
        except (KeyError, TypeError) as error:
            raise UserError(
                f"cannot read the checkpoint {path}: expected one of train, and it lacks {error}"
            ) from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def _check_images(self, there: dict[str, list[Any]]) -> None:
        here = self._fingerprint()
        if here != there:
            then, now = (", ".join(f"{name} {part[0]}" for name, part in parts.items()) for parts in (there, here))
            words = "the images or their labels are not those that the run was started with"
            raise UserError(f"{words}: {then} there, {now} here")

    def train(self) -> Result:
        """Trains to the last epoch and measures on the test images.

        Raises LossError when the loss is no number any more (the last good checkpoint stays), TrainingError when a file
        can't be written or a worker dies, Interrupted after Ctrl-C or SIGTERM, with the state saved.
        """
        images = sum(self._train.count(step) for step in range(len(self._train)))
        done = len(self.history) * images + self._sums.images
        progress = Progress(self.options.epochs, images, done, self.learner.device, self._shown)
        if self.processes.is_first:
            metrics.write_csv(self.history, self.folder)  # a run that was killed behind its checkpoint lacks a row
        board = metrics.TensorBoard(self.folder, self.history)
        with closing(progress), closing(board), Interruption() as interruption:
            while len(self.history) < self.options.epochs:
                row = self._epoch(progress, interruption)
                progress.epoch(row)
                board.add(row)
            test = self._evaluated(self._test, 0, interruption)
        return Result(self.history, best_of(self.history), test)

    def _epoch(self, progress: Progress, interruption: Interruption) -> Epoch:
        """Trains the rest of the current epoch, with the checkpoint at its end."""
        start = time.perf_counter() - self._seconds
        number = len(self.history) + 1
        pending: list[Tensor] = []
        for images, labels in self._train.epoch(number, self._step):
            pending.append(self.learner.step(images, labels, self._train.count(self._step)))
            self._step += 1
            if len(pending) == self._every or self._step == len(self._train):
                count = self._read(pending, number)
                self._seconds = time.perf_counter() - start
                progress.step(number, count, self._sums)
                self._stop_if_asked(interruption)
        validation = self._evaluated(self._validation, number, interruption)
        self._check(validation, number)
        row = Epoch(
            number,
            self.learner.lr,
            self._sums.mean_loss,
            self._sums.error,
            None if validation is None else validation.mean_loss,
            None if validation is None else validation.error,
            self._sums.images / self._seconds,
            time.perf_counter() - start,
            peak_memory(self.learner.device) / 2**20,
        )
        self.history.append(row)
        self._sums, self._step, self._seconds = Sums(), 0, 0.0
        self.learner.end_epoch()
        self._save()
        return row

    def _evaluated(self, part: Batches | None, number: int, interruption: Interruption) -> Sums | None:
        """Returns the figures on ``part``, None without one; a run that is stopped here repeats them later."""
        if part is None:
            return None

        def until_asked() -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(part.epoch(number)):
                if index % self._every == 0:
                    self._stop_if_asked(interruption)
                yield batch

        return self.learner.evaluate(until_asked())

    def _read(self, pending: list[Tensor], number: int) -> int:
        """Adds up the figures of the steps in ``pending``, of all processes; returns how many images that were."""
        first = self._step - len(pending)
        figures = self.processes.total(torch.stack(pending).cpu().double()).tolist()
        pending.clear()
        before = self._sums.images
        for step, (loss, wrong) in enumerate(figures, start=first):
            count = self._train.count(step)
            if not math.isfinite(loss):
                raise self._no_number(
                    f"the loss is {loss / count} in epoch {number}, step {step + 1} of {len(self._train)}"
                )
            self._sums.add(loss, int(wrong), count)
        return self._sums.images - before

    def _check(self, validation: Sums | None, number: int) -> None:
        if validation is not None and not math.isfinite(validation.loss):
            raise self._no_number(f"the validation loss is {validation.mean_loss} after epoch {number}")
        if not self.learner.is_finite():
            raise self._no_number(f"a weight is no number after epoch {number}")

    def _no_number(self, what: str) -> LossError:
        saved = len(self.history)
        kept = f"{self.folder / LAST} keeps epoch {saved}" if saved else "no epoch was complete, so nothing was saved"
        return LossError(f"{what}; {kept}. {advice(self.options)}")

    def _stop_if_asked(self, interruption: Interruption) -> None:
        """Saves the state within the epoch, and leaves, when any process has got a signal."""
        number = int(self.processes.total(torch.tensor(interruption.number)))
        if number == 0:
            return
        number = interruption.number or signal.SIGTERM  # it came to another process
        self._save()
        place = f"epoch {len(self.history) + 1}, step {self._step} of {len(self._train)}"
        if len(self.history) == self.options.epochs:
            place = "the test after the last epoch"
        raise Interrupted(
            f"stopped in {place}; everything is saved in {self.folder}, and --resume goes on there", number
        )

    def _save(self) -> None:
        state = self.learner.state()
        if not self.processes.is_first:
            return
        best = best_of(self.history)
        is_best = best is not None and best is self.history[-1] and self._step == 0
        state = {
            **state,
            "options": asdict(self.options),
            "data": self._fingerprint(),
            "classes": list(self.data.classes),
            "channels": self.data.channels,
            "image_size": self.data.image_size,
            "history": [asdict(row) for row in self.history],
            "sums": asdict(self._sums),
            "step": self._step,
            "seconds": self._seconds,
        }
        save_checkpoint(state, *([self.folder / BEST] if is_best else []), self.folder / LAST)
        metrics.write_csv(self.history, self.folder)

    def _fingerprint(self) -> dict[str, list[Any]]:
        """Returns [images, a digest of their labels] for each part of the data, which tells other images."""
        parts = {name: getattr(self.data, name) for name in ("train", "validation", "test")}
        return {
            name: [len(part), hashlib.blake2b(part.labels.numpy().tobytes(), digest_size=8).hexdigest()]
            for name, part in parts.items()
            if part is not None
        }


def batches(examples: Examples, options: Options, processes: Processes, shuffle: bool = False) -> Batches:
    """Returns this process's batches of ``examples``; with ``shuffle`` for training, in a new order every epoch.

    Raises UserError when they are larger than the data.
    """
    return Batches(
        examples,
        options.batch_size,
        seed=options.seed,
        shuffle=shuffle,
        rank=processes.rank,
        size=processes.size,
        workers=options.workers,
        pin_memory=processes.device.type == "cuda",
    )


def advice(options: Options) -> str:
    """Returns what to try when the loss is no number any more."""
    return "Try a smaller --lr" + ("" if options.amp == "off" else ", or --amp off")


def best_of(history: list[Epoch]) -> Epoch | None:
    """Returns the first epoch with the smallest validation error; None without validation."""
    measured = [row for row in history if row.validation_error is not None]
    return min(measured, key=lambda row: row.validation_error or 0.0, default=None)
