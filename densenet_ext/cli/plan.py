"""``densenet-ext plan``: what a training step needs in memory."""

from __future__ import annotations

from typing import Annotated

import typer

from densenet_ext import checks
from densenet_ext.cli.arguments import SAVE, option

_MODELS = {
    "densenet121": 224,
    "densenet161": 224,
    "densenet169": 224,
    "densenet201": 224,
    "densenet264": 224,
    "densenet_bc": 32,
}
"""The models of the command line, each with the height and width of the images that it is made for."""
_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16", "fp64": "float64"}

_MODEL = option("The network.", "|".join(_MODELS), str, checks.choice, tuple(_MODELS))
_IMAGE = option(
    "Height and width of the images; those that the network is made for.", "INTEGER", int, checks.integer, 1
)
_BATCH = option("Images per step.", "INTEGER", int, checks.integer, 1)
_DTYPE = option("Of the training; 16 bits are autocast's.", "|".join(_DTYPES), str, checks.choice, tuple(_DTYPES))
_MEMORY = option('As "80GiB": the largest batch that fits.', "SIZE", str, checks.memory)
_STATE = option(
    "Tensors that the optimizer keeps per parameter: SGD with momentum 1, Adam 2.", "INTEGER", int, checks.integer, 0
)


def plan(
    model: Annotated[str, _MODEL] = "densenet121",
    image: Annotated[int | None, _IMAGE] = None,
    batch: Annotated[int, _BATCH] = 32,
    dtype: Annotated[str, _DTYPE] = "fp32",
    save: Annotated[str | None, SAVE] = None,
    memory: Annotated[int | None, _MEMORY] = None,
    optimizer_state: Annotated[int, _STATE] = 0,
) -> None:
    """Prints what a training step needs in memory at each level of saving, without running it."""
    import torch

    import densenet_ext

    with torch.device("meta"):
        network = getattr(densenet_ext, model)()
    size = _MODELS[model] if image is None else image
    shape = (batch, network.in_channels, size, size)
    try:
        found = densenet_ext.plan(
            network, shape, getattr(torch, _DTYPES[dtype]), save, memory, optimizer_state=optimizer_state
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    typer.echo(f"{model}: {found}")
