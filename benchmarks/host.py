"""The time that a call costs before and between its kernels: a DenseNet-121 in which there is next to nothing to do.

Growth rate 2 and images of 32x32, so that the last block has one pixel an image. One thread, timed by the processor
time that it uses; medians, the contenders in turns.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

import densenet_ext as dx
from benchmarks import markdown, measure, peers
from benchmarks.run import Say, machine

NETWORK = peers.NETWORKS["densenet121"]._replace(growth_rate=2, num_init_features=4, num_classes=10, batch=2, image=32)
OURS, EAGER = "densenet_ext", "PyTorch"
CALLS = 5
"""In a row, for one measurement."""
PLANNED = ("densenet121", (16, 3, 224, 224))
LAST: Any = torch.channels_last


def run(rounds: int, say: Say) -> dict[str, Any]:
    """Measures an inference, forward and backward pass, and ``plan`` of a whole DenseNet-121; returns a results file.

    Raises peers.Unavailable where torchvision can't be imported.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found: dict[str, Any] = {"machine": machine(), "rounds": rounds, "rows": []}
        for mode in MODES:
            row = _row(mode, rounds)
            found["rows"].append(row)
            say(f"{row['mode']}: {row['milliseconds'][OURS]:.2f} ms, eager {row['milliseconds'][EAGER]:.2f}")
        found["plan_seconds"] = plan_seconds()
        say(f"plan: {found['plan_seconds']:.2f} s")
    finally:
        torch.set_num_threads(threads)
    return found


def plan_seconds() -> float:
    """Returns the seconds of ``plan`` for DenseNet-121, the second time that it is called."""
    with torch.device("meta"):
        model = getattr(dx, PLANNED[0])()

    def call() -> None:
        dx.plan(model, PLANNED[1])

    call()
    return measure.seconds(call)


def inference(model: nn.Module) -> Callable[[], object]:
    """Returns a call of ``model`` in evaluation, without gradients."""
    return measure.Inference(model, _images())


def training(model: nn.Module) -> Callable[[], object]:
    """Returns a forward and a backward pass of ``model``, without an optimizer."""
    images, parameters = _images(), list(model.parameters())

    def call() -> None:
        model(images).sum().backward()
        for parameter in parameters:
            parameter.grad = None

    return call


MODES: dict[str, Callable[[nn.Module], Callable[[], object]]] = {
    "inference": inference,
    "forward and backward": training,
}


def _images() -> torch.Tensor:
    return torch.randn(NETWORK.batch, 3, NETWORK.image, NETWORK.image).contiguous(memory_format=LAST)


def _row(mode: str, rounds: int) -> dict[str, Any]:
    torch.manual_seed(0)
    plain = peers.torchvision_densenet().DenseNet(**NETWORK.keywords()).to(memory_format=LAST)
    ours = dx.fuse(copy.deepcopy(plain))
    calls = {OURS: MODES[mode](ours), EAGER: MODES[mode](plain)}
    for call in calls.values():
        _processor_seconds(call)
    times = measure.interleave(calls, rounds, clock=_processor_seconds)
    return {
        "mode": mode,
        "milliseconds": {name: round(measure.median(values) * 1e3, 3) for name, values in times.items()},
        "ratio": [round(value, 3) for value in measure.ratio(times[EAGER], times[OURS])],
    }


def _processor_seconds(call: Callable[[], object]) -> float:
    start = time.process_time()
    for _ in range(CALLS):
        call()
    return (time.process_time() - start) / CALLS


def table(found: Mapping[str, Any]) -> str:
    """Returns a line for an inference and one for a forward and backward pass, and the time of ``plan``."""
    caption = f"1 thread, {found['rounds']} rounds of {CALLS} calls, medians: {markdown.provenance(found['machine'])}"
    head = ("DenseNet-121 of growth rate 2, 32^2, batch 2", "ours, ms", "PyTorch, ms", "its time over ours (range)")
    rows = []
    for row in found["rows"]:
        median, low, high = row["ratio"]
        cells = [f"{row['milliseconds'][name]:.2f}" for name in (OURS, EAGER)]
        rows.append((row["mode"], *cells, f"**{median:.2f}** ({low:.2f} to {high:.2f})"))
    plan = f"`plan` of DenseNet-121 at both levels of saving takes {found['plan_seconds']:.2f} s."
    return "\n\n".join([caption, markdown.table(head, rows, "lrrr"), plan])
