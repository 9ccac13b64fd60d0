"""The summary of ``make gpu``: one line a stage, read out of the files that the stages left, and the main numbers."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import gpu_predictions

from benchmarks import gpu_table


class Ended(Protocol):
    """How a stage ended."""

    @property
    def passed(self) -> bool: ...
    @property
    def seconds(self) -> float: ...
    @property
    def remark(self) -> str: ...


def of_ptxas(log: str) -> str:
    """Kernels, most registers, and how many use local memory, from what ptxas printed with -v."""
    registers = [int(found) for found in re.findall(r"Used (\d+) registers", log)]
    if not registers:
        return "built; the log has no report of ptxas"
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log)
    local = sum(any(int(size) for size in frame) for frame in frames)
    return f"{len(registers)} kernels, at most {max(registers)} registers, {local} with local memory or spills"


def of_tests(report: Path, log: Path) -> str:
    """Counts of a JUnit file, and the names of the first tests that failed; without one the same out of the log."""
    try:
        every = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return f"no report was written; {log.name} has {_of_lines(log)}"
    cases = [case for case in every if case.get("name")]  # those that were cut short have none
    bad = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    text = f"{len(cases) - len(bad) - skipped} passed, {len(bad)} failed, {skipped} skipped"
    text += f", {len(every) - len(cases)} cut short" if every != cases else ""
    names = [f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}" for case in bad[:10]]
    return f"{text}: {', '.join(names)}" if names else text


def _of_lines(log: Path) -> str:
    """Counts of the lines that pytest prints with -v, and the names of the first tests that failed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    # with -n "[gw1] [ 12%] PASSED tests/a.py::test_b", else "tests/a.py::test_b PASSED [ 12%]"
    lines = re.findall(r"^(?:\[gw\d+\] \[ *\d+%\] ([A-Z]+) (\S+)|(\S+::\S+) ([A-Z]+)\b)", text, re.MULTILINE)
    ends = [(first or last, name or named) for first, name, named, last in lines]
    bad = [name.rpartition("/")[2] for end, name in ends if end in ("FAILED", "ERROR")]
    counts = f"{sum(end == 'PASSED' for end, _ in ends)} passed, {len(bad)} failed"
    return f"{counts}: {', '.join(bad[:10])}" if bad else counts


def of_calls(log: str) -> list[str]:
    """How many calls every sanitizer saw, and its first complaint."""
    calls = re.findall(r"(\d+) of (\d+) calls", log)
    text = [f"calls {', '.join(f'{made}/{total}' for made, total in calls)}"] if calls else []
    complaint = re.search(r"^=+ (?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(.*\S)", log, re.MULTILINE)
    return [*text, *([complaint[1][:150]] if complaint else [])]


def of_last_call(log: str) -> str:
    """Which call the operators' calls came to, where they did not come to their end."""
    begun = re.findall(r"^call \d+: .*\S", log, re.MULTILINE)
    return f" in {begun[-1]}" if begun and not re.search(r"\d+ of \d+ calls", log) else ""


def of_benchmark(file: Path) -> str:
    """How many cases a results file has, and how many the time did not suffice for."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "no results: benchmarks.log ends with why"
    count = len(found["rows"]) if "rows" in found else len(found["runs"])
    left_out = found.get("left_out", 0)
    return f"{count} measured" + (f", {left_out} left out for want of time" if left_out else "")


def write(summary: Path, machine: str, results: Mapping[str, Ended], chosen: Sequence[str]) -> None:
    """Writes a half's summary: the stages so far, those to come, the tables of its benchmarks, and predictions."""
    lines = [f"# {machine}", "", "| stage | result | s | |", "|---|---|--:|---|"]
    for name in chosen:
        result = results.get(name)
        if result is None:
            lines.append(f"| {name} | not run | - | |")
        else:
            ended, remark = "passed" if result.passed else "**failed**", result.remark.replace("|", "\\|")
            lines.append(f"| {name} | {ended} | {result.seconds:.0f} | {remark} |")
    for file, render in gpu_table.RENDERERS.items():
        path = summary.parent / file
        if path.stem not in chosen or not path.exists():
            continue
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            lines += ["", render(found)]
            predictions = gpu_predictions.TABLES[path.stem](found)
            lines += ["", predictions] if predictions else []
        except Exception as error:  # a summary of the other stages is worth more than this table
            lines += ["", f"{file} can't be shown: {type(error).__name__}: {error}"]
    summary.write_text("\n".join(lines) + "\n", encoding="utf-8")
