"""A run from its options to its pictures: what ``densenet-ext train`` does."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

import densenet_ext
from densenet_ext.errors import UserError
from densenet_ext.files import write_text
from densenet_ext.reuse.connections import connections
from densenet_ext.reuse.drawing import draw_connections
from densenet_ext.reuse.weights_file import read_weights_file
from densenet_ext.training import curves, networks, options
from densenet_ext.training.checkpoints import BEST, LAST, locked
from densenet_ext.training.data import datasets, image_folder
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.learner import Learner
from densenet_ext.training.loop import Run, best_of
from densenet_ext.training.metrics import FILE as METRICS
from densenet_ext.training.metrics import Epoch, Sums
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes, agreed, joined

RUNS = Path("runs")
RESULT = "result.json"
CURVES, REUSE = "curves.png", "reuse.png"


def train(given: Mapping[str, Any], out: Path | None, resume: bool = False, download: bool = False) -> None:
    """Trains, or goes on training, with the options that were ``given`` (None: not given), in the folder ``out``.

    ``out`` None is a new folder below ``runs``. Prints what it does. Raises UserError, TrainingError, Interrupted.
    """
    if resume:
        if out is None:
            raise UserError("--resume: name the folder of the run to go on with, as in --out runs/digits")
        folder, chosen = out, options.resumed(options.load(out), given)
    else:
        chosen = Options.of(given)
        folder = out or new_folder(chosen.data)
        options.check_new(folder)
    with joined(chosen.device, chosen.amp, chosen.fsdp) as processes:
        # Before the first process makes the folder, since the others may have found another name for a new one.
        _train(chosen, processes.gather(folder)[0], resume, download, processes)


def _train(chosen: Options, folder: Path, resume: bool, download: bool, processes: Processes) -> None:
    """Is a function of its own so that ``joined`` can free the run, with its workers, when an error leaves it."""
    data, network = prepared(chosen, processes, download)
    words = announcement(network.to(processes.device), data, chosen, processes, folder)  # before the network is sharded
    run, first = Run(Learner(network, chosen, processes), data, folder), processes.is_global_zero
    # By now nothing of what was asked for is refused any more.
    lock = agreed(processes, lambda: _begin(chosen, folder, resume) if first else None)
    if resume:
        run.resume()
        words.append(f"going on after epoch {len(run.history)} of {chosen.epochs}")
    if first:
        print("\n".join(words), flush=True)
    test = run.train()
    if first:
        conclude(run.history, test, folder)
    if lock is not None:
        lock.close()
    processes.gather(None)  # nobody leaves before the first one has written


def _begin(chosen: Options, folder: Path, resume: bool) -> IO[bytes]:
    """Makes ``folder`` that of this run, and no other's while the lock is held that it returns."""
    if not resume:
        options.save(chosen, folder)
    return locked(folder / options.FILE)


def new_folder(name: str) -> Path:
    """Returns a folder below ``runs`` that is not there yet, called ``name`` or ``name-2`` and so on."""
    names = itertools.chain([name], (f"{name}-{i}" for i in itertools.count(2)))
    return next(folder for folder in map(RUNS.joinpath, names) if not folder.exists())


def prepared(chosen: Options, processes: Processes, download: bool) -> tuple[Data, nn.Module]:
    """Returns the data and the network of a run, on the CPU, and makes PyTorch deterministic if that was ``chosen``.

    Raises UserError for data that are not there, an unknown network, and images that the network does not take.
    """
    torch.backends.cudnn.benchmark = not chosen.deterministic
    if chosen.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    data = load_data(chosen, processes, download)
    network = built(chosen, data)
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(2, *data.train.shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"--model: {chosen.model} does not take images {list(data.train.shape)}: {error}") from error
    return data, network


def load_data(chosen: Options, processes: Processes, download: bool = False) -> Data:
    """Returns the data set that was ``chosen``, the same in all ``processes``. Raises UserError."""
    if chosen.data == "digits":
        return datasets.digits(chosen)
    if chosen.root is None:
        raise UserError(f"--root: expected the folder of the images, or where --download shall put {chosen.data}")
    if chosen.data == "imagefolder":
        return image_folder.load(chosen, processes)
    return datasets.cifar(chosen, processes, download)


def built(chosen: Options, data: Data) -> nn.Module:
    """Returns the network of ``chosen`` for ``data``, with the weights of its seed."""
    torch.manual_seed(chosen.seed)  # the same weights in every process
    classes, channels = len(data.classes), data.train.shape[0]
    return networks.build(chosen.model, classes=classes, channels=channels, save=chosen.save, fused=chosen.fused)


def announcement(network: nn.Module, data: Data, chosen: Options, processes: Processes, folder: Path) -> list[str]:
    """Returns in lines what will be trained, on what and where, and what of the network does not run fused."""
    parts = ((data.train, "to train on"), (data.validation, "for validation"), (data.test, "for the test"))
    images = ", ".join(f"{len(part)} {words}" for part, words in parts if part is not None)
    size = " x ".join(map(str, data.train.shape))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    form = "fused" if chosen.fused else "in the usual formulation"
    place = str(processes.device) + (f", {processes.world_size} processes" if processes.world_size > 1 else "")
    # The stem of a network for small images is a single convolution: there is nothing to fuse.
    rows = [row for row in densenet_ext.report(network) if not row.fused and row.kind != "stem"]
    return [
        f"{chosen.data}: images of {size} in {len(data.classes)} classes: {images}",
        *data.notes,
        f"{chosen.model}: {parameters:,} parameters, {form}, on {place}; everything goes into {folder}",
        *(f"not fused: {row.name}: {row.reason}" for row in rows if chosen.fused),
    ]


def conclude(history: Sequence[Epoch], test: Sums | None, folder: Path) -> None:
    """Prints what came of the run, and keeps it in result.json and in pictures."""
    best = best_of(history)
    values: dict[str, Any] = {"epochs": len(history), "best": best and asdict(best), "test": None}
    if best is not None:
        print(f"smallest validation error {best.validation_error:.2f} % after epoch {best.epoch}: {folder / BEST}")
    if test is not None:
        values["test"] = {"loss": test.mean_loss, "error": test.error, "wrong": test.wrong, "images": test.images}
        counted = f"{test.wrong} of {test.images} wrong"
        print(f"test accuracy {100 - test.error:.2f} % ({counted}) after the last epoch: {folder / LAST}")
    write_text(folder / RESULT, json.dumps(values, indent=2) + "\n")
    curves.draw_curves([asdict(row) for row in history], folder / CURVES, "Loss and error of the run")
    blocks = connections(read_weights_file(folder / LAST)["model"])
    draw_connections(blocks, folder / REUSE, "Which layer uses which, after the last epoch")
    print(f"metrics: {folder / METRICS}; pictures: {folder / CURVES}, {folder / REUSE}")
