"""``densenet-ext compare``: fused against unfused training on the same images from the same weights."""

from __future__ import annotations

import contextlib
import datetime
import gc
import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from densenet_ext._version import __version__
from densenet_ext.compare import comparison
from densenet_ext.compare.comparison import FORMS, SeedRun, StepBytes
from densenet_ext.compare.lockstep import step_bytes, train_in_lockstep
from densenet_ext.compare.picture import draw_comparison
from densenet_ext.errors import Ended, Interruption, UserError
from densenet_ext.files import write_text
from densenet_ext.memory.measuring import device_name
from densenet_ext.text import table
from densenet_ext.training import metrics, options
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.learner import Learner
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes, joined, make_processes, started_by_torchrun
from densenet_ext.training.running import announcement, built, new_folder, prepared

FIGURES, ROWS, PICTURE = "comparison.json", "comparison.csv", "comparison.png"

# Where something is, or how it is loaded: no figure depends on it.
_LEFT_OUT = ("data", "model", "root", "device", "workers", "fused", "seed", "sync_bn", "fsdp")


def compare(given: Mapping[str, Any], seeds: int, out: Path | None, download: bool = False) -> dict[str, Any]:
    """Trains both forms with each of the seeds 0, 1, ..., ``seeds`` - 1, with the options that were ``given``.

    Everything goes into the folder ``out``; None is a new one below ``runs``. Prints what it does and returns what
    comparison.json holds. Raises UserError, TrainingError, Interrupted; the figures of complete seeds are then kept.
    """
    if started_by_torchrun():
        raise UserError("compare: expected to run in one process, got torchrun")
    chosen = Options.of(given)
    folder = new_folder(f"compare-{chosen.data}") if out is None else out
    options.check_new(folder)
    with joined(chosen.device, chosen.amp) as processes:
        data, network = prepared(chosen, processes, download)
        words = announcement(network, data, chosen, processes, folder)
        images = sum(Learner(network, chosen, processes).batches(data.train, shuffle=True).counts)  # or refuses
        options.save(chosen, folder)
        print("\n".join(words))
        print(f"fused and unfused side by side, from the same weights through the same batches, seeds: {seeds}")
        return Comparer(chosen, data, processes, seeds, folder).compare(images)


class Comparer:
    """Compares both forms on ``data`` with each of so many ``seeds``."""

    def __init__(self, chosen: Options, data: Data, processes: Processes, seeds: int, folder: Path) -> None:
        self.chosen, self.data, self.processes, self.seeds, self.folder = chosen, data, processes, seeds, folder
        self.runs: list[SeedRun] = []  # the complete ones
        self.taken: dict[str, StepBytes] = {}

    def compare(self, images: int) -> dict[str, Any]:
        """Trains seed after seed, on so many ``images`` an epoch; files of complete seeds stay, whatever ends it."""
        self.taken = self._bytes()
        bar = metrics.bar(self.seeds * self.chosen.epochs * images)

        def show(run: SeedRun, images: int) -> None:
            done = len(run.forms["fused"].history)
            bar.set_description(f"seed {run.seed}, epoch {done + (images > 0)}/{self.chosen.epochs}", refresh=False)
            bar.update(images)
            if not images:
                fused, unfused = (run.forms[form].history[-1].loss for form in FORMS)
                bar.write(f"seed {run.seed}, epoch {done}: loss {fused:.4f} fused, {unfused:.4f} unfused")

        try:
            with contextlib.closing(bar), Interruption() as interruption:
                for seed in range(self.seeds):
                    learners = {form: self.learner(form, seed) for form in FORMS}
                    self.runs.append(train_in_lockstep(learners, self.data, interruption, show))
                    write_text(self.folder / ROWS, comparison.csv_text(self.runs))
                    write_text(self.folder / FIGURES, json.dumps(self.found(), indent=1) + "\n")
                    del learners
                    self._forget()
        except Ended as error:
            error.args = (f"{error}; {self.folder} keeps {len(self.runs)} of {self.seeds} seeds",)
            raise
        found = self.found()
        print("\n".join(["", table(comparison.cells(found)), "", *comparison.sentences(found)]))
        title = f"Fused and unfused training: {found['model']} on {found['data']}, seeds: {len(self.runs)}"
        histories = {form: [[asdict(row) for row in run.forms[form].history] for run in self.runs] for form in FORMS}
        draw_comparison(histories, found["step"], self.folder / PICTURE, title)
        print(f"{self.folder}: {FIGURES}, {ROWS}, {PICTURE}")
        return found

    def found(self) -> dict[str, Any]:
        """Returns the figures of the complete seeds, and what they depend on, as comparison.json holds them."""
        chosen = {name: value for name, value in asdict(self.chosen).items() if name not in _LEFT_OUT}
        return {
            "data": self.chosen.data,
            "model": self.chosen.model,
            "image": list(self.data.train.shape),
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

    def learner(self, form: str, seed: int) -> Learner:
        """Returns one form, with the weights of ``seed``: both forms start from the same ones."""
        chosen = replace(self.chosen, seed=seed, fused=form == "fused")
        # Each with a scaler of its own, where the precision has one.
        alone = make_processes(str(self.processes.device), self.chosen.amp)
        return Learner(built(chosen, self.data), chosen, alone)

    def _bytes(self) -> dict[str, StepBytes]:
        """Counts a step's bytes on networks of their own: those that are compared know nothing of it."""
        learners = {form: self.learner(form, 0) for form in FORMS}
        images, labels = next(learners["fused"].batches(self.data.train, shuffle=True).epoch(1))
        taken = {form: step_bytes(learner, images, labels) for form, learner in learners.items()}
        del learners
        self._forget()
        return taken

    def _forget(self) -> None:
        """Frees networks that are no longer needed, also those that compiled code refers to."""
        if self.chosen.compile:
            torch.compiler.reset()
        gc.collect()
