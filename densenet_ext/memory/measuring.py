"""Measures what a step really takes: bytes that it keeps for the backward pass, peak memory, and on which device.

Memory is counted by the allocator (on the CPU by the profiler's memory events), never by the size of the process: that
hides what the C library keeps for later, and shows what earlier steps have left.
"""

from __future__ import annotations

import gc
import json
import platform
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from densenet_ext.memory.counting import SavedBytes

FORWARD = "densenet_ext_forward"  # what a trace calls the part of a step in which memory is kept


class Memory(NamedTuple):
    """Bytes of one step, as the allocator counted them."""

    kept: int  # still held when the forward pass is over: what the backward pass needs, and the loss
    peak: int  # the most that was held at once, over what was held at the start


def saved_bytes(forward: Callable[[], Any], leave_out: Iterable[Tensor] = ()) -> int:
    """Returns the bytes of the storages that ``forward``'s graph saves for its backward pass, each counted once.

    ``leave_out`` names tensors that exist anyway (parameters, buffers, the input). Tensors that a
    ``torch.utils.checkpoint`` region holds in its own way are not seen; `allocations` sees them.
    """
    saved = SavedBytes(leave_out)
    with saved:
        forward()
    return saved.total


def peak_bytes(step: Callable[[], object], device: torch.device) -> int | None:
    """Returns the most that ``step`` holds at once on ``device`` over its start; None where nobody counts."""
    if device.type == "cpu":
        return allocations(step, _nothing).peak
    if device.type != "cuda":
        return None
    gc.collect()
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    start = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - start


def allocations(forward: Callable[[], Any], rest: Callable[[Any], object]) -> Memory:
    """Runs ``rest(forward())``; returns the bytes held between the two and at most, over the start, on the CPU."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        with record_function(FORWARD):
            value = forward()
        rest(value)
        del value
    return memory_of(_trace(profiler))


def memory_of(events: Sequence[Mapping[str, Any]]) -> Memory:
    """Returns the figures of `allocations` from the events of a Chrome trace."""
    end = next(event["ts"] + event["dur"] for event in events if event.get("name") == FORWARD)
    changes = [event for event in events if event.get("name") == "[memory]" and event["args"]["Device Type"] == 0]
    held = kept = peak = 0
    for event in sorted(changes, key=lambda event: event["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
        if event["ts"] <= end:
            kept = held
    return Memory(kept, peak)


def device_name(device: torch.device) -> str:
    """Returns the model of a GPU or of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return processor_name() if device.type == "cpu" else device.type


def processor_name() -> str:
    """Returns the model of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.processor() or platform.machine()


def _nothing(value: Any) -> None:
    return None


def _trace(profiler: profile) -> list[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    return events
