"""What can go wrong in a run, in two kinds: what the user can mend, and what happened to the run."""

from __future__ import annotations


class UserError(ValueError):
    """An option, a folder or a file is not what it should be; the message says what was expected. Exit code 2."""


class TrainingError(RuntimeError):
    """Training can't go on: no space on the disk, a worker that died; the message says where and why. Exit code 1."""


class LossError(TrainingError):
    """The loss is no number any more. Every process raises it, since the loss is that of the whole batch."""


class LostError(TrainingError):
    """Another process of the run has ended. All that are left raise it."""
