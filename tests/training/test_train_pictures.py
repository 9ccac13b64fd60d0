from __future__ import annotations

import errno
import itertools
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

import densenet_ext as dx
from densenet_ext.reuse.connections import Connections, connections
from densenet_ext.reuse.drawing import draw_connections
from densenet_ext.training import figures
from densenet_ext.training.compare.picture import ComparedRuns, draw_comparison
from densenet_ext.training.curves import draw_curves
from densenet_ext.training.errors import TrainingError, UserError

NAN = float("nan")


def block(layers: int = 3, behind: str | None = "transition", name: str = "denseblock1") -> Connections:
    readers = layers + (behind is not None)
    use = torch.rand(layers + 1, readers, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    use[torch.ones_like(use, dtype=torch.bool).tril(-1)] = NAN
    return Connections(name, use, (8, *[4] * layers), behind, True)


def history(epochs: int = 8, scale: float = 1.0, validated: bool = True, **changed: Any) -> list[dict[str, Any]]:
    rows = []
    for epoch in range(1, epochs + 1):
        loss = scale * 2 / epoch
        rows.append(
            {
                "epoch": epoch,
                "lr": 0.1 if epoch <= epochs / 2 else 0.01 if epoch <= 0.75 * epochs else 0.001,
                "loss": loss,
                "error": 30 * loss,
                "validation_loss": 1.1 * loss if validated else None,
                "validation_error": 33 * loss if validated else None,
                "images_per_s": 100.0,
                "seconds": 1.0,
            }
        )
    for name, value in changed.items():
        rows[-1][name] = value
    return rows


def compared(seeds: int = 3, **changed: Any) -> tuple[ComparedRuns, ComparedRuns]:
    fused = ComparedRuns([history(scale=1 + 0.1 * seed) for seed in range(seeds)], 0.05, 2**20, 3 * 2**20)
    unfused = ComparedRuns(fused.histories, 0.1, 4 * 2**20, 5 * 2**20)
    return ComparedRuns(**{**fused.__dict__, **changed}), unfused


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    found: list[Figure] = []
    write = figures._write
    monkeypatch.setattr(figures, "_write", lambda figure, path: (found.append(figure), write(figure, path))[1])
    return found


def boxes(figure: Figure) -> list[tuple[str, Any]]:
    """Every text that is drawn, and where, in dots."""
    found: list[tuple[str, Any]] = []
    draw = Text.draw

    def noted(text: Text, renderer: Any) -> None:
        if text.get_visible() and text.get_text().strip():
            found.append((text.get_text(), text.get_window_extent(renderer)))
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:  # a figure holds ticks beyond its limits as well, which are not drawn
        patch.setattr(Text, "draw", noted)
        figure.draw_without_rendering()
    return found


def assert_readable(figure: Figure) -> None:
    """Nothing that is written leaves the page or lies on something else that is written."""
    width, height = figure.get_size_inches() * figure.dpi
    written = boxes(figure)
    assert len(written) > 5
    for text, box in written:
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height, text
    for (one, a), (other, b) in itertools.combinations(written, 2):
        apart = a.x1 <= b.x0 or b.x1 <= a.x0 or a.y1 <= b.y0 or b.y1 <= a.y0
        assert apart, (one, other)


def words(figure: Figure) -> str:
    return " ".join(" ".join(text.split()) for text, _ in boxes(figure))


# ---- figure 5 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "blocks, columns, rows",
    [
        ([block(2, None, "")], 1, 1),
        ([block(1)], 1, 1),
        ([block(6), block(12), block(64), block(48, "classifier")], 2, 2),
        ([block(16)] * 3, 3, 1),
        ([block(n) for n in (4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4)], 4, 3),
        ([block(200)], 1, 1),
    ],
    ids=["two layers", "one layer", "264", "three", "eleven", "200 layers"],
)
def test_panels_of_every_size_are_readable(
    tmp_path: Path, drawn: list[Figure], blocks: list[Connections], columns: int, rows: int
) -> None:
    draw_connections(blocks, tmp_path / "reuse.png", "Feature reuse in checkpoint.pt")
    (figure,) = drawn
    assert_readable(figure)
    panels, scale = figure.axes[:-1], figure.axes[-1]
    assert len(panels) == len(blocks) and "% of the reader's most used source" in scale.get_ylabel()
    assert len({round(axes.get_position().x0, 6) for axes in panels}) == min(columns, len(blocks))
    assert len({round(axes.get_position().y0, 6) for axes in panels}) == rows
    width, height = Image.open(tmp_path / "reuse.png").size
    assert 7 * 150 <= width <= 18 * 150 and height <= 14 * 150
    for axes in panels:  # squares are squares
        box = axes.get_window_extent()
        assert box.width == pytest.approx(box.height)


def test_a_panel_shows_each_reader_against_its_strongest_source(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = [[0.5, 0.1, 3.0, 0], [NAN, 0.4, 6.0, 0], [NAN, NAN, 1.5, 0], [NAN, NAN, NAN, 0]]
    use = torch.tensor(rows, device="cpu")
    draw_connections([Connections("b", use, (8, 4, 4, 4), "classifier", True)], tmp_path / "a.png", "x")
    axes = drawn[0].axes[0]
    (mesh,) = axes.collections
    shown = mesh.get_array()
    assert shown is not None
    wanted = [[100, 25, 50, 0], [NAN, 100, 100, 0], [NAN, NAN, 25, 0], [NAN, NAN, NAN, 0]]
    torch.testing.assert_close(torch.tensor(shown.filled(NAN)).float(), torch.tensor(wanted), equal_nan=True)
    assert (mesh.norm.vmin, mesh.norm.vmax) == (0, 100)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["input", "1", "2", "3"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1", "2", "3"]
    numbers = [text.get_text() for text in axes.texts]
    assert numbers == ["100", "25", "50", "0", "100", "100", "0", "25", "0", "0", "last column: classifier"]
    told = words(drawn[0])
    for part in (
        "source: layer that made the features",
        "reader: layer that uses them",
        "How to read it",
        "b: 3 layers",
    ):
        assert part in told
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the input on top


def test_where_nothing_comes_behind_the_last_layer_has_no_row(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_connections([block(3, None)], tmp_path / "a.png", "x")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["input", "1", "2"]
    assert "last column" not in words(drawn[0])


def test_dark_is_strong_in_grey_too() -> None:
    from matplotlib import colormaps

    shades = [0.299 * r + 0.587 * g + 0.114 * b for r, g, b, _ in colormaps["viridis_r"](range(256))]
    assert all(later < earlier for earlier, later in itertools.pairwise(shades)) and shades[0] < 0.9  # not white
    blue, orange = (int(c[1:3], 16) * 0.299 + int(c[3:5], 16) * 0.587 for c in (figures.BLUE, figures.ORANGE))
    assert orange - blue > 60


# ---- curves ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("epochs", [1, 2, 4, 8, 40, 300])
@pytest.mark.parametrize("validated", [True, False])
def test_curves_of_any_length_are_readable(tmp_path: Path, drawn: list[Figure], epochs: int, validated: bool) -> None:
    draw_curves(history(epochs, validated=validated), tmp_path / "curves.png", "densenet_bc:22,12 on digits")
    assert_readable(drawn[0])
    assert [axes.get_title(loc="left") for axes in drawn[0].axes] == ["Loss", "Error"]
    for axes in drawn[0].axes:
        legend = axes.get_legend()
        assert legend is not None
        names = [text.get_text() for text in legend.get_texts()]
        assert names == (["training", "validation"] if validated else ["training"])
    assert ("Validation: at the end" in words(drawn[0])) is validated


def test_curves_mark_drops_and_the_best_epoch(tmp_path: Path, drawn: list[Figure]) -> None:
    rows = history(8)
    rows[4]["validation_error"] = 1.25
    rows[6]["validation_error"] = 1.25  # not the first one
    draw_curves(rows, tmp_path / "curves.svg", "x")
    for axes in drawn[0].axes:
        lines = [line for line in axes.lines if line.get_linestyle() == ":"]
        assert sorted(line.get_xdata()[0] for line in lines) == [4.5, 6.5]  # type: ignore[index]
        assert sorted(text.get_text().strip() for text in axes.texts) == ["lr 0.001", "lr 0.01"]
    (star,) = (line for line in drawn[0].axes[1].lines if line.get_marker() == "*")
    assert (list(star.get_xdata()), list(star.get_ydata())) == ([5], [1.25])  # type: ignore[arg-type]
    assert "Star: the lowest validation error, 1.25 % in epoch 5." in words(drawn[0])
    assert "learning rate (lr) drops" in words(drawn[0])


def test_losses_over_decades_are_on_a_logarithmic_scale(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curves(history(8), tmp_path / "a.png", "x")  # from 2.2 to 0.25
    draw_curves(history(80), tmp_path / "b.png", "x")
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["linear", "log"]
    assert "logarithmic" in drawn[1].axes[0].get_ylabel() and drawn[1].axes[1].get_yscale() == "linear"


def test_no_epochs(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="there is no epoch to draw yet"):
        draw_curves([], tmp_path / "curves.png", "x")
    empty = ComparedRuns([[]], None, None, None)
    with pytest.raises(UserError, match="there is no epoch to draw yet"):
        draw_comparison(empty, empty, tmp_path / "compare.png", "x")


# ---- fused against unfused -------------------------------------------------------------------------------------------


def test_comparison(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_comparison(*compared(), tmp_path / "compare.png", "Fused against unfused: densenet_bc:22,12 on digits")
    assert_readable(drawn[0])
    loss, error, costs = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (loss, error)] == ["Training loss", "Validation error"]
    assert len(loss.lines) == 2 * (3 + 1)
    mean = loss.lines[3].get_ydata()  # of scales 1, 1.1 and 1.2
    assert list(mean) == pytest.approx([1.1 * 2 / epoch for epoch in range(1, 9)])  # type: ignore[arg-type]
    assert [bar.get_width() for bar in costs.patches] == pytest.approx([100, 50, 100, 25, 100, 60])  # type: ignore[attr-defined]
    assert [text.get_text() for text in costs.texts] == [
        *("unfused: 100.0 ms", "fused: 50.0 ms, 50 %"),
        *("unfused: 4.0 MiB", "fused: 1.0 MiB, 25 %"),
        *("unfused: 5.0 MiB", "fused: 3.0 MiB, 60 %"),
    ]
    assert "Strong lines are the mean of 3 seeds" in words(drawn[0])


def test_comparison_of_one_seed_without_measurements(tmp_path: Path, drawn: list[Figure]) -> None:
    fused, unfused = compared(1, seconds_per_step=0.13, bytes_kept=None, peak_bytes=None)
    draw_comparison(fused, unfused, tmp_path / "compare.png", "x")
    assert_readable(drawn[0])
    texts = [text.get_text() for text in drawn[0].axes[2].texts]
    assert texts[1:] == ["fused: 130.0 ms, 130 %", "not measured", "not measured"]
    assert "seed" not in words(drawn[0]) and len(drawn[0].axes[0].lines) == 2


@pytest.mark.parametrize("epochs", [1, 60])
def test_comparison_without_validation(tmp_path: Path, drawn: list[Figure], epochs: int) -> None:
    runs = [history(epochs, validated=False), history(epochs, 1.2, validated=False)]
    draw_comparison(ComparedRuns(runs, 2.0, 1, 1), ComparedRuns(runs, 2.5, 1, 1), tmp_path / "compare.png", "x")
    assert_readable(drawn[0])
    assert drawn[0].axes[1].get_title(loc="left") == "Training error"
    assert "unfused: 2.50 s" in words(drawn[0])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, start", [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
@pytest.mark.filterwarnings("error")
def test_kinds_of_files_and_equal_content_gives_an_equal_file(tmp_path: Path, name: str, start: bytes) -> None:
    found = []
    for _ in range(2):
        draw_connections([block(40)], tmp_path / name, "Feature reuse in $x_{$ 漢字.pt")  # a file may be called so
        found.append((tmp_path / name).read_bytes())
        os.unlink(tmp_path / name)
    assert found[0].startswith(start) and found[0] == found[1]


@pytest.mark.parametrize(
    "name, told",
    [
        ("a.jpg", r"a.jpg: expected a picture's name that ends in .png, .svg, .pdf, got .jpg"),
        ("a", r"got none"),
        ("nowhere/a.png", r"there is no folder .*nowhere to write the picture into"),
        ("folder.png", r"folder.png is a folder, expected the name of a picture"),
    ],
    ids=["kind", "no kind", "no folder", "folder"],
)
def test_names_that_are_refused(tmp_path: Path, name: str, told: str) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(UserError, match=told):
        draw_connections([block()], tmp_path / name, "x")
    assert [path.name for path in tmp_path.iterdir()] == ["folder.png"]


@pytest.mark.parametrize(
    "number, kind", [(errno.ENOSPC, TrainingError), (errno.EIO, TrainingError), (errno.EACCES, UserError)]
)
def test_a_file_that_cannot_be_written_stays_what_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[Exception]
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def refuse(*args: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(kind, match=f"cannot write the picture {re.escape(str(path))}: {os.strerror(number)}"):
        draw_curves(history(), path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"old"


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pictures need matplotlib: pip install 'densenet_ext\[train\]'"):
        draw_curves(history(), tmp_path / "a.png", "x")


SETTINGS = """
import sys, pathlib
import matplotlib
from densenet_ext.training.curves import draw_curves
from tests.training.test_train_pictures import history
matplotlib.rcParams.update({"text.usetex": True, "figure.facecolor": "red", "font.size": 40, "svg.hashsalt": "mine"})
before = dict(matplotlib.rcParams.copy())
draw_curves(history(), pathlib.Path(sys.argv[1]), "x")
assert dict(matplotlib.rcParams.copy()) == before
assert "matplotlib.pyplot" not in sys.modules
"""


def test_settings_of_the_user_are_neither_used_nor_changed(tmp_path: Path) -> None:
    draw_curves(history(), tmp_path / "here.png", "x")
    folder = str(Path(dx.__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": folder, "MPLBACKEND": "TkAgg"}
    command = [sys.executable, "-c", SETTINGS, str(tmp_path / "there.png")]
    subprocess.run(command, check=True, env=environment, capture_output=True, timeout=120)
    assert (tmp_path / "there.png").read_bytes() == (tmp_path / "here.png").read_bytes()


def test_a_real_state_dict(tmp_path: Path, drawn: list[Figure]) -> None:
    blocks = connections(dx.densenet_bc(40, 4).state_dict())
    draw_connections(blocks, tmp_path / "a.png", "x")
    assert [axes.get_title(loc="left") for axes in drawn[0].axes[:3]] == [f"denseblock{n}: 6 layers" for n in (1, 2, 3)]
