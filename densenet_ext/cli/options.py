"""The options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from densenet_ext import checks
from densenet_ext.cli.arguments import SAVE, choice, option
from densenet_ext.training.options import AMP, DATA, ON_CORRUPT


def _defaults(name: str) -> str:
    """What the field ``name`` of Defaults is for each data set: "30 for digits, 300 for cifar10"."""
    return ", ".join(f"{getattr(defaults, name)} for {data}" for data, defaults in DATA.items())


def _model(name: str, value: Any) -> str:
    from densenet_ext.training import networks

    return networks.check(value)


def _fraction(name: str, value: Any) -> float:
    number = checks.probability(name, value)
    if number == 1.0:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got 1")
    return number


Data = Annotated[str | None, choice("The images. Default: digits, which are inside scikit-learn.", tuple(DATA))]
Root = Annotated[
    Path | None, typer.Option(help="Their folder. For imagefolder: train/CLASS/*, val/CLASS/*, or CLASS/* alone.")
]
Model = Annotated[
    str | None,
    option(
        f"densenet121 to 264, densenet_bc:DEPTH,K, timm:NAME, torchvision:NAME. Default: {_defaults('model')}.",
        "NAME",
        str,
        _model,
    ),
]
Save = Annotated[str | None, SAVE]
Epochs = Annotated[
    int | None,
    option(
        f"Passes over the training images. Default: {_defaults('epochs')}.",
        "INTEGER",
        int,
        checks.integer,
        1,
    ),
]
BatchSize = Annotated[
    int | None,
    option(
        f"Images per step, of all processes together. Default: {_defaults('batch_size')}.",
        "INTEGER",
        int,
        checks.integer,
        1,
    ),
]
Lr = Annotated[
    float | None,
    option(
        "Learning rate, divided by 10 after 50 % and 75 % of the epochs. Default: 0.1.",
        "NUMBER",
        float,
        checks.positive,
    ),
]
Amp = Annotated[str | None, choice("Mixed precision (autocast). Default: off.", tuple(AMP))]
Compile = Annotated[bool | None, typer.Option("--compile/--no-compile", help="Runs the network through torch.compile.")]
Device = Annotated[str | None, typer.Option(help="Default: a GPU where there is one, or else cpu.")]
Workers = Annotated[int | None, option("Processes that load images. Default: 0.", "INTEGER", int, checks.integer, 0)]
Deterministic = Annotated[
    bool | None,
    typer.Option(
        "--deterministic/--no-deterministic", help="PyTorch's own operators too; on the CPU they are in any case."
    ),
]
Validation = Annotated[
    float | None,
    option("Part of the training images that is held out for validation. Default: 0.1.", "NUMBER", float, _fraction),
]
ImageSize = Annotated[
    int | None, option("Height and width that images are brought to.", "INTEGER", int, checks.integer, 8)
]
OnCorrupt = Annotated[
    str | None, choice("What to do about images that can't be read: name and refuse, or skip.", ON_CORRUPT)
]
Download = Annotated[bool, typer.Option("--download", help="Lets CIFAR be downloaded into --root.")]


def given(context: typer.Context, *others: str) -> dict[str, Any]:
    """The fields of training.options.Options that the command line sets, None where it does not; not ``others``."""
    values = {name: value for name, value in context.params.items() if name not in others}
    return {**values, "root": None if values["root"] is None else str(values["root"])}
