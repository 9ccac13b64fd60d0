"""The options of a run: what the command line asks, their defaults for each data set, what a resume may change.

The recipe is the paper's (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, section 4.2): SGD with
Nesterov momentum 0.9, weight decay 1e-4, learning rate 0.1 divided by 10 at 50 % and 75 % of the epochs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import torch

from densenet_ext import checks
from densenet_ext._version import __version__
from densenet_ext.arguments import integer, number, read
from densenet_ext.errors import UserError
from densenet_ext.training import networks

FILE = "options.json"
DATA: dict[str, dict[str, Any]] = {
    "digits": {"model": "densenet_bc:22,12", "epochs": 30, "batch_size": 64},
    "cifar10": {"model": "densenet_bc:100,12", "epochs": 300, "batch_size": 64},
    "cifar100": {"model": "densenet_bc:100,12", "epochs": 300, "batch_size": 64},
    "imagefolder": {"model": "densenet121", "epochs": 90, "batch_size": 256},
}
"""The data sets of the command line, with the options that depend on them."""
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Mixed precision, with the dtype of convolutions and products."""


def _option(default: Any, help: str, *, compared: bool = True, free: bool = False, **argument: Any) -> Any:
    """Returns a field that is an option of the command line; ``argument`` is for argparse's ``add_argument``.

    ``compared``: the command compare has it, too. ``free``: a resume may change it, since it says where the run goes
    on, not what it computes.
    """
    if isinstance(default, bool):
        argument = {"action": argparse.BooleanOptionalAction, **argument}
        help += " Default: on." if default else ""
    elif default is not None and default is not MISSING:
        help += f" Default: {default}."
    argument["help"] = help.replace("%", "%%")
    return field(default=default, metadata={"argument": argument, "compared": compared, "free": free})


def _by_data(name: str, help: str, **argument: Any) -> Any:
    """Returns an option whose default depends on the data."""
    defaults = ", ".join(f"{each[name]} for {data}" for data, each in DATA.items())
    return _option(MISSING, f"{help} Default: {defaults}.", **argument)


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that a run is made of."""

    data: str = _option("digits", "The data set; digits come with scikit-learn.", choices=tuple(DATA))
    root: str | None = _option(None, "Its folder: train/CLASS/*, val/CLASS/*, or CLASS/* alone.", free=True)
    model: str = _by_data("model", networks.NAMES, type=read(str, networks.check), metavar="NAME")
    save: str = _option("bottlenecks", "What blocks keep for the backward pass.", choices=checks.LEVELS)
    fused: bool = _option(True, "Run each block over one buffer, or as usual.", compared=False)
    epochs: int = _by_data("epochs", "Passes over the training images.", **integer(1))
    batch_size: int = _by_data("batch_size", "Images a step, of all processes.", **integer(1))
    lr: float = _option(0.1, "Learning rate, a tenth from 50 % and 75 % of the epochs on.", **number(checks.positive))
    weight_decay: float = 1e-4
    amp: str = _option("off", "Mixed precision (autocast).", choices=tuple(AMP))
    compile: bool = _option(False, "Run the network through torch.compile.")
    device: str | None = _option(None, "Such as cuda:1. Default: a GPU where there is one, else cpu.", free=True)
    workers: int = _option(0, "Processes that load images.", free=True, **integer(0))
    seed: int = _option(0, "For weights, order, augmentation.", compared=False, **integer(0, 2**63 - 1))
    deterministic: bool = _option(False, "Same numbers in every run; on the CPU they are in any case.")
    validation: float = _option(0.1, "Fraction of training images held out.", **number(checks.probability))
    image_size: int | None = _option(None, "Height and width that images are brought to.", **integer(8))
    on_corrupt: str = _option("refuse", "If images can't be read.", choices=("refuse", "skip"))
    sync_bn: bool = _option(False, "Under torchrun: norms see the whole batch.", compared=False)
    fsdp: bool = _option(False, "Under torchrun: FSDP2 in place of DDP.", compared=False, free=True)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Returns the options that were ``given`` by name, the others at their defaults; None means not given."""
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**DATA[chosen.get("data", "digits")], **chosen})


ASKED = {each.name: each.metadata for each in fields(Options) if each.metadata}
"""The options of the command line, by the field that they set."""


def save(options: Options, folder: Path) -> None:
    """Makes ``folder`` and writes ``options`` to options.json in it, with the versions that run.

    Raises UserError when it has one already, of another run, or can't be written into.
    """
    versions = {"densenet_ext": __version__, "torch": str(torch.__version__)}
    check_new(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / FILE, "x", encoding="utf-8") as file:  # another run may come first: one of them makes it
            file.write(json.dumps({"options": asdict(options), "versions": versions}, indent=2) + "\n")
    except OSError as error:
        raise UserError(f"--out: expected a folder to write into, got {folder}: {error.strerror or error}") from error


def check_new(folder: Path) -> None:
    """Raises UserError when ``folder`` has a run in it."""
    if (folder / FILE).exists():
        raise UserError(f"--out: {folder} holds a run already: --resume goes on with it, or give another --out")


def load(folder: Path) -> Options:
    """Returns the options that ``folder`` keeps. Raises UserError when it holds no run, or a damaged options.json."""
    path = folder / FILE
    try:
        return Options(**json.loads(path.read_text(encoding="utf-8"))["options"])
    except OSError as error:
        raise UserError(f"--resume: expected the folder of a run, cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected the options of a run, got something else ({error})") from error


def resumed(kept: Options, given: Mapping[str, Any]) -> Options:
    """Returns ``kept`` with what of ``given`` a resume may change. Raises UserError when it would change more."""
    changes = {name: value for name, value in given.items() if value is not None and value != getattr(kept, name)}
    words = [
        f"{flag(n)} is {getattr(kept, n)!r} there, got {new!r}" for n, new in changes.items() if not ASKED[n]["free"]
    ]
    if words:
        raise UserError(f"--resume: expected the options that the run was started with: {'; '.join(words)}")
    return replace(kept, **changes)


def flag(name: str) -> str:
    """Returns the option of the command line that sets the field ``name``."""
    return "--" + name.replace("_", "-")
