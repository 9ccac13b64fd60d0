"""Pictures that look alike whatever the user's matplotlib is set to, in files that are whole or not there."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densenet_ext.errors import UserError
from densenet_ext.files import replace_file

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


def check_picture(path: Path) -> None:
    """Raises UserError unless ``path`` ends like a picture. To be called before the work whose result is drawn."""
    if path.suffix.lower() not in KINDS:
        raise UserError(f"{path}: expected the name of a picture, which ends in {', '.join(KINDS)}")


@contextlib.contextmanager
def picture(path: Path, title: str, width: float, height: float, words: str) -> Iterator[Figure]:
    """Yields a figure of ``width`` x ``height`` inches and the ``words`` below; written to ``path`` at the end.

    matplotlib lays it out. Neither pyplot nor a backend is touched, and the user's settings are as before afterwards.

    Raises UserError as :func:`check_picture`, TrainingError when it can't be written; ``path`` then holds what it held.
    """
    check_picture(path)
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


def plain(axes: Axes, title: str, x: str, y: str) -> None:
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

    plain(axes, title, "epoch", "loss" if kind == "loss" else "error, %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    if kind == "loss" and 0 < 10 * min(values) < max(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max(1.15 * max(values), 1e-3))
    # Above the axes, where it hides nothing.
    axes.legend(fontsize=SMALL, frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=2)
