"""Pictures of training: what a dense block's layers read, how a run went, and fused against unfused."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from densenet_ext.text import readable
from densenet_ext.training.errors import UserError
from densenet_ext.training.pictures.figures import BLUE, GREY, ORANGE, SMALL, TEXT, legend, picture, plain

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable

    from densenet_ext.training.pictures.connections import Connections

# ---- the paper's figure 5 --------------------------------------------------------------------------------------------

_HOW_TO_READ = (
    "How to read it: each layer of a dense block reads the features of all layers before it. A square shows how "
    "strongly one reader (its column) uses one source (its row). The strength is the mean absolute value of the "
    "weights between them, in percent of that of the source which this reader uses most: dark is strong, light is "
    "weak. White: a layer cannot read what is made later. The top row is the block's input, the lowest square of a "
    "column is the layer just before it. If columns are dark all over, no source is preferred, as in an untrained "
    "network."
)
_SIDE = 2.9  # of a block's square, inches
_LEFT, _BETWEEN, _BAR = 0.95, 0.95, 1.35  # for the labels of rows; for those and the last column's; for the scale
_BELOW, _ABOVE = 0.5, 0.35  # for the labels of columns and for the block's name
_LABELS = 13  # on an axis at most
_NUMBERED, _SEPARATE = 9, 30  # readers up to which squares have room for their numbers, and for lines between them


def draw_connections(blocks: Sequence[Connections], path: Path, title: str) -> None:
    """Draws how strongly each layer uses each earlier one: a triangle per block, one colour scale for all.

    Source: Huang et al. (CVPR 2017), figure 5. Colours are relative to each reader's strongest source: the norm behind
    a convolution takes the size of its weights away again, so that columns can't be compared by it.

    Raises UserError and TrainingError as :func:`densenet_ext.training.pictures.figures.picture`.
    """
    columns = len(blocks) if len(blocks) <= 3 else 2 if len(blocks) == 4 else 4
    rows = math.ceil(len(blocks) / columns)
    across, up = _SIDE + _BETWEEN, _SIDE + _BELOW + _ABOVE
    width = max(7.0, _LEFT + columns * across + _BAR - 0.5)
    with picture(path, title, width, rows * up, _HOW_TO_READ) as page:
        for number, block in enumerate(blocks):
            row, column = divmod(number, columns)
            axes = page.axes(_LEFT + column * across, (rows - 1 - row) * up + _BELOW, _SIDE, _SIDE)
            drawn = _draw_block(axes, block)
            if column == 0:
                axes.set_ylabel("source: layer that made the features", fontsize=TEXT)
            if number + columns >= len(blocks):
                axes.set_xlabel("reader: layer that uses them", fontsize=TEXT)
        scale = page.axes(_LEFT + columns * across - 0.3, _BELOW, 0.2, rows * up - _BELOW - _ABOVE)
        bar = page.figure.colorbar(drawn, cax=scale, ticks=[0, 25, 50, 75, 100], format="%d %%")
        bar.set_label("% of the reader's most used source", fontsize=TEXT)
        scale.tick_params(labelsize=SMALL)


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
    """The numbers of layers that are written on an axis."""
    step = next(step for step in (1, 2, 5, 10, 20, 50, 100, layers) if layers / step <= _LABELS)
    return list(range(1, layers + 1)) if step == 1 else list(range(step, layers + 1, step))


# ---- how a run went --------------------------------------------------------------------------------------------------

History = Sequence[Mapping[str, Any]]
"""Rows of metrics, an epoch each: epoch, lr, loss, error (percent), validation_loss and validation_error or None."""

_CURVES = (
    "Lower is better. The loss is the mean cross-entropy, the error the part of the images whose first guess is wrong. "
    "Training: over an epoch, while the network learned."
)
_VALIDATION = " Validation: at the end of an epoch, on images that it does not learn from."
_DROPS = " Dotted lines: the learning rate (lr) drops to what is written there."
_STEPS = 4  # learning rates of a schedule that is one of steps in any case
_MANY, _FEW = 40, 10  # epochs up to which dots are drawn, and where two lines lie on each other


def draw_curves(history: History, path: Path, title: str) -> None:
    """Draws loss and error of training and validation by epoch, where the learning rate drops, and the best epoch.

    Values that are no numbers are left out, and named below. A drop is one to less than half.

    Raises UserError when there is no epoch, and UserError and TrainingError as
    :func:`densenet_ext.training.pictures.figures.picture`.
    """
    if not history:
        raise UserError(f"{path}: there is no epoch to draw yet")
    kinds = [("training", "", BLUE, "-")]
    if any(row["validation_error"] is not None for row in history):
        kinds.append(("validation", "validation_", ORANGE, "--"))
    measured, prefix, *_ = kinds[-1]
    best = _best(history, f"{prefix}error")
    words = _CURVES + (_VALIDATION if prefix else "") + (_DROPS if _drops(history) else "")
    if best is not None:
        words += f" Star: the lowest {measured} error, {best[f'{prefix}error']:.2f} % in epoch {best['epoch']}."
    words += _missing(history, [(f"{kind} {name}", p + name) for kind, p, *_ in kinds for name in ("loss", "error")])
    with picture(path, title, 11, 4.2, words) as page:
        for name, left in (("loss", 0.85), ("error", 6.35)):
            axes = page.axes(left, 0.5, 4.4, 3.4)
            for label, prefix, color, style in kinds:
                look = {"color": color, "linestyle": style, "linewidth": 1.8, "markersize": 3.5}
                _curve(axes, history, prefix + name, label=label, **look)
            _finish(axes, name, name.capitalize(), [history], [prefix + name for _, prefix, *_ in kinds])
            _mark_drops(axes, history)
            if name == "error" and best is not None:
                height = best[f"{kinds[-1][1]}error"]
                axes.plot(best["epoch"], height, "*", markersize=14, color="black", clip_on=False, zorder=5)
            legend(axes)


def _number(value: float | None) -> float:
    """``value``, or NaN for None and what is infinite."""
    return value if value is not None and math.isfinite(value) else math.nan


def _curve(axes: Axes, history: History, key: str, **look: Any) -> None:
    look.setdefault("marker", "o" if len(history) <= _MANY else "")
    axes.plot([row["epoch"] for row in history], [_number(row[key]) for row in history], **look)


def _finish(axes: Axes, name: str, title: str, histories: Sequence[History], keys: Sequence[str]) -> None:
    """Names and scales of ``axes`` with the loss or the error by epoch."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    plain(axes, title, "epoch", "loss" if name == "loss" else "error, %")
    rows = [row for history in histories for row in history]
    epochs = [row["epoch"] for row in rows]
    axes.set_xlim(min(epochs) - 0.5, max(epochs) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, steps=[1, 2, 5, 10]))
    axes.grid(axis="y", color="#dddddd", linewidth=0.8)
    values = [_number(row[key]) for row in rows for key in keys]
    numbers = [value for value in values if not math.isnan(value)] or [1.0]
    least, most = min(numbers), max(numbers)
    if name == "loss" and 0 < 10 * least < most:
        axes.set_yscale("log")
        axes.set_ylabel("loss, logarithmic scale")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if most < 1000 * least else (1,)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(least / 1.5, most * (most / least) ** 0.15)
    else:
        axes.set_ylim(0, max(1.15 * most, 1e-3))


def _drops(history: History) -> list[tuple[float, float]]:
    """Where the learning rate falls to less than half: between which epochs, and to what; none where it is smooth."""
    if len({row["lr"] for row in history}) > max(_STEPS, len(history) / 3):
        return []
    pairs = zip(history, history[1:], strict=False)
    return [(b["epoch"] - 0.5, b["lr"]) for a, b in pairs if b["lr"] < 0.5 * a["lr"]]


def _mark_drops(axes: Axes, history: History) -> None:
    room = 0.14 * len(history)  # that a label takes
    free = last = history[-1]["epoch"]
    for at, lr in reversed(_drops(history)):
        axes.axvline(at, color=GREY, linestyle=":", linewidth=1.2)
        if at < free:
            side = "right" if at > last - room / 2 else "center"
            look: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": side, "va": "top", "color": GREY}
            box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
            axes.text(at, 0.995, f"lr {lr:.3g}", fontsize=SMALL, bbox=box, **look)
            free = at - (1.5 if side == "right" else 1) * room


def _best(history: History, key: str) -> Mapping[str, Any] | None:
    """The first epoch of the lowest ``key``, or None where it never was a number."""
    rows = [row for row in history if not math.isnan(_number(row[key]))]
    return min(rows, key=lambda row: row[key]) if rows else None


def _missing(history: History, names: Sequence[tuple[str, str]]) -> str:
    """Says where there is no number; where nothing was measured, none is missing."""
    found = []
    for name, key in names:
        epochs = [row["epoch"] for row in history if row[key] is not None and math.isnan(_number(row[key]))]
        if epochs:
            more = f" and {len(epochs) - 3} more" if len(epochs) > 3 else ""
            found.append(f"{name} in epoch {', '.join(map(str, epochs[:3]))}{more}")
    return f" Not a number, and left out: {'; '.join(found)}." if found else ""


# ---- fused against unfused -------------------------------------------------------------------------------------------


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
    :func:`densenet_ext.training.pictures.figures.picture`.
    """
    forms = (("unfused", unfused, ORANGE, "-", 2.0), ("fused", fused, BLUE, "--", 1.0))
    everything = [history for _, runs, *_ in forms for history in runs.histories if history]
    if not everything:
        raise UserError(f"{path}: there is no epoch to draw yet")
    validated = any(row["validation_error"] is not None for history in everything for row in history)
    error = ("validation_error", "Validation error") if validated else ("error", "Training error")
    seeds = max(len(runs.histories) for _, runs, *_ in forms)
    dots = "o" if max(map(len, everything)) <= _FEW else ""
    words = (_SEEDS.format(seeds) if seeds > 1 else "") + _COMPARISON
    with picture(path, title, 11, 6.5, words) as page:
        for (key, name), left in ((("loss", "Training loss"), 0.85), (error, 6.35)):
            axes = page.axes(left, 3.2, 4.4, 2.95)
            for label, runs, color, style, size in forms:
                look: dict[str, Any] = {"color": color, "linewidth": 2 * size, "marker": dots, "markersize": 4 * size}
                for history in runs.histories if seeds > 1 else ():
                    _curve(axes, history, key, **{**look, "linewidth": 0.7, "markersize": 0})
                _curve(axes, _mean(runs.histories, key), key, label=label, linestyle=style, **look)
            _finish(axes, "loss" if key == "loss" else "error", name, everything, [key])
            legend(axes)
        _draw_costs(page.axes(1.6, 0.5, 9.15, 1.8), fused, unfused)


def _mean(histories: Sequence[History], key: str) -> History:
    """The mean over the seeds of every epoch that all have; NaN where one has no number."""
    epochs = zip(*histories, strict=False)
    return [{"epoch": rows[0]["epoch"], key: sum(_number(row[key]) for row in rows) / len(rows)} for rows in epochs]


def _draw_costs(axes: Axes, fused: ComparedRuns, unfused: ComparedRuns) -> None:
    costs = (
        ("time", fused.seconds_per_step, unfused.seconds_per_step, _seconds),
        ("kept for backward", fused.bytes_kept, unfused.bytes_kept, _size),
        ("peak memory", fused.peak_bytes, unfused.peak_bytes, _size),
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


def _size(value: float) -> str:
    return readable(round(value))
