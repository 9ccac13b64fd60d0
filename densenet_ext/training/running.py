"""A run from its options to its pictures: what ``densenet-ext train`` does."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

import densenet_ext
from densenet_ext.training import networks, options
from densenet_ext.training.data.datasets import Data
from densenet_ext.training.data.datasets import load as load_data
from densenet_ext.training.data.examples import agreed
from densenet_ext.training.data.image_folder import image_parts
from densenet_ext.training.errors import TrainingError, UserError
from densenet_ext.training.files import BEST, LAST, check_last, load_checkpoint, locked, write_text
from densenet_ext.training.learner import Learner
from densenet_ext.training.loop import Result, Run
from densenet_ext.training.metrics import FILE as METRICS
from densenet_ext.training.options import Options
from densenet_ext.training.processes import Processes, joined

RUNS = Path("runs")
RESULT = "result.json"
CURVES, REUSE = "curves.png", "reuse.png"


def train(given: Mapping[str, Any], out: Path | None, resume: bool = False, download: bool = False) -> Result:
    """Trains, or goes on training, with the options that were ``given`` (None: not given), in the folder ``out``.

    ``out`` None is a new folder below ``runs``. Prints what it does. Raises UserError, TrainingError, Interrupted.
    """
    # Before the processes are joined: the first one makes the folder when all have looked.
    if resume:
        if out is None:
            raise UserError("--resume: name the folder of the run to go on with, as in --out runs/digits")
        folder, chosen = out, options.resumed(options.load(out), given)
    else:
        chosen = Options.of(given)
        folder = out or new_folder(chosen)
        check_folder(folder)
        check_outside(folder, chosen)
    with joined(chosen.device, chosen.amp, chosen.fsdp, chosen.sync_bn) as processes:
        return _train(chosen, processes.gather(folder)[0], resume, download, processes)


def _train(chosen: Options, folder: Path, resume: bool, download: bool, processes: Processes) -> Result:
    def begin() -> IO[bytes] | None:
        """Makes ``folder`` that of this run, and no other's while the lock is held that it returns."""
        if not processes.is_first:
            return None
        if not resume:
            check_folder(folder)  # another run may have come first meanwhile
            make_folder(folder)
            options.save(chosen, folder)
        lock = locked(folder / options.FILE)
        if resume:
            check_last(folder)
        return lock

    lock = agreed(processes, begin) if resume else None
    set_determinism(chosen.deterministic)
    data = load_data(chosen, processes, download)
    torch.manual_seed(chosen.seed)  # of the weights, the same in every process
    network = networks.build(
        chosen.model, classes=len(data.classes), channels=data.channels, save=chosen.save, fused=chosen.fused
    )
    check_takes(network, chosen.model, data)
    if chosen.sync_bn:
        processes.check_sync_bn(network, images_like(data))
    words = announcement(network.to(processes.device), data, chosen, processes, folder)  # before the network is sharded
    run = Run(Learner(network, chosen, processes), data, folder)
    if resume:
        run.resume()
    else:  # by now nothing of what was asked for is refused any more
        lock = agreed(processes, begin)
    if processes.is_first:
        print("\n".join(words))
        if resume:
            print(f"going on after epoch {len(run.history)} of {chosen.epochs}")
    result = run.train()
    if processes.is_first:
        conclude(result, folder)
    if lock is not None:
        lock.close()
    processes.gather(None)  # nobody leaves before the first one has written
    return result


# ---- what is refused before ------------------------------------------------------------------------------------------


def new_folder(chosen: Options, prefix: str = "") -> Path:
    """Returns a folder below ``runs`` that is not there yet, named after ``prefix`` and the data."""
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
    for part in image_parts(Path(chosen.root)):
        if folder.resolve().is_relative_to(part.resolve()):
            raise UserError(
                f"--out: expected a folder outside of the images in {part}, got {folder}: its pictures would be taken "
                "for images of a class"
            )


def make_folder(folder: Path) -> None:
    """Makes ``folder``, with those above it. Raises UserError when it can't."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out: cannot make the folder {folder}: {error.strerror}") from error


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


def images_like(data: Data) -> torch.Tensor:
    """Returns two black images [2, C, H, W] as ``data`` has them."""
    return torch.zeros(2, data.channels, data.image_size, data.image_size)


# ---- what a run starts from and leaves -------------------------------------------------------------------------------


def set_determinism(deterministic: bool) -> None:
    """Sets PyTorch's own operators to deterministic ones, or lets cuDNN measure which are the fastest."""
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)


def announcement(network: nn.Module, data: Data, chosen: Options, processes: Processes, folder: Path) -> list[str]:
    """Returns in lines what will be trained, on what and where, and what of the network does not run fused."""
    parts = ((data.train, "to train on"), (data.validation, "for validation"), (data.test, "for the test"))
    images = ", ".join(f"{len(part)} {words}" for part, words in parts if part is not None)
    size = f"{data.channels} x {data.image_size} x {data.image_size}"
    parameters = sum(parameter.numel() for parameter in network.parameters())
    form = "fused" if chosen.fused else "in the usual formulation"
    place = str(processes.device) + (f", {processes.size} processes" if processes.size > 1 else "")
    # The stem of a network for small images is a single convolution: there is nothing to fuse.
    rows = [row for row in densenet_ext.report(network) if not row.fused and row.kind != "stem"]
    return [
        f"{data.name}: images of {size} in {len(data.classes)} classes: {images}",
        *data.notes,
        f"{chosen.model}: {parameters:,} parameters, {form}, on {place}; everything goes into {folder}",
        *(f"not fused: {row.name}: {row.reason}" for row in rows if chosen.fused),
    ]


def conclude(result: Result, folder: Path) -> None:
    """Prints what came of the run, and keeps it in result.json and in pictures."""
    values: dict[str, Any] = {"epochs": len(result.history), "best": None, "test": None}
    if result.best is not None:
        values["best"] = asdict(result.best)
        error = f"{result.best.validation_error:.2f} %"
        print(f"smallest validation error {error} after epoch {result.best.epoch}: {folder / BEST}")
    if result.test is not None:
        test = result.test
        values["test"] = {"loss": test.mean_loss, "error": test.error, "wrong": test.wrong, "images": test.images}
        counted = f"{test.wrong} of {test.images} wrong"
        print(f"test accuracy {100 - test.error:.2f} % ({counted}) after the last epoch: {folder / LAST}")
    write_text(folder / RESULT, json.dumps(values, indent=2) + "\n")
    print(f"metrics: {folder / METRICS}")
    for draw, name in ((_draw_curves, CURVES), (_draw_reuse, REUSE)):
        try:
            draw(result, folder / name)
            print(f"picture: {folder / name}")
        except (UserError, TrainingError) as told:  # the run is complete and saved without it
            print(f"no {name}: {told}")


def _draw_curves(result: Result, path: Path) -> None:
    from densenet_ext.training.curves import draw_curves

    draw_curves([asdict(row) for row in result.history], path, "Loss and error of the run")


def _draw_reuse(result: Result, path: Path) -> None:
    from densenet_ext.reuse.connections import connections
    from densenet_ext.reuse.drawing import draw_connections

    weights = load_checkpoint(path.with_name(LAST))["model"]
    draw_connections(connections(weights), path, "Which layer uses which, after the last epoch")
