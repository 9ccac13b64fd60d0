"""A run whose workers are killed in its second epoch, for a process of its own (test_train_images.py)."""

from __future__ import annotations

import multiprocessing
from unittest import mock

from torch import Tensor

from densenet_ext.cli import main
from densenet_ext.training.learner import Learner


def command(words: list[str]) -> None:
    """Runs ``densenet-ext`` with ``words``; before its fifth step all workers are killed."""
    step = Learner.step

    def kill(self: Learner, *arguments: object) -> Tensor:
        if self.steps == 4:
            for worker in multiprocessing.active_children():
                worker.kill()
        return step(self, *arguments)

    with mock.patch.object(Learner, "step", kill):
        main(words)
