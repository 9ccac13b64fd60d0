"""The metrics of a run: a row an epoch, as CSV, for TensorBoard, and behind a bar on a terminal."""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Iterable
from dataclasses import asdict, astuple, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from densenet_ext.files import write_text

if TYPE_CHECKING:
    from lightning_fabric.loggers import TensorBoardLogger
    from tqdm import tqdm

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

    def __str__(self) -> str:
        """Returns the row in words."""
        text = f"lr {self.lr:g}, loss {self.loss:.4f}, error {self.error:.2f} %"
        if self.validation_loss is not None:
            text += f", validation loss {self.validation_loss:.4f}, error {self.validation_error:.2f} %"
        return f"{text}, {self.images_per_s:.0f} images/s, {self.memory_mib:.0f} MiB"


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
        """The mean loss of at least one image."""
        return self.loss / self.images

    @property
    def error(self) -> float:
        """The error of at least one image, in percent."""
        return 100 * self.wrong / self.images


def write_csv(history: Iterable[Epoch], folder: Path) -> None:
    """Writes metrics.csv whole: rows that a killed run has left after its last checkpoint are gone afterwards."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(field.name for field in fields(Epoch))
    for epoch in history:
        writer.writerow(f"{value:.6g}" if isinstance(value, float) else value for value in astuple(epoch))
    write_text(folder / FILE, text.getvalue())


# One chart for training and validation together, as TensorBoard groups them.
_TAGS = {
    "loss": "loss/training",
    "validation_loss": "loss/validation",
    "error": "error/training",
    "validation_error": "error/validation",
}


def board(folder: Path, epochs: int) -> TensorBoardLogger:
    """Returns the writer of TensorBoard's scalars in ``folder``, which drops rows of later epochs than ``epochs``."""
    from lightning_fabric.loggers import TensorBoardLogger  # the benchmarks' tables need none

    return TensorBoardLogger(folder, TENSORBOARD, version="", purge_step=epochs + 1)


def log(logger: TensorBoardLogger, epoch: Epoch) -> None:
    """Writes the row of ``epoch``."""
    row = {_TAGS.get(name, name): value for name, value in asdict(epoch).items() if value is not None}
    logger.log_metrics(row, step=int(row.pop("epoch")))
    logger.save()


def bar(images: int, done: int = 0, shown: bool = True) -> tqdm:
    """Returns tqdm's bar over so many ``images``, of which ``done`` are done; nothing away from a terminal."""
    from tqdm import tqdm

    # tqdm shows nothing where a terminal does not know its width, as in a container; this takes 80 columns then.
    return tqdm(
        total=images,
        initial=done,
        disable=not (shown and sys.stderr.isatty()),
        unit=" img",
        unit_scale=True,
        smoothing=0.05,
        ncols=shutil.get_terminal_size().columns,
        bar_format="{desc}{percentage:3.0f}%|{bar}|{remaining} left, {rate_fmt}{postfix}",  # fits 80 columns
    )


def peak_memory(device: torch.device) -> float:
    """Returns the most MiB so far: that PyTorch has allocated on a GPU, or else that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    import resource  # not on Windows, where nothing of this package has been run

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held / 2**20 if sys.platform == "darwin" else held / 2**10
