"""The metrics of a run: a row an epoch, as CSV and for TensorBoard."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from densenet_ext.training.errors import TrainingError
from densenet_ext.training.files import write_text

FILE = "metrics.csv"
TENSORBOARD = "tensorboard"


@dataclass(frozen=True)
class Row:
    """An epoch's figures: losses are mean cross-entropies, errors are percent of images whose first guess is wrong."""

    epoch: int  # from 1 on
    lr: float
    loss: float  # over the epoch, while the network learned
    error: float
    validation_loss: float | None  # at the epoch's end; None without validation images
    validation_error: float | None


@dataclass(frozen=True)
class Epoch(Row):
    """A row of metrics.csv: the figures, and what the epoch took."""

    images_per_s: float  # in training, of all processes together
    seconds: float  # of the epoch, validation included
    memory_mib: float  # the most that the first process has had so far: of the GPU, or of the whole process


@dataclass
class Sums:
    """Losses and errors added up over images."""

    loss: float = 0.0
    wrong: int = 0
    images: int = 0

    def add(self, loss: float, wrong: int, images: int) -> None:
        """Adds the summed ``loss`` and the ``wrong`` guesses of so many ``images``."""
        self.loss += loss
        self.wrong += wrong
        self.images += images

    @property
    def mean_loss(self) -> float:
        """The mean loss; NaN before the first image."""
        return self.loss / self.images if self.images else math.nan

    @property
    def error(self) -> float:
        """Percent; NaN before the first image."""
        return 100 * self.wrong / self.images if self.images else math.nan


def write_csv(history: Iterable[Epoch], folder: Path) -> None:
    """Writes metrics.csv whole: what a killed run has left behind its last checkpoint is gone afterwards."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(Epoch)], lineterminator="\n")
    writer.writeheader()
    for epoch in history:
        row = asdict(epoch)
        writer.writerow({name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()})
    write_text(folder / FILE, text.getvalue())


class TensorBoard:
    """The rows as TensorBoard's scalars, by the first process; nothing where TensorBoard is not installed."""

    def __init__(self, folder: Path, history: Sequence[Epoch]) -> None:
        from lightning_fabric.loggers import TensorBoardLogger  # the benchmarks' tables need none

        # Rows of epochs that a killed run has shown and that are trained again now are taken back. The last epoch's row
        # comes anew: the run may have been killed between its checkpoint and this row.
        try:
            self._logger = TensorBoardLogger(folder, TENSORBOARD, version="", purge_step=max(1, len(history)))
        except ModuleNotFoundError:
            self._logger = None  # type: ignore[assignment]
        for row in history[-1:]:
            self.add(row)

    def add(self, epoch: Epoch) -> None:
        """Writes the row of ``epoch``. Raises TrainingError when it can't."""
        if self._logger is None:
            return
        row = {_TAGS.get(name, name): value for name, value in asdict(epoch).items() if value is not None}
        try:
            self._logger.log_metrics(row, step=int(row.pop("epoch")))
            self._logger.save()
        except (OSError, ValueError) as error:  # the logger makes ValueError of whatever happens
            raise TrainingError(f"cannot write {self._logger.log_dir}: {error.__cause__ or error}") from error

    def close(self) -> None:
        """Ends the file."""
        if self._logger is not None:
            self._logger.finalize("success")


# One chart for training and validation together, as TensorBoard groups them.
_TAGS = {
    "loss": "loss/training",
    "validation_loss": "loss/validation",
    "error": "error/training",
    "validation_error": "error/validation",
}
