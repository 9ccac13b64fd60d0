"""The options of a run: their defaults for each data set, how a run's folder keeps them, what a resume may change.

The recipe is the paper's (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, section 4.2): SGD with
Nesterov momentum 0.9, weight decay 1e-4, learning rate 0.1 divided by 10 at 50 % and 75 % of the epochs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from densenet_ext._version import __version__
from densenet_ext.training.errors import UserError
from densenet_ext.training.files import write_text

FILE = "options.json"


class Defaults(NamedTuple):
    """What depends on the data."""

    model: str
    epochs: int
    batch_size: int


DATA = {
    "digits": Defaults("densenet_bc:22,12", 30, 64),
    "cifar10": Defaults("densenet_bc:100,12", 300, 64),
    "cifar100": Defaults("densenet_bc:100,12", 300, 64),
    "imagefolder": Defaults("densenet121", 90, 256),
}
"""The data sets of the command line."""
AMP = {"off": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Mixed precision, with the dtype of convolutions and products."""
ON_CORRUPT = ("refuse", "skip")


@dataclass(frozen=True)
class Options:
    """Everything that a run is made of."""

    data: str  # key of DATA
    model: str  # as networks.build takes it
    epochs: int
    batch_size: int  # images per step, of all processes together
    root: str | None = None  # folder of the data
    lr: float = 0.1
    weight_decay: float = 1e-4
    save: str = "bottlenecks"
    fused: bool = True
    amp: str = "off"  # key of AMP
    compile: bool = False
    seed: int = 0
    deterministic: bool = False
    validation: float = 0.1  # part of the training images
    image_size: int | None = None  # height and width; None: what the data and the model are made for
    on_corrupt: str = "refuse"  # one of ON_CORRUPT
    sync_bn: bool = False
    fsdp: bool = False
    device: str | None = None  # None: a GPU where there is one
    workers: int = 0  # processes that load images

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """The options that were ``given`` by name, the others at their defaults for the data; None means not given."""
        data = given.get("data") or "digits"
        if data not in DATA:
            raise UserError(f"--data: expected one of {', '.join(DATA)}, got {data!r}")
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**DATA[data]._asdict(), "data": data, **chosen})


FREE = frozenset({"root", "device", "workers", "fsdp"})
"""What a resume may change: where the run goes on, not what it computes."""


def save(options: Options, folder: Path) -> None:
    """Writes ``options`` to options.json in ``folder``, with the versions that ran."""
    versions = {"densenet_ext": __version__, "torch": str(torch.__version__)}
    write_text(folder / FILE, json.dumps({"options": asdict(options), "versions": versions}, indent=2) + "\n")


def load(folder: Path) -> Options:
    """The options that ``folder`` keeps. Raises UserError when it holds no run, or its options.json is damaged."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["options"]
        known = {field.name for field in fields(Options)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise UserError(f"{path}: unknown options {', '.join(unknown)}: another version of densenet_ext wrote them")
        return Options(**values)
    except FileNotFoundError as error:
        raise UserError(f"--resume: expected a folder with a run in it, got {folder} without {FILE}") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: expected the options of a run, got something else ({error})") from error


def resumed(kept: Options, given: Mapping[str, Any]) -> Options:
    """``kept`` with what of ``given`` a resume may change. Raises UserError when it would change anything else."""
    changes = {name: value for name, value in given.items() if value is not None and value != getattr(kept, name)}
    other = [name for name in changes if name not in FREE]
    if other:
        words = "; ".join(f"{flag(name)} is {getattr(kept, name)!r} there, got {changes[name]!r}" for name in other)
        raise UserError(
            f"--resume: expected the options that the run was started with: {words}. Leave them out to go on as it "
            "was started, or start another run with another --out"
        )
    return replace(kept, **changes)


def flag(name: str) -> str:
    """The option of the command line that sets the field ``name``."""
    return "--" + name.replace("_", "-")
