"""The table of test_matrix.py, library by property, made of pytest's reports: so it holds with pytest-xdist as well."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

import pytest

from densenet_ext.text import table

_CELL = re.compile(r"test_matrix\.py::test_(\w+)\[(.+)\]$")
_RANK = {"skipped": 0, "passed": 1, "failed": 2, "error": 3}  # the worse of a test's phases is its outcome


def outcomes(stats: Mapping[str, Iterable[object]]) -> dict[tuple[str, str], str]:
    """By library and property; ``stats`` are those of pytest's terminal reporter."""
    found: dict[tuple[str, str], str] = {}
    for outcome in _RANK:
        for report in stats.get(outcome, ()):
            cell = _CELL.search(report.nodeid) if isinstance(report, pytest.TestReport) else None
            if cell is not None:
                found[cell[2], cell[1].replace("_", " ")] = outcome
    return found


def text_of(found: Mapping[tuple[str, str], str]) -> str:
    """Libraries down, properties across; empty where a test did not run."""
    libraries, properties = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    rows = [[library, *(found.get((library, name), "") for name in properties)] for library in libraries]
    return table([["library", *properties], *rows])
