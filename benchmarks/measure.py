"""What a training step takes in time: seconds in interleaved rounds. Nothing here knows a network.

What it takes in memory is counted by :mod:`densenet_ext.memory.measuring`.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SLOW = 1.3
SELDOM = 3


class Step:
    """A training step: forward, cross entropy, backward, SGD with momentum. Gradients are freed at its end."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, autocast: torch.dtype | None = None) -> None:
        """``autocast``: the dtype to which autocast lowers the forward pass; None: everything in float32."""
        self.model = model
        self.images = images  # [N, C, H, W] float32
        self.labels = labels  # [N] int64
        self.autocast = autocast
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def forward(self) -> Tensor:
        """The loss, with its graph."""
        with lowered(self.images, self.autocast):
            return F.cross_entropy(self.model(self.images), self.labels)

    def backward(self, loss: Tensor) -> None:
        """The rest of the step."""
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self) -> None:
        self.backward(self.forward())


class Inference:
    """The scores of a model in evaluation mode, without gradients."""

    def __init__(self, model: nn.Module, images: Tensor, autocast: torch.dtype | None = None) -> None:
        self.model = model.eval()
        self.images = images  # [N, C, H, W] float32
        self.autocast = autocast

    @torch.no_grad()
    def __call__(self) -> Tensor:
        with lowered(self.images, self.autocast):
            scores: Tensor = self.model(self.images)
            return scores


def lowered(images: Tensor, dtype: torch.dtype | None) -> AbstractContextManager[object]:
    """Autocast to ``dtype`` where ``images`` are; nothing when it is None, as in a loop that has never heard of it."""
    return nullcontext() if dtype is None else torch.autocast(images.device.type, dtype=dtype)


class Ratio(NamedTuple):
    """How many times as long one contender took as another, round by round."""

    median: float
    low: float
    high: float


def seconds(step: Callable[[], object], device: torch.device | None = None) -> float:
    """The wall time of one call until its last result is there, with the garbage of earlier ones out of the way."""
    gc.collect()
    wait = torch.cuda.synchronize if device is not None and device.type == "cuda" else _no_wait
    wait(device)
    start = time.perf_counter()
    step()
    wait(device)
    return time.perf_counter() - start


def _no_wait(device: torch.device | None) -> None:
    return None  # on the processor a call has ended when it returns


def interleave(
    steps: Mapping[str, Callable[[], object]],
    rounds: int,
    peers: Collection[str] = (),
    clock: Callable[[Callable[[], object]], float] = seconds,
) -> dict[str, list[float | None]]:
    """The seconds of every step in each of ``rounds`` rounds, None for a round that left it out.

    A round runs each step once, each round beginning one further down the list, so that no step is always the one that
    comes after a particular other. A peer that the first round finds ``SLOW`` times slower than the fastest peer is
    surely not the fastest: it runs in every ``SELDOM``-th round only.
    """
    names = list(steps)
    times: dict[str, list[float | None]] = {name: [] for name in names}
    slow: set[str] = set()
    for r in range(rounds):
        for name in rotated(names, r):
            times[name].append(None if name in slow and r % SELDOM else clock(steps[name]))
        if r == 0:
            first = {name: median(times[name]) for name in peers}
            slow = {name for name, value in first.items() if value > SLOW * min(first.values())}
    return times


def rotated(names: Sequence[str], by: int) -> list[str]:
    """``names`` beginning with the ``by``-th, counted around."""
    first = by % len(names) if names else 0
    return [*names[first:], *names[:first]]


def median(times: Sequence[float | None]) -> float:
    """The median over the rounds in which the step ran."""
    return statistics.median(value for value in times if value is not None)


def ratio(theirs: Sequence[float | None], ours: Sequence[float | None]) -> Ratio:
    """Theirs over ours, paired within each round that ran both: what slows a whole round down cancels.

    Raises ValueError when no round ran both.
    """
    pairs = [a / b for a, b in zip(theirs, ours, strict=True) if a is not None and b is not None]
    if not pairs:
        raise ValueError("ratio: expected at least one round that ran both, got none")
    return Ratio(statistics.median(pairs), min(pairs), max(pairs))
