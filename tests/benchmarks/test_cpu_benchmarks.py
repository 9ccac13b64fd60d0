"""The benchmarks of the processor's kernels and of whole steps: what they count, on tiny shapes, and their tables."""

from __future__ import annotations

import functools
import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import densenet_ext as dx
from benchmarks import host, operators, peaks, peers, profile, roofline, table
from benchmarks.stopwatch import Stopwatch
from densenet_ext import _extension
from densenet_ext.kernels import OPS

CPU = torch.device("cpu")
TINY = peers.Network("tiny", "A tiny DenseNet", 4, (2, 3), 8, 5, False, batch=2, image=32)
pytestmark = pytest.mark.skipif(_extension.module is None, reason=f"no compiled part: {_extension.why_missing}")


def no_words(_: object) -> None:
    return None


# ---- peaks -----------------------------------------------------------------------------------------------------------


def test_peaks_are_those_of_the_machine() -> None:
    ticks = iter(range(1000))
    found = peaks.peaks(torch.float32, Stopwatch(CPU, 64, lambda: next(ticks)), (4, 8), 2**10)
    assert found.gemm == 2 * 8**3 and found.copy == 2 * 2**10  # of calls that take a second each
    assert (found.multiply_adds is None) == (peaks.multiply_adds() == {})
    assert found.multiply_adds is None or found.multiply_adds > 1e9
    limits = peaks.Peaks(gemm=100.0, copy=10.0, multiply_adds=None)
    assert limits.bound(200, 10) == 2 and limits.bound(200, 50) == 5


# ---- roofline --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_3x3_case_runs_and_has_its_flops(dtype: torch.dtype) -> None:
    found = list(operators.cases_3x3(TINY, dtype, CPU))
    assert {case.operator for case in found} == {"bn_relu_conv3x3", "bn_relu_conv3x3_backward"}
    assert [case.where for case in found] == ["block 1", "block 1", "block 2", "block 2"]
    for case in found:
        operator = getattr(torch.ops.densenet_ext, case.operator).default
        operator(**case.make())
        products = 2 if case.operator.endswith("backward") else 1
        assert case.columns == 16 and case.flops == products * 2 * case.rows * 9 * 16 * 4


def test_bytes_of_a_3x3_convolution() -> None:
    case = next(operators.cases_3x3(TINY, torch.float32, CPU))
    operator = torch.ops.densenet_ext.bn_relu_conv3x3.default
    pixels, b, k = 2 * 8 * 8, 16, 4
    assert operators.bytes_moved(operator, case.make()) == 4 * (pixels * (b + k) + 4 * b + 9 * b * k + 2 * k)


def test_the_roofline_has_every_kernel_and_the_widths_that_are_promised() -> None:
    found = list(roofline.cases(roofline.CHOSEN, torch.float32))
    known = {case.operator for _, case in found}
    assert known == set(OPS)
    for way in ("bn_relu_conv1x1", "bn_relu_conv1x1_backward"):
        shapes = {(4 * network.growth_rate, case.rows, case.columns) for network, case in found if case.operator == way}
        assert {N for N, _, _ in shapes} == {48, 96, 128, 192} and 49 in {M for _, M, _ in shapes}
        for N in (48, 96, 128, 192):
            assert len({M for n, M, _ in shapes if n == N}) > 1 and len({C for n, _, C in shapes if n == N}) > 1
    for way in ("bn_relu_conv3x3", "bn_relu_conv3x3_backward"):
        assert {case.columns for _, case in found if case.operator == way} == {48, 128}


@pytest.fixture(scope="module")
def tiny_roofline() -> dict[str, Any]:
    saved: list[int] = []
    chosen = [roofline.Chosen(TINY, lambda case: case.where.startswith("block 1"))]
    before = torch.get_num_threads()
    found = roofline.run(chosen, (1, 2), 0, no_words, lambda found: saved.append(len(found["rows"])), (8,), 2**10)
    assert torch.get_num_threads() == before
    assert saved == [len(found["rows"]) // 2, len(found["rows"])]
    return found


def test_a_roofline(tiny_roofline: dict[str, Any]) -> None:
    assert json.loads(json.dumps(tiny_roofline)) == tiny_roofline
    assert [(peak["dtype"], peak["threads"]) for peak in tiny_roofline["peaks"]] == [
        (dtype, threads) for dtype in ("float32", "bfloat16") for threads in (1, 2)
    ]
    limits = {(peak["dtype"], str(peak["threads"])): peak for peak in tiny_roofline["peaks"]}
    for row in tiny_roofline["rows"]:
        assert (row["outputs"] is None) == (row["flops"] == 0)
        for threads, timed in row["timed"].items():
            limit = limits[row["dtype"], threads]
            shares = (row["flops"] / timed["seconds"] / limit["gemm"], row["bytes"] / timed["seconds"] / limit["copy"])
            assert (timed["share_of_gemm"], timed["share_of_copy"]) == pytest.approx(shares, abs=1e-4)
            assert timed["share_of_bound"] == pytest.approx(max(shares), abs=1e-4)


def test_the_table_of_a_roofline(tiny_roofline: dict[str, Any]) -> None:
    limits, products, others = [part for part in roofline.table(tiny_roofline).split("\n\n") if part.startswith("|")]
    assert limits.splitlines()[2].startswith("| float32, 1 core | ") and "| bfloat16, 2 cores | " in limits
    expected = {"`bn_relu_conv1x1`", "`bn_relu_conv1x1_backward`", "`bn_relu_conv3x3`", "`bn_relu_conv3x3_backward`"}
    assert {line.split(" | ")[0].strip("| ") for line in products.splitlines()[2:]} == expected
    row = next(row for row in tiny_roofline["rows"] if row["operator"] == "bn_relu")
    timed = row["timed"]["1"]
    cell = f"{timed['seconds'] * 1e3:.2f} ms, {timed['share_of_copy']:.0%}"
    line = next(line for line in others.splitlines() if line.startswith("| `bn_relu` "))
    assert line.startswith(f"| `bn_relu` | 128 | 16 | {row['bytes'] / 1e6:.3g} | {cell} | ")


# ---- profile ---------------------------------------------------------------------------------------------------------


def event(name: str, above: Any = None, microseconds: float = 1.0, flops: int = 0, **more: Any) -> SimpleNamespace:
    return SimpleNamespace(name=name, cpu_parent=above, cpu_time_total=microseconds, flops=flops, **more)


def test_a_time_belongs_to_the_outermost_operator() -> None:
    function = event("_Fused")
    block = event("densenet_ext::dense_layers", function, 50)
    within = event("aten::convolution", block, 30)
    outer = event("aten::conv2d", function, 7, 1000)
    inner = event("aten::conv2d", outer, 6, 1000)  # autocast's second
    step = event("Optimizer.step#SGD.step", None, 9)
    shapes, asked = [[2, 8, 3, 3], [2, 4, 3, 3], [8, 4, 1, 1], []], [True, True, False]
    given = {"input_shapes": shapes, "concrete_inputs": [None, asked]}
    backward = event("aten::convolution_backward", event("ConvolutionBackward0"), 11, **given)
    found = profile.parts_of([function, block, within, outer, inner, step, event("aten::add_", step), backward])
    assert found == {
        "densenet_ext::dense_layers": (1, pytest.approx(50e-6), 0),
        profile.FORWARD: (1, pytest.approx(7e-6), 1000),
        profile.OPTIMIZER: (1, pytest.approx(9e-6), 0),
        profile.BACKWARD: (1, pytest.approx(11e-6), 2 * 2 * (2 * 8 * 9) * 4),
    }
    asked[0] = False
    assert profile.flops_of_backward(backward) == 2 * (2 * 8 * 9) * 4


@pytest.mark.parametrize("network", [TINY, TINY._replace(small_inputs=True, image=8)], ids=["large", "small"])
def test_flops_of_the_layers_are_those_that_torch_counts(network: peers.Network) -> None:
    model = dx.DenseNet(**network.keywords(), small_inputs=network.small_inputs)
    blocks = [module for module in model.modules() if isinstance(module, dx.DenseBlock)]
    images: list[torch.Tensor] = []
    for block in blocks:
        block.register_forward_pre_hook(lambda module, args: images.append(args[0].detach()))
    model(torch.randn(network.batch, 3, network.image, network.image))
    with FlopCounterMode(display=False) as counter:
        for block, x in zip(blocks, images.copy(), strict=True):
            block(x)
    assert profile.flops_of_layers(network) == counter.get_total_flops()


def test_a_profile() -> None:
    saved: list[int] = []
    found = profile.run([TINY], 2, no_words, lambda found: saved.append(len(found["rows"])), (8,))
    assert json.loads(json.dumps(found)) == found and saved == [1, 2, 3, 4]
    assert {(row["mode"], row["dtype"]) for row in found["rows"]} == set(
        itertools.product(profile.MODES, profile.DTYPES)
    )
    layers = profile.flops_of_layers(TINY)
    for row in found["rows"]:
        parts, training = row["parts"], row["mode"] == "training"
        assert sum(part["seconds"] for part in parts.values()) < row["seconds"]
        assert parts["densenet_ext::dense_layers"]["flops"] == layers
        assert parts["densenet_ext::dense_layers"]["calls"] == len(TINY.block_config)
        stem = 2 * 2 * 16 * 16 * 49 * 3 * 8
        assert parts[profile.FORWARD if training else profile.FIRST]["flops"] == stem
        assert parts["densenet_ext::whole_transition"]["calls"] == 2  # a head is one, too
        assert (profile.OPTIMIZER in parts) == training
        if training:
            assert parts["densenet_ext::dense_layers_backward"]["flops"] == 2 * layers
            assert parts[profile.BACKWARD]["flops"] == stem  # images have no gradient
    shown = [part for part in profile.table(found).split("\n\n") if part.startswith("|")]
    assert [part.split(" | ")[0] for part in shown] == ["| training", "| inference"]
    assert "| `densenet_ext::dense_layers` | " in shown[1] and "%, at " in shown[1]


def test_the_table_of_a_profile_adds_up() -> None:
    parts = {
        "densenet_ext::dense_layers": {"calls": 4, "seconds": 0.06, "flops": 3e9},
        profile.FORWARD: {"calls": 1, "seconds": 0.03, "flops": 0},
        "densenet_ext::bn_relu_avg_pool": {"calls": 1, "seconds": 0.0005, "flops": 0},
    }
    row = {
        "title": "A",
        "image": 8,
        "batch": 2,
        "mode": "inference",
        "dtype": "float32",
        "seconds": 0.1,
        "parts": parts,
    }
    about = {"cpu": "A", "simd": "s", "torch": "t", "commit": "c", "date": "d"}
    lines = profile.table({"machine": about, "threads": 2, "steps": 1, "gemm": {"float32": 1e11}, "rows": [row]})
    assert lines.splitlines()[2:] == [
        "| inference | A, 8^2, batch 2, float32 |",
        "|---|--:|",
        "| milliseconds | 100.0 |",
        "| `densenet_ext::dense_layers` | 60%, at 50% |",
        f"| {profile.FORWARD} | 30% |",
        f"| {profile.REST} | 10% |",  # with what is less than a hundredth
    ]


# ---- host time -------------------------------------------------------------------------------------------------------


def test_host_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "NETWORK", host.NETWORK._replace(block_config=(2, 2)))
    monkeypatch.setattr(host, "CALLS", 1)
    monkeypatch.setattr(host, "plan_seconds", lambda: 0.25)
    before = torch.get_num_threads()
    try:
        found = host.run(2, no_words)
    except peers.Unavailable as error:
        pytest.skip(str(error))
    assert torch.get_num_threads() == before and json.loads(json.dumps(found)) == found
    assert [row["mode"] for row in found["rows"]] == ["inference", "forward and backward"]
    for row in found["rows"]:
        median, low, high = row["ratio"]
        assert 0 < low <= median <= high and min(row["milliseconds"].values()) > 0
    text = host.table(found)
    assert f"| inference | {found['rows'][0]['milliseconds'][host.OURS]:.2f} | " in text
    assert text.endswith("takes 0.25 s.")


def test_the_networks_of_host_time_leave_no_gradient_and_have_one_pixel_at_the_end() -> None:
    assert [block.image for block in operators.blocks_of(host.NETWORK)] == [8, 4, 2, 1]
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 32 * 32, 2))
    seen: list[int] = []
    model[1].weight.register_hook(lambda grad: seen.append(1))
    host.training(model)()
    assert seen and all(parameter.grad is None for parameter in model.parameters()) and model.training
    host.inference(model)()
    assert not model.training and len(seen) == 1


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_commands_write_results_files_that_have_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from benchmarks.__main__ import app

    monkeypatch.setattr(roofline, "CHOSEN", [roofline.Chosen(TINY, lambda case: case.where == "head")])
    monkeypatch.setattr(roofline, "run", functools.partial(roofline.run, sides=(8,), copied=2**10))
    monkeypatch.setattr(profile, "run", functools.partial(profile.run, sides=(8,)))
    monkeypatch.setattr(host, "run", lambda rounds, say: HOST | {"rounds": rounds})
    for name in ("bc100", "densenet121"):
        monkeypatch.setitem(peers.NETWORKS, name, TINY)
    threads = torch.get_num_threads()
    for name, *options in (("roofline", "--shortest", 0), ("profile", "--steps", 1), ("host", "--rounds", 3)):
        out = tmp_path / "new" / f"cpu-{name}.json"
        arguments = [name, *options, *(["--threads", threads] if name != "host" else []), "--out", out]
        result = testing.CliRunner().invoke(app, [str(argument) for argument in arguments])
        assert result.exit_code == 0, result.output
        tables = table.of_file(out)
        assert list(tables) == [name] and tables[name] in result.output


HOST = {
    "machine": {"cpu": "A", "simd": "s", "torch": "t", "commit": "c", "date": "d"},
    "rows": [{"mode": "inference", "milliseconds": {host.OURS: 1.0, host.EAGER: 3.0}, "ratio": [3.0, 2.0, 4.0]}],
    "plan_seconds": 0.5,
}
