"""Tables in Markdown, and what stands above them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def table(head: Sequence[str], rows: Iterable[Sequence[object]], align: str) -> str:
    """Returns a table; ``align`` has a letter for each column: l for words, r for numbers.

    Raises ValueError when the number of letters or of a row's cells is not that of the columns.
    """
    cells = [[str(cell) for cell in row] for row in rows]
    for row in (align, *cells):
        if len(row) != len(head):
            raise ValueError(f"table: expected {len(head)} columns, got {len(row)}")
    rule = "|" + "".join("---|" if letter == "l" else "--:|" for letter in align)
    return "\n".join([line(head), rule, *map(line, cells)])


def line(cells: Iterable[str]) -> str:
    """Returns a row of a table."""
    return "| " + " | ".join(cells) + " |"


def provenance(machine: Mapping[str, Any]) -> str:
    """Returns on what figures of the processor were measured."""
    return (
        f"{machine['cpu']} ({machine['simd']}), torch {machine['torch']}, commit {machine['commit']}, {machine['date']}"
    )
