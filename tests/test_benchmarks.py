"""The benchmarks: what they measure on things whose size is known, and that README.md shows the committed results."""

from __future__ import annotations

import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from benchmarks import measure, peers, table
from benchmarks.run import copy_state, machine, run

TINY = peers.Network("tiny", "A tiny DenseNet", 4, (2, 2), 8, 5, True, batch=2, image=8)
FLOAT = 4  # bytes


def clock_of(seconds: dict[str, float]) -> Callable[[Callable[[], object]], float]:
    """A clock that reads the step's name instead of running it."""
    return lambda step: seconds[str(step())]


def steps(*names: str) -> dict[str, Callable[[], object]]:
    return {name: functools.partial(str, name) for name in names}


# ---- rounds and ratios -----------------------------------------------------------------------------------------------


def test_every_step_runs_once_a_round_and_the_order_rotates() -> None:
    order: list[str] = []
    ticks = itertools.count(1)

    def clock(step: Callable[[], object]) -> float:
        order.append(str(step()))
        return float(next(ticks))

    times = measure.interleave(steps("a", "b", "c"), 4, clock=clock)
    assert "".join(order) == "abcbcacababc"
    assert times == {"a": [1, 6, 8, 10], "b": [2, 4, 9, 11], "c": [3, 5, 7, 12]}


def test_a_peer_that_is_far_slower_runs_in_fewer_rounds_and_ours_in_all() -> None:
    seconds = {"ours": 9.0, "fast": 1.0, "near": 1.2, "slow": 2.0}
    times = measure.interleave(steps(*seconds), 7, ["fast", "near", "slow"], clock_of(seconds))
    assert times["slow"] == [2.0, None, None, 2.0, None, None, 2.0]
    for name in ("ours", "fast", "near"):
        assert times[name] == [seconds[name]] * 7


def test_ratios_are_paired_within_a_round() -> None:
    # Every round is slower than the last; peer over ours is 2, 3 and 4 all the same.
    assert measure.ratio([2, 30, 400], [1, 10, 100]) == (3, 2, 4)
    assert measure.ratio([2, None, 400], [1, 10, 100]) == (3, 2, 4)
    assert measure.median([1, None, 5, 2]) == 2
    with pytest.raises(ValueError, match="at least one round that ran both"):
        measure.ratio([None], [1.0])


def test_seconds_is_the_wall_time() -> None:
    assert 0.02 <= measure.seconds(lambda: time.sleep(0.02)) < 1


# ---- bytes -----------------------------------------------------------------------------------------------------------


def test_saved_bytes_counts_a_storage_once_and_leaves_out_what_exists() -> None:
    x = torch.randn(10, 20, requires_grad=True)

    def forward() -> Tensor:
        y = x.exp()  # saves y, 200 values
        return (y * y[:5].repeat(2, 1) * x).sum()  # y and x again, the repeated half, and the first product

    assert measure.saved_bytes(forward, [x]) == 3 * 200 * FLOAT
    assert measure.saved_bytes(forward) == 4 * 200 * FLOAT
    with torch.no_grad():
        assert measure.saved_bytes(forward) == 0


def test_allocations_are_over_the_start_of_the_step() -> None:
    held_before = torch.zeros(5000)

    def forward() -> Tensor:
        torch.zeros(3000)  # in use for a moment
        return torch.zeros(1000)

    def rest(value: Tensor) -> None:
        torch.zeros(4000)

    memory = measure.allocations(forward, rest)
    assert memory == (1000 * FLOAT, 5000 * FLOAT)
    assert measure.allocations(lambda: torch.zeros(7), lambda value: None) == (7 * FLOAT, 7 * FLOAT)
    del held_before


def test_memory_of_a_trace() -> None:
    def change(at: float, size: int, device: int = 0) -> dict[str, object]:
        return {"name": "[memory]", "ts": at, "args": {"Bytes": size, "Device Type": device}}

    events = [
        change(3, -30),
        change(1, 10),
        change(2, 30),
        change(2, 1000, device=1),
        {"name": "benchmark_forward", "ts": 0.5, "dur": 3},
        change(4, 25),
        change(5, -35),
        {"name": "aten::add", "ts": 6, "dur": 1},
        {},
    ]
    assert measure.memory_of(events) == (10, 40)


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_a_step_frees_what_it_took_and_both_counts_agree(save: str) -> None:
    model = dx.DenseNet(**TINY.keywords(), small_inputs=True, save=save)
    step = measure.Step(model, torch.randn(2, 3, 8, 8), torch.tensor([0, 4]))
    step()  # momentum and its like stay
    before = [parameter.detach().clone() for parameter in model.parameters()]
    memory = measure.allocations(step.forward, step.backward)
    saved = measure.saved_bytes(step.forward, [*model.parameters(), *model.buffers(), step.images, step.labels])
    loss = FLOAT
    assert memory.kept == saved + loss
    assert memory.peak > memory.kept
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


# ---- contenders ------------------------------------------------------------------------------------------------------


def test_networks_are_those_of_the_papers() -> None:
    built = {}
    for name, network in peers.NETWORKS.items():
        with torch.device("meta"):
            built[name] = next(peers.contenders(network)).build()
    with torch.device("meta"):
        expected = {"bc100": dx.densenet_bc(100, 12), "densenet121": dx.densenet121()}
    for name, model in expected.items():
        assert [p.shape for p in built[name].parameters()] == [p.shape for p in model.parameters()]
    assert sum(p.numel() for p in built["bc100"].parameters()) == 769_162


@pytest.mark.parametrize("small_inputs", [True, False])
def test_contenders_have_distinct_names_and_the_same_parameters(small_inputs: bool) -> None:
    network = TINY._replace(small_inputs=small_inputs)
    made = list(peers.contenders(network))
    names = [contender.name for contender in made]
    assert len(set(names)) == len(names)
    assert any(contender.how == peers.PLAIN and not contender.ours for contender in made)
    for save in peers.LEVELS:  # what the ratios refer to
        assert f"densenet_ext, {save}, channels_last" in names
    source = made[0].build()
    for contender in made:
        try:
            model = contender.build()
        except peers.Unavailable:
            assert "torchvision" in contender.name
            continue
        copy_state(source, model)
        for a, b in zip(source.parameters(), model.parameters(), strict=True):
            assert torch.equal(a, b)


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"shape \[3, 2\], got \[2, 3\]"):
        copy_state(nn.Linear(2, 3, bias=False), nn.Linear(3, 2, bias=False))


def test_a_clone_is_loaded_from_its_path(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "densenet.py").write_text("class DenseNet:\n    here = __file__\n")
    assert vars(peers.efficient_densenet(tmp_path))["here"] == str(tmp_path / "models" / "densenet.py")
    with pytest.raises(peers.Unavailable, match="no models/densenet.py"):
        peers.efficient_densenet(tmp_path / "models")


def test_reasons_hold_no_paths() -> None:
    error = RuntimeError("g++ /some/where/x.cpp -o '/else/where': not found, 3/4 done\nand more")
    assert peers.reason(error) == "g++ ... -o '...': not found, 3/4 done"
    assert peers.reason(KeyError()) == "KeyError"


# ---- a run and its tables --------------------------------------------------------------------------------------------


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


def test_rewriting_touches_only_what_stands_between_the_markers(tiny_run: dict[str, table.Run]) -> None:
    marked = "a\n<!-- benchmarks:{0} -->\n{1}<!-- /benchmarks:{0} -->\nz\n"
    old = marked.format("speed", "") + "between\n" + marked.format("memory", "old\n")
    new = table.rewrite(old, tiny_run)
    speed, memory = (f"{render(tiny_run)}\n" for render in (table.speed, table.memory))
    assert new == marked.format("speed", speed) + "between\n" + marked.format("memory", memory)
    assert table.rewrite(new, tiny_run) == new
    with pytest.raises(ValueError, match="benchmarks:memory"):
        table.rewrite(marked.format("speed", ""), tiny_run)


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    for text in ("", "[]", '{"runs": 3}'):
        (tmp_path / "cpu.json").write_text(text)
        with pytest.raises(ValueError, match="cpu.json: expected"):
            table.load(tmp_path / "cpu.json")


def test_readme_shows_the_committed_results() -> None:
    if not table.RESULTS.is_file():
        pytest.skip("no results are committed")
    text = table.README.read_text(encoding="utf-8")
    assert text == table.rewrite(text, table.load(table.RESULTS), table.of_gpu()), "run `python -m benchmarks table`"


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
    out, readme = tmp_path / "results" / "cpu.json", tmp_path / "README.md"
    out.parent.mkdir()
    out.write_text(json.dumps({"runs": tiny_run}))
    options = ("--network", "bc100", "--rounds", 1, "--threads", 1, "--batch-size", 3, "--no-compile", "--out", out)
    result = command(*options)
    assert result.exit_code == 0, result.output
    runs = table.load(out)
    assert list(runs) == ["tiny", "bc100"] and runs["tiny"] == tiny_run["tiny"]
    assert {row["batch"] for row in runs["bc100"]["rows"]} == {3}
    assert {row["threads"] for row in runs["bc100"]["rows"]} == {1}

    text = "".join(f"<!-- benchmarks:{name} --><!-- /benchmarks:{name} -->" for name in table.RENDERERS)
    readme.write_text(text)
    assert command("table", "--results", out, "--readme", readme).exit_code == 0
    assert readme.read_text() == table.rewrite(text, runs)
    result = command("table", "--results", tmp_path / "none.json", "--readme", readme)
    assert result.exit_code == 1


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
