"""The ends of a run before its time: what the user can mend, what happened to the run, and a signal."""

from __future__ import annotations


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
