"""The progress of a run: tqdm's bar on a terminal, plain lines anywhere else."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from typing import Any

import torch
from tqdm import tqdm

from densenet_ext.text import readable
from densenet_ext.training.metrics import Epoch, Sums

SECONDS_BETWEEN_LINES = 60.0  # within an epoch, away from a terminal
_BAR = "{desc}{percentage:3.0f}%|{bar}|{remaining} left, {rate_fmt}{postfix}"  # fits 80 columns


class Bar:
    """A bar over ``total`` images on a terminal, and how long the rest takes anywhere; nothing unless ``shown``."""

    def __init__(self, total: int, done: int = 0, shown: bool = True) -> None:
        """``done``: images that were trained on before this process started."""
        self._total, self._first, self._seen, self._shown = total, done, done, shown
        self._start = time.perf_counter()
        self.is_drawn = shown and sys.stderr.isatty()
        width: dict[str, Any] = {"dynamic_ncols": True}
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if self.is_drawn and not os.get_terminal_size(sys.stderr.fileno()).columns:
                width = {"ncols": 80, "nrows": 24}  # the width is unknown, as in a container: tqdm would show nothing
        look: dict[str, Any] = {"unit": " img", "unit_scale": True, "smoothing": 0.05, "bar_format": _BAR, **width}
        self.tqdm = tqdm(total=total, initial=done, disable=not self.is_drawn, **look)

    def advance(self, images: int, place: str, figures: str) -> None:
        """Counts ``images`` more; ``place`` stands in front of the bar, ``figures`` behind it."""
        self._seen += images
        self.tqdm.set_description(place, refresh=False)
        self.tqdm.set_postfix_str(figures, refresh=False)
        self.tqdm.update(images)

    def line(self, text: str) -> None:
        """Writes one line of words, which stays above a bar."""
        if self._shown:
            self.tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def left(self) -> str:
        """Returns the time that the other images take, by those of this process so far, in words."""
        done = self._seen - self._first
        if not done:
            return "time left unknown"
        seconds = (self._total - self._seen) * (time.perf_counter() - self._start) / done
        return f"{tqdm.format_interval(max(seconds, 0.0))} left"

    def close(self) -> None:
        """Leaves the bar as it stands."""
        self.tqdm.close()


class Progress(Bar):
    """Shows the training of ``epochs`` epochs of ``images`` images each; nothing unless ``shown``."""

    def __init__(self, epochs: int, images: int, done: int, device: torch.device, shown: bool) -> None:
        super().__init__(epochs * images, done, shown)
        self._epochs, self._images, self._device = epochs, images, device
        self._last_line = time.perf_counter()

    def step(self, epoch: int, images: int, sums: Sums) -> None:
        """Shows ``images`` more of ``epoch``, whose losses and errors so far are ``sums``."""
        place, figures = f"epoch {epoch}/{self._epochs}", ""
        if self.is_drawn:  # asking a GPU's allocator takes a while
            memory = readable(peak_memory(self._device))
            figures = f"loss {sums.mean_loss:.3f}, error {sums.error:.1f}%, {memory}"
        self.advance(images, place, figures)
        if not self.is_drawn and time.perf_counter() - self._last_line > SECONDS_BETWEEN_LINES:
            part = f"{sums.images} of {self._images} images"
            self.line(f"{place}, {part}: loss {sums.mean_loss:.4f}, error {sums.error:.2f} %, {self.left()}")

    def epoch(self, row: Epoch) -> None:
        """Writes the complete ``row`` in a line, which stays above a bar."""
        text = f"epoch {row.epoch}/{self._epochs}: lr {row.lr:g}, loss {row.loss:.4f}, error {row.error:.2f} %"
        if row.validation_loss is not None:
            text += f", validation loss {row.validation_loss:.4f}, error {row.validation_error:.2f} %"
        left = "" if row.epoch == self._epochs else f", {self.left()}"
        self.line(f"{text}, {row.images_per_s:.0f} images/s, {readable(peak_memory(self._device))}{left}")

    def line(self, text: str) -> None:
        """Writes one line of words, which stays above a bar."""
        super().line(text)
        self._last_line = time.perf_counter()


def peak_memory(device: torch.device) -> int:
    """Returns the most bytes so far: that PyTorch has allocated on a GPU, or else that this process has held."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # not on Windows, where nothing of this package has been run

    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024
