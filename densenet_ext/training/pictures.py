"""Pictures that look alike whatever the user's matplotlib is set to: their frame, and the curves of a run."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densenet_ext.training.errors import UserError
from densenet_ext.training.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
# Okabe and Ito's: told apart by colour-blind readers, and in grey by their lightness. Lines differ in style as well.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#555555"
TEXT, SMALL = 10, 9  # points
_LETTERS = 12.5  # per inch

History = Sequence[Mapping[str, Any]]
"""Rows of metrics, an epoch each: epoch, lr, loss, error (percent), validation_loss and validation_error or None."""


@contextlib.contextmanager
def picture(path: Path, title: str, width: float, height: float, words: str) -> Iterator[Figure]:
    """Yields a figure of ``width`` x ``height`` inches and the ``words`` below; written to ``path`` at the end.

    matplotlib lays it out. Neither pyplot nor a backend is touched, and the user's settings are as before afterwards.

    Raises UserError unless ``path`` ends like a picture, TrainingError when it can't be written; it then holds what it
    held.
    """
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path}: expected the name of a picture, which ends in {', '.join(KINDS)}")
    import matplotlib.style
    from matplotlib.figure import Figure

    with matplotlib.style.context("default"):
        lines = textwrap.wrap(words, round(_LETTERS * width))
        figure = Figure((width, height + 0.2 * len(lines)), dpi=150, facecolor="white", layout="constrained")
        look: dict[str, Any] = {"x": 0.01, "ha": "left", "color": "#222222", "parse_math": False}
        figure.suptitle(textwrap.fill(title, round(0.7 * _LETTERS * width)), fontsize=13, fontweight="bold", **look)
        figure.supxlabel("\n".join(lines), fontsize=TEXT, **look)
        yield figure
        data = io.BytesIO()
        figure.savefig(data, format=path.suffix.lower()[1:])
    replace_file(data.getbuffer(), path)


def name(axes: Axes, title: str, x: str, y: str) -> None:
    """Names ``axes`` and takes away what is not needed to read them."""
    axes.set_title(title, fontsize=TEXT + 1, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)


def curve(axes: Axes, history: History, key: str, **look: Any) -> None:
    """Draws ``key`` by epoch, with dots where they are few."""
    look = {"marker": "o" if len(history) <= 40 else "", "markersize": 3.5, **look}
    axes.plot([row["epoch"] for row in history], [row[key] for row in history], **look)


def finish(axes: Axes, kind: str, title: str, values: Sequence[float]) -> None:
    """Sets names, scales and the legend of ``axes`` with the "loss" or the "error" by epoch, of these ``values``."""
    from matplotlib.ticker import MaxNLocator

    name(axes, title, "epoch", "loss" if kind == "loss" else "error, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    if kind == "loss" and 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(1.15 * max(values), 1e-3))
    # Above the axes, where it hides nothing.
    axes.legend(fontsize=SMALL, frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=2)


def draw_curves(history: History, path: Path, title: str) -> None:
    """Draws loss and error of training and validation by epoch, where the learning rate drops, and the best epoch.

    ``history`` has at least one row. Raises UserError and TrainingError as :func:`picture`.
    """
    kinds = [("training", "", BLUE, "-")]
    if history[0]["validation_error"] is not None:
        kinds.append(("validation", "validation_", ORANGE, "--"))
    measured, prefix, *_ = kinds[-1]
    best = min(history, key=lambda row: row[f"{prefix}error"])
    pairs = zip(history, history[1:], strict=False)
    drops = [(after["epoch"] - 0.5, after["lr"]) for before, after in pairs if after["lr"] < before["lr"]]
    words = (
        "Lower is better. Loss: mean cross-entropy; error: images whose first guess is wrong. Training: over an epoch, "
        "while the network learned; validation: at its end, on other images. Dotted: drops of the learning rate (lr). "
        f"Star: the lowest {measured} error, {best[f'{prefix}error']:.2f} % in epoch {best['epoch']}."
    )
    with picture(path, title, 11, 4.6, words) as figure:
        for kind, axes in zip(("loss", "error"), figure.subplots(1, 2), strict=True):
            for label, part, color, style in kinds:
                curve(axes, history, part + kind, label=label, color=color, linestyle=style, linewidth=1.8)
            finish(axes, kind, kind.capitalize(), [row[part + kind] for row in history for _, part, *_ in kinds])
            for at, lr in drops:
                axes.axvline(at, color=GREY, linestyle=":", linewidth=1.2)
                look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "va": "top", "color": GREY}
                axes.text(at, 0.995, f" lr {lr:.3g}", fontsize=SMALL, ha="left", **look)
        axes.plot(best["epoch"], best[f"{prefix}error"], "*", markersize=14, color="black", clip_on=False, zorder=5)
