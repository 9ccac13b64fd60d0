"""What the benchmarks of single kernels have in common: how a call is timed, and in which dtypes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

REPEATS = 15
BUSY = 2_000_000
"""Cycles, about a millisecond: longer than the host takes for a dozen operations."""


class Precision(NamedTuple):
    """The dtype of the rows, and whether products may use TF32."""

    name: str
    dtype: torch.dtype
    tf32: bool = False


PRECISIONS = (
    Precision("bfloat16", torch.bfloat16),
    Precision("float32", torch.float32),
    Precision("float32, TF32", torch.float32, tf32=True),
    Precision("float16", torch.float16),
)


class Stopwatch:
    """Seconds of single calls on a device, with nothing of their arguments in its cache."""

    def __init__(
        self,
        device: torch.device,
        flush_bytes: int | None = None,
        now: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``flush_bytes``: what is written between two calls; by default several times the cache of a GPU.

        ``now``: the clock of a processor.
        """
        self.device = device
        if flush_bytes is None:
            cache = torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0
            flush_bytes = max(4 * cache, 2**20)
        self.flush = torch.empty(flush_bytes, dtype=torch.uint8, device=device)
        self.now = now

    def median(self, call: Callable[[], object], repeats: int = REPEATS) -> float:
        """The median seconds of ``repeats`` calls after three that are not counted."""
        return statistics.median(self.times(call, repeats))

    def times(self, call: Callable[[], object], repeats: int = REPEATS) -> list[float]:
        """The seconds of ``repeats`` calls after three that are not counted."""
        for _ in range(3):
            call()
        return self._on_gpu(call, repeats) if self.device.type == "cuda" else self._here(call, repeats)

    def _on_gpu(self, call: Callable[[], object], repeats: int) -> list[float]:
        # the GPU is kept busy until all that a call asks for is in its queue: it would wait for the host in between
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
        for start, end in events:
            self.flush.zero_()
            torch.cuda._sleep(BUSY)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def _here(self, call: Callable[[], object], repeats: int) -> list[float]:
        times = []
        for _ in range(repeats):
            self.flush.zero_()
            begin = self.now()
            call()
            times.append(self.now() - begin)
        return times
