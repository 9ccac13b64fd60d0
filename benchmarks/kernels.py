"""How fast the operators are: time, bytes and the share of what a plain copy moves in the same time, on the same GPU.

Between two calls a buffer larger than the second-level cache is written, so that each call finds its arguments in
memory, as in a network whose layers fill the cache many times over.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from benchmarks import choice3x3, operators
from benchmarks.peers import Network
from benchmarks.run import Say, machine
from benchmarks.stopwatch import PRECISIONS, REPEATS, Precision, Stopwatch

GIB = 2**30


def copy_bandwidth(stopwatch: Stopwatch, size: int = GIB) -> float:
    """Bytes read and written per second by ``copy_`` of ``size`` bytes."""
    source = torch.empty(size, dtype=torch.uint8, device=stopwatch.device).random_()
    target = torch.empty_like(source)
    return 2 * size / stopwatch.median(lambda: target.copy_(source))


def wanted(networks: Sequence[Network], device: torch.device) -> Iterator[tuple[Network, Precision, operators.Case]]:
    """All cases, the first network in all precisions before the next. TF32 is for what multiplies only."""
    for network in networks:
        for precision in PRECISIONS:
            for case in operators.cases(network, precision.dtype, device):
                if case.flops or not precision.tf32:
                    yield network, precision, case


def measure(case: operators.Case, precision: Precision, stopwatch: Stopwatch, copy: float) -> dict[str, Any]:
    """The figures of one call; ``copy``: bytes per second of a copy."""
    operator = getattr(torch.ops.densenet_ext, case.operator).default
    arguments = {**case.make(), **operators.arithmetic(operator, precision.tf32)}
    seconds = stopwatch.median(lambda: operator(**arguments))
    moved = operators.bytes_moved(operator, arguments)
    return {
        "operator": case.operator,
        "where": case.where,
        "rows": case.rows,
        "columns": case.columns,
        "precision": precision.name,
        "seconds": seconds,
        "bytes": moved,
        "bytes_per_second": moved / seconds,
        "share_of_copy": round(moved / seconds / copy, 4),
        "flops": case.flops,
        "flops_per_second": case.flops / seconds,
    }


def run(
    networks: Sequence[Network],
    device: torch.device,
    seconds: float,
    say: Say,
    save: Callable[[dict[str, Any]], None],
    copy_bytes: int = GIB,
) -> dict[str, Any]:
    """Measures the operators at the shapes of ``networks`` for at most about ``seconds``; returns a results file.

    ``save`` is called with what there is after every network and precision, and at the end, however it comes. A case
    for which the memory does not suffice is left out, with the reason. A quarter of the time, or what is left, goes to
    3x3 convolutions, ours against PyTorch's: last, since nothing uses ours before it was measured.
    """
    start = time.monotonic()
    end = start + 0.75 * seconds
    stopwatch = Stopwatch(device)
    copy = copy_bandwidth(stopwatch, copy_bytes)
    say(f"a copy moves {copy / 1e9:.0f} GB/s")
    found: dict[str, Any] = {"machine": machine(device), "copy_bytes_per_second": copy, "repeats": REPEATS}
    found |= {"rows": [], "skipped": [], "left_out": 0, "conv3x3": []}
    group = ""
    try:
        for network, precision, case in wanted(networks, device):
            if time.monotonic() > end:
                found["left_out"] += 1
                continue
            if group != (group := f"{network.name}, batch {network.batch}, {precision.name}"):
                say(group)
                save(found)
            try:
                row = measure(case, precision, stopwatch, copy)
            except torch.OutOfMemoryError:
                name = f"{case.operator}, {group}, {case.where}"
                found["skipped"].append({"case": name, "reason": "out of memory"})
                continue
            found["rows"].append({"network": network.name, "batch": network.batch, **row})
        save(found)
        left = start + seconds - time.monotonic()
        found["conv3x3"] = choice3x3.run(networks, PRECISIONS, stopwatch, left)
    finally:  # what was measured before a kernel failed is kept too
        save(found)
    return found
