"""``densenet-ext compare``: fused against unfused training on the same images from the same weights."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densenet_ext._version import __version__
from densenet_ext.planning.measuring import device_name
from densenet_ext.text import table
from densenet_ext.training import networks, options
from densenet_ext.training.compare import comparison
from densenet_ext.training.compare.comparison import FORMS, SeedRun, StepBytes
from densenet_ext.training.compare.lockstep import Lockstep, step_bytes
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.data.datasets import load as load_data
from densenet_ext.training.data.loading import Batches
from densenet_ext.training.errors import Interrupted, TrainingError, UserError
from densenet_ext.training.files import write_text
from densenet_ext.training.interruption import Interruption
from densenet_ext.training.learner import Learner
from densenet_ext.training.loop import batches
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes, joined, make_fabric
from densenet_ext.training.progress import Bar
from densenet_ext.training.running import (
    announcement,
    check_folder,
    check_outside,
    check_takes,
    make_folder,
    new_folder,
    set_determinism,
)

FIGURES, ROWS, PICTURE = "comparison.json", "comparison.csv", "comparison.png"

# Where something is, or how it is loaded: no figure depends on it.
_LEFT_OUT = ("data", "model", "root", "device", "workers", "fused", "seed", "sync_bn", "fsdp")


def compare(given: Mapping[str, Any], seeds: int, out: Path | None, download: bool = False) -> dict[str, Any]:
    """Trains both forms with each of the seeds 0, 1, ..., ``seeds`` - 1, with the options that were ``given``.

    Everything goes into the folder ``out``; None is a new one below ``runs``. Prints what it does and returns what
    comparison.json holds. Raises UserError, TrainingError, Interrupted; the figures of complete seeds are then kept.
    """
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        raise UserError("compare: expected to run in one process, got torchrun: start it with densenet-ext compare")
    chosen = Options.of(given)
    folder = new_folder(chosen, "compare-") if out is None else out
    if (folder / options.FILE).exists():
        raise UserError(f"--out: {folder} holds a run already: name another folder")
    check_folder(folder)
    check_outside(folder, chosen)
    with joined(chosen.device, chosen.amp) as processes:
        set_determinism(chosen.deterministic)
        data = load_data(chosen, processes, download)
        comparer = Comparer(chosen, data, processes, seeds, folder)
        comparer.announce()
        return comparer.compare()


class Comparer:
    """Compares both forms on ``data`` for as many ``seeds`` as there shall be."""

    def __init__(self, chosen: Options, data: Data, processes: Processes, seeds: int, folder: Path) -> None:
        self.chosen, self.data, self.processes, self.seeds, self.folder = chosen, data, processes, seeds, folder
        self.runs: list[SeedRun] = []  # the complete ones
        self.taken: dict[str, StepBytes] = {}

    def announce(self) -> None:
        """Prints what will be compared, and makes the folder. Raises UserError for what can't be trained."""
        network = self._network("fused", 0)
        check_takes(network, self.chosen.model, self.data)
        self._batches()
        print("\n".join(announcement(network, self.data, self.chosen, self.processes, self.folder)))
        seeds = f"with seeds 0 to {self.seeds - 1}" if self.seeds > 1 else "with seed 0"
        print(f"fused and unfused side by side, from the same weights through the same batches, {seeds}")
        make_folder(self.folder)
        options.save(self.chosen, self.folder)

    def compare(self) -> dict[str, Any]:
        """Trains seed after seed; what is complete is shown and kept whatever ends it."""
        train = self._batches()
        images = sum(train.count(step) for step in range(len(train)))
        progress = _Progress(self.seeds, self.chosen.epochs, images)
        try:
            with contextlib.closing(progress), Interruption() as interruption:
                self._count_bytes()
                for seed in range(self.seeds):
                    self._train(seed, interruption, progress)
        except (UserError, TrainingError) as error:
            raise type(error)(f"{error}; {self._conclude()}") from error
        except Interrupted as error:
            raise Interrupted(f"{error}; {self._conclude()}", error.exit_code - 128) from error
        self._conclude()
        return self.found()

    def found(self) -> dict[str, Any]:
        """Returns the figures of the complete seeds, with what they depend on; no paths."""
        chosen = {name: value for name, value in asdict(self.chosen).items() if name not in _LEFT_OUT}
        return {
            "data": self.data.name,
            "model": self.chosen.model,
            "image": [self.data.channels, self.data.image_size, self.data.image_size],
            "options": chosen,
            "machine": {
                "device": device_name(self.processes.device),
                "threads": torch.get_num_threads(),
                "torch": str(torch.__version__),
                "densenet_ext": __version__,
                "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            },
            "seeds_asked": self.seeds,
            **comparison.summary(self.runs, self.taken, self.chosen.amp),
        }

    def _network(self, form: str, seed: int) -> nn.Module:
        torch.manual_seed(seed)  # of the weights, which are the same in both forms
        return networks.build(
            self.chosen.model,
            classes=len(self.data.classes),
            channels=self.data.channels,
            save=self.chosen.save,
            fused=form == "fused",
        )

    def _learner(self, form: str, seed: int) -> Learner:
        chosen = replace(self.chosen, seed=seed, fused=form == "fused")
        # Each with a scaler of its own, where the precision has one.
        alone = Processes(make_fabric(str(self.processes.device), self.chosen.amp))
        return Learner(self._network(form, seed), chosen, alone)

    def _batches(self) -> Batches:
        return batches(self.data.train, self.chosen, self.processes, shuffle=True)

    def _count_bytes(self) -> None:
        """Counts a step's bytes on networks of their own: those that are compared know nothing of it."""
        images, labels = next(self._batches().epoch(1))
        for form in FORMS:
            self.taken[form] = step_bytes(self._learner(form, 0), images, labels)
            self._forget()

    def _train(self, seed: int, interruption: Interruption, progress: _Progress) -> None:
        learners = {form: self._learner(form, seed) for form in FORMS}
        self.runs.append(Lockstep(learners, self.data, progress.show).train(interruption))
        write_text(self.folder / ROWS, comparison.csv_text(self.runs))
        write_text(self.folder / FIGURES, json.dumps(self.found(), indent=1) + "\n")
        del learners
        self._forget()

    def _forget(self) -> None:
        """Frees networks that are no longer needed, also those that compiled code refers to."""
        if self.chosen.compile:
            torch.compiler.reset()
        gc.collect()

    def _conclude(self) -> str:
        """Prints and draws what is complete; returns in words what is kept."""
        if not self.runs:
            return "no seed was complete, so there is nothing to compare"
        found = self.found()
        print("\n".join(["", table(comparison.cells(found)), "", *comparison.sentences(found)]))
        names = f"{FIGURES}, {ROWS}"
        try:
            draw(self.runs, found, self.folder / PICTURE)
            names += f", {PICTURE}"
        except (UserError, TrainingError) as error:
            print(f"no picture: {error}")
        print(f"{self.folder}: {names}")
        return f"{self.folder} keeps {len(self.runs)} of {_count(self.seeds, 'seed')}"


def draw(runs: Sequence[SeedRun], found: comparison.Found, path: Path) -> None:
    """Draws the picture. Raises UserError when matplotlib is missing or ``path`` can't be written, or TrainingError."""
    from densenet_ext.training.compare.picture import ComparedRuns, draw_comparison

    step = found["step"]
    fused, unfused = (
        ComparedRuns(
            [[asdict(row) for row in run.forms[form].history] for run in runs],
            step["seconds"][form],
            step["kept_bytes"][form],
            step["peak_bytes"][form],
        )
        for form in FORMS
    )
    title = f"Fused and unfused training: {found['model']} on {found['data']}, {_count(len(runs), 'seed')}"
    draw_comparison(fused, unfused, path, title)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'s' if number != 1 else ''}"


class _Progress(Bar):
    """A bar over all seeds on a terminal, a line for each seed and epoch anywhere else."""

    def __init__(self, seeds: int, epochs: int, images: int) -> None:
        """``images``: of an epoch."""
        super().__init__(seeds * epochs * images)
        self._epochs = epochs

    def show(self, run: SeedRun, images: int) -> None:
        """Counts ``images`` more that were trained on; none: an epoch is complete."""
        done = len(run.forms["fused"].history)
        figures = self._figures(run, done) if done else ""
        self.advance(images, f"seed {run.seed}, epoch {min(done + 1, self._epochs)}/{self._epochs}", figures)
        if not images and not self.is_drawn:
            self.line(f"seed {run.seed}, epoch {done}/{self._epochs}: {figures}, {self.left()}")

    def _figures(self, run: SeedRun, done: int) -> str:
        ours, theirs = (run.forms[form].history[done - 1] for form in FORMS)
        text = f"loss {ours.loss:.4f} fused, {theirs.loss:.4f} unfused"
        if ours.validation_error is None:
            return f"{text}, error {ours.error:.2f} % and {theirs.error:.2f} %"
        return f"{text}, validation error {ours.validation_error:.2f} % and {theirs.validation_error:.2f} %"
