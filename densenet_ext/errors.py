"""What ends a command early: something that the user can mend, something that happened to the run, or a signal."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any


class Ended(Exception):
    """Ends a command with a sentence instead of a traceback."""

    exit_code = 1
    everywhere = True  # whether all processes of a run raise it; only the first one prints it then


class UserError(Ended, ValueError):
    """An option, a folder or a file is not what it should be; the message says what was expected."""

    exit_code = 2


class TrainingError(Ended, RuntimeError):
    """One process can't go on, as when the disk is full; the message says where and why."""

    everywhere = False


class SharedError(TrainingError):
    """No process can go on: the loss, which is that of the whole batch, is no number, or another process has ended."""

    everywhere = True


class Interrupted(Ended):
    """The run was asked to stop, by the signal ``number``, and has saved its state."""

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell reports a process that a signal has ended


class Interruption:
    """While entered, notes the first Ctrl-C or SIGTERM in :attr:`number`; the second one does what it always does."""

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0: none came
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        self._before = {name: signal.signal(name, self._note) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
