"""What argparse is told about the arguments of the command line, so that they are checked as those of a call are."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from densenet_ext import checks


def read(kind: type, check: Callable[..., Any], *limits: Any) -> Callable[[str], Any]:
    """Returns a function that reads an argument's text as ``kind`` and refuses, for argparse, what ``check`` refuses.

    ``check`` is called as those of :mod:`densenet_ext.checks`: with a name, the value and ``limits``.
    """

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = text  # for the check to refuse
        try:
            return check("", value, *limits)
        except (TypeError, ValueError) as error:
            raise argparse.ArgumentTypeError(str(error).removeprefix(": ")) from error

    return parse


def integer(least: int, *most: int) -> dict[str, Any]:
    """Returns what ``add_argument`` takes for an integer from ``least`` to ``most``."""
    return {"type": read(int, checks.integer, least, *most), "metavar": "N"}


def number(check: Callable[..., Any]) -> dict[str, Any]:
    """Returns what ``add_argument`` takes for a number that ``check`` accepts."""
    return {"type": read(float, check), "metavar": "X"}
