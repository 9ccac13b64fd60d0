"""The ends of a run before its time: what the user can mend, what happened to the run, and a signal."""

from __future__ import annotations


class Ended(Exception):
    """Ends a command with a sentence instead of a traceback."""

    exit_code = 1
    everywhere = False  # whether all processes of a run raise it; only the first one tells it then


class UserError(Ended, ValueError):
    """An option, a folder or a file is not what it should be; the message says what was expected."""

    exit_code = 2
    everywhere = True


class TrainingError(Ended, RuntimeError):
    """Training can't go on: no space on the disk, a worker that died; the message says where and why."""


class LossError(TrainingError):
    """The loss is no number any more. Every process raises it, since the loss is that of the whole batch."""

    everywhere = True


class LostError(TrainingError):
    """Another process of the run has ended. All that are left raise it."""

    everywhere = True


class Interrupted(Ended):
    """The run was asked to stop, by the signal ``number``, and has saved its state."""

    everywhere = True

    def __init__(self, message: str, number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + number  # as a shell reports a process that a signal has ended
