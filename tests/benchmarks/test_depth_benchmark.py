"""The benchmark of deep networks: what a row counts, that an interrupted run goes on, its table and its picture."""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch

from benchmarks import depth, table
from densenet_ext import _extension
from tests.support import forks

pytestmark = pytest.mark.skipif(_extension.module is None, reason=f"no compiled part: {_extension.why_missing}")
SHALLOW = [depth.Depth(depth.OURS, 10), depth.Depth(depth.THEIRS, 10)]


def no_words(_: object) -> None:
    return None


def end_the_process(*_: object) -> None:
    os._exit(1)


def run(depths: list[depth.Depth], earlier: Any, save: Callable[[Any], None] = no_words, **changed: Any) -> Any:
    settings: dict[str, Any] = {"rounds": 1, "batch": 2, "image": 8, "threads": torch.get_num_threads()}
    settings = {**settings, "say": no_words, "save": save, **changed}
    # its processes: new ones, too, but with their imports done
    server = SimpleNamespace(get_context=lambda _: forks.server())
    with mock.patch.object(depth, "multiprocessing", server):
        return depth.run(depths, earlier, **settings)


def test_both_forms_have_the_same_parameters() -> None:
    for layers in (10, 22):
        ours, theirs = (depth.model_of(depth.Depth(form, layers)) for form in (depth.OURS, depth.THEIRS))
        assert [p.shape for p in ours.parameters()] == [p.shape for p in theirs.parameters()]


def test_a_row_holds_what_a_later_step_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "PATIENCE", 1000.0)
    threads = torch.get_num_threads()
    ours, theirs = (depth.measured(each, 4, 8, threads) for each in SHALLOW)
    for row in (ours, theirs):
        assert row["steps"] == 5 and row["seconds"] > 0
        # parameters, momentum, and what is kept or the gradients, whatever is more
        assert row["peak_bytes"] >= 8 * row["parameters"] + max(row["kept_bytes"], 4 * row["parameters"])
        assert row["resident_bytes"] > row["peak_bytes"]
    assert ours["parameters"] == theirs["parameters"] and ours["kept_bytes"] < theirs["kept_bytes"]
    monkeypatch.setattr(depth, "PATIENCE", 0.0)
    assert depth.measured(SHALLOW[0], 4, 8, threads)["steps"] == 1


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    saved: list[int] = []
    result: dict[str, Any] = run(SHALLOW, None, lambda found: saved.append(len(found["rows"])))
    assert saved == [0, 1, 2]  # the levels of saving first
    return result


@pytest.mark.skipif(depth.resident_peak() is None, reason="the system does not tell")
def test_a_process_does_not_count_what_its_parent_held() -> None:
    ballast = torch.ones(2**27)  # 512 MiB
    here = depth.resident_peak()
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as processes:
        there = processes.submit(depth.resident_peak).result()
    assert here is not None and there is not None and there < here
    assert here > 4 * ballast.numel()


def test_an_interrupted_run_goes_on(found: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    assert json.loads(json.dumps(found)) == found
    assert [(row["form"], row["layers"]) for row in found["rows"]] == SHALLOW
    monkeypatch.setattr(depth, "measured", end_the_process)
    monkeypatch.setattr(depth, "levels", lambda *_: {"rounds": 0})
    assert run(SHALLOW, found) == found  # nothing is measured again
    other_day = {**found, "machine": {**found["machine"], "date": "2000-01-01"}}
    assert run(SHALLOW, other_day) == other_day
    for changed in ({**found, "batch": 3}, {**found, "machine": {**found["machine"], "commit": "another"}}):
        assert run([], changed)["rows"] == []


def test_a_process_that_is_ended_leaves_its_row_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(depth, "measured", end_the_process)
    monkeypatch.setattr(depth, "levels", lambda *_: {"rounds": 0})
    words: list[str] = []
    assert run(SHALLOW[:1], None, say=words.append)["rows"] == []
    assert "10 layers" in words[0] and "was ended" in words[0]


def test_the_table_and_the_picture(found: dict[str, Any], tmp_path: Path) -> None:
    text = depth.table(found)
    picture, _, rows, levels = text.split("\n\n")
    assert picture == depth.PICTURE and f"({(depth_picture()).relative_to(table.ROOT)})" in picture
    assert len(rows.splitlines()) == 2 + len(found["rows"])
    median, low, high = found["levels"]["ratio"]
    assert f"{median:.2f} ({low:.2f} to {high:.2f}) times" in levels and low <= median <= high
    pytest.importorskip("matplotlib")
    depth.draw(found, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")


def depth_picture() -> Path:
    """Where the command draws."""
    return table.ROOT / "docs" / "pictures" / "depth.png"


def test_the_command_goes_on_and_refuses_other_files(
    found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    testing = pytest.importorskip("typer.testing")
    pytest.importorskip("matplotlib")
    from benchmarks.__main__ import app

    monkeypatch.setattr(depth, "DEPTHS", SHALLOW)
    out, picture = tmp_path / "depth.json", tmp_path / "depth.png"
    out.write_text(json.dumps(found))
    options = ["depth", "--batch-size", 2, "--image", 8, "--threads", found["threads"], "--out", out]
    result = testing.CliRunner().invoke(app, [str(option) for option in [*options, "--picture", picture]])
    assert result.exit_code == 0, result.output
    assert depth.table(found) in result.output and picture.is_file()
    result = testing.CliRunner().invoke(app, [str(option) for option in [*options, "--picture", tmp_path]])
    assert result.exit_code == 2 and "--picture" in result.output
    out.write_text("[]")
    result = testing.CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 2 and "--out" in result.output
