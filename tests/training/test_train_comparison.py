"""The figures of `densenet-ext compare`, from made-up runs: over seeds, in words, in the picture, and on a terminal."""

from __future__ import annotations

import io
import json
import sys
from dataclasses import replace

import pytest

pytest.importorskip("lightning_fabric")
pytest.importorskip("tqdm")

from densenet_ext.training.compare import command as comparing
from densenet_ext.training.compare import comparison
from densenet_ext.training.compare.comparison import FORMS, FormRun, SeedRun, StepBytes
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
    assert found["seeds"][0]["loss_difference"][0]["difference"] == pytest.approx(1e-7)
    step = found["step"]
    assert step["timed"] == 9 and step["seconds"] == {"fused": 0.012, "unfused": 0.024, "ratio": 2.0}
    assert step["kept_bytes"] == {"fused": 2**20, "unfused": 5 * 2**20, "ratio": 5.0}
    rows = {row[0]: row[1:] for row in comparison.cells(found)}
    assert rows["test error, %"] == ["20.00 ± 10.00", "22.00 ± 10.54", "-2.00 ± 1.00"]
    assert rows["time per step, ms"] == ["12.0", "24.0", "2.00 times less"]
    assert rows["peak of a step, MiB"] == ["3.00", "4.00", "1.33 times less"]
    words = " ".join(comparison.sentences(found))
    assert (
        "3.0e-07 in step 1 (one rounding is 1.2e-07 of a value); training amplifies it: 3.0e-06 up to step 10" in words
    )
    assert "between -4.48 and +0.48 points (95 % confidence): no difference is seen" in words


def test_a_difference_that_the_seeds_do_not_explain_is_named():
    runs = [made_up(seed, 20.0 + seed, 50.0 + 1.1 * seed) for seed in range(12)]
    words = " ".join(comparison.sentences(comparison.summary(runs, TAKEN, "off")))
    assert "Test error: the mean difference is between -30.9" in words and words.endswith("the forms differ.")


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
    assert len(words) == 2 and "one rounding is 7.8e-03" in words[0] and "more --seeds" in words[1]


def test_the_picture_is_drawn_from_both_forms(monkeypatch, tmp_path):
    from densenet_ext.training.compare import picture

    drawn = []
    monkeypatch.setattr(picture, "draw_comparison", lambda *given: drawn.append(given))
    runs = [made_up(0, 10.0, 11.0), made_up(1, 12.0, 14.0)]
    found = {"model": "densenet_bc:10,4", "data": "digits", **comparison.summary(runs, TAKEN, "off")}
    comparing.draw(runs, found, tmp_path / "picture.png")
    [(fused, unfused, path, title)] = drawn
    assert path == tmp_path / "picture.png"
    assert title == "Fused and unfused training: densenet_bc:10,4 on digits, 2 seeds"
    for form, each, seconds in (("fused", fused, 0.012), ("unfused", unfused, 0.024)):
        assert [[row["validation_error"] for row in history] for history in each.histories] == [
            [row.validation_error for row in run.forms[form].history] for run in runs
        ]
        assert each.seconds_per_step == seconds and (each.bytes_kept, each.peak_bytes) == TAKEN[form]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_there_is_one_bar_and_no_line(monkeypatch, capsys):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = comparing._Progress(seeds=2, epochs=2, images=100)
    for seed in (0, 1):
        run = made_up(seed, 10.0, 11.0)
        for _ in range(4):
            progress.show(run, 50)
        progress.show(run, 0)
    progress.close()
    assert "seed 1, epoch 2/2: 100%" in terminal.getvalue()
    assert capsys.readouterr().out == ""
