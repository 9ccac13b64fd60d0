"""``densenet-ext train`` and ``densenet-ext compare``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from densenet_ext import checks
from densenet_ext.cli.arguments import option

Download = Annotated[bool, typer.Option("--download", help="Lets CIFAR be downloaded into --root.")]
Seeds = Annotated[
    int, option("How often each form is trained: with seeds 0, 1, 2, ...", "INTEGER", int, checks.integer, 1)
]


def train(
    given: dict[str, Any],
    download: Download = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: a new one below runs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Goes on with the run in --out, with its options.")] = False,
) -> None:
    """Trains a DenseNet on images: the paper's recipe unless options say otherwise.

    The recipe is SGD with Nesterov momentum 0.9, weight decay 1e-4 and a learning rate that is divided by 10 at 50 %
    and 75 % of the epochs. Ctrl-C and SIGTERM save and leave; --resume goes on to the same numbers.

    Several processes: torchrun --nproc-per-node N -m densenet_ext train ...
    """
    from densenet_ext.training import running

    running.train(given, out, resume, download)


def compare(
    given: dict[str, Any],
    seeds: Seeds = 5,
    download: Download = False,
    out: Annotated[Path | None, typer.Option(help="Folder of the comparison. Default: a new one below runs.")] = None,
) -> None:
    """Trains a DenseNet fused and unfused, side by side, and tells what differs: results, time and memory.

    Both forms start from the same weights and go through the same batches, step by step in turns, with the recipe of
    densenet-ext train. Their difference, seed by seed, comes as a table, as a picture and as files.
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # read at the first profile: PyTorch's profiler else announces it
    from densenet_ext.training.compare import command as comparing

    comparing.compare(given, seeds, out, download)
