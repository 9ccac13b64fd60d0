"""``make gpu`` without a GPU: time is shared, nothing stops the next stage, the commands exist, the summary."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import gpu
import gpu_predictions
import gpu_summary
import pytest

MACHINE = gpu.Machine("A GPU", "9.0", 1, "2.11.0+cu130", "13.0")
ALL = list(gpu.STAGES)


class Clock:
    """Time that passes only when told."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def run(tmp_path: Path) -> gpu.Run:
    return gpu.Run(tmp_path, tmp_path / "venv", 60)


# ---- time ------------------------------------------------------------------------------------------------------------


def test_shares_use_up_what_is_left_and_pass_on_the_rest() -> None:
    left, given = 500.0, {}
    for name in ALL:
        given[name] = gpu.share_of(name, ALL, left)
        left -= 0.5 * given[name]  # every stage ends early
    assert given["networks"] == left + 0.5 * given["networks"]
    assert sum(given.values()) > 500 and given["build"] < 300 and given["tests"] > 150
    assert gpu.share_of("kernels", ["kernels"], 40) == 40


def test_each_stage_gets_its_part_and_none_stops_the_others(tmp_path: Path) -> None:
    clock, seen = Clock(), []

    def stage(takes: float, passed: bool = True, breaks: bool = False) -> gpu.Stage:
        def body(run: gpu.Run, machine: gpu.Machine, seconds: float) -> gpu.Result:
            seen.append(seconds)
            clock.now += takes
            if breaks:
                raise OSError("no space")
            return gpu.Result(passed, takes, "a | remark")

        return gpu.Stage(body, 1.0)

    stages = {"build": stage(100), "tests": stage(10, passed=False), "kernels": stage(0, breaks=True)}
    stages["networks"] = stage(1)
    run = gpu.Run(tmp_path, tmp_path / "venv", 400 + gpu.RESERVE, clock)
    results = gpu.run_stages(run, MACHINE, list(stages), stages)
    assert [results[name].passed for name in stages] == [True, False, False, True]
    assert results["kernels"].remark == "OSError: no space"
    weights = [gpu.STAGES[name].share for name in stages]
    assert seen[0] == pytest.approx(400 * weights[0] / sum(weights))
    assert seen[3] == pytest.approx(400 - 110)
    summary = (tmp_path / "right.md").read_text()
    assert "| build | passed | 100 | a \\| remark |" in summary and "| tests | **failed** | 10 |" in summary


def test_nothing_is_run_of_what_could_not_be_built(tmp_path: Path) -> None:
    def build(run: gpu.Run, machine: gpu.Machine, seconds: float) -> gpu.Result:
        return gpu.Result(False, 7, "exit code 1; ")

    stages = {"build": gpu.Stage(build, 1.0), "tests": gpu.STAGES["tests"]}
    run = gpu.Run(tmp_path, tmp_path / "venv", 400)
    results = gpu.run_stages(run, MACHINE, list(stages), stages)
    assert results["tests"] == (False, 0.0, "not run: there is no build")
    assert [path.name for path in tmp_path.iterdir()] == ["right.md"]


def test_a_command_that_takes_too_long_ends_with_all_that_it_started(
    run: gpu.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.5)
    stubborn = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)"
    code = (
        "import subprocess, sys, time\n"
        f"child = subprocess.Popen([sys.executable, '-c', {stubborn!r}])\n"
        "print('started', child.pid)\n"
        "try: time.sleep(60)\n"
        "except KeyboardInterrupt: print('a report')\n"
    )
    log = tmp_path / "x.log"
    begin = time.monotonic()
    ended, taken = run.call([sys.executable, "-c", code], log, 1.0)
    assert ended is None and 1.0 <= taken <= time.monotonic() - begin < 20
    text = log.read_text()
    assert "a report" in text and "[out of time after" in text
    (pid,) = re.findall(r"^started (\d+)$", text, re.MULTILINE)
    child = int(pid)
    for _ in range(50):
        if not _alive(child):
            break
        time.sleep(0.1)
    assert not _alive(child)


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_command_leaves_its_output_and_its_exit_code(run: gpu.Run, tmp_path: Path) -> None:
    code, _ = run.call(
        [sys.executable, "-c", "import os; print(os.environ['WORD']); exit(3)"], tmp_path / "x", 60, WORD="hi"
    )
    assert code == 3 and "hi\n[exit code 3 after" in (tmp_path / "x").read_text()


# ---- the commands ----------------------------------------------------------------------------------------------------


class Recorded(gpu.Run):
    """Runs nothing: notes the commands, and gives each the same exit code."""

    def __init__(self, out: Path, code: int | None = 0) -> None:
        super().__init__(out, out / "venv", 60)
        self.commands: list[tuple[list[str], dict[str, str]]] = []
        self.code = code

    def call(self, command: Any, log: Path, seconds: float, **environ: str) -> tuple[int | None, float]:
        self.commands.append((list(command), environ))
        with log.open("a") as file:
            file.write("7 of 9 calls\n========= ERROR SUMMARY: 0 errors\nUsed 40 registers\n")
        return self.code, 1.0


def test_the_build_is_offline_and_for_this_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "NVCC_APPEND_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    made: list[Path] = []
    monkeypatch.setattr(gpu.prepare_venv, "create", made.append)
    run = Recorded(tmp_path)
    result = gpu.build(run, MACHINE, 60)
    assert result.passed and result.remark == "2 kernels, at most 40 registers, 0 with local memory or spills"
    command, environ = run.commands[0]
    assert {"--no-index", "--no-deps", "--no-build-isolation"} <= set(command)
    assert environ == {
        "MAX_JOBS": str(os.cpu_count()),
        "TORCH_CUDA_ARCH_LIST": "9.0",
        "DENSENET_EXT_CUDA": "1",
        "NVCC_APPEND_FLAGS": "-Xptxas=-v",
    }
    python = run.venv / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    gpu.build(Recorded(tmp_path), MACHINE, 60)
    assert made == [run.venv]
    gpu.prepare_venv.unfinished(run.venv).touch()  # one that was cut short is made again
    gpu.build(Recorded(tmp_path), MACHINE, 60)
    assert made == [run.venv] * 2
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.0")
    failed = Recorded(tmp_path, None)
    assert gpu.build(failed, MACHINE, 60)[::2] == (False, "out of time; ")
    assert failed.commands[0][1]["TORCH_CUDA_ARCH_LIST"] == "8.0"


def test_the_suite_is_whole_and_begins_with_what_shows_most(tmp_path: Path) -> None:
    run = Recorded(tmp_path)
    result = gpu.tests(run, MACHINE, 60)
    ((command, _),) = run.commands
    files = [Path(word).name for word in command if word.endswith(".py")]
    found = [path for path in (gpu.ROOT / "tests").rglob("test_*.py") if path.parent.name != "peers"]
    assert sorted(files) == sorted(path.name for path in found)
    assert tuple(files[: len(gpu.FIRST_TESTS)]) == gpu.FIRST_TESTS
    assert command[command.index("--device") + 1] == "cuda" and "no report was written" in result.remark
    options = [word for word in command[1:] if not word.endswith(".py") and word not in ("--device", "cuda")]
    collected = subprocess.run(
        [sys.executable, *options, "--collect-only", "tests/support/test_devices.py"],
        cwd=gpu.ROOT,
        capture_output=True,
        text=True,
    )
    assert collected.returncode == 0, collected.stdout + collected.stderr  # pytest knows every option


def test_the_sanitizer_runs_three_tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: "/bin/compute-sanitizer")
    run = Recorded(tmp_path)
    result = gpu.sanitizer(run, MACHINE, 60)
    assert sorted(command[:3] for command, _ in run.commands) == [
        ["/bin/compute-sanitizer", "--tool", tool] for tool in ("memcheck", "racecheck", "synccheck")
    ]
    assert [path.name for path in tmp_path.iterdir()] == ["sanitizer.log"]
    assert all(environ == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"} for _, environ in run.commands)
    assert result.passed and "racecheck: no errors" in result.remark and "calls 7/9, 7/9, 7/9" in result.remark
    script = run.commands[0][0][run.commands[0][0].index("tests/kernels/every_operator.py") :]
    script[script.index("cuda")] = "cpu"
    called = subprocess.run([sys.executable, *script], cwd=gpu.ROOT, capture_output=True, text=True)
    assert called.returncode == 0 and gpu_summary.of_calls(called.stdout), called.stderr
    assert not gpu.sanitizer(Recorded(tmp_path, 9), MACHINE, 60).passed
    monkeypatch.setattr(gpu.shutil, "which", lambda name, path=None: None)
    missing = gpu.sanitizer(Recorded(tmp_path), MACHINE, 60)
    assert not missing.passed and "there is no compute-sanitizer" in missing.remark


@pytest.mark.parametrize("what", ["kernels", "networks"])
def test_benchmarks_get_their_time_and_a_file(what: str, tmp_path: Path) -> None:
    testing = pytest.importorskip("typer.testing")
    from benchmarks.__main__ import app

    run = Recorded(tmp_path)
    result = gpu.STAGES[what].run(run, MACHINE, 90)
    ((command, _),) = run.commands
    assert command[command.index("--seconds") + 1] == "60" and "no results" in result.remark
    shown = testing.CliRunner().invoke(app, [what, "--help"], env={"COLUMNS": "200"})
    assert all(word in shown.output for word in command if word.startswith("--"))


# ---- the summary -----------------------------------------------------------------------------------------------------


def test_what_the_files_say(tmp_path: Path) -> None:
    log = "Used 30 registers\n 0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    log += "Used 255 registers\n 16 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
    assert gpu_summary.of_ptxas(log) == "2 kernels, at most 255 registers, 1 with local memory or spills"
    report = tmp_path / "tests.xml"
    report.write_text(
        '<testsuites><testsuite><testcase classname="tests.test_a" name="b"/>'
        '<testcase classname="tests.test_a" name="c[1]"><failure message="x"/></testcase>'
        '<testcase classname="tests.test_a" name="d"><skipped/></testcase></testsuite></testsuites>'
    )
    log = tmp_path / "tests.log"
    assert gpu_summary.of_tests(report, log) == "1 passed, 1 failed, 1 skipped: test_a::c[1]"
    report.write_text('<testsuites><testcase classname="a" name="b"/><testcase time="0.0"/></testsuites>')
    assert gpu_summary.of_tests(report, log) == "1 passed, 0 failed, 0 skipped, 1 cut short"
    report.write_text("<testsuites>")
    assert gpu_summary.of_tests(report, log) == "no report was written; tests.log has 0 passed, 0 failed"
    log.write_text(
        "[gw1] [ 12%] PASSED tests/a/test_a.py::test_b \n[gw0] [  3%] FAILED tests/a/test_a.py::test_c[1] \n"
        "tests/a/test_a.py::test_c[1] \ntests/a/test_d.py::test_e PASSED   [ 50%]\n"
    )
    assert gpu_summary.of_tests(report, log).endswith("tests.log has 2 passed, 1 failed: test_a.py::test_c[1]")
    begun = "call 1: bn_relu bfloat16\ncall 2: channel_stats float32 \n========= Error\n"
    assert gpu_summary.of_last_call(begun) == " in call 2: channel_stats float32"
    assert gpu_summary.of_last_call(begun + "2 of 9 calls\n") == gpu_summary.of_last_call("") == ""
    sanitized = "========= COMPUTE-SANITIZER\n3 of 9 calls\n========= Invalid __global__ read of size 4 bytes\n"
    assert gpu_summary.of_calls(sanitized + "========= ERROR SUMMARY: 1 error\n") == [
        "calls 3/9",
        "Invalid __global__ read of size 4 bytes",
    ]
    assert gpu_summary.of_calls("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n") == []
    results = tmp_path / "networks.json"
    results.write_text(json.dumps({"runs": {"a": 1, "b": 2}, "left_out": 3}))
    assert gpu_summary.of_benchmark(results) == "2 measured, 3 left out for want of time"


def test_a_summary_shows_stages_to_come_and_survives_damaged_results(tmp_path: Path) -> None:
    (tmp_path / "networks.json").write_text("{}")
    summary = tmp_path / "fast.md"
    gpu_summary.write(summary, MACHINE.line, {"build": gpu.Result(True, 61.2, "")}, ["build", "networks"])
    text = summary.read_text()
    assert text.startswith("# 1 x A GPU, compute capability 9.0, torch 2.11.0+cu130, CUDA 13.0")
    assert "| build | passed | 61 |" in text and "| networks | not run |" in text
    assert "networks.json can't be shown: KeyError" in text
    gpu_summary.write(summary, MACHINE.line, {}, ["build", "tests"])
    assert "networks.json" not in summary.read_text()  # the other half's


def test_predictions_are_held_against_what_was_measured(tmp_path: Path) -> None:
    case = {"network": "densenet121", "batch": 256, "precision": "bfloat16", "where": "block 3, layer 24"}
    forward = {**case, "operator": "bn_relu_conv1x1", "rows": 50176, "columns": 992}
    few_rows = {**forward, "rows": 12544}
    backward = {**forward, "operator": "bn_relu_conv1x1_backward"}
    other = {**forward, "network": "bc100"}
    stats = {**forward, "operator": "channel_stats"}
    shares = [gpu_predictions.predicted(row) for row in (forward, few_rows, backward, other, stats)]
    assert shares == [0.67, 0.54, 0.55, None, None]
    measured = [
        {**forward, "share_of_copy": 0.60},
        {**backward, "share_of_copy": 0.30},
        {**other, "share_of_copy": 1.0},
    ]
    text = gpu_predictions.kernels({"rows": measured})
    assert text is not None and "1 of 2 within 25%" in text
    assert "| bn_relu_conv1x1 | block 3, layer 24 | 0.67 | 0.60 | right (0.90) |" in text
    assert "| 0.55 | 0.30 | wrong, slower (0.55) |" in text and "bc100" not in text
    assert gpu_predictions.kernels({"rows": measured[2:]}) is None


def test_predictions_of_whole_networks() -> None:
    rows = [
        {"ours": True, "how": "bottlenecks", "layout": "channels_last", "seconds": 256 / 4800},
        {"ours": True, "how": "features", "layout": "channels_last", "seconds": 1.0},
        {"ours": False, "how": "bottlenecks", "layout": "channels_last", "seconds": 1.0},
    ]
    run = {"network": "densenet121", "batch": 256, "dtype": "bfloat16", "training": True, "rows": rows}
    text = gpu_predictions.networks({"runs": {"a": run, "b": {**run, "batch": 64}}})
    assert text is not None and "0 of 1 within 25%" in text
    assert "| bottlenecks | channels_last | 9600 | 4800 | wrong, slower (0.50) |" in text
    assert gpu_predictions.networks({"runs": {"c": {**run, "training": False}}}) is None


# ---- from the outside ------------------------------------------------------------------------------------------------


def test_without_a_gpu_it_says_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu, "find_machine", lambda: "there is no GPU")
    assert gpu.main(["right", "--out", str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err == "make gpu: there is no GPU.\n" and not (tmp_path / "out").exists()


def test_a_hidden_gpu_is_one_sentence(tmp_path: Path) -> None:
    hidden = subprocess.run(
        [sys.executable, str(gpu.ROOT / "tools" / "gpu.py"), "fast", "--out", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert hidden.returncode == 2 and hidden.stderr.count("\n") == 1 and "sees no NVIDIA GPU" in hidden.stderr


@pytest.mark.parametrize("stages", ["fly", "build fly", "", "networks"])
def test_unknown_stages_are_named(stages: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        gpu.main(["right", "--out", str(tmp_path), "--stages", stages])
    assert end.value.code == 2 and "--stages: expected some of build, tests" in capsys.readouterr().err


def test_the_exit_code_and_the_order_of_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    def run_stages(run: gpu.Run, machine: gpu.Machine, chosen: list[str]) -> dict[str, gpu.Result]:
        order.extend(chosen)
        run.summary.write_text("")
        return {name: gpu.Result(name != "tests", 1.0, "") for name in chosen}

    monkeypatch.setattr(gpu, "find_machine", lambda: MACHINE)
    monkeypatch.setattr(gpu, "run_stages", run_stages)
    assert gpu.main(["fast", "--out", str(tmp_path), "--stages", "networks build"]) == 0
    assert order == ["build", "networks"]
    assert gpu.main(["right", "--out", str(tmp_path), "--stages", "tests"]) == 1
    del order[:]
    assert gpu.main(["fast", "--out", str(tmp_path)]) == 0 and order == ["build", "kernels", "networks"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["fast.md", "right.md"]


def test_make_has_a_target_for_each_half() -> None:
    for half in gpu.HALVES:
        asked = subprocess.run(
            ["make", "--dry-run", f"gpu-{half}", "OUT=there"], cwd=gpu.ROOT, capture_output=True, text=True, check=True
        )
        assert f"tools/gpu.py {half} --out there" in asked.stdout
