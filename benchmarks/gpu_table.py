"""Tables in Markdown from the results files of a GPU: whole networks, and single operators."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.choice3x3 import table_rows
from benchmarks.markdown import table

Results = Mapping[str, Any]
Row = Mapping[str, Any]

_NETWORKS = (
    *("network", "batch", "pass", "precision", "ours, images / s", "`features`"),
    *("fastest eager peer", "images / s", "its time over ours", "CUDA graph: ours", "eager"),
    *("`torch.compile`", "max-autotune", "peak, GiB: ours", "`features`", "eager", "`memory_efficient`"),
)
_CONV3X3 = (
    "network",
    "precision",
    "width",
    "pixels",
    "C",
    "k",
    "ours, us",
    "PyTorch's, us",
    "its time over ours",
    "difference",
)
_KERNELS = ("operator", "shapes", "ms, all", "GB / s", "share of a copy", "lowest to highest", "TFLOP / s")


def networks(found: Results) -> str:
    """A line a case: images per second of ours and of the fastest eager peer, the same as graphs, peaks."""
    lines = table(_NETWORKS, map(_case, found["runs"].values()), "lrllrrl" + "r" * (len(_NETWORKS) - 7))
    remarks = [f"{key}: {', '.join(reasons)}" for key, run in found["runs"].items() if (reasons := _reasons(run))]
    rounds = sorted({run["rounds"] for run in found["runs"].values()})
    text = f"{_machine(found['machine'])}; medians of {' or '.join(map(str, rounds))} interleaved rounds."
    return "\n\n".join([text, lines, *(["Not measured: " + "; ".join(remarks) + "."] if remarks else [])])


def kernels(found: Results) -> str:
    """A table a network and precision, a line an operator: all its shapes together."""
    groups: dict[tuple[str, int, str], dict[str, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in found["rows"]:
        groups[row["network"], row["batch"], row["precision"]][row["operator"]].append(row)
    copy = found["copy_bytes_per_second"] / 1e9
    parts = [f"{_machine(found['machine'])}; a copy moves {copy:.0f} GB/s, bytes read and written."]
    for (network, batch, precision), rows in groups.items():
        lines = [_operator(name, each, found["copy_bytes_per_second"]) for name, each in rows.items()]
        shown = table(_KERNELS, lines, "l" + "r" * (len(_KERNELS) - 1))
        parts += [f"**{network}**, batch {batch}, {precision}", shown]
    return "\n\n".join([*parts, *_conv3x3(found.get("conv3x3", ()))])


def _conv3x3(rows: Sequence[Row]) -> list[str]:
    """A line a shape, ours against PyTorch's; and the rows that conv3x3_choice.cu's table becomes by it."""
    if not rows:
        return []
    lines = [
        [
            *(str(row[name]) for name in ("network", "precision", "width", "rows", "C", "N")),
            *(f"{row[name] * 1e6:.0f}" for name in ("ours", "theirs")),
            f"{row['theirs'] / row['ours']:.2f}",
            f"{row['difference']:.1e}",
        ]
        for row in rows
    ]
    shown = table(_CONV3X3, lines, "ll" + "r" * (len(_CONV3X3) - 2))
    own = table_rows(rows) or ["// none: PyTorch's is faster everywhere"]
    return ["3x3 convolutions, both passes with all around them:", shown, "\n".join(["```cpp", *own, "```"])]


RENDERERS: dict[str, Callable[[Results], str]] = {"networks.json": networks, "kernels.json": kernels}
"""How the results files of ``make gpu`` are shown."""


def _machine(machine: Mapping[str, Any]) -> str:
    gpu = "gpu" in machine
    where = f"{machine['gpu']}, driver {machine['driver']}, CUDA {machine['cuda']}" if gpu else machine["cpu"]
    return f"{where}, torch {machine['torch']}, commit {machine['commit']}, {machine['date']}"


def _case(run: Results) -> list[str]:
    rows, skipped = run["rows"], run["skipped"]
    theirs = [row for row in rows if not row["ours"] and "compile" not in row["how"] and "graph" not in row["how"]]
    fastest = min(theirs, key=lambda row: row["seconds"], default=None)

    def cell(ours: bool, how: str, value: Callable[[Row], str], layout: str = "channels_last") -> str:
        for row in rows:
            if (row["ours"], row["how"], row["layout"]) == (ours, how, layout):
                return value(row)
        reasons = [s["reason"] for s in skipped if f", {how}, {layout}" in s["contender"] and _is_ours(s) == ours]
        return "OOM" if "OOM" in reasons else "-"

    return [
        run["title"],
        str(run["batch"]),
        "training" if run["training"] else "inference",
        _precision(run),
        cell(True, "bottlenecks", _speed),
        cell(True, "features", _speed),
        f"{fastest['who']}, {fastest['how']}, {fastest['layout']}" if fastest else "-",
        _speed(fastest) if fastest else "-",
        _ratio(fastest) if fastest else "-",
        cell(True, "bottlenecks, CUDA graph", _speed),
        cell(False, "plain, CUDA graph", _speed),
        cell(False, "torch.compile", _speed),
        cell(False, "torch.compile, max-autotune", _speed),
        cell(True, "bottlenecks", _peak),
        cell(True, "features", _peak),
        cell(False, "plain", _peak),
        cell(False, "memory_efficient=True", _peak),
    ]


def _is_ours(skipped: Mapping[str, str]) -> bool:
    return skipped["contender"].startswith(("densenet_ext,", "fuse("))


def _precision(run: Results) -> str:
    if run["autocast"]:
        return f"{run['dtype']}, autocast"
    return f"{run['dtype']}, convolutions in TF32" if run["tf32"] else run["dtype"]


def _speed(row: Row) -> str:
    return f"{row['images_per_second']:.0f}" if row["images_per_second"] >= 100 else f"{row['images_per_second']:.1f}"


def _peak(row: Row) -> str:
    return "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**30:.2f}"


def _ratio(row: Row) -> str:
    ratio = row["ratios"].get("bottlenecks")
    return "-" if ratio is None else f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _reasons(run: Results) -> list[str]:
    return [f"{each['contender']} ({each['reason']})" for each in run["skipped"]]


def _operator(name: str, rows: Sequence[Row], copy: float) -> list[str]:
    seconds, moved = sum(row["seconds"] for row in rows), sum(row["bytes"] for row in rows)
    flops, shares = sum(row["flops"] for row in rows), [row["share_of_copy"] for row in rows]
    return [
        f"`{name}`",
        str(len(rows)),
        f"{seconds * 1e3:.3f}",
        f"{moved / seconds / 1e9:.0f}",
        f"{moved / seconds / copy:.0%}",
        f"{min(shares):.0%} to {max(shares):.0%}",
        f"{flops / seconds / 1e12:.1f}" if flops else "-",
    ]
