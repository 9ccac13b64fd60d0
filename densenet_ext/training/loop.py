"""The training loop: SGD with a cosine schedule, a progress bar, metrics as CSV, a checkpoint per epoch."""

from __future__ import annotations

import csv
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from densenet_ext.models import DenseNet, densenet_bc
from densenet_ext.training.checkpoint import save_checkpoint
from densenet_ext.training.data import Split, batches

CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"


class TrainingError(RuntimeError):
    """Training can't go on; the message says where and why."""


@dataclass(frozen=True)
class Settings:
    """What a run is made of; stands in its checkpoint."""

    epochs: int = 30
    batch_size: int = 64
    lr: float = 0.1
    weight_decay: float = 5e-4
    save: str = "bottlenecks"
    seed: int = 0
    depth: int = 22
    growth_rate: int = 12


@dataclass(frozen=True)
class Epoch:
    """One line of the metrics: losses are cross-entropies, errors are percent."""

    epoch: int
    lr: float
    loss: float
    error: float
    held_out_loss: float
    held_out_error: float
    images_per_s: float
    seconds: float


def build(settings: Settings, split: Split) -> DenseNet:
    """The DenseNet-BC of ``settings`` for the images and labels of ``split``."""
    classes = int(split.labels.max()) + 1
    channels = split.images.shape[1]
    return densenet_bc(
        settings.depth, settings.growth_rate, num_classes=classes, in_channels=channels, save=settings.save
    )


def train(settings: Settings, split: Split, folder: Path, show_progress: bool = True) -> list[Epoch]:
    """Trains on ``split`` and leaves metrics.csv and checkpoint.pt in ``folder``, which has to exist.

    Returns the metrics of every epoch. Raises TrainingError when the loss is no number any more or the metrics can't be
    written, CheckpointError when a checkpoint can't.
    """
    run = _Run(settings, split)
    history: list[Epoch] = []
    metrics = folder / METRICS
    _write_row(metrics, "w", list(Epoch.__dataclass_fields__))
    with tqdm(total=settings.epochs * len(split.labels), unit="img", disable=not show_progress) as bar:
        for number in range(1, settings.epochs + 1):
            bar.set_description(f"epoch {number}/{settings.epochs}")
            epoch = run.epoch(number, bar)
            history.append(epoch)
            save_checkpoint(run.state(epoch), folder / CHECKPOINT)
            _write_row(metrics, "a", [_shortened(value) for value in asdict(epoch).values()])
    return history


class _Run:
    """What changes while a network learns."""

    def __init__(self, settings: Settings, split: Split) -> None:
        torch.manual_seed(settings.seed)
        self.settings, self.split = settings, split
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.model = build(settings, split)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), settings.lr, momentum=0.9, nesterov=True, weight_decay=settings.weight_decay
        )
        steps = settings.epochs * math.ceil(len(split.labels) / settings.batch_size)
        self.schedule = torch.optim.lr_scheduler.OneCycleLR(self.optimizer, settings.lr, total_steps=steps)

    def epoch(self, number: int, bar: tqdm[Any]) -> Epoch:
        """Trains on every image once, then measures on those held out."""
        split, start = self.split, time.perf_counter()
        seen, loss_sum, wrong = 0, 0.0, 0
        lr = float(self.schedule.get_last_lr()[0])
        self.model.train()
        for images, labels in batches(split.images, split.labels, self.settings.batch_size, self.generator):
            scores = self.model(images)
            loss = F.cross_entropy(scores, labels)
            value = loss.item()
            if not math.isfinite(value):
                raise TrainingError(f"the loss is {value} in epoch {number} after {seen} images: try a smaller --lr")
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            seen += len(labels)
            loss_sum += value * len(labels)
            wrong += int((scores.detach().argmax(1) != labels).sum())
            bar.set_postfix(loss=f"{loss_sum / seen:.3f}", error=f"{100 * wrong / seen:.2f} %", refresh=False)
            bar.update(len(labels))
        rate = seen / (time.perf_counter() - start)
        held_out_loss, held_out_error = evaluate(self.model, split.held_out_images, split.held_out_labels)
        seconds = time.perf_counter() - start
        return Epoch(number, lr, loss_sum / seen, 100 * wrong / seen, held_out_loss, held_out_error, rate, seconds)

    def state(self, epoch: Epoch) -> dict[str, Any]:
        """What a checkpoint holds: tensors, numbers and strings only, so that it loads with ``weights_only``."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "settings": asdict(self.settings),
            "metrics": asdict(epoch),
        }


def _shortened(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.6g}"


def _write_row(path: Path, mode: str, row: list[Any]) -> None:
    try:
        with open(path, mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)
    except OSError as error:
        raise TrainingError(f"cannot write the metrics {path}: {error.strerror or error}") from error


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor, batch_size: int = 256) -> tuple[float, float]:
    """Mean cross-entropy and error in percent of ``model`` in evaluation mode on ``images`` [N, C, H, W]."""
    model.eval()
    loss_sum, wrong = 0.0, 0
    for x, y in zip(images.split(batch_size), labels.split(batch_size), strict=True):
        scores = model(x)
        loss_sum += F.cross_entropy(scores, y, reduction="sum").item()
        wrong += int((scores.argmax(1) != y).sum())
    return loss_sum / len(labels), 100 * wrong / len(labels)
