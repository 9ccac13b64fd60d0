"""A run of the benchmarks, its results file and its tables, and that the pages show the committed results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import markdown, peers, table
from benchmarks.run import machine, run
from tests.support import pages

TINY = peers.Network("tiny", "A tiny DenseNet", 4, (2, 2), 8, 5, True, batch=2, image=8)


@pytest.fixture(scope="module")
def tiny_run() -> dict[str, table.Run]:
    lines: list[str] = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny tensors: threads would only wait for one another
    made = run(TINY, 2, None, False, lines.append)
    torch.set_num_threads(threads)
    assert len(lines) == len(made["rows"]) + 1
    return {"tiny": made}


def test_a_run_measures_everyone(tiny_run: dict[str, table.Run]) -> None:
    found = tiny_run["tiny"]
    assert json.loads(json.dumps(found)) == found
    rows = {row["contender"]: row for row in found["rows"]}
    assert list(rows) == [contender.name for contender in peers.contenders(TINY, compiled=False)]
    assert found["skipped"] == []
    plain = rows[found["baseline"]]
    assert not plain["ours"] and plain["how"] == peers.PLAIN
    for save in peers.LEVELS:
        ours = rows[f"densenet_ext, {save}, channels_last"]
        assert ours["ratios"][save] == {"median": 1.0, "low": 1.0, "high": 1.0}
        assert ours["kept_bytes"] < plain["kept_bytes"]
        ratio = plain["ratios"][save]
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    for row in rows.values():
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"], rel=1e-2)
        assert (row["network"], row["batch"], row["image"], row["dtype"]) == ("tiny", 2, 8, "float32")
        assert row["peak_bytes"] >= row["kept_bytes"] > 0


def test_machine_facts_name_the_machine_to_nobody() -> None:
    facts = machine()
    assert set(facts) == {"cpu", "simd", "torch", "python", "commit", "date"}
    assert facts["torch"] == torch.__version__ and facts["cpu"]
    assert str(Path.home()) not in json.dumps(facts)


def test_tables_show_the_rows(tiny_run: dict[str, table.Run]) -> None:
    made = dict(tiny_run["tiny"])
    made["skipped"] = [{"contender": "somebody", "reason": "no compiler"}]
    for text in (table.speed({"tiny": made}), table.memory({"tiny": made})):
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert len(lines) == 2 + len(made["rows"])
        assert len({line.count("|") for line in lines}) == 1
        assert "Not measured: somebody (no compiler)." in text
    fastest = table.fastest_peer(made["rows"])
    assert fastest is not None and f"The fastest peer is {fastest['contender']}:" in table.speed(tiny_run)


def test_the_summary_has_a_row_for_each_level_of_ours(tiny_run: dict[str, table.Run]) -> None:
    made = tiny_run["tiny"]
    rows = {row["contender"]: row for row in made["rows"]}
    peer, plain = table.fastest_peer(made["rows"]), rows[made["baseline"]]
    assert peer is not None
    caption, lines = table.summary(tiny_run).split("\n\n")
    assert caption.startswith("**A tiny DenseNet**, float32, 1 threads: ") and caption.endswith(", 2 rounds")
    head, _, *found = lines.splitlines()
    assert len(found) == len(peers.LEVELS)
    for save, line in zip(peers.LEVELS, found, strict=True):
        ours, ratio = rows[f"densenet_ext, {save}, channels_last"], peer["ratios"][save]
        assert line.count("|") == head.count("|")
        cells = line.strip("| ").split(" | ")
        assert cells[:4] == [
            "A tiny DenseNet, 8x8, batch 2",
            f'`"{save}"`',
            f"{ours['seconds']:.3f}",
            peer["contender"],
        ]
        assert cells[4] == f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
        assert cells[5::2] == [f"{ours[key] / 2**20:.1f}" for key in ("kept_bytes", "peak_bytes")]
        assert cells[6::2] == [f"{plain[key] / ours[key]:.2f}" for key in ("kept_bytes", "peak_bytes")]


def test_the_summary_says_once_how_networks_were_measured_together(tiny_run: dict[str, table.Run]) -> None:
    first = tiny_run["tiny"]
    together = table.summary({"a": first, "b": {**first, "title": "Another"}})
    assert together.startswith("**A tiny DenseNet and Another**, float32") and together.count("rounds") == 1
    apart = table.summary({"a": first, "b": {**first, "title": "Another", "rounds": 3}}).split("\n\n")
    assert [text[:10] for text in apart] == ["**A tiny D", "**Another*", "| network "]
    theirs = [row if row["ours"] else {**row, "who": "efficient"} for row in first["rows"]]
    named = table.summary({"a": {**first, "rows": theirs}})
    assert named.count("| gpleiss/efficient_densenet_pytorch, ") == len(peers.LEVELS)
    alone = table.summary({"a": {**first, "rows": [row for row in first["rows"] if row["ours"]], "baseline": None}})
    assert alone.count("| - | - | ") == len(peers.LEVELS)


MARKED = "a\n<!-- benchmarks:{0} -->\n{1}<!-- /benchmarks:{0} -->\nz\n"


def test_rewriting_touches_only_what_stands_between_the_markers() -> None:
    old = MARKED.format("speed", "") + "between\n" + MARKED.format("memory", "old\n")
    new = table.rewrite("docs/users/measured.md", old, {"speed": "1", "memory": "2\n3", "depth": "4"})
    assert new == MARKED.format("speed", "1\n") + "between\n" + MARKED.format("memory", "2\n3\n")
    # Without its file a table is not shown any longer.
    assert table.rewrite("docs/users/measured.md", new, {"speed": "1"}) == new.replace("2\n3\n", "")


@pytest.mark.parametrize(
    "text, message",
    [
        (MARKED.format("speed", ""), "markers <!-- benchmarks:memory --> and <!-- /benchmarks:memory -->, got neither"),
        ("<!-- benchmarks:speed -->", "and /benchmarks:name next, got speed$"),
        ("<!-- /benchmarks:speed --><!-- benchmarks:speed -->", "next, got /speed, speed$"),
        (MARKED.format("speed", MARKED.format("memory", "")), "next, got speed, memory, /memory, /speed$"),
        (2 * MARKED.format("speed", ""), "next, got speed, /speed, speed, /speed$"),
        (MARKED.format("depth", ""), "memory, gpu-networks, gpu-kernels, compare only, got benchmarks:depth$"),
    ],
    ids=["none", "open", "reversed", "nested", "twice", "another-page"],
)
def test_wrong_markers_are_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=f"^docs/users/measured.md: expected .*{message}"):
        table.rewrite("docs/users/measured.md", text, {"speed": "1", "memory": "2"})


def compared() -> dict[str, Any]:
    """What `densenet-ext compare` might have written."""

    def spread(mean: float, deviation: float) -> dict[str, Any]:
        return {"mean": mean, "deviation": deviation}

    def cost(fused: float, unfused: float) -> dict[str, float]:
        return {"fused": fused, "unfused": unfused, "ratio": unfused / fused}

    difference = {**spread(-0.1, 0.5), "interval": [-0.72, 0.52]}
    result = {"fused": spread(2.3, 0.4), "unfused": spread(2.4, 0.5), "difference": difference}
    names = ("loss", "error", "validation_error_best", "validation_error_last", "test_error")
    return {
        "data": "digits",
        "model": "densenet_bc:22,12",
        "options": {"epochs": 30, "batch_size": 64},
        "machine": {"device": "A processor", "threads": 2, "torch": "2.13.0", "date": "2026-11-25"},
        "seeds": [{"seed": seed} for seed in range(5)],
        "results": dict.fromkeys(names, result),
        "loss_difference": {"rounding": 1.2e-7, "largest": [{"steps": 1, "difference": 2.4e-7}]},
        "step": {
            "timed": 2985,
            "seconds": cost(0.03, 0.06),
            "ratio_of_medians": 2.0,
            "kept_bytes": cost(2**20, 2**22),
            "peak_bytes": cost(2**21, 2**22),
        },
    }


def test_the_table_of_a_comparison_is_small() -> None:
    text = table.compare(compared())
    assert text.startswith("**densenet_bc:22,12 on digits**, 30 epochs, batch 64, 5 seeds, 2 threads: A processor, ")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 8 and {line.count("|") for line in lines} == {5}
    assert "| test error, % | 2.30 ± 0.40 | 2.40 ± 0.50 | -0.10 ± 0.50 |" in lines
    assert "| kept for the backward pass, MiB | 1.00 | 4.00 | 4.00 times less |" in lines
    assert "first step: at most 2.4e-07 apart" in text and "Test error: -0.72 to +0.52 points" in text


def test_the_table_of_a_comparison_comes_from_its_file_where_there_is_one(tmp_path: Path) -> None:
    path = tmp_path / "compare-digits.json"
    assert table.of_file(path) == {}
    path.write_text(json.dumps(compared()))
    assert table.of_file(path) == {"compare": table.compare(compared())}
    path.write_text('{"results": {}}')
    with pytest.raises(ValueError, match="compare-digits.json: expected a results file"):
        table.of_file(path)


def test_tables_have_as_many_cells_in_every_line() -> None:
    lines = markdown.table(("a", "b", "c"), [("x", 1, 2.5), ("y", 3, "-")], "lrr").splitlines()
    assert lines == ["| a | b | c |", "|---|--:|--:|", "| x | 1 | 2.5 |", "| y | 3 | - |"]
    for rows, align in (([("x", 1)], "lrr"), ([("x", 1, 2)], "lr")):
        with pytest.raises(ValueError, match="expected 3 columns, got 2"):
            markdown.table(("a", "b", "c"), rows, align)


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"runs": 3}'):
        (tmp_path / "cpu.json").write_text(text)
        with pytest.raises(ValueError, match="cpu.json: expected"):
            table.load(tmp_path / "cpu.json")


def test_every_table_has_one_place() -> None:
    names = [name for names in table.PAGES.values() for name in names]
    assert sorted(names) == sorted([*table.RENDERERS, *(name for file in table.BESIDE.values() for name in file)])


@pytest.mark.parametrize("page", pages.PAGES, ids=lambda page: page.name)
def test_every_page_shows_the_committed_results(page: Path) -> None:
    name, text = page.relative_to(table.ROOT).as_posix(), page.read_text(encoding="utf-8")
    if name not in table.PAGES:
        assert "<!-- benchmarks:" not in text, f"nobody writes {name}: it is missing in table.PAGES"
    elif not table.RESULTS.is_file():
        pytest.skip("no results are committed")
    else:
        assert text == table.rewrite(name, text, table.of_results()), "run `python -m benchmarks table`"


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    testing = pytest.importorskip("typer.testing")
    from benchmarks.__main__ import app

    monkeypatch.setitem(peers.NETWORKS, "bc100", TINY)
    yield lambda *arguments: testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_a_run_keeps_the_other_networks_figures_and_the_table_command_writes(
    command: Callable[..., Any], tiny_run: dict[str, table.Run], tmp_path: Path
) -> None:
    out = tmp_path / "results" / "cpu.json"
    out.parent.mkdir()
    out.write_text(json.dumps({"runs": tiny_run}))
    options = ("--network", "bc100", "--rounds", 1, "--threads", 1, "--batch-size", 3, "--no-compile", "--out", out)
    result = command(*options)
    assert result.exit_code == 0, result.output
    runs = table.load(out)
    assert list(runs) == ["tiny", "bc100"] and runs["tiny"] == tiny_run["tiny"]
    assert {row["batch"] for row in runs["bc100"]["rows"]} == {3}
    assert {row["threads"] for row in runs["bc100"]["rows"]} == {1}

    def shown(tables: dict[str, str]) -> dict[str, str]:
        return {
            page: "".join(MARKED.format(name, f"{tables[name]}\n" if name in tables else "") for name in names)
            for page, names in table.PAGES.items()
        }

    def written() -> dict[str, str]:
        return {page: (tmp_path / page).read_text() for page in table.PAGES}

    for page, text in shown({}).items():
        (tmp_path / page).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / page).write_text(text)
    options = ("table", "--root", tmp_path, "--results")
    assert command(*options, tmp_path / "none.json").exit_code == 1
    assert command(*options, out).output == "README.md: unchanged\ndocs/users/measured.md: tables rewritten\n"
    tables = {name: render(runs) for name, render in table.RENDERERS.items()}
    assert written() == shown(tables)
    out.with_name("compare-digits.json").write_text(json.dumps(compared()))
    assert command(*options, out).output == "README.md: unchanged\ndocs/users/measured.md: tables rewritten\n"
    assert written() == shown({**tables, "compare": table.compare(compared())})
    # Where one page can't be written, none is.
    (tmp_path / "docs" / "users" / "measured.md").write_text("no markers")
    out.with_name("compare-digits.json").unlink()
    before = written()
    assert command(*options, out).exit_code == 1 and written() == before


def test_bad_options_are_refused(command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("no results")
    for options, name in (
        (("--efficient", tmp_path), "--efficient"),
        (("--out", tmp_path / "bad.json"), "--out"),
        (("--rounds", 0), "--rounds"),
        (("--network", "resnet"), "--network"),
    ):
        result = command(*options)
        assert result.exit_code == 2 and name in result.output
