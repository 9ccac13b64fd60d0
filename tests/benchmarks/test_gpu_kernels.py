"""The benchmarks of the GPU's operators, as far as a processor can run them: shapes, bytes, order, tables."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
import torch
from torch import Tensor

import densenet_ext as dx
from benchmarks import choice3x3, gpu_table, kernels, operators, peers
from densenet_ext import _extension
from densenet_ext.kernels import OPS
from tests.benchmarks.tiny import CPU, SMALL, TINY, no_words

pytestmark = pytest.mark.skipif(_extension.module is None, reason=f"no compiled part: {_extension.why_missing}")


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


def test_a_gpu_gets_no_operator_without_a_kernel_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def operators_on(kind: str) -> set[str]:
        return {case.operator for case in operators.cases(SMALL, torch.float32, torch.device(kind))}

    monkeypatch.setattr(operators, "CPU_OPS", {"bn_relu"})
    assert operators_on("cuda") == operators_on("cpu") - {"bn_relu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("network", [TINY, SMALL], ids=lambda n: n.name)
def test_every_case_runs(network: peers.Network, dtype: torch.dtype) -> None:
    found = list(operators.cases(network, dtype, CPU))
    pools = {name for name in OPS if "max_pool" in name}
    assert {case.operator for case in found} == set(OPS) - (pools if network.small_inputs else set())
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
    assert by_precision["float16"] == set(OPS)


def test_a_run_of_the_operators_ends_in_time_and_survives_a_full_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    late = kernels.run([TINY], CPU, -1, no_words, no_words, 2**16)
    assert late["rows"] == [] and late["left_out"] == len(list(kernels.wanted([TINY], CPU)))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(kernels, "measure", full)
    found = kernels.run([SMALL], CPU, 60, no_words, no_words, 2**16)
    assert found["rows"] == [] and {each["reason"] for each in found["skipped"]} == {"out of memory"}


def test_the_table_of_operators_adds_up_their_shapes(measured: dict[str, Any]) -> None:
    text = gpu_table.kernels(measured)
    assert text.count("\n\n**") == 2 * len(kernels.PRECISIONS)
    rows = [{"seconds": 1e-3, "bytes": 10**9, "share_of_copy": 0.5, "flops": 10**12}] * 2
    rows.append({"seconds": 2e-3, "bytes": 4 * 10**9, "share_of_copy": 1.0, "flops": 0})
    assert gpu_table._operator("x", rows, 2e12) == ["`x`", "3", "4.000", "1500", "75%", "50% to 100%", "500.0"]


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
        of_theirs = choice3x3.theirs(layer)
        assert choice3x3.difference(layer, of_theirs) < 1e-12

        def other(of_theirs: Any = of_theirs) -> dict[str, Tensor]:
            found: dict[str, Tensor] = of_theirs()
            found["grad_conv_weight"][0] *= 2
            return found

        assert choice3x3.difference(layer, other) > 0.01
        assert not choice3x3.difference(layer, lambda want=want: want) <= 1  # features that nobody has written


def test_a_choice_begins_where_ours_is_faster_throughout() -> None:
    def row(rows: int, ours: float, width: int = 56, size: int = 2, difference: float = 1e-3) -> dict[str, Any]:
        precision = "bfloat16" if size == 2 else "float32, TF32"
        shape = {"capability": 90, "bytes": size, "tf32": size == 4, "C": 128, "N": 32, "width": width, "rows": rows}
        found = {"ours": ours, "theirs": 1.0, "difference": difference}
        return {**shape, **found, "network": "densenet121", "precision": precision}

    found = [row(100, 0.5), row(400, 2.0), row(800, 0.9), row(800, 0.8), row(1600, 0.7)]
    found += [row(800, 0.9, width=28), row(800, 1.1, width=28), row(50, 0.5, width=28), row(9, 0.5, size=4)]
    assert choice3x3.table_rows(found) == ["{90, 2, false, 128, 32, 56, 800},", "{90, 4, true, 128, 32, 56, 9},"]
    assert choice3x3.table_rows([row(9, 1.0)]) == []
    wrong = [row(400, 0.5, difference=0.5), row(800, 0.5), row(1600, 0.5, width=28, difference=float("nan"))]
    assert choice3x3.table_rows(wrong) == ["{90, 2, false, 128, 32, 56, 800},"]


def test_the_choice_is_a_part_of_the_operators_table(measured: dict[str, Any]) -> None:
    rows = measured["conv3x3"]
    assert {(row["network"], row["width"]) for row in rows} >= {("small", 8), ("small", 4)}
    assert {row["precision"] for row in rows} == {"bfloat16", "float16", "float32, TF32"}
    text = gpu_table.kernels(measured)
    assert "```cpp\n" in text and all(f"| {row['ours'] * 1e6:.0f} |" in text for row in rows)
