"""Runs the command line in the process of the test."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from densenet_ext.cli import main


class Ended:
    """A command that has ended: exit code and what it printed, also without line breaks."""

    def __init__(self, code: int, output: str) -> None:
        self.code = code
        self.output = output
        self.text = " ".join(output.split())


def run(*words: Any) -> Ended:
    """Runs ``densenet-ext`` with ``words``; other exceptions than SystemExit come out."""
    output, code = io.StringIO(), 0
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main([str(word) for word in words])
        except SystemExit as error:
            code = int(error.code or 0)
    return Ended(code, output.getvalue())
