"""One benchmark run: every contender of a network, in one process, from the same weights on the same images."""

from __future__ import annotations

import datetime
import math
import os
import platform
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import densenet_ext as dx
from benchmarks import measure, peers
from benchmarks.peers import COMPILED, LAYOUTS, LEVELS, PLAIN, Contender, Network
from densenet_ext.memory import measuring

Say = Callable[[str], None]


class Prepared:
    """A contender that is built, warmed up and weighed."""

    def __init__(self, contender: Contender, weights: nn.Module, images: Tensor, labels: Tensor) -> None:
        """``weights``: the model whose parameters and buffers it starts from.

        Raises peers.Unavailable where the contender can't run.
        """
        self.contender = contender
        model = contender.build()
        copy_state(weights, model)
        layout = LAYOUTS[contender.layout]
        model.to(memory_format=layout)  # type: ignore[call-overload]  # torch leaves this keyword out of its types
        self.step = measure.Step(model, images.contiguous(memory_format=layout), labels)
        forward = self.step.forward
        try:
            loss = forward()
            self.loss = loss.item()  # of the weights that all start from
            self.step.backward(loss)
            del loss
        except Exception as error:  # whatever a compiler may raise
            if contender.how != COMPILED:
                raise
            raise peers.Unavailable(peers.reason(error)) from error
        self.memory = measuring.allocations(forward, self.step.backward)
        known = [*model.parameters(), *model.buffers(), self.step.images, labels]
        self.saved = measuring.saved_bytes(forward, known)


def copy_state(source: nn.Module, target: nn.Module) -> None:
    """Gives ``target`` the parameters and buffers of ``source``, which has the same ones under names of its own."""
    theirs = [*source.parameters(), *source.buffers()]
    with torch.no_grad():
        for ours, value in zip([*target.parameters(), *target.buffers()], theirs, strict=True):
            if ours.shape != value.shape:
                raise RuntimeError(f"expected a parameter of shape {list(value.shape)}, got {list(ours.shape)}")
            ours.copy_(value)


def run(network: Network, rounds: int, efficient: Path | None, compiled: bool, say: Say) -> dict[str, Any]:
    """Measures every contender on ``network`` with the threads that torch has; returns its part of a results file.

    Raises RuntimeError when contenders that start from the same weights disagree about the first loss.
    """
    torch.manual_seed(0)
    images = torch.randn(network.batch, 3, network.image, network.image)
    labels = torch.randint(network.num_classes, (network.batch,))
    weights = next(peers.contenders(network)).build()
    prepared: dict[str, Prepared] = {}
    skipped: list[dict[str, str]] = []
    for contender in peers.contenders(network, efficient, compiled):
        try:
            made = Prepared(contender, weights, images, labels)
        except peers.Unavailable as error:
            skipped.append({"contender": contender.name, "reason": str(error)})
            say(f"{contender.name}: not measured, {error}")
            continue
        expected = next(iter(prepared.values()), made).loss
        if not math.isclose(made.loss, expected, rel_tol=1e-2):
            raise RuntimeError(f"{contender.name}: expected the loss of the others, {expected}, got {made.loss}")
        prepared[contender.name] = made
        say(f"{contender.name}: keeps {made.memory.kept / 2**20:.1f} MiB, peak {made.memory.peak / 2**20:.1f} MiB")
    say(f"{rounds} rounds")
    theirs = [name for name, made in prepared.items() if not made.contender.ours]
    times = measure.interleave({name: made.step for name, made in prepared.items()}, rounds, theirs)
    return {
        "title": network.title,
        "machine": machine(),
        "rounds": rounds,
        "baseline": next((name for name in theirs if prepared[name].contender.how == PLAIN), None),
        "rows": [row(network, made, times) for made in prepared.values()],
        "skipped": skipped,
    }


def row(network: Network, made: Prepared, times: Mapping[str, Sequence[float | None]]) -> dict[str, Any]:
    """The figures of one contender."""
    contender = made.contender
    mine = times[contender.name]
    seconds = measure.median(mine)
    references = {save: f"densenet_ext, {save}, channels_last" for save in LEVELS}
    return {
        "contender": contender.name,
        "who": contender.who,
        "how": contender.how,
        "layout": contender.layout,
        "ours": contender.ours,
        "network": network.name,
        "batch": network.batch,
        "image": network.image,
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "seconds": round(seconds, 5),
        "seconds_per_round": [None if value is None else round(value, 5) for value in mine],
        "images_per_second": round(network.batch / seconds, 3),
        "ratios": {
            save: {key: round(value, 4) for key, value in measure.ratio(mine, times[name])._asdict().items()}
            for save, name in references.items()
        },
        "kept_bytes": made.memory.kept,
        "saved_tensor_bytes": made.saved,
        "peak_bytes": made.memory.peak,
    }


def machine(device: torch.device | None = None) -> dict[str, Any]:
    """What the figures depend on beside the settings; nothing that tells one machine from another of its kind.

    ``device``: also the GPU that was measured, with its driver and CUDA.
    """
    facts = {} if device is None or device.type != "cuda" else _gpu(device)
    return {
        **facts,
        "cpu": measuring.processor_name(),
        "simd": dx.build_info()["simd"],
        "torch": str(torch.__version__),
        "python": platform.python_version(),
        "commit": _commit(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }


def _commit() -> str:
    """The commit of this source tree, with a mark when the measured code differs from it.

    Where the tree has come without its history, DENSENET_EXT_COMMIT says which it is.
    """
    root = Path(__file__).parent.parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", "csrc", "densenet_ext")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("DENSENET_EXT_COMMIT") or "unknown"
