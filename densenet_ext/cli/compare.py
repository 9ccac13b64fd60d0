"""``densenet-ext compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from densenet_ext import checks
from densenet_ext.cli.arguments import errors_told, option
from densenet_ext.cli.options import (
    Amp,
    BatchSize,
    Compile,
    Data,
    Deterministic,
    Device,
    Download,
    Epochs,
    ImageSize,
    Lr,
    Model,
    OnCorrupt,
    Root,
    Save,
    Validation,
    Workers,
)

Seeds = Annotated[
    int, option("How often each form is trained: with seeds 0, 1, 2, ...", "INTEGER", int, checks.integer, 1)
]


def compare(
    context: typer.Context,
    seeds: Seeds = 5,
    data: Data = None,
    root: Root = None,
    model: Model = None,
    save: Save = None,
    epochs: Epochs = None,
    batch_size: BatchSize = None,
    lr: Lr = None,
    amp: Amp = None,
    compile: Compile = None,
    device: Device = None,
    workers: Workers = None,
    deterministic: Deterministic = None,
    validation: Validation = None,
    image_size: ImageSize = None,
    on_corrupt: OnCorrupt = None,
    download: Download = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison. Default: a new one below runs.")] = None,
) -> None:
    """Trains a DenseNet fused and unfused, side by side, and tells what differs: results, time and memory.

    Both forms start from the same weights and go through the same batches, step by step in turns, with the recipe of
    densenet-ext train. Their difference, seed by seed, comes as a table, as a picture and as files.
    """
    given = {name: value for name, value in context.params.items() if name not in ("out", "seeds", "download")}
    given["root"] = None if root is None else str(root)
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at the first profile: PyTorch's profiler else announces it
    with errors_told():
        from densenet_ext.training.compare import command as comparing

        comparing.compare(given, seeds, out, download)
