"""``densenet-ext compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from densenet_ext import checks
from densenet_ext.cli import options
from densenet_ext.cli.arguments import errors_told, option

Seeds = Annotated[
    int, option("How often each form is trained: with seeds 0, 1, 2, ...", "INTEGER", int, checks.integer, 1)
]


def compare(
    context: typer.Context,
    seeds: Seeds = 5,
    data: options.Data = None,
    root: options.Root = None,
    model: options.Model = None,
    save: options.Save = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.Lr = None,
    amp: options.Amp = None,
    compile: options.Compile = None,
    device: options.Device = None,
    workers: options.Workers = None,
    deterministic: options.Deterministic = None,
    validation: options.Validation = None,
    image_size: options.ImageSize = None,
    on_corrupt: options.OnCorrupt = None,
    download: options.Download = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison. Default: a new one below runs.")] = None,
) -> None:
    """Trains a DenseNet fused and unfused, side by side, and tells what differs: results, time and memory.

    Both forms start from the same weights and go through the same batches, step by step in turns, with the recipe of
    densenet-ext train. Their difference, seed by seed, comes as a table, as a picture and as files.
    """
    given = options.given(context, "out", "seeds", "download")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at the first profile: PyTorch's profiler else announces it
    with errors_told():
        from densenet_ext.training.compare import command as comparing

        comparing.compare(given, seeds, out, download)
