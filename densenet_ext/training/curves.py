"""The curves of a run: losses and errors by epoch, where the learning rate drops, and the best epoch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from densenet_ext.figures import BLUE, GREY, ORANGE, SMALL, History, curve, finish, picture


def draw_curves(history: History, path: Path, title: str) -> None:
    """Draws loss and error of training and validation by epoch, where the learning rate drops, and the best epoch.

    ``history`` has at least one row. Raises UserError and TrainingError as
    :func:`densenet_ext.figures.picture`.
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
