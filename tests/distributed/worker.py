"""Starts processes that run the cases of a module together, and tells each case's outcome.

A case is a function ``case_*(world)`` that every process calls; it raises where something is wrong. All cases of a
module share one start of the processes. What comes after a case that failed does not run: the processes are out of
step. Nothing hangs for long: collectives give up after ``PATIENCE`` seconds, and the processes are killed in the end.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import sys
import tempfile
import time
import traceback
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from tests.support.forks import Fork

SIZE = 2
PATIENCE = 60


class World(NamedTuple):
    """One of the processes."""

    rank: int
    device: torch.device

    def total(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of x over the processes."""
        x = x.detach().clone()
        dist.all_reduce(x)
        return x

    def share(self, x: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        """This process's part of a batch x, cut into ``sizes``."""
        return x.split(sizes)[self.rank]


def backend() -> str:
    """NCCL where each process has a GPU of its own, else gloo."""
    return "nccl" if dist.is_nccl_available() and torch.cuda.device_count() >= SIZE else "gloo"


def cases(module: str) -> list[str]:
    """The names of the cases of a module, in their order."""
    return [name for name in vars(importlib.import_module(module)) if name.startswith("case_")]


def outcomes(module: str, limit: float) -> dict[str, str]:
    """What went wrong, per case, "" where nothing did: ``SIZE`` processes within ``limit`` seconds."""
    with tempfile.TemporaryDirectory() as folder:
        running = [Fork(main, module, folder, rank) for rank in range(SIZE)]
        deadline = time.monotonic() + limit
        for process in running:
            with contextlib.suppress(TimeoutError):  # what did not run says so below
                process.finish(max(0.0, deadline - time.monotonic()))
        found = dict.fromkeys(cases(module), "")
        for rank in range(SIZE):
            log = Path(folder) / f"outcome{rank}"
            told = dict(map(json.loads, log.read_text().splitlines())) if log.exists() else {}
            for name in found:
                error = told.get(name, f"did not run or did not end: {running[rank].output()}")
                found[name] += f"process {rank}: {error}\n" if error else ""
    return found


def main(module: str, folder: str, rank: int) -> None:
    kind = backend()
    device = torch.device("cuda", rank) if kind == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    store = dist.FileStore(f"{folder}/store", SIZE)
    dist.init_process_group(kind, store=store, rank=rank, world_size=SIZE, timeout=timedelta(seconds=PATIENCE))
    world = World(rank, device)
    with open(f"{folder}/outcome{rank}", "w") as log:
        for name in cases(module):
            error = _run(getattr(importlib.import_module(module), name), world)
            print(json.dumps([name, error]), file=log, flush=True)
            if error:
                return
    gc.collect()  # norms of the cases refer to the group, whose threads would end out of order
    dist.destroy_process_group()


def _run(case: Any, world: World) -> str:
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()
    try:
        case(world)
    except Exception:
        return traceback.format_exc()
    return ""
