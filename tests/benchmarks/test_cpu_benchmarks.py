"""The benchmarks of the processor's kernels and of whole steps: what they count, on tiny shapes, and their tables."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from benchmarks import operators, peaks, peers, roofline
from benchmarks.kernels import Stopwatch
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
    assert known == set(OPS) - {"move_running_stats"}
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
