"""Tables in Markdown from the results files, and their places in README.md and docs/.

Text between ``<!-- benchmarks:speed -->`` and ``<!-- /benchmarks:speed -->`` (or another name) is written here, never
by hand: a test holds that the pages and the results files agree.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import depth, gpu_table, host, profile, roofline, workloads
from benchmarks.markdown import table
from densenet_ext.compare import comparison

ROOT = Path(__file__).parent.parent
PAGES = {
    "README.md": ("workloads-summary", "depth"),
    "docs/users/measured.md": (
        "workloads",
        "workloads-amd",
        "summary",
        "speed",
        "host",
        "profile",
        "roofline",
        "memory",
        "gpu-networks",
        "gpu-kernels",
        "compare",
    ),
}
"""Which tables stand on which page. Between the markers of one whose results file is not there stands nothing."""

FOLDER = Path(__file__).parent / "results"
RESULTS = FOLDER / "cpu.json"

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


def summary(runs: Mapping[str, Run]) -> str:
    """One table: each level of ours in channels_last against the fastest peer and against the memory of plain."""
    measured_together: dict[str, list[str]] = defaultdict(list)
    rows = []
    for run in runs.values():
        measured_together[_settings(run)].append(run["title"])
        peer = fastest_peer(run["rows"])
        for row in run["rows"]:
            if (row["who"], row["layout"]) == ("densenet_ext", "channels_last"):
                rows.append(_summary_cells(run, row, peer))
    captions = [f"**{' and '.join(titles)}**, {settings}" for settings, titles in measured_together.items()]
    return "\n\n".join([*captions, table(_SUMMARY, rows, "llrlrrrrr")])


_SUMMARY = (
    *("network", "`save=`", "s / step", "fastest peer", "its time over ours"),
    *("kept, MiB", "plain / this", "peak over start, MiB", "plain / this"),
)

RENDERERS: dict[str, Callable[[Mapping[str, Run]], str]] = {"speed": speed, "memory": memory, "summary": summary}
"""The tables of a results file of the processor, by the names of their markers."""


def of_results(path: Path = RESULTS) -> dict[str, str]:
    """All tables by the names of their markers: of ``path`` and of those other results files that lie beside it.

    Raises OSError when ``path`` can't be read and ValueError, with the file's name, when one is no results file.
    """
    runs = load(path)
    tables = {name: render(runs) for name, render in RENDERERS.items()}
    for name in BESIDE:
        tables |= of_file(path.with_name(name))
    return tables


def of_file(path: Path) -> dict[str, str]:
    """The tables of one file of ``BESIDE`` by the names of their markers; none where there is no file.

    Raises ValueError, with the file's name, when it is something else.
    """
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {name: render(found) for name, render in BESIDE[path.name].items()}
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path.name}: expected a results file of benchmarks, got something else") from error


def compare(found: comparison.Found) -> str:
    """Results over the seeds and what a step takes, fused against unfused."""
    chosen, machine, seeds = found["options"], found["machine"], found["seeds"]
    caption = (
        f"**{found['model']} on {found['data']}**, {chosen['epochs']} epochs, batch {chosen['batch_size']}, "
        f"{len(seeds)} seeds, {machine['threads']} threads: {machine['device']}, torch {machine['torch']}, "
        f"{machine['date']}"
    )
    head, *rows = comparison.cells(found, _COMPARED)
    shown = table(head, rows, "lrrr")
    return "\n\n".join([caption, shown, " ".join(comparison.sentences(found))])


_COMPARED = ("loss", "validation_error_last", "test_error", "seconds", "kept_bytes", "peak_bytes")

BESIDE: dict[str, dict[str, Callable[[Any], str]]] = {
    **{f"gpu-{name}": {f"gpu-{Path(name).stem}": render} for name, render in gpu_table.RENDERERS.items()},
    "cpu-workloads.json": {"workloads": workloads.table, "workloads-summary": workloads.summary},
    "cpu-workloads-amd.json": {"workloads-amd": workloads.table},  # of another machine, kept by hand
    "cpu-depth.json": {"depth": depth.table},
    "cpu-host.json": {"host": host.table},
    "cpu-roofline.json": {"roofline": roofline.table},
    "cpu-profile.json": {"profile": profile.table},
    "compare-digits.json": {"compare": compare},  # comparison.json of `densenet-ext compare`
}
"""The other results files, and their tables by the names of their markers."""


_MARKER = re.compile(r"<!-- (/?)benchmarks:([\w-]+) -->")


def rewrite(page: str, text: str, tables: Mapping[str, str]) -> str:
    """``text``, which is that of ``page``, with its part of ``tables`` between the markers and nothing between others.

    Raises ValueError when the markers of a table are missing, open without an end, or belong to another page.
    """
    found = [(marker[1], marker[2]) for marker in _MARKER.finditer(text)]
    names = [name for slash, name in found if not slash]
    if found != [(slash, name) for name in names for slash in ("", "/")] or len(set(names)) < len(names):
        got = ", ".join(slash + name for slash, name in found)
        raise ValueError(f"{page}: expected every marker benchmarks:name once and /benchmarks:name next, got {got}")
    for name in names:
        if name not in PAGES[page]:
            raise ValueError(f"{page}: expected the markers of {', '.join(PAGES[page])} only, got benchmarks:{name}")
    for name in PAGES[page]:
        opening, closing = f"<!-- benchmarks:{name} -->", f"<!-- /benchmarks:{name} -->"
        if name in names:
            before, rest = text.split(opening)
            shown = f"{tables[name]}\n" if name in tables else ""
            text = f"{before}{opening}\n{shown}{closing}{rest.partition(closing)[2]}"
        elif name in tables:
            raise ValueError(f"{page}: expected the markers {opening} and {closing}, got neither")
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
        rows = [(row["who"], row["how"], row["layout"], *cells(run, row)) for row in run["rows"]]
        shown = table(head, rows, "lll" + "r" * (len(head) - 3))
        parts += [part for part in (_caption(run), shown, remark(run), _left_out(run)) if part]
    return "\n\n".join(parts)


def _caption(run: Run) -> str:
    return f"**{run['title']}**, {_images(run)}, {_settings(run)}"


def _images(run: Run) -> str:
    row = run["rows"][0]
    return f"{row['image']}x{row['image']}, batch {row['batch']}"


def _settings(run: Run) -> str:
    row, machine = run["rows"][0], run["machine"]
    return (
        f"{row['dtype']}, {row['threads']} threads: {machine['cpu']}, {machine['simd']}, torch {machine['torch']}, "
        f"commit {machine['commit']}, {machine['date']}, {run['rounds']} rounds"
    )


_WHOSE = {"efficient": "gpleiss/efficient_densenet_pytorch"}  # where nothing around the table says so


def _summary_cells(run: Run, row: Row, peer: Row | None) -> list[str]:
    return [
        f"{run['title']}, {_images(run)}",
        f'`"{row["how"]}"`',
        f"{row['seconds']:.3f}",
        "-" if peer is None else f"{_WHOSE.get(peer['who'], peer['who'])}, {peer['how']}, {peer['layout']}",
        _ratio(None if peer is None else peer["ratios"].get(row["how"])),
        *_memory_cells(run, row),
    ]


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
