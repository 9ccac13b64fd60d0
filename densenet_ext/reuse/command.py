"""The command ``reuse``: the picture of a checkpoint's connections, and a table of them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from densenet_ext.errors import UserError
from densenet_ext.reuse.connections import Connections, connections, shares
from densenet_ext.reuse.drawing import draw_connections
from densenet_ext.reuse.weights_file import read_weights_file
from densenet_ext.text import table

_HEADER = ("block", "reader", "from the input", "from older layers", "from the layer just before")
_LEGEND = """\
How a reader's absolute weights are spread over its sources; in brackets how the features are.
With more weight than features, a source is used more than others."""
_ORDER = """\
The blocks were found by their shapes, and their layers are taken to append new features, as cat([x, new]);
say --new-first if they put them in front, as cat([new, x])."""


def reuse(checkpoint: Path, out: Path | None = None, new_first: bool = False) -> str:
    """Draws the connections of ``checkpoint`` into ``out`` and returns a table of them, and where the picture is.

    ``out`` is by default a picture beside the checkpoint. ``new_first``: as
    :func:`densenet_ext.reuse.connections.connections`.

    Raises UserError for a checkpoint that can't be read or has no dense blocks, and for an ``out`` that is no picture,
    TrainingError when the disk is full.
    """
    picture = checkpoint.with_name(f"{checkpoint.stem}-reuse.png") if out is None else out
    if picture.exists() and checkpoint.exists() and picture.samefile(checkpoint):
        raise UserError(f"{picture} is the checkpoint itself, expected another file for the picture")
    blocks = connections(read_weights_file(checkpoint), new_first)
    draw_connections(blocks, picture, f"Feature reuse in {checkpoint.name}")
    note = () if new_first or all(block.known for block in blocks) else (_ORDER,)
    return "\n".join((_table(blocks), _LEGEND, *note, f"picture: {picture}"))


def _table(blocks: Sequence[Connections]) -> str:
    return table([_HEADER, *(row for block in blocks for row in _rows(block))])


def _rows(block: Connections) -> Iterator[tuple[str, ...]]:
    """One for the layers that have a choice, one for what comes behind."""
    last = block.layers
    layers = "layer 2" if last == 2 else f"layers 2 to {last}" if last > 2 else "layer 1"
    yield block.name, layers, *_cells(block, range(1, last))
    if block.behind:
        yield "", block.behind, *_cells(block, [last])


def _cells(block: Connections, readers: Sequence[int]) -> tuple[str, str, str]:
    found = shares(block, readers)
    if found is None:
        return "", "", ""
    part = tuple(f"{100 * weight:.0f} % ({100 * features:.0f} %)" for weight, features in found)
    return part[0], part[1], part[2]
