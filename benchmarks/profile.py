"""Of what a training step and an inference consist: each operator's share of the time, by PyTorch's profiler.

Where the multiply-adds of an operator are known, its speed is held against torch's best product of two large matrices
of the same dtype, measured in the same run. A share belongs to the outermost operator: what a dense block's operator
calls counts as the block's.
"""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

import densenet_ext as dx
from benchmarks import markdown, measure
from benchmarks.operators import blocks_of
from benchmarks.peaks import SIDES, gemm
from benchmarks.peers import Network
from benchmarks.run import Say, machine
from benchmarks.stopwatch import Stopwatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
MODES = ("training", "inference")
FIRST = "densenet_ext::first_conv"
FORWARD, BACKWARD = "PyTorch's convolutions, forward", "PyTorch's convolutions, backward"
OPTIMIZER = "the optimizer"
REST = "the rest: autograd, loss, classifier, Python"
SEEN = 0.01
"""Less than this share everywhere is part of the rest."""


class Part(NamedTuple):
    """What the operators of one name take, in all steps that were profiled."""

    calls: int
    seconds: float
    flops: float  # 0 where they are not known


def parts_of(events: Iterable[Any]) -> dict[str, Part]:
    """Returns the time and the flops of each group of operators from a profile's events."""
    found: dict[str, Part] = defaultdict(lambda: Part(0, 0.0, 0.0))
    for event in events:
        name = group_of(event.name)
        if name is None or any(group_of(above.name) for above in _above(event)):
            continue
        part = found[name]
        seconds, flops = event.cpu_time_total / 1e6, flops_of(event, name)
        found[name] = Part(part.calls + 1, part.seconds + seconds, part.flops + flops)
    return dict(found)


def group_of(name: str) -> str | None:
    """Returns what the operator ``name`` counts as, or None for what only matters inside of others."""
    if name.startswith("densenet_ext::"):
        return name
    if name == "aten::convolution_backward":
        return BACKWARD
    if name in ("aten::convolution", "aten::conv1d", "aten::conv2d", "aten::conv3d"):
        return FORWARD
    return OPTIMIZER if name.startswith("Optimizer.") else None


def _above(event: Any) -> Iterator[Any]:
    while (event := event.cpu_parent) is not None:
        yield event


def flops_of(event: Any, name: str) -> int:
    """Returns the flops of one call of an operator that counts as ``name``; 0 where they do not follow from it."""
    if name == BACKWARD:
        return flops_of_backward(event)
    if name == FIRST:
        _, weight, *_, out = event.input_shapes
        return 2 * math.prod(out) * math.prod(weight[1:])
    return event.flops or 0


def flops_of_backward(event: Any) -> int:
    """Returns the flops of the gradients that one ``aten::convolution_backward`` was asked for."""
    grad, _, weight = event.input_shapes[:3]
    asked = event.concrete_inputs[-1][:2]
    return 2 * math.prod(grad) * math.prod(weight[1:]) * sum(asked)


def flops_of_layers(network: Network) -> int:
    """Returns the flops of all dense layers' convolutions in one forward pass."""
    k, total = network.growth_rate, 0
    for block in blocks_of(network):
        channels = sum(block.channels + layer * k for layer in range(block.layers))
        total += 2 * block.pixels * 4 * k * (channels + 9 * k * block.layers)
    return total


def run(
    networks: Sequence[Network],
    steps: int,
    say: Say,
    save: Callable[[dict[str, Any]], None],
    sides: tuple[int, ...] = SIDES,
) -> dict[str, Any]:
    """Profiles ``steps`` of every network, mode and dtype with the threads that torch has; returns a results file."""
    found: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "steps": steps}
    watch = Stopwatch(torch.device("cpu"))
    found |= {"gemm": {name: max(gemm(dtype, side, watch) for side in sides) for name, dtype in DTYPES.items()}}
    found["rows"] = []
    for network in networks:
        for mode in MODES:
            for dtype in DTYPES:
                row = profiled(network, mode, dtype, steps)
                found["rows"].append(row)
                say(f"{network.title}, {mode}, {dtype}: {row['seconds'] * 1e3:.1f} ms")
                save(found)
    return found


def profiled(network: Network, mode: str, dtype: str, steps: int) -> dict[str, Any]:
    """One network's seconds a step, and of what they consist."""
    torch.manual_seed(0)
    model = dx.DenseNet(**network.keywords(), small_inputs=network.small_inputs)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    images = torch.randn(network.batch, 3, network.image, network.image).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(network.num_classes, (network.batch,))
    autocast = None if dtype == "float32" else DTYPES[dtype]
    training = mode == "training"
    step = measure.Step(model, images, labels, autocast) if training else measure.Inference(model, images, autocast)
    step()
    step()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True, with_flops=True) as profiler:
        start = time.perf_counter()
        for _ in range(steps):
            step()
        seconds = (time.perf_counter() - start) / steps
    parts = parts_of(profiler.events())
    layers = flops_of_layers(network) * steps
    for name, passes in {"densenet_ext::dense_layers": 1, "densenet_ext::dense_layers_backward": 2}.items():
        if name in parts:
            parts[name] = parts[name]._replace(flops=passes * layers)
    return {
        "network": network.name,
        "title": network.title,
        "batch": network.batch,
        "image": network.image,
        "mode": mode,
        "dtype": dtype,
        "seconds": seconds,
        "parts": {
            name: {"calls": part.calls / steps, "seconds": part.seconds / steps, "flops": part.flops / steps}
            for name, part in sorted(parts.items(), key=lambda each: -each[1].seconds)
        },
    }


def table(found: Mapping[str, Any]) -> str:
    """Returns a table for training and one for inference: operators by networks and dtypes."""
    peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s in {dtype}" for dtype, peak in found["gemm"].items())
    where = f"{found['threads']} threads, {found['steps']} steps: {markdown.provenance(found['machine'])}"
    parts = [f"{where}; torch's best product: {peaks}"]
    for mode in MODES:
        rows = [row for row in found["rows"] if row["mode"] == mode]
        if rows:
            parts.append(_table(mode, rows, found["gemm"]))
    return "\n\n".join(parts)


def _table(mode: str, rows: Sequence[Mapping[str, Any]], gemm: Mapping[str, float]) -> str:
    shares = [{name: part["seconds"] / row["seconds"] for name, part in row["parts"].items()} for row in rows]
    highest: dict[str, float] = defaultdict(float)
    for each in shares:
        for name, share in each.items():
            highest[name] = max(highest[name], share)
    named = [name for name in sorted(highest, key=lambda name: -highest[name]) if highest[name] >= SEEN]
    lines = [["milliseconds", *(f"{row['seconds'] * 1e3:.1f}" for row in rows)]]
    for name in named:
        lines.append([f"`{name}`" if "::" in name else name, *(_cell(name, row, gemm[row["dtype"]]) for row in rows)])
    lines.append([REST, *(f"{1 - sum(each.get(name, 0) for name in named):.0%}" for each in shares)])
    head = [mode, *(f"{row['title']}, {row['image']}^2, batch {row['batch']}, {row['dtype']}" for row in rows)]
    return markdown.table(head, lines, "l" + "r" * len(rows))


def _cell(name: str, row: Mapping[str, Any], gemm: float) -> str:
    part = row["parts"].get(name)
    if part is None:
        return "-"
    share = f"{part['seconds'] / row['seconds']:.0%}"
    return f"{share}, at {part['flops'] / part['seconds'] / gemm:.0%}" if part["flops"] else share
