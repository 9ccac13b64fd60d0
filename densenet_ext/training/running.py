"""A run from its options to its pictures: what ``densenet-ext train`` does."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from densenet_ext.training import announcing, networks, options
from densenet_ext.training.checkpoint import check_last
from densenet_ext.training.data import datasets
from densenet_ext.training.data.class_folders import image_parts
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.data.examples import agreed
from densenet_ext.training.errors import TrainingError, UserError
from densenet_ext.training.learner import Learner
from densenet_ext.training.loop import Result, Run
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes, joined

RUNS = Path("runs")


def train(given: Mapping[str, Any], out: Path | None, resume: bool = False, download: bool = False) -> Result:
    """Trains, or goes on training, with the options that were ``given`` (None: not given), in the folder ``out``.

    ``out`` None is a new folder below ``runs``. Prints what it does. Raises UserError, TrainingError, Interrupted.
    """
    with joined(given.get("device")) as processes:
        return _train(given, out, resume, download, processes)


def _train(given: Mapping[str, Any], out: Path | None, resume: bool, download: bool, processes: Processes) -> Result:
    # One process decides, since the others' look may come after it has made the folder.
    folder, chosen, error = processes.gather(_decided(given, out, resume) if processes.is_first else None)[0]
    if error is not None:
        raise error
    set_determinism(chosen.deterministic)
    data = load_data(chosen, processes, download)
    torch.manual_seed(chosen.seed)  # of the weights, the same in every process
    network = networks.build(
        chosen.model, classes=len(data.classes), channels=data.channels, save=chosen.save, fused=chosen.fused
    )
    check_takes(network, chosen.model, data)
    if chosen.sync_bn:
        processes.check_sync_bn(network, images_like(data))
    run = Run(Learner(network, chosen, processes), data, folder)
    if resume:
        run.resume()
    else:  # by now nothing of what was asked for is refused any more
        agreed(processes, lambda: _begin(chosen, folder) if processes.is_first else None)
    if processes.is_first:
        announcing.announce(network, data, chosen, processes, folder)
        if resume:
            print(f"going on after epoch {len(run.history)} of {chosen.epochs}")
    result = run.train()
    if processes.is_first:
        announcing.conclude(result, folder)
    processes.gather(None)  # nobody leaves before the first one has written
    return result


def _decided(given: Mapping[str, Any], out: Path | None, resume: bool) -> tuple[Path, Options | None, Exception | None]:
    try:
        if resume:
            if out is None:
                raise UserError("--resume: name the folder of the run to go on with, as in --out runs/digits")
            chosen = options.resumed(options.load(out), given)
            check_last(out)
            return out, chosen, None
        chosen = Options.of(given)
        folder = new_folder(chosen) if out is None else out
        check_folder(folder)
        check_outside(folder, chosen)
        return folder, chosen, None
    except (UserError, TrainingError) as error:
        return Path(), None, error


def _begin(chosen: Options, folder: Path) -> None:
    """Makes ``folder`` that of this run. Raises UserError when another run has come first meanwhile."""
    check_folder(folder)
    make_folder(folder)
    options.save(chosen, folder)


def new_folder(chosen: Options, prefix: str = "") -> Path:
    """A folder below ``runs`` that is not there yet, named after ``prefix`` and the data."""
    names = itertools.chain([f"{prefix}{chosen.data}"], (f"{prefix}{chosen.data}-{i}" for i in itertools.count(2)))
    return next(folder for folder in (RUNS / name for name in names) if not folder.exists())


def check_folder(folder: Path) -> None:
    """Refuses, as UserError, a folder that can't be made or written into, or that has a run in it."""
    if (folder / options.FILE).exists():
        raise UserError(
            f"--out: {folder} holds a run already: --resume goes on with it, another --out starts a new one"
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise UserError(f"--out: expected a folder to write into, got {folder}: {existing} is a file")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(f"--out: expected a folder to write into, got {folder}: no permission to write into {existing}")


def check_outside(folder: Path, chosen: Options) -> None:
    """Refuses, as UserError, a folder among the images of ``chosen``: the run's pictures would be taken for some."""
    if chosen.data != "imagefolder" or chosen.root is None:
        return
    found = image_parts(Path(chosen.root))
    inside = [part for part in found if folder.resolve().is_relative_to(part.resolve())]
    if inside:
        raise UserError(
            f"--out: expected a folder outside of the images in {inside[0]}, got {folder}: its pictures would be "
            "taken for images of a class"
        )


def make_folder(folder: Path) -> None:
    """Makes ``folder``, with those above it. Raises UserError when it can't."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from error


def load_data(chosen: Options, processes: Processes, download: bool) -> Data:
    """The images and labels of ``chosen``."""
    return datasets.load(
        chosen.data,
        root=None if chosen.root is None else Path(chosen.root),
        image_size=chosen.image_size,
        validation=chosen.validation,
        download=download,
        on_corrupt=chosen.on_corrupt,
        workers=chosen.workers,
        processes=processes,
    )


def set_determinism(deterministic: bool) -> None:
    """Sets PyTorch's own operators to deterministic ones, or lets cuDNN measure which are the fastest."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def images_like(data: Data) -> torch.Tensor:
    """Two black images [2, C, H, W] as ``data`` has them."""
    return torch.zeros(2, data.channels, data.image_size, data.image_size)


@torch.no_grad()
def check_takes(network: nn.Module, name: str, data: Data) -> None:
    """Refuses, as UserError, images that ``network`` does not take: too small ones, as a rule."""
    size = data.image_size
    try:
        network.eval()(images_like(data))
    except (RuntimeError, ValueError, TypeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--model: {name} does not take images of {data.channels} x {size} x {size}: {reason}"
        ) from error
