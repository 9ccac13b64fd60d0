"""The curves of a run: losses and errors by epoch, where the learning rate drops, and the best epoch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densenet_ext.training.errors import UserError
from densenet_ext.training.figures import BLUE, GREY, ORANGE, SMALL, legend, picture, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes

History = Sequence[Mapping[str, Any]]
"""Rows of metrics, an epoch each: epoch, lr, loss, error (percent), validation_loss and validation_error or None."""

_CURVES = (
    "Lower is better. The loss is the mean cross-entropy, the error the part of the images whose first guess is wrong. "
    "Training: over an epoch, while the network learned."
)
_VALIDATION = " Validation: at the end of an epoch, on images that it does not learn from."
_DROPS = " Dotted lines: the learning rate (lr) drops to what is written there."
_MANY = 40  # epochs up to which dots are drawn


def draw_curves(history: History, path: Path, title: str) -> None:
    """Draws loss and error of training and validation by epoch, where the learning rate drops, and the best epoch.

    Raises UserError when there is no epoch, and UserError and TrainingError as
    :func:`densenet_ext.training.figures.picture`.
    """
    if not history:
        raise UserError(f"{path}: there is no epoch to draw yet")
    kinds = [("training", "", BLUE, "-")]
    if history[0]["validation_error"] is not None:
        kinds.append(("validation", "validation_", ORANGE, "--"))
    measured, prefix, *_ = kinds[-1]
    best = min(history, key=lambda row: row[f"{prefix}error"])
    pairs = zip(history, history[1:], strict=False)
    drops = [(after["epoch"] - 0.5, after["lr"]) for before, after in pairs if after["lr"] < before["lr"]]
    words = _CURVES + (_VALIDATION if prefix else "") + (_DROPS if drops else "")
    words += f" Star: the lowest {measured} error, {best[f'{prefix}error']:.2f} % in epoch {best['epoch']}."
    with picture(path, title, 11, 4.6, words) as figure:
        loss, error = figure.subplots(1, 2)
        for name, axes in (("loss", loss), ("error", error)):
            for label, part, color, style in kinds:
                curve(axes, history, part + name, label=label, color=color, linestyle=style, linewidth=1.8)
            finish(axes, name, name.capitalize(), [row[part + name] for row in history for _, part, *_ in kinds])
            for at, lr in drops:
                axes.axvline(at, color=GREY, linestyle=":", linewidth=1.2)
                look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "top", "color": GREY}
                axes.text(at, 0.995, f" lr {lr:.3g}", fontsize=SMALL, ha="left", **look)
            legend(axes)
        error.plot(best["epoch"], best[f"{prefix}error"], "*", markersize=14, color="black", clip_on=False, zorder=5)


def curve(axes: Axes, history: History, key: str, **look: Any) -> None:
    """Draws ``key`` by epoch."""
    look = {"marker": "o" if len(history) <= _MANY else "", "markersize": 3.5, **look}
    axes.plot([row["epoch"] for row in history], [row[key] for row in history], **look)


def finish(axes: Axes, name: str, title: str, values: Sequence[float]) -> None:
    """Sets names and scales of ``axes`` with the loss or the error by epoch, which has these ``values``."""
    from matplotlib.ticker import LogFormatter, LogLocator, MaxNLocator, NullFormatter

    plain(axes, title, "epoch", "loss" if name == "loss" else "error, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    least, most = min(values), max(values)
    if name == "loss" and 0 < 10 * least < most:
        axes.set_yscale("log")
        axes.set_ylabel("loss, logarithmic scale")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1000 * least else (1,)))
        axes.yaxis.set_major_formatter(LogFormatter(labelOnlyBase=False))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(least / 1.5, most * (most / least) ** 0.15)
    else:
        axes.set_ylim(0, max(1.15 * most, 1e-3))
