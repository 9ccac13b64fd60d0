"""``densenet-ext train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from densenet_ext import checks
from densenet_ext.cli import options
from densenet_ext.cli.arguments import errors_told, option

Fused = Annotated[
    bool | None,
    typer.Option("--fused/--no-fused", help="One buffer per dense block, or the usual formulation. Default: fused."),
]
Seed = Annotated[
    int | None,
    option("Of the weights, the order and the augmentation. Default: 0.", "INTEGER", int, checks.integer, 0, 2**63 - 1),
]


def train(
    context: typer.Context,
    data: options.Data = None,
    root: options.Root = None,
    model: options.Model = None,
    save: options.Save = None,
    fused: Fused = None,
    epochs: options.Epochs = None,
    batch_size: options.BatchSize = None,
    lr: options.Lr = None,
    amp: options.Amp = None,
    compile: options.Compile = None,
    device: options.Device = None,
    workers: options.Workers = None,
    seed: Seed = None,
    deterministic: options.Deterministic = None,
    validation: options.Validation = None,
    image_size: options.ImageSize = None,
    on_corrupt: options.OnCorrupt = None,
    download: options.Download = False,
    sync_bn: Annotated[
        bool | None, typer.Option("--sync-bn/--no-sync-bn", help="Under torchrun: statistics of the whole batch.")
    ] = None,
    fsdp: Annotated[
        bool | None, typer.Option("--fsdp/--no-fsdp", help="Under torchrun: FSDP2 instead of DistributedDataParallel.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Folder of the run. Default: a new one below runs.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Goes on with the run in --out, with its options.")] = False,
) -> None:
    """Trains a DenseNet on images: the paper's recipe unless options say otherwise.

    The recipe is SGD with Nesterov momentum 0.9, weight decay 1e-4 and a learning rate that is divided by 10 at 50 %
    and 75 % of the epochs. Ctrl-C and SIGTERM save and leave; --resume goes on to the same numbers.

    Several processes: torchrun --nproc-per-node N -m densenet_ext train ...
    """
    given = options.given(context, "out", "resume", "download")
    with errors_told():
        from densenet_ext.training import running

        running.train(given, out, resume, download)
