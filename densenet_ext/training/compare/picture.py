"""The picture of a comparison: the runs of both forms over each other, and what a step of either takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densenet_ext.text import readable
from densenet_ext.training.curves import History, curve, finish
from densenet_ext.training.errors import UserError
from densenet_ext.training.figures import BLUE, GREY, ORANGE, SMALL, legend, picture, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_FEW = 10  # epochs up to which two lines that lie on each other have dots


@dataclass(frozen=True)
class ComparedRuns:
    """Runs of one form of a network, fused or unfused, and what a training step of that form takes."""

    histories: Sequence[History]  # per seed, in the same order in both forms
    seconds_per_step: float | None  # None: was not measured
    bytes_kept: int | None  # by the forward pass, for the backward pass
    peak_bytes: int | None  # the most that a step needs


_COMPARISON = (
    "The fused form is drawn over the unfused one: where the lines lie on each other, both forms learn alike. Bars: "
    "what one training step takes, the unfused form being 100 %; shorter is better."
)
_SEEDS = "Strong lines are the mean of {} seeds, thin lines are one seed each. "


def draw_comparison(fused: ComparedRuns, unfused: ComparedRuns, path: Path, title: str) -> None:
    """Draws the runs of both forms over each other, and time and memory of a step as bars.

    The loss is that of training; the error is that of validation, or without one that of training.

    Raises UserError when there is no epoch, and UserError and TrainingError as
    :func:`densenet_ext.training.figures.picture`.
    """
    forms = (("unfused", unfused, ORANGE, "-", 2.0), ("fused", fused, BLUE, "--", 1.0))
    everything = [row for _, runs, *_ in forms for history in runs.histories for row in history]
    if not everything:
        raise UserError(f"{path}: there is no epoch to draw yet")
    validated = everything[0]["validation_error"] is not None
    error = ("validation_error", "Validation error") if validated else ("error", "Training error")
    seeds = max(len(runs.histories) for _, runs, *_ in forms)
    dots = "o" if len(fused.histories[0]) <= _FEW else ""
    words = (_SEEDS.format(seeds) if seeds > 1 else "") + _COMPARISON
    with picture(path, title, 11, 6.9, words) as figure:
        rows = figure.subplot_mosaic([["loss", "error"], ["costs", "costs"]], height_ratios=[3, 2])
        for axes, key, name in ((rows["loss"], "loss", "Training loss"), (rows["error"], *error)):
            for label, runs, color, style, size in forms:
                look: dict[str, Any] = {"color": color, "linewidth": 2 * size, "marker": dots, "markersize": 4 * size}
                for history in runs.histories if seeds > 1 else ():
                    curve(axes, history, key, **{**look, "linewidth": 0.7, "markersize": 0})
                curve(axes, _mean(runs.histories, key), key, label=label, linestyle=style, **look)
            finish(axes, "loss" if key == "loss" else "error", name, [row[key] for row in everything])
            legend(axes)
        _draw_costs(rows["costs"], fused, unfused)


def _mean(histories: Sequence[History], key: str) -> History:
    """Returns the mean over the seeds of every epoch."""
    epochs = zip(*histories, strict=True)
    return [{"epoch": rows[0]["epoch"], key: statistics.fmean(row[key] for row in rows)} for rows in epochs]


def _draw_costs(axes: Axes, fused: ComparedRuns, unfused: ComparedRuns) -> None:
    costs: tuple[tuple[str, Any, Any, Callable[[Any], str]], ...] = (
        ("time", fused.seconds_per_step, unfused.seconds_per_step, _seconds),
        ("kept for backward", fused.bytes_kept, unfused.bytes_kept, readable),
        ("peak memory", fused.peak_bytes, unfused.peak_bytes, readable),
    )
    longest = 100.0
    for place, (_, ours, theirs, written) in enumerate(costs):
        if not ours or not theirs:
            axes.text(1, place, "not measured", fontsize=SMALL, va="center", color=GREY)
            continue
        percent = 100 * ours / theirs
        longest = max(longest, percent)
        for shift, width, color, words in (
            (-0.19, 100.0, ORANGE, f"unfused: {written(theirs)}"),
            (0.19, percent, BLUE, f"fused: {written(ours)}, {percent:.0f} %"),
        ):
            axes.barh(place + shift, width, height=0.34, color=color)
            axes.annotate(
                words, (width, place + shift), (5, 0), textcoords="offset points", fontsize=SMALL, va="center"
            )
    plain(axes, "What a training step takes", "in % of unfused", "")
    axes.set_yticks(range(len(costs)), [name for name, *_ in costs])
    axes.set_ylim(len(costs) - 0.45, -0.55)
    axes.set_xlim(0, 1.25 * longest)


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.1f} ms"
