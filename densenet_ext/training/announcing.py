"""What a run says before and after its epochs, and the pictures that it leaves."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import nn

import densenet_ext
from densenet_ext.training.checkpoint import BEST, LAST, load_checkpoint
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.errors import TrainingError, UserError
from densenet_ext.training.files import write_text
from densenet_ext.training.loop import Result
from densenet_ext.training.metrics import FILE as METRICS
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes

RESULT = "result.json"
CURVES, REUSE = "curves.png", "reuse.png"


def announce(network: nn.Module, data: Data, chosen: Options, processes: Processes, folder: Path) -> None:
    """Prints what will be trained, on what and where, and what of the network does not run fused."""
    parts = ((data.train, "to train on"), (data.validation, "for validation"), (data.test, "for the test"))
    images = ", ".join(f"{len(part)} {words}" for part, words in parts if part is not None)
    size = f"{data.channels} x {data.image_size} x {data.image_size}"
    print(f"{data.name}: images of {size} in {len(data.classes)} classes: {images}")
    for note in data.notes:
        print(note)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    form = "fused" if chosen.fused else "in the usual formulation"
    place = str(processes.device) + (f", {processes.size} processes" if processes.size > 1 else "")
    print(f"{chosen.model}: {parameters:,} parameters, {form}, on {place}; everything goes into {folder}")
    if chosen.fused:
        # The stem of a network for small images is a single convolution: there is nothing to fuse.
        for row in densenet_ext.report(network):
            if not row.fused and row.kind != "stem":
                print(f"not fused: {row.name}: {row.reason}")


def conclude(result: Result, folder: Path) -> None:
    """Prints what came of the run, and keeps it in result.json."""
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
    print(f"metrics: {folder / METRICS}")
    for draw, name in ((_draw_curves, CURVES), (_draw_reuse, REUSE)):
        try:
            draw(result, folder / name)
            print(f"picture: {folder / name}")
        except (UserError, TrainingError) as error:  # the run is complete and saved without it
            print(f"no {name}: {error}")


def _draw_curves(result: Result, path: Path) -> None:
    from densenet_ext.training.pictures.drawing import draw_curves

    draw_curves([asdict(row) for row in result.history], path, "Loss and error of the run")


def _draw_reuse(result: Result, path: Path) -> None:
    from densenet_ext.training.pictures.connections import connections
    from densenet_ext.training.pictures.drawing import draw_connections

    weights = load_checkpoint(path.with_name(LAST))["model"]
    draw_connections(connections(weights), path, "Which layer uses which, after the last epoch")
