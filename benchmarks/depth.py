"""How time and memory grow with the depth: DenseNet-BC (k = 12, 32x32) of 40 to 3,298 layers at ``save="features"``.

Every depth is measured in a process of its own, so that nothing earlier is left in it, and written as soon as it is
there: an interrupted run goes on. The points of others are those of Pleiss et al., "Memory-Efficient Implementation of
DenseNets" (arXiv 1707.06990): their deepest networks, k = 12, in the 12 GB of their GPU.
"""

from __future__ import annotations

import json
import math
import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import densenet_ext as dx
from benchmarks import markdown, measure, peers
from benchmarks.run import Say, machine
from densenet_ext import figures
from densenet_ext.memory import measuring

OURS, THEIRS = 'densenet_ext, save="features"', "PyTorch, nothing recomputed"
PAPER = {"usual form": 154, "memory-efficient": 478}
"""Layers of the deepest network that fits, by the paper's form."""
PAPER_GIB = 12
PATIENCE = 20.0
"""Seconds of a step beyond which one is enough."""


class Depth(NamedTuple):
    """A network of so many layers, in one form."""

    form: str
    layers: int


DEPTHS = (
    *(Depth(OURS, layers) for layers in (40, 100, 250, 478, 1000, 1996, 3298)),
    *(Depth(THEIRS, layers) for layers in (40, 100, 154)),
)


def model_of(depth: Depth) -> nn.Module:
    """Returns DenseNet-BC with k = 12 of ``depth.layers`` layers, in channels_last."""
    model: nn.Module
    if depth.form == OURS:
        model = dx.densenet_bc(depth.layers, 12, save="features")
    else:
        blocks = ((depth.layers - 4) // 6,) * 3
        network = peers.NETWORKS["bc100"]._replace(block_config=blocks)
        model = peers.efficient_densenet(None)(**network.keywords(), small_inputs=True, efficient=False)
    return model.to(memory_format=torch.channels_last)  # type: ignore[call-overload,no-any-return]


def batch_of(batch: int, image: int) -> tuple[Tensor, Tensor]:
    """Returns images in channels_last, and labels."""
    images = torch.randn(batch, 3, image, image).contiguous(memory_format=torch.channels_last)
    return images, torch.randint(10, (batch,))


def measured(depth: Depth, batch: int, image: int, threads: int) -> dict[str, Any]:
    """One row: seconds of a step, and its memory; to be called in a new process.

    Momentum is there before the first step, so that this one needs what all later ones do. It is the only one when it
    takes longer than ``PATIENCE``.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = model_of(depth)
    step = measure.Step(model, *batch_of(batch, image))
    for parameter in model.parameters():
        step.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    known = [*model.parameters(), *model.parameters(), *model.buffers(), step.images]  # momentum is as large
    held = sum(tensor.numel() * tensor.element_size() for tensor in known)
    ends = []

    def forward() -> Tensor:
        ends.append(time.perf_counter())
        return step.forward()

    def backward(loss: Tensor) -> None:
        step.backward(loss)
        ends.append(time.perf_counter())

    memory = measuring.allocations(forward, backward)
    first = ends[1] - ends[0]
    seconds = [first] if first > PATIENCE else [measure.seconds(step) for _ in range(5)]
    return {
        **depth._asdict(),
        "parameters": parameters,
        "seconds": measure.median(seconds),
        "steps": len(seconds),
        "kept_bytes": memory.kept,
        "peak_bytes": held + memory.peak,
        "resident_bytes": resident_peak(),
    }


def resident_peak() -> int | None:
    """Returns the most bytes that this process has held, None where the system does not tell.

    ``getrusage`` would count what the parent held when it started the process.
    """
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)


def levels(rounds: int, batch: int, image: int) -> dict[str, Any]:
    """Both levels of saving of DenseNet-BC-100, in interleaved rounds: seconds, and the paired ratio."""
    torch.manual_seed(0)
    given = batch_of(batch, image)
    steps = {}
    for save in peers.LEVELS:
        model = dx.densenet_bc(100, 12, save=save).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        steps[save] = measure.Step(model, *given)
        steps[save]()
    times = measure.interleave(steps, rounds)
    return {
        "rounds": rounds,
        "seconds": {save: measure.median(values) for save, values in times.items()},
        "ratio": [round(value, 4) for value in measure.ratio(times["features"], times["bottlenecks"])],
    }


def run(
    depths: Sequence[Depth],
    earlier: Mapping[str, Any] | None,
    rounds: int,
    batch: int,
    image: int,
    threads: int,
    say: Say,
    save: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Measures what ``earlier``, a results file of the same code and settings, does not hold; returns all.

    ``save`` is called after each row. A depth whose process is ended, for want of memory perhaps, is left out.
    """
    torch.set_num_threads(threads)
    found: dict[str, Any] = {"machine": machine(), "threads": threads, "batch": batch, "image": image, "rows": []}
    if earlier is not None and _settings(earlier) == _settings(found):
        found = dict(earlier)
    if "levels" not in found:
        found["levels"] = levels(rounds, batch, image)
        save(found)
    there = {(row["form"], row["layers"]): row for row in found["rows"]}
    for depth in depths:
        if depth in there:
            continue
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
                there[depth] = processes.submit(measured, depth, batch, image, threads).result()
        except BrokenProcessPool:
            say(f"{depth.layers} layers, {depth.form}: the process was ended, for want of memory perhaps")
            continue
        say(f"{depth.layers} layers, {depth.form}: {there[depth]['seconds']:.1f} s")
        found["rows"] = list(there.values())
        save(found)
    return found


def _settings(found: Mapping[str, Any]) -> Any:
    about = {key: value for key, value in found["machine"].items() if key != "date"}
    return about, *(found[key] for key in ("threads", "batch", "image"))


def earlier_of(path: Path) -> dict[str, Any] | None:
    """Returns what an earlier run has left in ``path``, or None. Raises ValueError when that is something else."""
    if not path.is_file():
        return None
    found = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(found, dict) or not {"machine", "threads", "batch", "image", "rows"} <= found.keys():
        raise ValueError(f"{path.name}: expected the results of benchmarks depth, got something else")
    return found


def draw(found: Mapping[str, Any], path: Path) -> None:
    """Draws peak memory and time over the number of layers, and the paper's points, into ``path``.

    Raises UserError and TrainingError as :func:`densenet_ext.figures.picture`.
    """
    words = (
        f"Training steps of DenseNet-BC, k = 12, {found['image']}x{found['image']}, batch {found['batch']}, float32, "
        "on the processor. Peak: with parameters, momentum and gradients, as the allocator counts. Crosses: the "
        "deepest networks that fit into the 12 GB of a GPU in Pleiss et al., 2017."
    )
    ticks = sorted({row["layers"] for row in found["rows"] if row["form"] == OURS})
    with figures.picture(path, f"DenseNets of up to {ticks[-1]:,} layers", 9, 3.8, words) as figure:
        memory, seconds = figure.subplots(1, 2)
        for form, colour, marker in ((OURS, figures.BLUE, "o"), (THEIRS, figures.ORANGE, "s")):
            rows = sorted((row for row in found["rows"] if row["form"] == form), key=lambda row: row["layers"])
            x = [row["layers"] for row in rows]
            look: dict[str, Any] = {"color": colour, "marker": marker, "label": form}
            memory.plot(x, [row["peak_bytes"] / 2**30 for row in rows], **look)
            seconds.plot(x, [row["seconds"] for row in rows], **look)
        memory.axhline(PAPER_GIB, color=figures.GREY, linestyle=":", linewidth=1)
        for name, layers in PAPER.items():
            memory.plot(layers, PAPER_GIB, "x", color=figures.GREY, markersize=8)
            look = {"fontsize": figures.SMALL - 1, "color": figures.GREY, "ha": "center"}
            text = f"{layers} layers\n{name}"
            memory.annotate(text, (layers, PAPER_GIB), xytext=(0, 7), textcoords="offset points", **look)
        figures.plain(memory, "Peak memory of a step", "layers", "GiB")
        figures.plain(seconds, "Time of a step", "layers", "seconds")
        for axes in (memory, seconds):
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
            axes.minorticks_off()
        memory.set_ylim(top=4 * PAPER_GIB)  # room for the words
        seconds.legend(fontsize=figures.SMALL, frameon=False, loc="upper left")


def table(found: Mapping[str, Any]) -> str:
    """Returns the picture, a line a depth, and what the second level of saving costs."""
    where = f"{found['threads']} threads: {markdown.provenance(found['machine'])}"
    head = ("layers", "form", "parameters, M", "s / step", "kept, GiB", "peak, GiB", "process, GiB")
    rows = [
        (
            f"{row['layers']:,}",
            row["form"],
            f"{row['parameters'] / 1e6:.2f}",
            f"{row['seconds']:.{max(1, 2 - math.floor(math.log10(row['seconds'])))}f}",
            *(_gib(row[key]) for key in ("kept_bytes", "peak_bytes", "resident_bytes")),
        )
        for row in sorted(found["rows"], key=lambda row: (row["form"] != OURS, row["layers"]))
    ]
    parts = [f"{PICTURE}\n\n{where}", markdown.table(head, rows, "rlrrrrr")]
    if "levels" in found:
        median, low, high = found["levels"]["ratio"]
        parts.append(
            f'A step of DenseNet-BC-100, batch {found["batch"]}, at `save="features"` takes {median:.2f} ({low:.2f} to '
            f'{high:.2f}) times one at `"bottlenecks"`, paired in {found["levels"]["rounds"]} rounds.'
        )
    return "\n\n".join(parts)


def _gib(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f}"


PICTURE = "![Peak memory and time of a step over the number of layers](docs/pictures/depth.png)"
