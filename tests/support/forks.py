"""Processes that begin with everything imported: a process of its own otherwise takes 4 s of a core for its imports.

They are forked from a server (``multiprocessing``'s) that has imported what preloaded.py names and computed nothing, so
that no thread of torch's is lost on the way. What only a fresh interpreter shows (what an import does, how the command
is found) needs a real process.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from multiprocessing import forkserver
from pathlib import Path
from typing import Any
from unittest import mock

from tests.support.command_line import Ended

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds: beside others, on few cores, processes of a few seconds have taken minutes


def environment() -> dict[str, str]:
    """Of a process of its own: this checkout, one thread."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}


@functools.cache
def server() -> multiprocessing.context.ForkServerContext:
    """Returns what starts processes from the server, also for a ProcessPoolExecutor."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.support.preloaded"])
    with mock.patch.dict(os.environ, environment()):  # the server finds this checkout from any folder
        forkserver.ensure_running()
    return context


class Fork:
    """A process that calls ``function(*arguments)``, both from modules, in the current folder, on one thread.

    What it prints goes into a file. It ends with the code that a process has: 0, that of SystemExit, 1 with a
    traceback, or a signal's number below zero.
    """

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self._printed = tempfile.NamedTemporaryFile(prefix="printed")
        inside = (environment(), self._printed.name, function, arguments)
        self._process = server().Process(target=_begin, args=inside)
        self._process.start()

    def poll(self) -> int | None:
        """Returns the exit code, or None while it runs."""
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        """Ends it, however busy it is; does nothing where it has ended."""
        self._process.kill()

    def output(self) -> str:
        """Returns what it has printed so far."""
        return Path(self._printed.name).read_text()

    def finish(self, timeout: float = PATIENCE) -> Ended:
        """Waits for its end; after ``timeout`` seconds kills it and raises TimeoutError."""
        self._process.join(timeout)
        code = self.poll()
        if code is None:
            self.kill()
            self._process.join()
            raise TimeoutError(f"ran for more than {timeout} s and printed\n{self.output()}")
        return Ended(code, self.output())


def _begin(environ: dict[str, str], printed: str, function: Callable[..., object], arguments: tuple[Any, ...]) -> None:
    import torch

    multiprocessing.set_start_method(None, force=True)  # DataLoader's workers start as they do elsewhere
    os.environ.clear()
    os.environ.update(environ)
    with open(printed, "w") as file:
        for stream in (1, 2):
            os.dup2(file.fileno(), stream)
    torch.set_num_threads(1)
    function(*arguments)


def torchrun(count: int, function: Callable[..., object], *arguments: object) -> None:
    """Calls ``function(*arguments)`` in ``count`` forks of this process, as ``torchrun --standalone`` runs a script."""
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=f"{os.getpid()}-{time.monotonic_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        start_method="fork",
    )
    elastic_launch(config, _call)(function, *arguments)


def _call(function: Callable[..., object], *arguments: object) -> None:
    function(*arguments)  # what it returns would be sent to the one that launched it
