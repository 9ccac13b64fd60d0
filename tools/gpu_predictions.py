"""What the kernels' first measurement is held against: the shares of a copy's bandwidth that were predicted for them.

Derived from the kernels' machine code for an H200, bf16 and DenseNet-121 at batch 256, before any GPU had run them
(docs/users/gpu-kernels.md), and to be proved wrong: what is off by more than a quarter names what the model does not
know.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Row = Mapping[str, Any]

NETWORK, BATCH, PRECISION = "densenet121", 256, "bfloat16"
WITHIN = 0.25
# Kernels that go over rows once: launches of a few microseconds count at the smaller images.
ELEMENTWISE = {"bn_relu": 0.70, "bn_relu_backward_reduce": 0.69, "append_features": 0.46, "feature_grad": 0.48}


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
    return ELEMENTWISE.get(row["operator"])


def table(found: Mapping[str, Any]) -> str | None:
    """Markdown: each prediction beside what kernels.json has, and how many hold; None where nothing was predicted."""
    lines = []
    right = 0
    for row in found["rows"]:
        share = predicted(row)
        if share is None:
            continue
        ratio = row["share_of_copy"] / share
        verdict = "right" if abs(ratio - 1) <= WITHIN else f"wrong, {'faster' if ratio > 1 else 'slower'}"
        right += verdict == "right"
        cells = (
            row["operator"],
            row["where"],
            f"{share:.2f}",
            f"{row['share_of_copy']:.2f}",
            f"{verdict} ({ratio:.2f})",
        )
        lines.append("| " + " | ".join(cells) + " |")
    if not lines:
        return None
    head = ["| operator | where | predicted | measured | |", "|---|---|--:|--:|---|"]
    title = f"Shares of a copy's bandwidth as predicted for an H200, {NETWORK}, batch {BATCH}, {PRECISION}: "
    return "\n".join([f"{title}{right} of {len(lines)} within {WITHIN:.0%}.", "", *head, *lines])
