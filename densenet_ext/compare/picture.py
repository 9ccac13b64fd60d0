"""The picture of a comparison: the runs of both forms over each other, and what a step of either takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densenet_ext.figures import BLUE, ORANGE, SMALL, History, curve, finish, picture, plain
from densenet_ext.text import readable

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Histories = Mapping[str, Sequence[History]]
"""By form, fused and unfused: the runs, a seed each."""

_WORDS = (
    "The fused form is drawn over the unfused one: where the lines lie on each other, both forms learn alike. Strong "
    "lines are the mean over the seeds, thin ones a seed each. Bars: what one training step takes, in percent of the "
    "unfused form; shorter is better."
)
_COSTS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "seconds": ("time", lambda seconds: f"{1000 * seconds:.1f} ms"),
    "kept_bytes": ("kept for backward", readable),
    "peak_bytes": ("peak memory", readable),
}
_LOOKS: dict[str, dict[str, Any]] = {
    "unfused": {"color": ORANGE, "linewidth": 4},
    "fused": {"color": BLUE, "linewidth": 2, "linestyle": "--"},
}


def draw_comparison(histories: Histories, step: Mapping[str, Any], path: Path, title: str) -> None:
    """Draws the runs of both forms over each other, and as bars what a ``step`` takes, as comparison.json holds it.

    The loss is that of training; the error is that of validation, or without one that of training.

    Raises UserError and TrainingError as :func:`densenet_ext.figures.picture`.
    """
    everything = [row for runs in histories.values() for history in runs for row in history]
    validated = everything[0]["validation_error"] is not None
    error = ("validation_error", "Validation error") if validated else ("error", "Training error")
    with picture(path, title, 11, 6.9, _WORDS) as figure:
        panels = figure.subplot_mosaic([["loss", "error"], ["costs", "costs"]], height_ratios=[3, 2])
        for kind, key, words in (("loss", "loss", "Training loss"), ("error", *error)):
            for form, look in _LOOKS.items():
                for history in histories[form]:
                    curve(panels[kind], history, key, **{**look, "linewidth": 0.7, "linestyle": "-", "marker": ""})
                curve(panels[kind], _mean(histories[form], key), key, label=form, **look)
            finish(panels[kind], kind, words, [row[key] for row in everything])
        _draw_costs(panels["costs"], step)


def _mean(histories: Sequence[History], key: str) -> History:
    """Returns the mean over the seeds of every epoch."""
    epochs = zip(*histories, strict=True)
    return [{"epoch": rows[0]["epoch"], key: statistics.fmean(row[key] for row in rows)} for rows in epochs]


def _draw_costs(axes: Axes, step: Mapping[str, Any]) -> None:
    costs = [cost for cost in _COSTS if step[cost]["ratio"] is not None]
    for form, shift, color in (("unfused", -0.19, ORANGE), ("fused", 0.19, BLUE)):
        percents = [100 * step[cost][form] / step[cost]["unfused"] for cost in costs]
        bars = axes.barh([at + shift for at in range(len(costs))], percents, height=0.34, color=color)
        sizes = [_COSTS[cost][1](step[cost][form]) for cost in costs]
        words = [f"{form}: {size}, {percent:.0f} %" for size, percent in zip(sizes, percents, strict=True)]
        axes.bar_label(bars, words, padding=5, fontsize=SMALL)
    plain(axes, "What a training step takes", "in % of unfused", "")
    axes.set_yticks(range(len(costs)), [_COSTS[cost][0] for cost in costs])
    axes.invert_yaxis()
    axes.margins(x=0.25)
