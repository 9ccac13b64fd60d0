"""The figures of a comparison, fused against unfused: over seeds, in files, and as a table."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from densenet_ext.training.metrics import Row, Sums
from densenet_ext.training.options import AMP

FORMS = ("fused", "unfused")

Found = Mapping[str, Any]
"""The content of comparison.json."""

RESULTS = {
    "loss": ("training loss, last epoch", 4),
    "error": ("training error, last epoch, %", 2),
    "validation_error_best": ("validation error, best epoch, %", 2),
    "validation_error_last": ("validation error, last epoch, %", 2),
    "test_error": ("test error, %", 2),
}
"""The results that are compared: the name in the table, and the digits behind the point."""
COSTS = {
    "seconds": ("time per step, ms", 1e3),
    "kept_bytes": ("kept for the backward pass, MiB", 2**-20),
    "peak_bytes": ("peak of a step, MiB", 2**-20),
}
"""The costs of a step: the name in the table, and the factor from the file's unit to the table's."""

# 97.5 % quantiles of Student's t for 1, 2, ... degrees of freedom; beyond, the last one, which is a little wide.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass
class FormRun:
    """One form's training with one seed."""

    history: list[Row] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)  # of the timed steps, which are the same ones in both forms
    test: Sums | None = None  # of the last weights; None without test images


@dataclass
class SeedRun:
    """The training of both forms with one seed."""

    seed: int
    forms: dict[str, FormRun] = field(default_factory=lambda: {form: FormRun() for form in FORMS})
    differences: list[float] = field(default_factory=list)  # of the two mean losses in each step, absolute


class StepBytes(NamedTuple):
    """Bytes of a training step."""

    kept: int  # by the forward pass for the backward pass
    peak: int | None  # the most at once, over what is there before the step; None on devices where nobody counts


def summary(runs: Sequence[SeedRun], taken: Mapping[str, StepBytes], amp: str) -> dict[str, Any]:
    """Returns the figures of the complete ``runs``, of which there is at least one, as comparison.json holds them.

    Losses are mean cross-entropies, errors and their differences are percent of the images, differences are
    fused - unfused within a seed, ratios are unfused / fused.
    """
    seeds: list[dict[str, Any]] = [
        {"seed": run.seed, **{form: _of_form(run.forms[form]) for form in FORMS}} for run in runs
    ]
    results = {}
    for name in RESULTS:
        ours, theirs = ([seed[form][name] for seed in seeds] for form in FORMS)
        if None not in ours:
            difference = _spread([a - b for a, b in zip(ours, theirs, strict=True)])
            difference["interval"] = _interval(difference, len(seeds))
            results[name] = {"fused": _spread(ours), "unfused": _spread(theirs), "difference": difference}
    return {
        "results": results,
        "loss_difference": {"rounding": torch.finfo(AMP[amp]).eps, "largest": _growth(runs)},
        "step": _step(runs, taken),
        "seeds": seeds,
    }


def _of_form(run: FormRun) -> dict[str, float | None]:
    last = run.history[-1]
    validated = [row.validation_error for row in run.history if row.validation_error is not None]
    return {
        "loss": last.loss,
        "error": last.error,
        "validation_error_best": min(validated, default=None),
        "validation_error_last": last.validation_error,
        "test_error": None if run.test is None else run.test.error,
    }


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {
        "mean": statistics.fmean(values),
        "deviation": statistics.stdev(values) if len(values) > 1 else None,
    }


def _interval(difference: Found, seeds: int) -> list[float] | None:
    """Returns the 95 % confidence interval of the mean difference, or None for fewer than three ``seeds``.

    From two seeds that differ by one image each it would be of no width.
    """
    if seeds < 3:
        return None
    half = _T[min(seeds - 1, len(_T)) - 1] * difference["deviation"] / math.sqrt(seeds)
    return [difference["mean"] - half, difference["mean"] + half]


def _growth(runs: Sequence[SeedRun]) -> list[dict[str, Any]]:
    """Returns the largest difference of the two losses up to steps 1, 10, 100, ... and to the last one."""
    steps = max(len(run.differences) for run in runs)
    marks = [*(10**power for power in range(9) if 10**power < steps), steps]
    return [{"steps": mark, "difference": max(max(run.differences[:mark]) for run in runs)} for mark in marks]


def _step(runs: Sequence[SeedRun], taken: Mapping[str, StepBytes]) -> dict[str, Any]:
    """Returns the costs of a step: seconds are medians over all seeds, their ratio is the median of the pairs."""
    seconds = {form: [value for run in runs for value in run.forms[form].seconds] for form in FORMS}
    pairs = [theirs / ours for ours, theirs in zip(seconds["fused"], seconds["unfused"], strict=True)]
    medians = {form: statistics.median(values) if values else None for form, values in seconds.items()}
    step: dict[str, Any] = {"timed": len(pairs)}  # steps of either form
    step["seconds"] = {**medians, "ratio": statistics.median(pairs) if pairs else None}
    for name in ("kept", "peak"):
        ours, theirs = (getattr(taken[form], name) for form in FORMS)
        step[f"{name}_bytes"] = {"fused": ours, "unfused": theirs, "ratio": theirs / ours if ours else None}
    return step


def csv_text(runs: Sequence[SeedRun]) -> str:
    """Returns comparison.csv: a row for each seed, form and epoch."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "form", *(field.name for field in dataclasses.fields(Row))])
    for run in runs:
        for form in FORMS:
            for row in run.forms[form].history:
                values = dataclasses.astuple(row)
                writer.writerow([run.seed, form, *("" if value is None else f"{value:.9g}" for value in values)])
    return text.getvalue()


# ---- the table -------------------------------------------------------------------------------------------------------


def cells(found: Found, names: Sequence[str] = (*RESULTS, *COSTS)) -> list[list[str]]:
    """Returns the rows of the table, its head first; of what was not measured there is none."""
    rows = [["", *FORMS, "fused against unfused"]]
    for name in names:
        if name in found["results"]:
            title, digits = RESULTS[name]
            of = found["results"][name]
            difference = _plus_minus(of["difference"], digits, "+")
            rows.append([title, *(_plus_minus(of[form], digits) for form in FORMS), difference])
        elif name in found["step"] and found["step"][name]["ratio"] is not None:
            title, factor = COSTS[name]
            cost = found["step"][name]
            rows.append([title, *(_three_digits(factor * cost[form]) for form in FORMS), _factor(cost["ratio"])])
    return rows


def sentences(found: Found) -> list[str]:
    """Returns what the table's numbers are, how far the first losses are apart, and whether the results differ."""
    seeds, step, difference = len(found["seeds"]), found["step"], found["loss_difference"]
    lines = [f"Mean ± standard deviation over {seeds} seeds."] if seeds > 1 else []
    if step["timed"]:
        lines.append(f"Time: medians of {step['timed']} steps of each form in turns; the factor is that of the pairs.")
    first = difference["largest"][0]["difference"]
    lines.append(f"Losses of the first step: at most {first:.1e} apart; one rounding is {difference['rounding']:.1e}.")
    name = next(name for name in ("test_error", "validation_error_last", "error") if name in found["results"])
    interval = found["results"][name]["difference"]["interval"]
    if interval is not None:
        low, high = interval
        verdict = "no difference is seen" if low <= 0 <= high else "the forms differ"
        words = RESULTS[name][0].removesuffix(", %").capitalize()
        lines.append(f"{words}: {low:+.2f} to {high:+.2f} points (95 % confidence), {verdict}.")
    return lines


def _plus_minus(spread: Found, digits: int, sign: str = "-") -> str:
    mean = round(spread["mean"], digits) + 0.0  # no -0.00
    text = f"{mean:{sign}.{digits}f}"
    return text if spread["deviation"] is None else f"{text} ± {spread['deviation']:.{digits}f}"


def _three_digits(value: float) -> str:
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"


def _factor(ratio: float) -> str:
    text = f"{max(ratio, 1 / ratio):.2f}"
    return "the same" if text == "1.00" else f"{text} times {'less' if ratio > 1 else 'more'}"
