"""Figures that look alike whatever the user's matplotlib is set to, and files that are whole or not there."""

from __future__ import annotations

import contextlib
import io
import textwrap
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from densenet_ext.training.errors import TrainingError, UserError
from densenet_ext.training.files import replace_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KINDS = (".png", ".svg", ".pdf")
# Okabe and Ito's: told apart by colour-blind readers, and in grey by their lightness. Lines differ in style as well.
BLUE, ORANGE, GREY = "#0072B2", "#E69F00", "#555555"
_DPI = 150
TEXT, SMALL = 10, 9  # points
_LETTERS = 12.5  # per inch
_USER_CAN_MEND = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def check_picture(path: Path) -> None:
    """Raises UserError unless ``path`` ends like a picture, in a folder that is there, and matplotlib is installed.

    To be called before the work whose result is drawn.
    """
    if path.suffix.lower() not in KINDS:
        raise UserError(
            f"{path}: expected a picture's name that ends in {', '.join(KINDS)}, got {path.suffix or 'none'}"
        )
    if path.is_dir():
        raise UserError(f"{path} is a folder, expected the name of a picture")
    if not path.parent.is_dir():
        raise UserError(f"{path}: there is no folder {path.parent} to write the picture into")
    try:
        import matplotlib.figure  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError("pictures need matplotlib: pip install 'densenet_ext[train]'") from error


@contextlib.contextmanager
def picture(path: Path, title: str, width: float, height: float, words: str) -> Iterator[Figure]:
    """Yields a figure of ``width`` x ``height`` inches and the ``words`` below; written to ``path`` at the end.

    matplotlib lays it out. Neither pyplot nor a backend is touched, and the user's settings are as before afterwards.
    The same content gives the same file.

    Raises UserError as :func:`check_picture` or when the folder can't be written into, TrainingError when the disk is
    full or fails. ``path`` then holds what it held.
    """
    check_picture(path)
    import matplotlib
    import matplotlib.style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    lines = textwrap.wrap(words, round(_LETTERS * width))
    with matplotlib.style.context("default"), matplotlib.rc_context({"svg.hashsalt": "densenet_ext"}):
        figure = Figure((width, height + 0.2 * len(lines)), dpi=_DPI, facecolor="white", layout="constrained")
        FigureCanvasAgg(figure)
        look: dict[str, Any] = {"x": 0.01, "ha": "left", "color": "#222222", "parse_math": False}
        figure.suptitle(textwrap.fill(title, round(0.7 * _LETTERS * width)), fontsize=13, fontweight="bold", **look)
        figure.supxlabel("\n".join(lines), fontsize=TEXT, **look)
        yield figure
        _write(figure, path)


def plain(axes: Axes, title: str, x: str, y: str) -> None:
    """Names ``axes`` and takes away what is not needed to read them."""
    axes.set_title(title, fontsize=TEXT + 1, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=TEXT)
    axes.set_ylabel(y, fontsize=TEXT)
    axes.tick_params(labelsize=SMALL)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def legend(axes: Axes) -> None:
    """Names the lines of ``axes`` above it, where it hides nothing."""
    axes.legend(fontsize=SMALL, frameon=False, loc="lower right", bbox_to_anchor=(1.01, 0.985), ncols=2)


def _write(figure: Figure, path: Path) -> None:
    kind = path.suffix.lower()[1:]
    undated: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}}
    data = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # letters of a name that the font does not have are drawn as boxes
        figure.savefig(data, format=kind, metadata=undated.get(kind))
    try:
        replace_file(data.getbuffer(), path)
    except _USER_CAN_MEND as error:
        raise UserError(f"cannot write the picture {path}: {error.strerror}") from error
    except OSError as error:
        raise TrainingError(f"cannot write the picture {path}: {error.strerror or error}") from error
