"""What a run shows: a bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from densenet_ext.training.metrics import Epoch, Sums

SECONDS_BETWEEN_LINES = 60.0  # within an epoch, away from a terminal


class Progress:
    """Shows the training of ``epochs`` epochs of ``images`` images each; nothing unless ``shown``."""

    def __init__(self, epochs: int, images: int, done: int, device: torch.device, shown: bool) -> None:
        """``done``: images that were trained on before this process started."""
        self._epochs, self._images, self._device, self._shown = epochs, images, device, shown
        self._start, self._first, self._seen = time.perf_counter(), done, done
        self._last_line = self._start
        self._is_terminal = shown and sys.stderr.isatty()
        self._bar: Any = None
        if self._is_terminal:
            self._bar = tqdm(total=epochs * images, initial=done, unit=" images", dynamic_ncols=True, smoothing=0.05)

    def step(self, epoch: int, images: int, sums: Sums) -> None:
        """``images`` more are learned in ``epoch``, whose losses and errors so far are ``sums``."""
        self._seen += images
        if self._bar is not None:
            self._bar.set_description(f"epoch {epoch}/{self._epochs}", refresh=False)
            values = {"loss": f"{sums.mean_loss:.3f}", "error": f"{sums.error:.2f} %", "memory": self._memory()}
            self._bar.set_postfix(values, refresh=False)
            self._bar.update(images)
        elif self._shown and time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            part = f"{sums.images} of {self._images} images"
            figures = f"loss {sums.mean_loss:.4f}, error {sums.error:.2f} %"
            self.line(f"epoch {epoch}/{self._epochs}, {part}: {figures}, {self._left()}")

    def epoch(self, row: Epoch) -> None:
        """``row`` is complete: a line, which stays above a bar."""
        text = f"epoch {row.epoch}/{self._epochs}: lr {row.lr:g}, loss {row.loss:.4f}, error {row.error:.2f} %"
        if row.validation_loss is not None:
            text += f", validation loss {row.validation_loss:.4f}, error {row.validation_error:.2f} %"
        left = "" if row.epoch == self._epochs else f", {self._left()}"
        self.line(f"{text}, {row.images_per_s:.0f} images/s, {self._memory()}{left}")

    def line(self, text: str) -> None:
        """One line of words."""
        if self._bar is not None:
            self._bar.write(text, file=sys.stdout)
        elif self._shown:
            print(text, flush=True)
        self._last_line = time.perf_counter()

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()

    def _memory(self) -> str:
        return f"{peak_memory(self._device) / 2**20:.0f} MiB"

    def _left(self) -> str:
        done = self._seen - self._first
        if not done:
            return "time left unknown"
        seconds = (self._epochs * self._images - self._seen) * (time.perf_counter() - self._start) / done
        return f"{tqdm.format_interval(max(seconds, 0.0))} left"


def peak_memory(device: torch.device) -> int:
    """The most bytes so far: that PyTorch has allocated on a GPU, or else that this process has held in memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where nothing of this package has been run

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
