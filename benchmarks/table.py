"""Tables in Markdown from a results file, and their place in README.md.

Text between ``<!-- benchmarks:speed -->`` and ``<!-- /benchmarks:speed -->`` (or ``memory``) is written here, never by
hand: a test holds that README.md and the results file agree.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import gpu_table

RESULTS = Path(__file__).parent / "results" / "cpu.json"
# Of `make gpu` on one machine; the names between its markers in README.md are those without the ending.
GPU_RESULTS = [RESULTS.with_name(f"gpu-{name}") for name in gpu_table.RENDERERS]
README = Path(__file__).parent.parent / "README.md"

Row = Mapping[str, Any]  # of one contender on one network
Run = Mapping[str, Any]  # "title", "machine", "rounds", "baseline", "rows", "skipped": of one network


def load(path: Path) -> dict[str, Run]:
    """The runs of a results file by network. Raises ValueError, with the file's name, when it is none."""
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))["runs"]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path.name}: expected a results file of benchmarks, got something else") from error
    if not isinstance(runs, dict):
        raise ValueError(f"{path.name}: expected runs by network, got {type(runs).__name__}")
    return runs


def speed(runs: Mapping[str, Run]) -> str:
    """Seconds, images per second and paired ratios of every contender, a table a network."""
    head = ("network", "mode", "layout", "s / step", "images / s", "time over ours: `bottlenecks`", "`features`")
    return _tables(runs, head, _speed_cells, _against_the_fastest)


def memory(runs: Mapping[str, Run]) -> str:
    """Bytes kept for the backward pass and the peak over the start of a step, a table a network."""
    head = ("network", "mode", "layout", "kept, MiB", "plain / this", "peak over start, MiB", "plain / this")
    return _tables(runs, head, _memory_cells, lambda run: None)


RENDERERS: dict[str, Callable[[Mapping[str, Run]], str]] = {"speed": speed, "memory": memory}


def of_gpu(files: Sequence[Path] = GPU_RESULTS) -> dict[str, str]:
    """The tables of a GPU by the names of their markers, of those results files that are there.

    Raises ValueError, with the file's name, when one is none.
    """
    tables = {}
    for path in files:
        if not path.is_file():
            continue
        try:
            render = gpu_table.RENDERERS[path.name.removeprefix("gpu-")]
            tables[path.stem] = render(json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path.name}: expected a results file of benchmarks, got something else") from error
    return tables


def rewrite(text: str, runs: Mapping[str, Run], gpu: Mapping[str, str] | None = None) -> str:
    """``text`` with the tables of ``runs``, and those of a GPU as ``of_gpu`` gives them, between their markers.

    Raises ValueError when a marker is missing.
    """
    tables = {**{name: render(runs) for name, render in RENDERERS.items()}, **(gpu or {})}
    for name, table in tables.items():
        opening, closing = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        before, found, rest = text.partition(opening)
        _, found_too, after = rest.partition(closing)
        if not found or not found_too:
            raise ValueError(f"README.md: expected the markers {opening} and {closing}, in this order, got none")
        text = f"{before}{opening}\n{table}\n{closing}{after}"
    return text


def fastest_peer(rows: Iterable[Row]) -> Row | None:
    """The peer with the smallest median, None when no peer was measured."""
    return min((row for row in rows if not row["ours"]), key=lambda row: row["seconds"], default=None)


def _tables(
    runs: Mapping[str, Run],
    head: Sequence[str],
    cells: Callable[[Run, Row], Sequence[str]],
    remark: Callable[[Run], str | None],
) -> str:
    parts = []
    for run in runs.values():
        lines = [_line(head), "|---|---|---|" + "--:|" * (len(head) - 3)]
        for row in run["rows"]:
            lines.append(_line((row["who"], row["how"], row["layout"], *cells(run, row))))
        table = "\n".join(lines)
        parts += [part for part in (_caption(run), table, remark(run), _left_out(run)) if part]
    return "\n\n".join(parts)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _caption(run: Run) -> str:
    row, machine = run["rows"][0], run["machine"]
    return (
        f"**{run['title']}**, {row['image']}x{row['image']}, batch {row['batch']}, {row['dtype']}, "
        f"{row['threads']} threads: {machine['cpu']}, {machine['simd']}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}, {run['rounds']} rounds"
    )


def _speed_cells(run: Run, row: Row) -> list[str]:
    return [
        f"{row['seconds']:.3f}",
        f"{row['images_per_second']:.1f}",
        *(_ratio(row["ratios"].get(save)) for save in ("bottlenecks", "features")),
    ]


def _ratio(ratio: Mapping[str, float] | None) -> str:
    if ratio is None:
        return "-"
    return f"{ratio['median']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"


def _memory_cells(run: Run, row: Row) -> list[str]:
    plain = next((other for other in run["rows"] if other["contender"] == run["baseline"]), None)
    cells = []
    for key in ("kept_bytes", "peak_bytes"):
        cells += [f"{row[key] / 2**20:.1f}", "-" if plain is None else f"{plain[key] / row[key]:.2f}"]
    return cells


def _against_the_fastest(run: Run) -> str | None:
    peer = fastest_peer(run["rows"])
    if peer is None:
        return None
    factors = [f"{ratio['median']:.2f} (`{save}`)" for save, ratio in peer["ratios"].items()]
    text = f"The fastest peer is {peer['contender']}: its step takes {' and '.join(factors)} times ours."
    rounds = {len(row["seconds_per_round"]) - row["seconds_per_round"].count(None) for row in run["rows"]}
    if min(rounds) < run["rounds"]:
        text += f" Peers that the first round showed to be far slower than that ran in {min(rounds)} rounds."
    return text


def _left_out(run: Run) -> str | None:
    if not run["skipped"]:
        return None
    return "Not measured: " + "; ".join(f"{each['contender']} ({each['reason']})" for each in run["skipped"]) + "."
