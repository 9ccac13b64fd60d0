"""The benchmark of small and large batches: its rows, the time that it may take, and its two tables."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks import peers, workloads
from densenet_ext import _extension

TINY = peers.Network("tiny", "A tiny DenseNet", 4, (2, 2), 8, 5, True, batch=2, image=8)


def no_words(_: object) -> None:
    return None


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> list[workloads.Workload]:
    monkeypatch.setitem(peers.NETWORKS, "tiny", TINY._replace(num_classes=10))
    monkeypatch.setattr(workloads, "SHORTEST", 1e-4)
    monkeypatch.setattr(workloads, "onnx_runtime", unavailable)
    monkeypatch.setattr(workloads, "open_vino", unavailable)
    return [
        workloads.Workload("tiny", mode, batch, 8)
        for mode, batch in (("training", 2), ("inference", 2), ("inference", 1))
    ]


def unavailable(*_: object) -> Any:
    raise peers.Unavailable("not here")


@pytest.mark.skipif(_extension.module is None, reason=f"no compiled part: {_extension.why_missing}")
def test_rows_are_saved_one_by_one_and_none_is_begun_too_late(tiny: list[workloads.Workload]) -> None:
    saved: list[int] = []
    found = workloads.run(tiny, 2, False, no_words, lambda found: saved.append(len(found["rows"])))
    assert saved == [1, 2, 3, 4, 6, 8] and found["threads"] == torch.get_num_threads()
    forms = [workloads.OURS, workloads.PACKED]
    for row in found["rows"]:
        ours = forms if row["mode"] == "inference" and row["batch"] == 1 else forms[:1]
        assert list(row["milliseconds"]) == [*ours, "PyTorch, channels_last", "PyTorch, contiguous"]
        assert row["fastest"] not in forms and row["ours"] in ours
        assert set(row["missing"]) == (set() if row["mode"] == "training" else {"ONNX Runtime", "OpenVINO"})
    words: list[str] = []
    assert workloads.run(tiny, 2, False, words.append, no_words, seconds=-1)["rows"] == []
    assert len(words) == 6 and all(text.endswith("no time is left") for text in words)


def test_the_tables_have_a_line_a_row_and_a_line_a_workload() -> None:
    def row(mode: str, dtype: str, ours: float, ratio: float, form: str = workloads.OURS) -> dict[str, Any]:
        times = {form: ours, "OpenVINO": ours * ratio, "PyTorch, contiguous": 99.0}
        found = {"mode": mode, "title": "A, 8^2, batch 2", "dtype": dtype, "milliseconds": times}
        return {**found, "fastest": "OpenVINO", "ours": form, "ratio": [ratio, 1.0, 9.0]}

    about = {"cpu": "A", "simd": "s", "torch": "t", "commit": "c", "date": "d"}
    rows = [row("training", "float32", 10.0, 2.0), row("training", "bfloat16", 4.0, 1.5)]
    rows += [row("inference", "float32", 2.0, 0.5), row("inference", "float32", 1.0, 1.0, workloads.PACKED)]
    found = {"machine": about, "threads": 2, "rounds": 7, "rows": rows}
    caption, whole = workloads.table(found).split("\n\n")
    assert caption == "2 threads, 7 rounds, medians: A (s), torch t, commit c, d; others: OpenVINO; PyTorch, contiguous"
    assert whole.splitlines()[2:] == [
        "| training: A, 8^2, batch 2 | float32 | 10.0 | OpenVINO | 20.0 | **2.00** (1.00 to 9.00) |",
        "| training: A, 8^2, batch 2 | bfloat16 | 4.0 | OpenVINO | 6.0 | **1.50** (1.00 to 9.00) |",
        "| inference: A, 8^2, batch 2 | float32 | 2.0 | OpenVINO | 1.0 | **0.50** (1.00 to 9.00) |",
        "| inference: A, 8^2, batch 2, packed weights | float32 | 1.0 | OpenVINO | 1.0 | **1.00** (1.00 to 9.00) |",
    ]
    again, short = workloads.summary(found).split("\n\n")
    assert again == caption and short.splitlines()[2:] == [
        "| training: A, 8^2, batch 2 | 10.0 | OpenVINO | **2.00** (1.00 to 9.00) | 4.0 | OpenVINO "
        "| **1.50** (1.00 to 9.00) |",
        "| inference: A, 8^2, batch 2 | 2.0 | OpenVINO | **0.50** (1.00 to 9.00) | - | - | - |",
        "| inference: A, 8^2, batch 2, packed weights | 1.0 | OpenVINO | **1.00** (1.00 to 9.00) | - | - | - |",
    ]
