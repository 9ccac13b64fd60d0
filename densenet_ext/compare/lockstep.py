"""Two forms of a network, fused and unfused, through the same batches: one seed of a comparison.

The forms take turns at being the first in a step, so that what slows the machine down for a while meets both alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from densenet_ext.compare.comparison import FORMS, SeedRun, StepBytes
from densenet_ext.errors import Interrupted, Interruption, SharedError
from densenet_ext.memory.measuring import peak_bytes, saved_bytes
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.learner import Learner
from densenet_ext.training.metrics import Sums

WARM_UP = 3  # steps of a seed that are not timed: they allocate, and choose algorithms


def step_bytes(learner: Learner, images: Tensor, labels: Tensor) -> StepBytes:
    """Returns what a step of ``learner`` takes on ``images`` [N, C, H, W] and ``labels`` [N]; it learns from it."""

    def step() -> Tensor:
        return learner.step(images, labels, len(labels))

    for _ in range(2):  # compiles, and allocates the optimizer's state
        step()
    existing = [*learner.network.parameters(), *learner.network.buffers(), images, labels]
    # Nothing is saved but in the forward pass: neither the backward pass nor SGD records a graph.
    return StepBytes(saved_bytes(step, existing), peak_bytes(step, learner.device))


def train_in_lockstep(
    learners: Mapping[str, Learner],
    data: Data,
    interruption: Interruption,
    shown: Callable[[SeedRun, int], None] = lambda run, images: None,
) -> SeedRun:
    """Trains both forms of ``learners`` on ``data`` to the last epoch, in turns step by step.

    Calls ``shown`` with the run so far and the images of the step after each step, and with 0 at an epoch's end.

    Raises SharedError when a loss or a weight is no number any more, Interrupted after Ctrl-C or SIGTERM.
    """
    learner = learners[FORMS[0]]
    options, run = learner.options, SeedRun(learner.options.seed)
    train = learner.batches(data.train, shuffle=True)
    # torch.compile meets the last, smaller batch and evaluation at the end of the first epoch.
    warm_up = max(WARM_UP, len(train.counts) if options.compile and options.epochs > 1 else 0)

    def no_number(form: str, what: str) -> SharedError:
        return SharedError(f"seed {run.seed}, {form}: {what}. {learner.advice}")

    parts = {part: getattr(data, part) for part in ("validation", "test")}
    others = {part: learner.batches(held) for part, held in parts.items() if held is not None}

    def evaluated(form: str, part: str) -> Sums | None:
        return learners[form].evaluate(others[part].epoch(0)) if part in others else None

    for number in range(1, options.epochs + 1):
        sums = {form: Sums() for form in FORMS}
        for step, (images, labels) in enumerate(train.epoch(number)):
            place = f"epoch {number}, step {step + 1} of {len(train.counts)}"
            done, count, losses = len(run.differences), len(labels), {}
            for form in FORMS if done % 2 == 0 else reversed(FORMS):
                (loss, wrong), seconds = _timed(learners[form], images, labels)
                if not math.isfinite(loss):
                    raise no_number(form, f"the loss is {loss} in {place}")
                losses[form] = loss / count
                sums[form].add(loss, int(wrong), count)
                if done >= warm_up and count == options.batch_size:
                    run.forms[form].seconds.append(seconds)
            run.differences.append(abs(losses["fused"] - losses["unfused"]))
            shown(run, count)
            if interruption.number:
                raise Interrupted(f"stopped in seed {run.seed}, {place}", interruption.number)
        for form in FORMS:
            validation = evaluated(form, "validation")
            if not learners[form].is_finite():
                raise no_number(form, f"a weight is no number after epoch {number}")
            run.forms[form].history.append(learners[form].end_epoch(sums[form], validation))
        shown(run, 0)
    for form in FORMS:
        run.forms[form].test = evaluated(form, "test")
    return run


def _timed(learner: Learner, images: Tensor, labels: Tensor) -> tuple[list[float], float]:
    """Returns the loss and the wrong guesses of a step, and its seconds."""
    _wait(learner.device)
    start = time.perf_counter()
    figures = learner.step(images, labels, len(labels))
    _wait(learner.device)
    return figures.tolist(), time.perf_counter() - start


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
