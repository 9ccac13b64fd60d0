"""The options of a run: what the command line asks, their defaults for each data set, what a resume may change.

The recipe is the paper's (Huang et al., "Densely Connected Convolutional Networks", CVPR 2017, section 4.2): SGD with
Nesterov momentum 0.9, weight decay 1e-4, learning rate 0.1 divided by 10 at 50 % and 75 % of the epochs.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from densenet_ext import checks
from densenet_ext._version import __version__
from densenet_ext.training.errors import UserError
from densenet_ext.training.files import write_text

FILE = "options.json"


class Defaults(NamedTuple):
    """The options that depend on the data."""

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


class Setting(NamedTuple):
    """An option of the command line; the field ``batch_size`` is ``--batch-size``."""

    help: str
    metavar: str = ""
    kind: type = str  # bool: --name/--no-name
    check: Callable[..., Any] | None = None  # (name, value, *limits) -> the value; raises ValueError, TypeError
    limits: tuple[Any, ...] = ()
    compared: bool = True  # whether the command compare has it, too
    free: bool = False  # whether a resume may change it: where the run goes on, not what it computes


def _asked(default: Any, setting: Setting) -> Any:
    return field(default=default, metadata={"asked": setting})


def _flag(help: str, default: bool, **more: Any) -> Any:
    return _asked(default, Setting(help, kind=bool, **more))


def _choice(help: str, choices: tuple[str, ...], default: Any = MISSING) -> Any:
    return _asked(default, Setting(help, "|".join(choices), str, checks.choice, (choices,)))


def _integer(help: str, least: int, *most: int, default: Any = MISSING, **more: Any) -> Any:
    return _asked(default, Setting(help, "INTEGER", int, checks.integer, (least, *most), **more))


def _number(help: str, check: Callable[..., Any], default: float) -> Any:
    return _asked(default, Setting(help, "NUMBER", float, check))


def _model(name: str, value: Any) -> str:
    from densenet_ext.training import networks

    return networks.check(value)


def _fraction(name: str, value: Any) -> float:
    number = checks.probability(name, value)
    if number == 1.0:
        raise ValueError(f"{name}: expected a number from 0 to below 1, got 1")
    return number


def _by_data(name: str) -> str:
    """Returns what the field ``name`` of Defaults is for each data set: "30 for digits, 300 for cifar10"."""
    return ", ".join(f"{getattr(defaults, name)} for {data}" for data, defaults in DATA.items())


_NETWORKS = f"densenet121 to 264, densenet_bc:DEPTH,K, timm:NAME, torchvision:NAME. Default: {_by_data('model')}."
_EPOCHS = f"Passes over the training images. Default: {_by_data('epochs')}."
_BATCH_SIZE = f"Images per step, of all processes together. Default: {_by_data('batch_size')}."
_ROOT = "Their folder. For imagefolder: train/CLASS/*, val/CLASS/*, or CLASS/* alone."
_FUSED = "One buffer per dense block, or the usual formulation. Default: fused."
_LR = "Learning rate, divided by 10 after 50 % and 75 % of the epochs. Default: 0.1."
_DEVICE = "Default: a GPU where there is one, or else cpu."
_SEED = "Of the weights, the order and the augmentation. Default: 0."
_VALIDATION = "Part of the training images that is held out for validation. Default: 0.1."
_CORRUPT = "What to do about images that can't be read: name and refuse, or skip."


@dataclass(frozen=True, kw_only=True)
class Options:
    """Everything that a run is made of."""

    data: str = _choice("The images. Default: digits, which are inside scikit-learn.", tuple(DATA))
    root: str | None = _asked(None, Setting(_ROOT, "PATH", free=True))
    model: str = _asked(MISSING, Setting(_NETWORKS, "NAME", str, _model))
    save: str = _choice("What blocks keep for the backward pass.", checks.LEVELS, "bottlenecks")
    fused: bool = _flag(_FUSED, True, compared=False)
    epochs: int = _integer(_EPOCHS, 1)
    batch_size: int = _integer(_BATCH_SIZE, 1)
    lr: float = _number(_LR, checks.positive, 0.1)
    weight_decay: float = 1e-4
    amp: str = _choice("Mixed precision (autocast). Default: off.", tuple(AMP), "off")
    compile: bool = _flag("Runs the network through torch.compile.", False)
    device: str | None = _asked(None, Setting(_DEVICE, "TEXT", free=True))
    workers: int = _integer("Processes that load images. Default: 0.", 0, default=0, free=True)
    seed: int = _integer(_SEED, 0, 2**63 - 1, default=0, compared=False)
    deterministic: bool = _flag("PyTorch's own operators too; on the CPU they are in any case.", False)
    validation: float = _number(_VALIDATION, _fraction, 0.1)
    image_size: int | None = _integer("Height and width that images are brought to.", 8, default=None)
    on_corrupt: str = _choice(_CORRUPT, ("refuse", "skip"), "refuse")
    sync_bn: bool = _flag("Under torchrun: statistics of the whole batch.", False, compared=False)
    fsdp: bool = _flag("Under torchrun: FSDP2 instead of DistributedDataParallel.", False, compared=False, free=True)

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Options:
        """Returns the options that were ``given`` by name, the others at their defaults; None means not given."""
        data = given.get("data") or "digits"
        if data not in DATA:
            raise UserError(f"--data: expected one of {', '.join(DATA)}, got {data!r}")
        chosen = {name: value for name, value in given.items() if value is not None}
        return cls(**{**DATA[data]._asdict(), "data": data, **chosen})


SETTINGS: dict[str, Setting] = {each.name: each.metadata["asked"] for each in fields(Options) if each.metadata}
"""What the command line asks, by the field that it sets."""


def save(options: Options, folder: Path) -> None:
    """Writes ``options`` to options.json in ``folder``, with the versions that ran."""
    versions = {"densenet_ext": __version__, "torch": str(torch.__version__)}
    write_text(folder / FILE, json.dumps({"options": asdict(options), "versions": versions}, indent=2) + "\n")


def load(folder: Path) -> Options:
    """Returns the options that ``folder`` keeps. Raises UserError when it holds no run, or a damaged options.json."""
    path = folder / FILE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["options"]
        unknown = sorted(set(values) - {each.name for each in fields(Options)})
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
    """Returns ``kept`` with what of ``given`` a resume may change. Raises UserError when it would change more."""
    changes = {name: value for name, value in given.items() if value is not None and value != getattr(kept, name)}
    other = [name for name in changes if not SETTINGS[name].free]
    if other:
        words = "; ".join(f"{flag(name)} is {getattr(kept, name)!r} there, got {changes[name]!r}" for name in other)
        raise UserError(
            f"--resume: expected the options that the run was started with: {words}. Leave them out to go on as it "
            "was started, or start another run with another --out"
        )
    return replace(kept, **changes)


def flag(name: str) -> str:
    """Returns the option of the command line that sets the field ``name``."""
    return "--" + name.replace("_", "-")
