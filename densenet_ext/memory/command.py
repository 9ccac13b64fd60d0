"""The command ``plan``: what a training step of one of this package's networks needs in memory."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

import densenet_ext
from densenet_ext import checks
from densenet_ext.arguments import integer, read
from densenet_ext.errors import UserError

SIZES = dict.fromkeys(("densenet121", "densenet161", "densenet169", "densenet201", "densenet264"), 224)
SIZES["densenet_bc"] = 32
"""The networks, each with the height and width of the images that it is made for."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def add_arguments(argument: Callable[..., Any]) -> None:
    """Tells argparse the arguments of :func:`plan`; ``argument`` is its ``add_argument``."""
    argument("--model", choices=tuple(SIZES), default="densenet121", help="The network.")
    size = "Height and width of the images. Default: those that the network is made for."
    argument("--image", help=size, **integer(1))
    argument("--batch", default=32, help="Images per step. Default: 32.", **integer(1))
    dtype = "Precision of training; 16 bits mean autocast."
    argument("--dtype", choices=tuple(DTYPES), default="fp32", help=dtype)
    argument("--save", choices=checks.LEVELS, help="What blocks keep for the backward pass.")
    argument("--memory", type=read(str, checks.memory), help="Such as 80GiB: shows the largest batch that fits.")
    state = "Tensors that the optimizer keeps per parameter: SGD with momentum 1, Adam 2."
    argument("--optimizer-state", default=0, help=state, **integer(0))


def plan(
    model: str, image: int | None, batch: int, dtype: str, save: str | None, memory: int | None, optimizer_state: int
) -> str:
    """Returns in words what a step of ``model`` needs on ``batch`` images of height and width ``image``.

    ``model`` is one of ``SIZES``, ``dtype`` one of ``DTYPES``; the others are those of :func:`densenet_ext.plan`.
    Raises UserError for images that the network does not take, and a memory that it does not fit into.
    """
    with torch.device("meta"):
        network = getattr(densenet_ext, model)()
    size = image or SIZES[model]
    shape = (batch, network.in_channels, size, size)
    try:
        found = densenet_ext.plan(network, shape, DTYPES[dtype], save, memory, optimizer_state=optimizer_state)
    except ValueError as error:
        words = str(error).replace("input_shape: the model", f"--image: {model}", 1)
        raise UserError(re.sub("^memory:", "--memory:", words)) from error
    return f"{model}: {found}"
