"""Pictures that look alike whatever the user's matplotlib is set to, in files that are whole or not there."""

from __future__ import annotations

import contextlib
import io
import textwrap
from collections.abc import Iterator
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
