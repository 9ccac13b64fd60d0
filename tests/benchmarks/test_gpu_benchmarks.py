"""The benchmarks of a GPU, as far as a processor can run them: shapes, bytes, order, results files, tables."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import densenet_ext as dx
from benchmarks import choice3x3, gpu_table, kernels, measure, networks, operators, peers, table
from densenet_ext import _extension
from densenet_ext.kernels import CPU_OPS, OPS

CPU = torch.device("cpu")
TINY = peers.Network("tiny", "A tiny DenseNet", 4, (2, 3), 8, 5, False, batch=2, image=32)
SMALL = TINY._replace(name="small", small_inputs=True, image=8)
pytestmark = pytest.mark.skipif(_extension.module is None, reason=f"no compiled part: {_extension.why_missing}")


def no_words(_: object) -> None:
    return None


def made(precision: torch.dtype = torch.float32) -> dict[str, tuple[operators.Case, operators.Arguments]]:
    """The last case of every operator and its arguments."""
    return {case.operator: (case, case.make()) for case in operators.cases(TINY, precision, CPU)}


# ---- operators: shapes and bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["densenet121", "bc100"])
def test_blocks_have_the_networks_sizes(name: str) -> None:
    network = peers.NETWORKS[name]
    with torch.device("meta"):
        model = next(peers.contenders(network)).build()
        seen: list[torch.Size] = []
        for module in model.modules():
            if isinstance(module, dx.DenseBlock):
                module.register_forward_pre_hook(lambda module, args: seen.append(args[0].shape))
        model(torch.empty(2, 3, network.image, network.image))
    blocks = list(operators.blocks_of(network._replace(batch=2)))
    assert [(block.batch, block.channels, block.image, block.image) for block in blocks] == [tuple(s) for s in seen]
    assert tuple(block.layers for block in blocks) == network.block_config


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", [TINY, SMALL], ids=lambda n: n.name)
def test_every_case_runs(network: peers.Network, dtype: torch.dtype) -> None:
    found = list(operators.cases(network, dtype, CPU))
    pools = {name for name in OPS if "max_pool" in name}
    assert {case.operator for case in found} == set(OPS) - CPU_OPS - (pools if network.small_inputs else set())
    for case in found:
        operator = getattr(torch.ops.densenet_ext, case.operator).default
        arguments = {**case.make(), **operators.arithmetic(operator)}
        operator(**arguments)
        rows = [x for x in arguments.values() if isinstance(x, torch.Tensor) and x.dim() == 2 and x.dtype == dtype]
        assert max(x.shape[0] for x in rows) == case.rows and bool(case.flops) == ("conv" in case.operator)


def test_bytes_are_what_a_call_has_to_move() -> None:
    found, f32 = made(), 4
    image = (32 // 8) ** 2 * 2  # the second block's pixels, batch 2
    C0, k, b, layers = (8 + 2 * 4) // 2, 4, 16, 3
    C = C0 + (layers - 1) * k

    def moved(name: str) -> int:
        return operators.bytes_moved(getattr(torch.ops.densenet_ext, name).default, found[name][1])

    assert moved("bn_relu") == f32 * (2 * image * b + 4 * b)
    assert moved("bn_relu_conv1x1") == f32 * (image * (C + b) + 4 * C + b * C + 2 * b)
    rows = 2 * b + 3 * C  # the output's gradient and z; x, and G read and written
    small = 4 * C + 4 * b + 2 * b * C + 2 * b + 4 * C
    assert moved("bn_relu_conv1x1_backward") == f32 * (image * rows + small)
    middle = C0 + layers // 2 * k
    assert moved("cat_bn_relu") == f32 * (2 * image * middle + 4 * middle)
    stem = 2 * 16 * 16 * 8  # values in front of the pooling, a quarter behind it, a byte for each index
    assert moved("bn_relu_max_pool") == f32 * (stem + stem // 4 + 4 * 8) + stem // 4
    assert found["bn_relu_conv1x1"][0].flops == 2 * image * C * b
    assert found["bn_relu_conv1x1_backward"][0].flops == 4 * image * C * b


def test_a_stopwatch_gives_the_median_of_the_calls_it_counts() -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        time.sleep(0.05 if len(calls) <= 4 else 0.002)  # three are not counted, one of those that are is an outlier

    assert 0.002 <= kernels.Stopwatch(CPU, 64).median(call, 5) < 0.03
    assert len(calls) == 8
    assert kernels.copy_bandwidth(kernels.Stopwatch(CPU, 64), 2**16) > 0


@pytest.fixture(scope="module")
def measured() -> dict[str, Any]:
    saved: list[int] = []
    found = kernels.run([TINY, SMALL], CPU, 60, no_words, lambda found: saved.append(len(found["rows"])), 2**16)
    assert saved == sorted(saved) and saved[-1] == len(found["rows"]) and len(saved) == 2 * len(kernels.PRECISIONS) + 2
    return found


def test_what_was_measured_before_a_kernel_failed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = iter([{"operator": "bn_relu"}, {"operator": "channel_stats"}])

    def measure(*_: Any) -> dict[str, Any]:
        row = next(rows, None)
        if row is None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return row

    saved: list[int] = []
    monkeypatch.setattr(kernels, "measure", measure)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        kernels.run([TINY], CPU, 60, no_words, lambda found: saved.append(len(found["rows"])), 2**16)
    assert saved == [0, 2]


def test_a_run_of_the_operators(measured: dict[str, Any]) -> None:
    assert json.loads(json.dumps(measured)) == measured
    assert measured["left_out"] == 0 and measured["skipped"] == []
    assert {row["network"] for row in measured["rows"]} == {"tiny", "small"}
    for row in measured["rows"]:
        assert row["bytes_per_second"] == pytest.approx(row["bytes"] / row["seconds"])
        assert row["share_of_copy"] == pytest.approx(
            row["bytes_per_second"] / measured["copy_bytes_per_second"], abs=1e-4
        )
    by_precision = {row["precision"]: set() for row in measured["rows"]}
    for row in measured["rows"]:
        by_precision[row["precision"]].add(row["operator"])
    assert by_precision["float32, TF32"] == {name for name in OPS if "conv" in name}
    assert by_precision["float16"] == set(OPS) - CPU_OPS


def test_a_run_of_the_operators_ends_in_time_and_survives_a_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    late = kernels.run([TINY], CPU, -1, no_words, no_words, 2**16)
    assert late["rows"] == [] and late["left_out"] == len(list(kernels.wanted([TINY], CPU)))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "measure", full)
    found = kernels.run([SMALL], CPU, 60, no_words, no_words, 2**16)
    assert found["rows"] == [] and {each["reason"] for each in found["skipped"]} == {"out of memory"}


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


def test_the_table_of_operators_adds_up_their_shapes(measured: dict[str, Any]) -> None:
    text = gpu_table.kernels(measured)
    assert text.count("\n\n**") == 2 * len(kernels.PRECISIONS)
    rows = [{"seconds": 1e-3, "bytes": 10**9, "share_of_copy": 0.5, "flops": 10**12}] * 2
    rows.append({"seconds": 2e-3, "bytes": 4 * 10**9, "share_of_copy": 1.0, "flops": 0})
    assert gpu_table._operator("x", rows, 2e12) == ["`x`", "3", "4.000", "1500", "75%", "50% to 100%", "500.0"]


def test_the_page_shows_a_gpu_only_when_there_are_results(tmp_path: Path, measured: dict[str, Any]) -> None:
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


# ---- ours or PyTorch's 3x3 convolution -------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [TINY, SMALL], ids=lambda n: n.name)
def test_both_ways_compute_the_same(network: peers.Network) -> None:
    for block in operators.blocks_of(network):
        layer = choice3x3.layer_of(block, network.growth_rate, torch.float64, CPU, False)
        layer.buffer.zero_()
        got = choice3x3.ours(layer)
        features, statistics = layer.buffer.clone(), (layer.mean.clone(), layer.var.clone())
        layer.buffer.zero_()
        want = choice3x3.theirs(layer)()
        for one, other in zip((features, *statistics), (layer.buffer, layer.mean, layer.var), strict=True):
            torch.testing.assert_close(one, other)
        assert got.keys() == want.keys()
        for name in got:
            torch.testing.assert_close(got[name], want[name], msg=name)


def test_a_choice_begins_where_ours_is_faster_throughout() -> None:
    def row(rows: int, ours: float, width: int = 56, size: int = 2) -> dict[str, Any]:
        shape = {"capability": 90, "bytes": size, "tf32": size == 4, "C": 128, "N": 32, "width": width, "rows": rows}
        return {**shape, "ours": ours, "theirs": 1.0, "network": "densenet121", "precision": "any"}

    found = [row(100, 0.5), row(400, 2.0), row(800, 0.9), row(800, 0.8), row(1600, 0.7)]
    found += [row(800, 0.9, width=28), row(800, 1.1, width=28), row(50, 0.5, width=28), row(9, 0.5, size=4)]
    assert choice3x3.table_rows(found) == ["{90, 2, false, 128, 32, 56, 800},", "{90, 4, true, 128, 32, 56, 9},"]
    assert choice3x3.table_rows([row(9, 1.0)]) == []


def test_the_choice_is_a_part_of_the_operators_table(measured: dict[str, Any]) -> None:
    rows = measured["conv3x3"]
    assert {(row["network"], row["width"]) for row in rows} >= {("small", 8), ("small", 4)}
    assert {row["precision"] for row in rows} == {"bfloat16", "float16", "float32, TF32"}
    text = gpu_table.kernels(measured)
    assert "```cpp\n" in text and all(f"| {row['ours'] * 1e6:.0f} |" in text for row in rows)
