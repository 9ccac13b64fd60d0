"""Draws how strongly each layer uses each earlier one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from densenet_ext.figures import SMALL, TEXT, picture, plain
from densenet_ext.reuse.connections import Connections

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

_HOW_TO_READ = (
    "A square shows how strongly one reader (its column) uses one source (its row): the mean absolute weight between "
    "them, in percent of that of the source which this reader uses most. White: a layer cannot read what comes later. "
    "If columns are dark all over, no source is preferred, as in an untrained network."
)
_LABELS = 13  # on an axis at most
_NUMBERED, _SEPARATE = 9, 30  # readers up to which squares have room for their numbers, and for lines between them


def draw_connections(blocks: Sequence[Connections], path: Path, title: str) -> None:
    """Draws how strongly each layer uses each earlier one: a triangle per block, one colour scale for all.

    Source: Huang et al. (CVPR 2017), figure 5. Colours are relative to each reader's strongest source: the norm behind
    a convolution takes the size of its weights away again, so that columns can't be compared by it.

    Raises UserError and TrainingError as :func:`densenet_ext.figures.picture`.
    """
    columns = len(blocks) if len(blocks) <= 3 else 2 if len(blocks) == 4 else 4
    rows = math.ceil(len(blocks) / columns)
    with picture(path, title, max(7.0, 3.8 * columns + 1.2), 3.75 * rows + 0.6, _HOW_TO_READ) as figure:
        panels = figure.subplots(rows, columns, squeeze=False).ravel()
        for spare in panels[len(blocks) :]:
            spare.remove()
        for number, (axes, block) in enumerate(zip(panels, blocks, strict=False)):
            axes.set_box_aspect(1)
            drawn = _draw_block(axes, block)
            if number % columns == 0:
                axes.set_ylabel("source: layer that made the features", fontsize=TEXT)
            if number + columns >= len(blocks):
                axes.set_xlabel("reader: layer that uses them", fontsize=TEXT)
        bar = figure.colorbar(
            drawn, ax=panels[: len(blocks)].tolist(), ticks=[0, 25, 50, 75, 100], format="%d %%", fraction=0.03
        )
        bar.set_label("% of the reader's most used source", fontsize=TEXT)
        bar.ax.tick_params(labelsize=SMALL)


def _draw_block(axes: Axes, block: Connections) -> ScalarMappable:
    readers = block.use.shape[1]
    percent = 100 * block.use / block.use.nan_to_num().amax(0).clamp(min=torch.finfo(torch.float32).tiny)
    drawn = axes.pcolormesh(percent.numpy(), cmap="viridis_r", vmin=0, vmax=100, rasterized=readers > _SEPARATE)
    if readers <= _SEPARATE:
        drawn.set(edgecolor="white", linewidth=1)
    # The input on top; where nothing comes behind the block, nobody reads its last layer, which then has no row.
    axes.set(xlim=(0, readers), ylim=(readers, 0))
    layers = f"{block.layers} layer{'s' if block.layers > 1 else ''}"
    plain(axes, f"{block.name}: {layers}" if block.name else layers, "", "")
    axes.spines[["left", "bottom"]].set_visible(False)
    axes.tick_params(length=0)
    numbers = _thinned(block.layers)
    sources = [0, *(l for l in numbers if l < readers)]
    axes.set_yticks([l + 0.5 for l in sources], ["input", *map(str, sources[1:])])
    axes.set_xticks([l - 0.5 for l in numbers], list(map(str, numbers)))
    if readers <= _NUMBERED:
        for source, reader in (~percent.isnan()).nonzero().tolist():
            value = float(percent[source, reader])
            look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SMALL - 1}
            axes.text(reader + 0.5, source + 0.5, f"{value:.0f}", color="white" if value > 45 else "black", **look)
    if block.behind:
        words = f"last column: {block.behind}"
        axes.text(1.015, 0.5, words, rotation=270, va="center", fontsize=SMALL, transform=axes.transAxes)
    return drawn


def _thinned(layers: int) -> list[int]:
    """Returns the numbers of layers that are written on an axis."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, layers) if layers / step <= _LABELS)
    return list(range(1, layers + 1)) if step == 1 else list(range(step, layers + 1, step))
