"""Ctrl-C and SIGTERM as a wish that the loop fulfils between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class Interruption:
    """While entered, notes the first signal in :attr:`number`; the second one does what it always does."""

    def __init__(self) -> None:
        self.number = 0  # of the signal; 0: none came
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():  # Python takes handlers nowhere else
            self._before = {name: signal.signal(name, self._note) for name in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        self.__exit__()
