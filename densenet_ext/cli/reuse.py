"""``densenet-ext reuse``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from densenet_ext.cli.arguments import errors_told

Checkpoint = Annotated[
    Path, typer.Argument(help="Of any DenseNet: a file of torch.save or .safetensors, a state dict or with one inside.")
]
Out = Annotated[Path | None, typer.Option(help="The picture: .png, .svg or .pdf. Default: beside the checkpoint.")]
NewFirst = Annotated[
    bool,
    typer.Option(
        "--new-first", help="The layers put new features in front of those they read; known libraries append."
    ),
]


def reuse(checkpoint: Checkpoint, out: Out = None, new_first: NewFirst = False) -> None:
    """Draws how strongly each layer of a DenseNet uses each earlier one, from the weights in a checkpoint.

    This is figure 5 of the paper (Huang et al. 2017), for the checkpoint of any library.
    """
    with errors_told():
        from densenet_ext.reuse import command

        typer.echo(command.reuse(checkpoint, out, new_first))
