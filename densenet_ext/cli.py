"""The command line: ``densenet-ext train`` and ``densenet-ext plan``.

What the user got wrong ends with exit code 2, what went wrong with 1.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

from densenet_ext import checks

try:
    import typer
except ModuleNotFoundError as error:
    raise SystemExit("densenet-ext: the command line needs typer: pip install 'densenet_ext[train]'") from error

app = typer.Typer(
    help="DenseNets over one buffer per dense block.", no_args_is_help=True, pretty_exceptions_enable=False
)


@app.callback()
def _commands() -> None:
    """DenseNets over one buffer per dense block."""


def main() -> None:
    """The entry point of ``densenet-ext`` and of ``python -m densenet_ext``."""
    app(prog_name="densenet-ext")


def _option(help: str, metavar: str, kind: type, check: Callable[..., Any], *limits: Any) -> Any:
    """An option whose text is read as ``kind``; ``check`` refuses what is wrong, in the words of the library."""

    def parse(text: Any) -> Any:
        with contextlib.suppress(ValueError):  # what is no number stays a text, for the check to refuse
            text = kind(text)
        try:
            return check("", text, *limits)
        except (TypeError, ValueError) as error:
            raise typer.BadParameter(str(error).removeprefix(": ")) from error

    return typer.Option(parser=parse, metavar=metavar, help=help)


_EPOCHS = _option("Passes over the training images.", "INTEGER", int, checks.integer, 1)
_BATCH_SIZE = _option("Images per step.", "INTEGER", int, checks.integer, 1)
_LR = _option("Highest learning rate.", "NUMBER", float, checks.positive)
_SAVE = _option("What blocks keep for the backward pass.", "|".join(checks.LEVELS), str, checks.choice, checks.LEVELS)
_SEED = _option("Of the weights, the order and the shifts.", "INTEGER", int, checks.integer, 0, 2**63 - 1)
_OUT = typer.Option(help="Folder for metrics.csv and checkpoint.pt.")
_DEPTH = _option("Layers with weights, 6 n + 4.", "INTEGER", int, checks.bc_depth)
_GROWTH_RATE = _option("Features that a layer adds.", "INTEGER", int, checks.integer, 1)


@app.command()
def train(
    epochs: Annotated[int, _EPOCHS] = 30,
    batch_size: Annotated[int, _BATCH_SIZE] = 64,
    lr: Annotated[float, _LR] = 0.1,
    save: Annotated[str, _SAVE] = "bottlenecks",
    seed: Annotated[int, _SEED] = 0,
    out: Annotated[Path, _OUT] = Path("runs/digits"),
    depth: Annotated[int, _DEPTH] = 22,
    growth_rate: Annotated[int, _GROWTH_RATE] = 12,
) -> None:
    """Trains a small DenseNet-BC on the handwritten digits inside scikit-learn."""
    try:
        from densenet_ext import training
    except ModuleNotFoundError as error:
        _fail(f"training needs {error.name}: pip install 'densenet_ext[train]'", error)
    settings = training.Settings(
        epochs=epochs, batch_size=batch_size, lr=lr, save=save, seed=seed, depth=depth, growth_rate=growth_rate
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise typer.BadParameter(f"cannot make the folder {out}: {error.strerror}", param_hint="'--out'") from error
    if not os.access(out, os.W_OK | os.X_OK):
        raise typer.BadParameter(f"expected a folder to write into, got {out} without permission", param_hint="'--out'")
    start = time.perf_counter()
    try:
        split = training.load_digits()
        history = training.train(settings, split, out)
    except (training.CheckpointError, training.TrainingError, ModuleNotFoundError) as error:
        _fail(str(error), error)
    held_out = len(split.held_out_labels)
    wrong = round(history[-1].held_out_error * held_out / 100)
    typer.echo(
        f"held-out accuracy {100 - history[-1].held_out_error:.2f} % ({wrong} of {held_out} wrong) "
        f"after {time.perf_counter() - start:.0f} s; {out / 'metrics.csv'}, {out / 'checkpoint.pt'}"
    )


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

_MODEL = _option("The network.", "|".join(_MODELS), str, checks.choice, tuple(_MODELS))
_IMAGE = _option(
    "Height and width of the images; those that the network is made for.", "INTEGER", int, checks.integer, 1
)
_BATCH = _option("Images per step.", "INTEGER", int, checks.integer, 1)
_DTYPE = _option("Of the training; 16 bits are autocast's.", "|".join(_DTYPES), str, checks.choice, tuple(_DTYPES))
_MEMORY = _option('As "80GiB": the largest batch that fits.', "SIZE", str, checks.memory)
_STATE = _option(
    "Tensors that the optimizer keeps per parameter: SGD with momentum 1, Adam 2.", "INTEGER", int, checks.integer, 0
)


@app.command()
def plan(
    model: Annotated[str, _MODEL] = "densenet121",
    image: Annotated[int | None, _IMAGE] = None,
    batch: Annotated[int, _BATCH] = 32,
    dtype: Annotated[str, _DTYPE] = "fp32",
    save: Annotated[str | None, _SAVE] = None,
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


def _fail(message: str, error: Exception) -> NoReturn:
    typer.echo(f"Error: {message}", err=True)
    raise typer.Exit(1) from error
