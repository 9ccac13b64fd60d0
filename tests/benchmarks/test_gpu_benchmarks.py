"""The benchmarks of networks on a GPU, as far as a processor can run them, and the tables and commands of all."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu_table, kernels, measure, networks, peers, table
from densenet_ext import _extension
from tests.benchmarks.tiny import CPU, SMALL, TINY, no_words

pytestmark = pytest.mark.skipif(_extension.module is None, reason=f"no compiled part: {_extension.why_missing}")


# ---- whole networks --------------------------------------------------------------------------------------------------


def test_cases_begin_with_what_matters_and_are_complete() -> None:
    found = networks.cases()
    keys = [case.key for case in found]
    assert len(set(keys)) == len(keys)
    assert keys[:2] == ["densenet121, training, bfloat16, batch 256", "densenet121, training, bfloat16, batch 64"]
    for name in ("densenet121", "densenet201", "densenet264", "bc100"):
        for mode in ("training", "inference"):
            for dtype in ("bfloat16", "float32"):
                for batch in (1, 16, 64, 256):
                    assert f"{name}, {mode}, {dtype}, batch {batch}" in keys
        assert f"{name}, training, bfloat16, batch 64, compiled" in keys


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("network", [TINY, SMALL], ids=lambda n: n.name)
def test_contenders_of_a_case(network: peers.Network, training: bool) -> None:
    found = list(networks.contenders(networks.Case(network, training, torch.float32)))
    names = [contender.name for contender in found]
    assert len(set(names)) == len(names)
    assert [c.how.endswith(networks.GRAPH) for c in found] == sorted(c.how.endswith(networks.GRAPH) for c in found)
    plain = {(c.layout, c.how) for c in found if not c.ours}
    assert {("contiguous", peers.PLAIN), ("channels_last", peers.PLAIN)} <= plain
    assert ("channels_last", peers.PLAIN + networks.GRAPH) in plain
    assert any("efficient=True" in how for _, how in plain) == training
    assert len({c.who for c in found if not c.ours}) == 1
    ours = {c.how for c in found if c.ours}
    assert ours == {f"{save}{end}" for save in peers.LEVELS[: 1 + training] for end in ("", networks.GRAPH)}
    modes = [c.how for c in networks.contenders(networks.Case(network, training, torch.float32, compiled=True))]
    assert modes == [*peers.LEVELS, peers.PLAIN, peers.COMPILED, networks.AUTOTUNED]


class Copied:
    """Stands for a graph where there are none: the call itself."""

    def __init__(self, call: Callable[[], object]) -> None:
        self.call = call

    def __call__(self) -> None:
        self.call()


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "Captured", Copied)
    monkeypatch.setattr(networks, "SHORTEST", 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_a_case_measures_everybody(graphs: None, training: bool, dtype: torch.dtype) -> None:
    case = networks.Case(SMALL, training, dtype)
    found = networks.run([case], CPU, 60, no_words, no_words, rounds=2)
    run = found["runs"][case.key]
    assert json.loads(json.dumps(found)) == found and found["left_out"] == 0
    assert [row["contender"] for row in run["rows"]] == [c.name for c in networks.contenders(case)]
    assert run["skipped"] == [] and run["rounds"] == 2 and run["autocast"] == (dtype == torch.bfloat16)
    for row in run["rows"]:
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"], rel=1e-2)
        assert set(row["ratios"]) == (set(peers.LEVELS) if training else {"bottlenecks"})
    ours = next(row for row in run["rows"] if row["contender"] == "densenet_ext, bottlenecks, channels_last")
    assert ours["ratios"]["bottlenecks"] == {"median": 1.0, "low": 1.0, "high": 1.0}


def test_autocast_reaches_the_forward_pass() -> None:
    model = torch.nn.Conv2d(3, 4, 1)
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    images = torch.randn(2, 3, 1, 1)
    step = measure.Step(torch.nn.Sequential(model, torch.nn.Flatten()), images, torch.tensor([0, 3]), torch.bfloat16)
    step()
    measure.Inference(model, images, torch.bfloat16)()
    measure.Inference(model, images)()
    assert seen == [torch.bfloat16, torch.bfloat16, torch.float32] and not model.training
    assert model.weight.grad is None and model.weight.dtype == torch.float32


def test_a_peer_without_room_is_a_result_and_no_end(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full(networks.Prepared):
        def __init__(self, case: networks.Case, contender: peers.Contender, *rest: Any) -> None:
            if not contender.ours and contender.layout == "contiguous":
                raise torch.OutOfMemoryError("CUDA out of memory")
            super().__init__(case, contender, *rest)

    monkeypatch.setattr(networks, "Prepared", Full)
    case = networks.Case(SMALL, True, torch.float32)
    run = networks.run([case], CPU, 60, no_words, no_words, rounds=2)["runs"][case.key]
    left_out = [c.name for c in networks.contenders(case) if not c.ours and c.layout == "contiguous"]
    assert run["skipped"] == [{"contender": name, "reason": "OOM"} for name in left_out]
    assert len(run["rows"]) == len(list(networks.contenders(case))) - len(left_out)


def test_graphs_make_room_for_the_others(graphs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    interleave, tries = networks._interleave, []

    def full_at_first(prepared: dict[str, Any], *rest: Any) -> Any:
        tries.append(list(prepared))
        if len(tries) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return interleave(prepared, *rest)

    monkeypatch.setattr(networks, "_interleave", full_at_first)
    case = networks.Case(SMALL, False, torch.float32)
    run = networks.run([case], CPU, 60, no_words, no_words, rounds=2)["runs"][case.key]
    assert tries[1] == [name for name in tries[0] if "graph" not in name] == [row["contender"] for row in run["rows"]]
    assert {each["reason"] for each in run["skipped"]} == {"OOM beside the others"}


def test_what_there_is_no_time_for_is_said(graphs: None) -> None:
    case = networks.Case(SMALL, True, torch.float32, compiled=True)
    found = networks.run([case, case._replace(compiled=False)], CPU, 30, no_words, no_words, rounds=2)
    run = found["runs"][case.key]
    assert [row["how"] for row in run["rows"]] == [*peers.LEVELS, peers.PLAIN]
    assert [each["reason"].split(" s,")[0] for each in run["skipped"]] == ["needs about 90", "needs about 400"]
    assert networks.run([case], CPU, -1, no_words, no_words)["left_out"] == 1


# ---- tables ----------------------------------------------------------------------------------------------------------


def network_results() -> dict[str, Any]:
    def row(who: str, how: str, layout: str, ours: bool, speed: float, peak: float | None) -> dict[str, Any]:
        ratio = {"median": 200 / speed, "low": 1.0, "high": 9.0}
        return {
            "contender": f"{who}, {how}, {layout}",
            "who": who,
            "how": how,
            "layout": layout,
            "ours": ours,
            "seconds": 64 / speed,
            "images_per_second": speed,
            "ratios": {"bottlenecks": ratio},
            "peak_bytes": None if peak is None else int(peak * 2**30),
        }

    rows = [
        row("densenet_ext", "bottlenecks", "channels_last", True, 200, 2.5),
        row("densenet_ext", "features", "channels_last", True, 180, 1.25),
        row("densenet_ext", "bottlenecks, CUDA graph", "channels_last", True, 250, 3),
        row("torchvision", "plain", "contiguous", False, 50, 8),
        row("torchvision", "plain", "channels_last", False, 100, 8.25),
        row("torchvision", "torch.compile", "channels_last", False, 150, None),
    ]
    skipped = [
        {"contender": "torchvision, memory_efficient=True, channels_last", "reason": "OOM"},
        {"contender": "torchvision, torch.compile, max-autotune, channels_last", "reason": "needs about 400 s"},
    ]
    run = {"title": "DenseNet-121", "batch": 64, "training": True, "dtype": "bfloat16", "autocast": True, "rounds": 5}
    run |= {"tf32": True, "rows": rows, "skipped": skipped}
    machine = {
        "gpu": "A GPU",
        "driver": "580",
        "cuda": "13.0",
        "torch": "2.11.0",
        "commit": "abc",
        "date": "2026-11-25",
    }
    return {"machine": machine, "runs": {"densenet121, training": run}}


def test_the_table_of_networks_compares_with_the_fastest_eager_peer() -> None:
    text = gpu_table.networks(network_results())
    head, _, line = [line for line in text.splitlines() if line.startswith("|")]
    cells = dict(zip(head.split(" | "), line.split(" | "), strict=True))
    assert text.startswith("A GPU, driver 580, CUDA 13.0, torch 2.11.0, commit abc, 2026-11-25; medians of 5 ")
    assert cells["fastest eager peer"] == "torchvision, plain, channels_last"
    assert cells["its time over ours"] == "2.00 (1.00 to 9.00)"
    assert (
        cells["ours, images / s"] == "200" and cells["CUDA graph: ours"] == "250" and cells["`torch.compile`"] == "150"
    )
    assert line.endswith("| 2.50 | 1.25 | 8.25 | OOM |")
    assert cells["max-autotune"] == "-" and "max-autotune, channels_last (needs about 400 s)" in text


def test_the_page_shows_a_gpu_only_when_there_are_results(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("gpu-networks.json", "gpu-kernels.json")]
    assert [table.of_file(file) for file in files] == [{}, {}]
    files[0].write_text(json.dumps(network_results()))
    tables = table.of_file(files[0])
    assert list(tables) == ["gpu-networks"]
    page = "docs/users/measured.md"
    opening, closing = "<!-- benchmarks:gpu-networks -->", "<!-- /benchmarks:gpu-networks -->"
    empty = f"{opening}\n{closing}"
    shown = table.rewrite(page, empty, tables)
    assert shown == f"{opening}\n{tables['gpu-networks']}\n{closing}"
    assert table.rewrite(page, shown, {}) == empty
    assert table.rewrite(page, "words", {}) == "words"
    with pytest.raises(ValueError, match="benchmarks:gpu-networks"):
        table.rewrite(page, "words", tables)
    files[1].write_text("{}")
    with pytest.raises(ValueError, match=r"gpu-kernels\.json: expected a results file"):
        table.of_file(files[1])


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    testing = pytest.importorskip("typer.testing")
    from benchmarks.__main__ import app

    for name in ("densenet121", "densenet201", "bc100"):
        monkeypatch.setitem(peers.NETWORKS, name, TINY._replace(name=name))
    monkeypatch.setattr(kernels, "run", functools.partial(kernels.run, copy_bytes=2**16))
    monkeypatch.setattr(networks, "cases", lambda: [networks.Case(SMALL, False, torch.float32)])
    yield lambda *arguments: testing.CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_commands_write_results_files(graphs: None, command: Callable[..., Any], tmp_path: Path) -> None:
    for name in ("kernels", "networks"):
        out = tmp_path / "new" / f"{name}.json"
        options = ["--rounds", 2] if name == "networks" else ["--batch-size", 1]
        result = command(name, "--device", "cpu", "--seconds", 60, "--out", out, *options)
        assert result.exit_code == 0, result.output
        found = json.loads(out.read_text())
        assert gpu_table.RENDERERS[f"{name}.json"](found) in result.output and found["machine"]["torch"]
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["kernels.json", "networks.json"]


def test_bad_options_are_refused(command: Callable[..., Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for options, name in (
        (("--device", "warp"), "--device"),
        (("--device", "meta"), "--device"),
        (("--device", "cpu", "--out", tmp_path / "file" / "below"), "--out"),
        (("--seconds", 0), "--seconds"),
    ):
        for what in ("kernels", "networks"):
            result = command(what, *options)
            assert result.exit_code == 2 and name in result.output
