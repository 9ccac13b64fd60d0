"""Tables and sizes for people to read."""

from __future__ import annotations

from collections.abc import Sequence


def table(cells: Sequence[Sequence[str]]) -> str:
    """Returns rows of equal length as aligned columns, the first row underlined."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join((lines[0], "  ".join("-" * width for width in widths), *lines[1:]))


def readable(size: int) -> str:
    """Returns bytes in the unit that leaves one to four digits before the point."""
    value, units = float(size), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value /= 1024
        del units[0]
    return f"{size} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
