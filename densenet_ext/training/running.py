"""A run from its options to its pictures: what ``densenet-ext train`` does."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
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
from densenet_ext.training import curves, networks, options
from densenet_ext.training.checkpoints import BEST, LAST, load_checkpoint, locked
from densenet_ext.training.data import load as load_data
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.learner import Learner
from densenet_ext.training.loop import Result, Run
from densenet_ext.training.metrics import FILE as METRICS
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes, agreed, joined

RUNS = Path("runs")
RESULT = "result.json"
CURVES, REUSE = "curves.png", "reuse.png"


def train(given: Mapping[str, Any], out: Path | None, resume: bool = False, download: bool = False) -> Result:
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
    with joined(chosen.device, chosen.amp, chosen.fsdp, chosen.sync_bn) as processes:
        # Before the first process makes the folder, since the others may have found another name for a new one.
        return _train(chosen, processes.gather(folder)[0], resume, download, processes)


def _train(chosen: Options, folder: Path, resume: bool, download: bool, processes: Processes) -> Result:
    def begin() -> IO[bytes] | None:
        """Makes ``folder`` that of this run, and no other's while the lock is held that it returns."""
        if not processes.is_global_zero:
            return None
        if not resume:
            options.save(chosen, folder)
        return locked(folder / options.FILE)

    data, network = prepared(chosen, processes, download)
    words = announcement(network.to(processes.device), data, chosen, processes, folder)  # before the network is sharded
    run = Run(Learner(network, chosen, processes), data, folder)
    lock = agreed(processes, begin)  # by now nothing of what was asked for is refused any more
    if resume:
        run.resume()
        words.append(f"going on after epoch {len(run.history)} of {chosen.epochs}")
    if processes.is_global_zero:
        print("\n".join(words), flush=True)
    result = run.train()
    if processes.is_global_zero:
        conclude(result, folder)
    if lock is not None:
        lock.close()
    processes.gather(None)  # nobody leaves before the first one has written
    return result


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
    network = built(chosen, data, chosen.seed)
    shape = (data.channels, data.image_size, data.image_size)
    try:
        with torch.no_grad():
            network.eval()(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"--model: {chosen.model} does not take images {list(shape)}: {error}") from error
    return data, network


def built(chosen: Options, data: Data, seed: int) -> nn.Module:
    """Returns the network of ``chosen`` for ``data``, with the weights of ``seed``."""
    torch.manual_seed(seed)  # the same weights in every process
    classes = len(data.classes)
    return networks.build(chosen.model, classes=classes, channels=data.channels, save=chosen.save, fused=chosen.fused)


def announcement(network: nn.Module, data: Data, chosen: Options, processes: Processes, folder: Path) -> list[str]:
    """Returns in lines what will be trained, on what and where, and what of the network does not run fused."""
    parts = ((data.train, "to train on"), (data.validation, "for validation"), (data.test, "for the test"))
    images = ", ".join(f"{len(part)} {words}" for part, words in parts if part is not None)
    size = f"{data.channels} x {data.image_size} x {data.image_size}"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    form = "fused" if chosen.fused else "in the usual formulation"
    place = str(processes.device) + (f", {processes.world_size} processes" if processes.world_size > 1 else "")
    # The stem of a network for small images is a single convolution: there is nothing to fuse.
    rows = [row for row in densenet_ext.report(network) if not row.fused and row.kind != "stem"]
    return [
        f"{data.name}: images of {size} in {len(data.classes)} classes: {images}",
        *data.notes,
        f"{chosen.model}: {parameters:,} parameters, {form}, on {place}; everything goes into {folder}",
        *(f"not fused: {row.name}: {row.reason}" for row in rows if chosen.fused),
    ]


def conclude(result: Result, folder: Path) -> None:
    """Prints what came of the run, and keeps it in result.json and in pictures."""
    values: dict[str, Any] = {"epochs": len(result.history), "best": None, "test": None}
    if result.best is not None:
        values["best"] = asdict(result.best)
        error = f"{result.best.validation_error:.2f} %"
        print(f"smallest validation error {error} after epoch {result.best.epoch}: {folder / BEST}")
    if result.test is not None:
        test = result.test
        values["test"] = {"loss": test.mean_loss, "error": test.error, "wrong": test.wrong, "images": test.images}
        counted = f"{test.wrong} of {test.images} wrong"
        print(f"test accuracy {100 - test.error:.2f} % ({counted}) after the last epoch: {folder / LAST}")
    write_text(folder / RESULT, json.dumps(values, indent=2) + "\n")
    curves.draw_curves([asdict(row) for row in result.history], folder / CURVES, "Loss and error of the run")
    blocks = connections(load_checkpoint(folder / LAST)["model"])
    draw_connections(blocks, folder / REUSE, "Which layer uses which, after the last epoch")
    print(f"metrics: {folder / METRICS}; pictures: {folder / CURVES}, {folder / REUSE}")
