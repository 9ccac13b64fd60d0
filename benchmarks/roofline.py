"""How near each kernel of the processor comes to what the processor can do, on one core and on all.

What multiplies is held against torch's best product of two large matrices of the same dtype, what moves against a copy,
both measured in the same run. One core is timed by the processor time that the calls use, so that other programs on the
machine count little; several by the wall clock. Between two calls a buffer larger than the caches is written.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from benchmarks import markdown, operators
from benchmarks.operators import Case
from benchmarks.peaks import COPIED, SIDES, Peaks, peaks
from benchmarks.peers import NETWORKS, Network
from benchmarks.run import Say, machine
from benchmarks.stopwatch import REPEATS, Stopwatch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FLUSHED = 2**26  # bytes
CPU = torch.device("cpu")


class Chosen(NamedTuple):
    """A network, and those of its calls that are measured."""

    network: Network
    wanted: Callable[[Case], bool]


def _everything(case: Case) -> bool:
    """What multiplies in every block, what only moves where the images are largest, and the head."""
    return bool(case.flops) or case.where.startswith(("stem", "block 1", "transition 1", "head"))


def _products_of_two_blocks(case: Case) -> bool:
    return case.operator.startswith("bn_relu_conv1x1") and case.where.startswith(("block 1", "block 3"))


def _last_block(case: Case) -> bool:
    return bool(case.flops) and case.where.startswith("block 4")


BC100, DENSENET121 = NETWORKS["bc100"], NETWORKS["densenet121"]
CHOSEN = (
    Chosen(BC100, _everything),
    Chosen(DENSENET121, _everything),
    Chosen(DENSENET121._replace(batch=1), _last_block),  # 49 rows
    Chosen(BC100._replace(name="bc100, k = 24", growth_rate=24, num_init_features=48), _products_of_two_blocks),
    Chosen(
        Network("densenet161", "DenseNet-161", 48, (6, 12, 36, 24), 96, 1000, False, batch=8, image=224),
        _products_of_two_blocks,
    ),
)
"""Products of 48, 128, 96 and 192 output channels."""


def cases(chosen: Sequence[Chosen], dtype: torch.dtype) -> Iterator[tuple[Network, Case]]:
    """Every wanted call; the 3x3 convolutions behind the others of their network."""
    for network, wanted in chosen:
        for case in operators.cases(network, dtype, CPU):
            if wanted(case):
                yield network, case


def run(
    chosen: Sequence[Chosen],
    threads: Sequence[int],
    shortest: float,
    say: Say,
    save: Callable[[dict[str, Any]], None],
    sides: tuple[int, ...] = SIDES,
    copied: int = COPIED,
) -> dict[str, Any]:
    """Measures every case in both dtypes with each number of ``threads``; returns a results file.

    ``shortest``: seconds that the counted calls of a case take at least. ``save`` is called after each dtype.
    """
    before = torch.get_num_threads()
    found: dict[str, Any] = {"machine": machine(), "threads": list(threads), "peaks": [], "rows": []}
    watches = {count: Stopwatch(CPU, FLUSHED, _clock(count)) for count in threads}
    try:
        for name, dtype in DTYPES.items():
            limits = {}
            for count, watch in watches.items():
                torch.set_num_threads(count)
                peak = limits[count] = peaks(dtype, watch, sides, copied)
                found["peaks"].append({"dtype": name, "threads": count, **peak._asdict()})
                say(f"{name}, {_cores(count)}: {peak.gemm / 1e9:.0f} GFLOP/s, a copy {peak.copy / 1e9:.0f} GB/s")
            for network, case in cases(chosen, dtype):
                row = measured(case, name, watches, limits, shortest)
                found["rows"].append({"network": network.name, "batch": network.batch, **row})
            save(found)
    finally:
        torch.set_num_threads(before)
    return found


def measured(
    case: Case, dtype: str, watches: Mapping[int, Stopwatch], limits: Mapping[int, Peaks], shortest: float
) -> dict[str, Any]:
    """The figures of one call, with each number of threads."""
    torch.set_num_threads(max(watches))
    operator = getattr(torch.ops.densenet_ext, case.operator).default
    arguments = {**case.make(), **operators.arithmetic(operator)}
    moved = operators.bytes_moved(operator, arguments)
    timed = {}
    for count, watch in watches.items():
        torch.set_num_threads(count)
        peak = limits[count]
        bound = peak.bound(case.flops, moved)
        repeats = min(REPEATS, max(3, round(shortest / bound)))
        seconds = watch.median(lambda: operator(**arguments), repeats)
        timed[str(count)] = {
            "seconds": seconds,
            "share_of_gemm": round(case.flops / seconds / peak.gemm, 4),
            "share_of_copy": round(moved / seconds / peak.copy, 4),
            "share_of_bound": round(bound / seconds, 4),
        }
    return {
        "operator": case.operator,
        "where": case.where,
        "dtype": dtype,
        "rows": case.rows,
        "columns": case.columns,
        "outputs": arguments["conv_weight"].shape[0] if case.flops else None,
        "flops": case.flops,
        "bytes": moved,
        "timed": timed,
    }


def _clock(threads: int) -> Callable[[], float]:
    return time.thread_time if threads == 1 else time.perf_counter


def table(found: Mapping[str, Any]) -> str:
    """Returns the peaks, and two tables: what multiplies, and what only moves, a line a shape."""
    parts = [markdown.provenance(found["machine"]), _peaks(found)]
    for multiplies in (True, False):
        shapes: dict[tuple[Any, ...], dict[str, Any]] = defaultdict(dict)
        for row in found["rows"]:
            if bool(row["flops"]) == multiplies:
                shapes[tuple(row[key] for key in _SHAPE)][row["dtype"]] = row
        head = ["operator", "rows", "channels", *(["GFLOP"] if multiplies else []), "MB, float32"]
        head += [f"{dtype}, {_cores(count)}" for dtype in DTYPES for count in found["threads"]]
        lines = [_line(shape, rows, found["threads"], multiplies) for shape, rows in shapes.items()]
        parts.append(markdown.table(head, lines, "l" + "r" * (len(head) - 1)))
    return "\n\n".join(parts)


_SHAPE = ("operator", "network", "batch", "where", "rows", "columns", "outputs")


def _peaks(found: Mapping[str, Any]) -> str:
    head = ("the machine's own", "torch.mm, GFLOP/s", "multiply-adds alone, GFLOP/s", "a copy, GB/s")
    rows = []
    for peak in found["peaks"]:
        alone = "-" if peak["multiply_adds"] is None else f"{peak['multiply_adds'] / 1e9:.0f}"
        where = f"{peak['dtype']}, {_cores(peak['threads'])}"
        rows.append((where, f"{peak['gemm'] / 1e9:.0f}", alone, f"{peak['copy'] / 1e9:.1f}"))
    return markdown.table(head, rows, "lrrr")


def _line(shape: Sequence[Any], rows: Mapping[str, Any], threads: Sequence[int], multiplies: bool) -> list[str]:
    operator, *_, M, C, N = shape
    one = next(iter(rows.values()))
    cells = [f"`{operator}`", f"{M:,}", f"{C} to {N}" if multiplies else str(C)]
    cells += [f"{one['flops'] / 1e9:.3g}"] if multiplies else []
    cells.append(f"{rows['float32']['bytes'] / 1e6:.3g}" if "float32" in rows else "-")
    share = "share_of_gemm" if multiplies else "share_of_copy"
    for dtype in DTYPES:
        for count in threads:
            timed = rows[dtype]["timed"][str(count)] if dtype in rows else None
            cells.append("-" if timed is None else f"{timed['seconds'] * 1e3:.2f} ms, {timed[share]:.0%}")
    return cells


def _cores(threads: int) -> str:
    return "1 core" if threads == 1 else f"{threads} cores"
