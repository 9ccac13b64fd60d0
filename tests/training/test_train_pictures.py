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
from densenet_ext.compare.picture import draw_comparison
from densenet_ext.errors import TrainingError, UserError
from densenet_ext.reuse.connections import Connections, connections
from densenet_ext.reuse.drawing import draw_connections
from densenet_ext.training.curves import draw_curves

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


def costs(fused: float | None, unfused: float) -> dict[str, float | None]:
    return {"fused": fused, "unfused": unfused, "ratio": unfused / fused if fused else None}


STEP = {"seconds": costs(0.05, 0.1), "kept_bytes": costs(2**20, 2**22), "peak_bytes": costs(3 * 2**20, 5 * 2**20)}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are written."""
    found: list[Figure] = []
    write = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (found.append(figure), write(figure, *a, **k))[1])
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
    for part in ("source: layer that made the features", "reader: layer that uses them", "b: 3 layers"):
        assert part in told
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the input on top


def test_where_nothing_comes_behind_the_last_layer_has_no_row(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_connections([block(3, None)], tmp_path / "a.png", "x")
    axes = drawn[0].axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["input", "1", "2"]
    assert "last column" not in words(drawn[0])


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


def test_losses_over_decades_are_on_a_logarithmic_scale(tmp_path: Path, drawn: list[Figure]) -> None:
    draw_curves(history(8), tmp_path / "a.png", "x")  # from 2.2 to 0.25
    draw_curves(history(80), tmp_path / "b.png", "x")
    assert [figure.axes[0].get_yscale() for figure in drawn] == ["linear", "log"]
    assert drawn[1].axes[1].get_yscale() == "linear"


# ---- fused against unfused -------------------------------------------------------------------------------------------


def test_comparison(tmp_path: Path, drawn: list[Figure]) -> None:
    runs = [history(scale=1 + 0.1 * seed) for seed in range(3)]
    draw_comparison({"fused": runs, "unfused": runs}, STEP, tmp_path / "compare.png", "Fused against unfused")
    assert_readable(drawn[0])
    loss, error, bars = drawn[0].axes
    assert [axes.get_title(loc="left") for axes in (loss, error)] == ["Training loss", "Validation error"]
    assert len(loss.lines) == 2 * (3 + 1)
    mean = loss.lines[3].get_ydata()  # of scales 1, 1.1 and 1.2
    assert list(mean) == pytest.approx([1.1 * 2 / epoch for epoch in range(1, 9)])  # type: ignore[arg-type]
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([100, 100, 100, 50, 25, 60])  # type: ignore[attr-defined]
    assert [text.get_text() for text in bars.texts] == [
        *("unfused: 100.0 ms, 100 %", "unfused: 4.0 MiB, 100 %", "unfused: 5.0 MiB, 100 %"),
        *("fused: 50.0 ms, 50 %", "fused: 1.0 MiB, 25 %", "fused: 3.0 MiB, 60 %"),
    ]


@pytest.mark.parametrize("epochs", [1, 60])
def test_comparison_without_validation_or_a_count_of_bytes(tmp_path: Path, drawn: list[Figure], epochs: int) -> None:
    runs = {form: [history(epochs, validated=False)] for form in ("fused", "unfused")}
    step = {**STEP, "seconds": costs(0.13, 0.1), "peak_bytes": {"fused": None, "unfused": None, "ratio": None}}
    draw_comparison(runs, step, tmp_path / "compare.png", "x")
    assert_readable(drawn[0])
    assert drawn[0].axes[1].get_title(loc="left") == "Training error"
    assert "fused: 130.0 ms, 130 %" in words(drawn[0]) and "peak" not in words(drawn[0])


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, start", [("a.png", b"\x89PNG"), ("a.PNG", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_kinds_of_files(tmp_path: Path, name: str, start: bytes) -> None:
    draw_connections([block(40)], tmp_path / name, "Feature reuse in $x_{$.pt")  # a file may be called so
    assert (tmp_path / name).read_bytes().startswith(start)
    with pytest.raises(UserError, match="a.jpg: expected the name of a picture, which ends in .png, .svg, .pdf"):
        draw_connections([block()], tmp_path / "a.jpg", "x")
    assert os.listdir(tmp_path) == [name]


def test_a_file_that_cannot_be_written_stays_what_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def refuse(*args: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(TrainingError, match=f"cannot write {re.escape(str(path))}: No space left on device"):
        draw_curves(history(), path, "x")
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"] and path.read_bytes() == b"old"


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
