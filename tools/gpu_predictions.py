"""What the first measurement is held against: the kernels' shares of a copy's bandwidth, and a network's images/s.

Derived from the kernels' machine code for an H200, bf16 and DenseNet-121 at batch 256, before any GPU had run them
(docs/users/gpu-kernels.md), and to be proved wrong: what is off by more than a quarter names what the model does not
know.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

Row = Mapping[str, Any]

NETWORK, BATCH, PRECISION = "densenet121", 256, "bfloat16"
WITHIN = 0.25
# Kernels that go over rows once: launches of a few microseconds count at the smaller images.
ELEMENTWISE = {"bn_relu": 0.70, "bn_relu_backward_reduce": 0.69, "append_features": 0.46, "feature_grad": 0.48}

# The 3x3 convolution by its rows, forward and backward: at 7x7 nearly all of it are launches.
CONV3X3 = {802_816: (0.40, 0.29), 200_704: (0.36, 0.25), 50_176: (0.21, 0.16), 12_544: (0.07, 0.06)}


def predicted(row: Row) -> float | None:
    """The share of a copy's bandwidth at which a row of kernels.json was predicted to run, or None."""
    if (row["network"], row["batch"], row["precision"]) != (NETWORK, BATCH, PRECISION):
        return None
    if row["operator"] == "bn_relu_conv1x1":
        return 0.67 if row["rows"] > 132 * 128 else 0.54  # a tile for each multiprocessor: weights are waited for
    if row["operator"] == "bn_relu_conv1x1_backward":
        # dz is made anew for each slice of 128 columns
        slices = -(-row["columns"] // 128)
        return 0.70 if slices <= 2 else 0.61 if slices <= 4 else 0.55
    if row["operator"].startswith("bn_relu_conv3x3"):
        return CONV3X3.get(row["rows"], (None, None))[row["operator"].endswith("_backward")]
    return ELEMENTWISE.get(row["operator"])


# Images per second of training at batch 256, which the GPU limits with a CUDA graph as without: 26.7 ms a step.
SPEEDS = {("bottlenecks", "channels_last"): 9600, ("bottlenecks, CUDA graph", "channels_last"): 9600}


def kernels(found: Mapping[str, Any]) -> str | None:
    """Markdown: each predicted share beside what kernels.json has; None where nothing was predicted."""
    what = "Shares of a copy's bandwidth"
    return _table(what, ((row, predicted(row), row["share_of_copy"]) for row in found["rows"]), 2)


def networks(found: Mapping[str, Any]) -> str | None:
    """Markdown: predicted images per second beside those of networks.json; None where nothing was predicted."""
    rows = []
    for run in found["runs"].values():
        if (run["network"], run["batch"], run["dtype"], run["training"]) != (NETWORK, BATCH, PRECISION, True):
            continue
        for row in run["rows"]:
            if row["ours"]:
                labelled = {"operator": row["how"], "where": row["layout"]}
                rows.append((labelled, SPEEDS.get((row["how"], row["layout"])), run["batch"] / row["seconds"]))
    return _table("Images per second of training", rows, 0)


TABLES: dict[str, Callable[[Mapping[str, Any]], str | None]] = {"kernels": kernels, "networks": networks}
"""By the results file that they read."""


def _table(what: str, rows: Iterable[tuple[Row, float | None, float]], digits: int) -> str | None:
    """Rows with what was predicted, or None, and what was measured: a line each, and how many hold."""
    lines = []
    right = 0
    for row, expected, measured in rows:
        if expected is None:
            continue
        ratio = measured / expected
        verdict = "right" if abs(ratio - 1) <= WITHIN else f"wrong, {'faster' if ratio > 1 else 'slower'}"
        right += verdict == "right"
        cells = (row["operator"], row["where"], f"{expected:.{digits}f}", f"{measured:.{digits}f}")
        lines.append("| " + " | ".join((*cells, f"{verdict} ({ratio:.2f})")) + " |")
    if not lines:
        return None
    head = ["| what | where | predicted | measured | |", "|---|---|--:|--:|---|"]
    title = f"{what} as predicted for an H200, {NETWORK}, batch {BATCH}, {PRECISION}: "
    return "\n".join([f"{title}{right} of {len(lines)} within {WITHIN:.0%}.", "", *head, *lines])
