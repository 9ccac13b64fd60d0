"""The loop over epochs: steps, validation, metrics, checkpoints, and going on where a run has stopped.

What a run computes at a place (epoch, step) follows from its options and from its state there, never from how it came
there: the order of the images and what is drawn at random are functions of the seed and the place. So a run that was
stopped or killed and then resumed ends with the same numbers as one that was not.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from densenet_ext.errors import Interrupted, Interruption, SharedError, UserError
from densenet_ext.reuse.weights_file import read_weights_file
from densenet_ext.training import metrics
from densenet_ext.training.checkpoints import BEST, LAST, save_checkpoint
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.data.loading import Batches, derived
from densenet_ext.training.learner import Learner
from densenet_ext.training.metrics import Epoch, Sums

if TYPE_CHECKING:
    from lightning_fabric.loggers import TensorBoardLogger

# On a GPU the host reads the losses of so many steps at once: reading waits for the GPU.
_READ_EVERY = 16


class Run:
    """The training of ``learner`` on ``data``, whose state is kept in ``folder``, which has to exist."""

    def __init__(self, learner: Learner, data: Data, folder: Path) -> None:
        self.learner, self.data, self.folder = learner, data, folder
        self.options, self.processes = learner.options, learner.processes
        self.history: list[Epoch] = []
        self._sums, self._step, self._seconds = Sums(), 0, 0.0  # of the current epoch's training so far
        self._every = 1 if learner.device.type == "cpu" else _READ_EVERY
        self._train = learner.batches(data.train, shuffle=True)
        self._counts = self._train.counts  # images of each step
        self._validation, self._test = (
            None if examples is None else learner.batches(examples) for examples in (data.validation, data.test)
        )
        self._interruption = Interruption()

    def resume(self) -> None:
        """Takes the state that the folder keeps, if it has one already.

        Raises UserError when it is damaged, another network's, or of other images.
        """
        path = self.folder / LAST
        if not path.exists():
            return
        state = read_weights_file(path)
        try:
            here, there = self._fingerprint(), state["data"]
            if here != there:
                raise UserError(f"the images or their labels are not those of the run's start: {there}, here {here}")
            self.learner.load_state(state)
            self.history = [Epoch(**row) for row in state["history"]]
            self._sums, self._step, self._seconds = Sums(**state["sums"]), state["step"], state["seconds"]
        except (KeyError, TypeError) as error:
            raise UserError(f"the checkpoint {path} is none of train: it lacks {error}") from error
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    def train(self) -> Sums | None:
        """Trains to the last epoch and returns the figures on the test images, None without them.

        Raises SharedError when the loss is no number any more (the last good checkpoint stays), TrainingError when a
        file can't be written, Interrupted after Ctrl-C or SIGTERM, with the state saved.
        """
        images, first = sum(self._counts), self.processes.is_global_zero
        bar = metrics.bar(self.options.epochs * images, len(self.history) * images + self._sums.images, first)
        if first:
            metrics.write_csv(self.history, self.folder)  # a run that was killed behind its checkpoint lacks a row
        board = metrics.board(self.folder, len(self.history))  # writes in the first process
        with closing(bar), self._interruption:
            while len(self.history) < self.options.epochs:
                row = self._epoch(bar, board)
                if first:
                    bar.write(f"epoch {row.epoch}/{self.options.epochs}: {row}")
                    sys.stdout.flush()
            test = self._evaluated(self._test, 0)
        board.finalize("success")
        return test

    def _epoch(self, bar: tqdm, board: TensorBoardLogger) -> Epoch:
        """Trains the rest of the current epoch, with the checkpoint at its end."""
        start = time.perf_counter() - self._seconds
        number = len(self.history) + 1
        bar.set_description(f"epoch {number}/{self.options.epochs}", refresh=False)
        pending: list[Tensor] = []
        for images, labels in self._train.epoch(number, self._step):
            pending.append(self.learner.step(images, labels, self._counts[self._step]))
            self._step += 1
            if len(pending) == self._every or self._step == len(self._counts):
                self._read(pending, number, bar)
                self._seconds = time.perf_counter() - start
                self._stop_if_asked()
        validation = self._evaluated(self._validation, number)
        if validation is not None and not math.isfinite(validation.loss):
            raise self._no_number(f"the validation loss is {validation.mean_loss} after epoch {number}")
        if not self.learner.is_finite():
            raise self._no_number(f"a weight is no number after epoch {number}")
        figures = self.learner.end_epoch(self._sums, validation)
        row = Epoch(
            **asdict(figures),
            images_per_s=self._sums.images / self._seconds,
            seconds=time.perf_counter() - start,
            memory_mib=metrics.peak_memory(self.learner.device),
        )
        self.history.append(row)
        self._sums, self._step, self._seconds = Sums(), 0, 0.0
        metrics.log(board, row)  # before the checkpoint: a run that is killed in between writes the row again
        self._save()
        return row

    def _evaluated(self, part: Batches | None, number: int) -> Sums | None:
        """Returns the figures on ``part``, None without one; a run that is stopped here repeats them later."""
        if part is None:
            return None

        def until_asked() -> Iterator[tuple[Tensor, Tensor]]:
            for index, batch in enumerate(part.epoch(number)):
                if index % self._every == 0:
                    self._stop_if_asked()
                yield batch

        return self.learner.evaluate(until_asked())

    def _read(self, pending: list[Tensor], number: int, bar: tqdm) -> None:
        """Adds up the figures of the steps in ``pending``, of all processes, and shows them."""
        first = self._step - len(pending)
        figures = self.processes.total(torch.stack(pending).cpu().double()).tolist()
        pending.clear()
        for step, (loss, wrong) in enumerate(figures, start=first):
            if not math.isfinite(loss):
                raise self._no_number(f"the loss is {loss} in epoch {number}, step {step + 1} of {len(self._counts)}")
            self._sums.add(loss, int(wrong), self._counts[step])
        if not bar.disable:  # asking a GPU's allocator takes a while
            memory = metrics.peak_memory(self.learner.device)
            shown = f"loss {self._sums.mean_loss:.3f}, error {self._sums.error:.1f}%, {memory:.0f}M"
            bar.set_postfix_str(shown, refresh=False)
            bar.update(sum(self._counts[first : self._step]))

    def _no_number(self, what: str) -> SharedError:
        saved = f"{self.folder / LAST} keeps epoch {len(self.history)}" if self.history else "no epoch was complete"
        return SharedError(f"{what}; {saved}. {self.learner.advice}")

    def _stop_if_asked(self) -> None:
        """Saves the state within the epoch, and leaves, when any process has got a signal."""
        if int(self.processes.total(torch.tensor(self._interruption.number))) == 0:
            return
        self._save()
        place = f"epoch {len(self.history) + 1}, step {self._step} of {len(self._counts)}"
        if len(self.history) == self.options.epochs:
            place = "the test after the last epoch"
        # Without a number the signal came to another process.
        number = self._interruption.number or signal.SIGTERM
        raise Interrupted(f"stopped in {place}; everything is saved in {self.folder}, --resume goes on there", number)

    def _save(self) -> None:
        state = self.learner.state()
        if not self.processes.is_global_zero:
            return
        best = best_of(self.history)
        is_best = best is not None and best is self.history[-1] and self._step == 0
        state = {
            **state,
            "options": asdict(self.options),
            "data": self._fingerprint(),
            "classes": list(self.data.classes),
            "channels": self.data.train.shape[0],
            "image_size": self.data.train.shape[1],
            "history": [asdict(row) for row in self.history],
            "sums": asdict(self._sums),
            "step": self._step,
            "seconds": self._seconds,
        }
        save_checkpoint(state, *([self.folder / BEST] if is_best else []), self.folder / LAST)
        metrics.write_csv(self.history, self.folder)

    def _fingerprint(self) -> list[list[int]]:
        """Returns [images, a digest of their labels] for each part of the data: other images have another."""
        parts = (self.data.train, self.data.validation, self.data.test)
        return [[len(part), derived(*part.labels.tolist())] for part in parts if part is not None]


def best_of(history: Sequence[Epoch]) -> Epoch | None:
    """Returns the first epoch with the smallest validation error; None without validation."""
    measured = [row for row in history if row.validation_error is not None]
    return min(measured, key=lambda row: row.validation_error or 0.0, default=None)
