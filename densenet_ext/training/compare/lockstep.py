"""Two forms of a network, fused and unfused, through the same batches: one seed of a comparison.

The forms take turns at being the first in a step, so that what slows the machine down for a while meets both alike.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from densenet_ext.planning.measuring import peak_bytes, saved_bytes
from densenet_ext.training.compare.comparison import FORMS, SeedRun, StepBytes
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.errors import Interrupted, LossError
from densenet_ext.training.interruption import Interruption
from densenet_ext.training.learner import Learner
from densenet_ext.training.loop import advice, batches
from densenet_ext.training.metrics import Row, Sums

WARM_UP = 3  # steps of a seed that are not timed: they allocate, and choose algorithms


def step_bytes(learner: Learner, images: Tensor, labels: Tensor) -> StepBytes:
    """Returns what a step of ``learner`` takes on ``images`` [N, C, H, W] and ``labels`` [N]; it learns from it."""
    images, labels = images.to(learner.device), labels.to(learner.device)

    def step() -> Tensor:
        return learner.step(images, labels, len(labels))

    for _ in range(2):  # compiles, and allocates the optimizer's state
        step()
    existing = [*learner.network.parameters(), *learner.network.buffers(), images, labels]
    # Nothing is saved but in the forward pass: neither the backward pass nor SGD records a graph.
    return StepBytes(saved_bytes(step, existing), peak_bytes(step, learner.device))


class Lockstep:
    """``learners``, by their form, on ``data``: each step of one is a step of the other, on the same images."""

    def __init__(self, learners: Mapping[str, Learner], data: Data, shown: Callable[[SeedRun, int], None]) -> None:
        """``shown``: told after each step, and at an epoch's end, what there is and how many images were new."""
        self.learners, self._shown = learners, shown
        learner = learners[FORMS[0]]
        self.options, self.device = learner.options, learner.device
        self.run = SeedRun(self.options.seed)
        self._train = batches(data.train, self.options, learner.processes, shuffle=True)
        self._others = {
            name: batches(examples, self.options, learner.processes)
            for name, examples in (("validation", data.validation), ("test", data.test))
            if examples is not None
        }
        compiles_later = self.options.compile and self.options.epochs > 1  # a last, smaller batch; evaluation
        self._warm_up = max(WARM_UP, len(self._train) if compiles_later else 0)

    def train(self, interruption: Interruption) -> SeedRun:
        """Trains both to the last epoch, and measures on the test images.

        Raises LossError when a loss or a weight is no number any more, Interrupted after Ctrl-C or SIGTERM,
        TrainingError when a worker dies.
        """
        for number in range(1, self.options.epochs + 1):
            self._epoch(number, interruption)
        for form, learner in self.learners.items():
            self.run.forms[form].test = self._evaluate(learner, "test", 0)
        return self.run

    def _epoch(self, number: int, interruption: Interruption) -> None:
        sums = {form: Sums() for form in FORMS}
        for step, (images, labels) in enumerate(self._train.epoch(number)):
            place = f"epoch {number}, step {step + 1} of {len(self._train)}"
            self._step(images, labels, sums, place)
            self._shown(self.run, len(labels))
            if interruption.number:
                raise Interrupted(f"stopped in seed {self.run.seed}, {place}", interruption.number)
        for form, learner in self.learners.items():
            validation = self._evaluate(learner, "validation", number)
            if not learner.is_finite():
                raise self._no_number(form, f"a weight is no number after epoch {number}")
            measured = (None, None) if validation is None else (validation.mean_loss, validation.error)
            row = Row(number, learner.lr, sums[form].mean_loss, sums[form].error, *measured)
            self.run.forms[form].history.append(row)
            learner.end_epoch()
        self._shown(self.run, 0)

    def _step(self, images: Tensor, labels: Tensor, sums: Mapping[str, Sums], place: str) -> None:
        images, labels = images.to(self.device), labels.to(self.device)
        steps, count = len(self.run.differences), len(labels)
        is_timed = steps >= self._warm_up and count == self.options.batch_size
        losses = {}
        for form in FORMS if steps % 2 == 0 else reversed(FORMS):
            figures, seconds = self._timed(self.learners[form], images, labels)
            loss, wrong = figures.tolist()
            if not math.isfinite(loss):
                raise self._no_number(form, f"the loss is {loss / count} in {place}")
            losses[form] = loss / count
            sums[form].add(loss, int(wrong), count)
            if is_timed:
                self.run.forms[form].seconds.append(seconds)
        self.run.differences.append(abs(losses["fused"] - losses["unfused"]))

    def _timed(self, learner: Learner, images: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        self._wait()
        start = time.perf_counter()
        figures = learner.step(images, labels, len(labels))
        self._wait()
        return figures, time.perf_counter() - start

    def _wait(self) -> None:
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)

    def _evaluate(self, learner: Learner, part: str, number: int) -> Sums | None:
        return learner.evaluate(self._others[part].epoch(number)) if part in self._others else None

    def _no_number(self, form: str, what: str) -> LossError:
        return LossError(f"seed {self.run.seed}, {form}: {what}. {advice(self.options)}")
