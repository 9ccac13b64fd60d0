"""The figures of `densenet-ext compare`, from made-up runs: over seeds, in words, in the picture, and on a terminal."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("tqdm")

from densenet_ext.compare import comparison
from densenet_ext.compare.comparison import FORMS, FormRun, SeedRun, StepBytes
from densenet_ext.training.metrics import Row, Sums


def made_up(seed: int, ours: float, theirs: float, steps: int = 250) -> SeedRun:
    """Two epochs whose last errors are ``ours`` fused and ``theirs`` unfused; unfused steps take twice as long."""
    forms = {}
    for form, error, factor in (("fused", ours, 1), ("unfused", theirs, 2)):
        history = [Row(epoch, 0.1, error / 10, error, 0.5, error + 3 - epoch) for epoch in (1, 2)]
        seconds = [0.010 * factor, 0.012 * factor, 0.030 * factor]
        forms[form] = FormRun(history, seconds, Sums(1.0, round(error), 100))
    return SeedRun(seed, forms, [1e-7 * (step + 1) * (seed + 1) for step in range(steps)])


TAKEN = {"fused": StepBytes(2**20, 3 * 2**20), "unfused": StepBytes(5 * 2**20, 4 * 2**20)}


def test_a_summary_pairs_the_seeds():
    runs = [made_up(0, 10.0, 11.0), made_up(1, 20.0, 23.0), made_up(2, 30.0, 32.0)]
    found = comparison.summary(runs, TAKEN, "off")
    error = found["results"]["error"]
    assert error["fused"] == {"mean": 20.0, "deviation": 10.0}
    assert error["unfused"]["mean"] == 22.0
    assert (error["difference"]["mean"], error["difference"]["deviation"]) == (-2.0, 1.0)
    half = 4.303 / 3**0.5
    assert error["difference"]["interval"] == pytest.approx([-2 - half, -2 + half])
    assert found["results"]["validation_error_best"]["fused"]["mean"] == 21.0
    growth = found["loss_difference"]["largest"]
    assert [each["steps"] for each in growth] == [1, 10, 100, 250]
    assert [each["difference"] for each in growth] == pytest.approx([3e-7, 3e-6, 3e-5, 7.5e-5])
    step = found["step"]
    assert step["timed"] == 9 and step["seconds"] == {"fused": 0.012, "unfused": 0.024, "ratio": 2.0}
    assert step["kept_bytes"] == {"fused": 2**20, "unfused": 5 * 2**20, "ratio": 5.0}
    rows = {row[0]: row[1:] for row in comparison.cells(found)}
    assert rows["test error, %"] == ["20.00 ± 10.00", "22.00 ± 10.54", "-2.00 ± 1.00"]
    assert rows["time per step, ms"] == ["12.0", "24.0", "2.00 times less"]
    assert rows["peak of a step, MiB"] == ["3.00", "4.00", "1.33 times less"]
    words = " ".join(comparison.sentences(found))
    assert "Losses of the first step: at most 3.0e-07 apart; one rounding is 1.2e-07." in words
    assert "Test error: -4.48 to +0.48 points (95 % confidence), no difference is seen" in words


def test_a_difference_that_the_seeds_do_not_explain_is_named():
    runs = [made_up(seed, 20.0 + seed, 50.0 + 1.1 * seed) for seed in range(12)]
    words = " ".join(comparison.sentences(comparison.summary(runs, TAKEN, "off")))
    assert "Test error: -30.9" in words and words.endswith("the forms differ.")


def test_what_was_not_measured_has_no_row():
    one = made_up(0, 10.0, 11.0)
    for form in FORMS:
        one.forms[form].history[:] = [replace(r, validation_error=None) for r in one.forms[form].history]
        one.forms[form].seconds.clear()
        one.forms[form].test = None
    found = comparison.summary([one], dict.fromkeys(FORMS, StepBytes(7, None)), "bf16")
    assert json.loads(json.dumps(found)) == found
    titles = [row[0] for row in comparison.cells(found)]
    assert titles == ["", *(comparison.RESULTS[n][0] for n in ("loss", "error")), comparison.COSTS["kept_bytes"][0]]
    assert comparison.cells(found)[2][1:] == ["10.00", "11.00", "-1.00"]
    assert comparison.cells(found)[3][3] == "the same"
    words = comparison.sentences(found)
    assert len(words) == 1 and "one rounding is 7.8e-03" in words[0]
