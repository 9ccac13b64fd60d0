"""What ``make gpu`` runs on a machine with an NVIDIA GPU, offline, in two halves: is it right, and is it fast.

    python3 tools/gpu.py right --out FOLDER     build, tests, compute-sanitizer
    python3 tools/gpu.py fast --out FOLDER      build, operators on their own, whole networks, against predictions

Each builds from source against the torch of this Python what is not built yet, and takes six minutes at most
(``--seconds``); ``--stages "tests"`` runs some of a half. The stages share the seconds: each gets its part of what is
left, so that time which one does not need goes to those behind it, and one that fails or takes too long stops none of
them, but that nothing is run of what could not be built. ``--seconds 1200`` leaves time for torch.compile's
max-autotune, which takes minutes before it runs. Both halves together leave eight files in FOLDER: right.md and
fast.md, which sum up, build.log, tests.log, sanitizer.log, kernels.json, networks.json, benchmarks.log. Exit code 0:
all was well; 1: not all; 2: there is no GPU, or the arguments are wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tools")]

import gpu_predictions  # noqa: E402
import gpu_summary  # noqa: E402
import prepare_venv  # noqa: E402

# What is left when the stages' time is over, for the summary.
RESERVE = 5.0
# A stage that was told to end may still write its report.
GRACE = 15.0
# Run first: if something is badly wrong these show it, and the time may end before the others.
FIRST_TESTS = ("test_cuda_operators.py", "test_kernels.py", "test_cuda_memory.py", "test_cuda.py", "test_block.py")


class Result(NamedTuple):
    """How a stage ended; ``remark`` is one line for the summary."""

    passed: bool
    seconds: float
    remark: str


class Machine(NamedTuple):
    """The GPU and the software that is used on it."""

    gpu: str
    capability: str  # "9.0"
    gpus: int
    torch: str
    cuda: str

    @property
    def line(self) -> str:
        return f"{self.gpus} x {self.gpu}, compute capability {self.capability}, torch {self.torch}, CUDA {self.cuda}"


class Run:
    """Where everything is, and the time that is left."""

    def __init__(
        self, out: Path, venv: Path, seconds: float, clock: Callable[[], float] = time.monotonic, half: str = "right"
    ) -> None:
        self.out, self.venv, self.clock, self.half = out, venv, clock, half
        self.end = clock() + seconds - RESERVE
        self.environ = dict(os.environ)

    @property
    def summary(self) -> Path:
        """The file that sums this half up."""
        return self.out / f"{self.half}.md"

    @property
    def python(self) -> str:
        """The environment's interpreter, or, where the stage "build" has not run, this one."""
        made = self.venv / "bin" / "python"
        return str(made) if made.exists() else sys.executable

    def left(self) -> float:
        return max(0.0, self.end - self.clock())

    def call(self, command: Sequence[str], log: Path, seconds: float, **environ: str) -> tuple[int | None, float]:
        """Runs a command, its output appended to ``log``; its exit code, None when it took too long, and seconds."""
        start = self.clock()
        with log.open("a", encoding="utf-8") as file:
            file.write(f"$ {' '.join(command)}\n")
            file.flush()
            process = subprocess.Popen(
                list(command),
                cwd=ROOT,
                env={**self.environ, "PYTHONUNBUFFERED": "1", **environ},
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _wait(process, seconds)
            taken = self.clock() - start
            file.write(f"[{'out of time' if code is None else f'exit code {code}'} after {taken:.0f} s]\n\n")
        return code, taken


def _wait(process: subprocess.Popen[bytes], seconds: float) -> int | None:
    """The exit code; after ``seconds`` the process is interrupted, then killed with all that it started: None."""
    try:
        return process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    try:
        process.wait(GRACE)
    except subprocess.TimeoutExpired:
        pass
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        pass
    process.wait()
    return None


# ---- stages ----------------------------------------------------------------------------------------------------------


def build(run: Run, machine: Machine, seconds: float) -> Result:
    """Installs the package from source into an environment that sees this Python's packages."""
    start, log = run.clock(), run.out / "build.log"
    if not (run.venv / "bin" / "python").exists() or prepare_venv.unfinished(run.venv).exists():
        prepare_venv.create(run.venv)
    environ = {
        "MAX_JOBS": os.environ.get("MAX_JOBS", str(os.cpu_count() or 1)),
        "TORCH_CUDA_ARCH_LIST": os.environ.get("TORCH_CUDA_ARCH_LIST", machine.capability),
        "DENSENET_EXT_CUDA": "1",
        # nvcc reads this itself: registers, spills and shared memory of every kernel go into the log
        "NVCC_APPEND_FLAGS": f"{os.environ.get('NVCC_APPEND_FLAGS', '')} -Xptxas=-v".strip(),
    }
    pip = [run.python, "-m", "pip", "--disable-pip-version-check", "install", "--verbose"]
    # editable: the tests import the package from this folder
    code, _ = run.call(
        [*pip, "--no-index", "--no-deps", "--no-build-isolation", "--editable", "."], log, seconds, **environ
    )
    if code != 0:
        return Result(False, run.clock() - start, _ended(code))
    show = "import densenet_ext as dx, sys; info = dx.build_info(); print(info); sys.exit(0 if info['cuda'] else 3)"
    code, _ = run.call([run.python, "-c", show], log, 120)
    seconds = run.clock() - start
    if code != 0:
        return Result(False, seconds, "the compiled part does not load with its GPU kernels: build.log ends with why")
    return Result(True, seconds, gpu_summary.of_ptxas(log.read_text(encoding="utf-8", errors="replace")))


def tests(run: Run, machine: Machine, seconds: float) -> Result:
    """The whole test suite with ``--device cuda``; what it leaves out is printed at the end of its log."""
    report = run.out / "tests.xml"
    report.unlink(missing_ok=True)
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name != "peers"]
    places = {name: place for place, name in enumerate(FIRST_TESTS)}
    files.sort(key=lambda path: (places.get(path.name, len(places)), path))
    # a line for each test, so that the log says how far a run came that left no report
    command = [run.python, "-m", "pytest", "--device", "cuda", f"--junit-xml={report}", "--durations=15", "-v"]
    # a kernel that does not end is waited for in C++, which no signal interrupts: the log gets where every thread is,
    # and pytest-timeout, where it is installed, ends the process
    stuck = min(180.0, max(20.0, seconds / 3))
    command += ["-o", f"faulthandler_timeout={0.8 * stuck:.0f}"]
    if _has(run, "xdist"):
        workers = min(8, max(1, (os.cpu_count() or 1) // 2))
        command += ["-n", str(workers), "--dist", "loadgroup"]
    if _has(run, "pytest_timeout"):
        command += ["--timeout", f"{stuck:.0f}", "--timeout-method", "thread"]
    command += [str(path.relative_to(ROOT)) for path in files]
    log = run.out / "tests.log"
    code, taken = run.call(command, log, seconds)
    counts = gpu_summary.of_tests(report, log)
    report.unlink(missing_ok=True)  # the log has what it has
    return Result(code == 0, taken, f"{_ended(code)}{counts}")


def sanitizer(run: Run, machine: Machine, seconds: float) -> Result:
    """compute-sanitizer's memcheck, racecheck and synccheck over a call of every operator."""
    program = shutil.which("compute-sanitizer")
    if program is None:
        for home in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda"):
            program = program or shutil.which("compute-sanitizer", path=f"{home}/bin:{home}/compute-sanitizer")
    if program is None:
        return Result(False, 0.0, "not run: there is no compute-sanitizer here")
    logs = {tool: run.out / f"{tool}.log" for tool in ("memcheck", "racecheck", "synccheck")}
    # under a sanitizer Python, torch and the GPU's context take their time before the first call
    calls = ["tests/kernels/every_operator.py", "--device", "cuda"]
    calls += ["--seconds", f"{max(0.4 * seconds, seconds - 40):.0f}"]

    def check(tool: str) -> tuple[int | None, float]:
        command = [program, "--tool", tool, "--error-exitcode", "9", run.python, *calls]
        return run.call(command, logs[tool], seconds, PYTORCH_NO_CUDA_MEMORY_CACHING="1")

    with ThreadPoolExecutor(len(logs)) as pool:  # they don't load the GPU: all at once
        ended = dict(zip(logs, pool.map(check, logs), strict=True))
    log, remarks = "", []
    for tool, file in logs.items():
        text, code = file.read_text(encoding="utf-8", errors="replace"), ended[tool][0]
        log += text
        file.unlink()
        remarks.append(
            f"{tool}: {'no errors' if code == 0 else _ended(code).rstrip('; ') + gpu_summary.of_last_call(text)}"
        )
    (run.out / "sanitizer.log").write_text(log, encoding="utf-8")
    passed = all(code == 0 for code, _ in ended.values())
    taken = max(used for _, used in ended.values())
    return Result(passed, taken, "; ".join([*remarks, *gpu_summary.of_calls(log)]))


def kernels(run: Run, machine: Machine, seconds: float) -> Result:
    """Time, bytes and share of the copy bandwidth of every operator at the networks' shapes."""
    return _benchmark(run, "kernels", seconds, "--batch-size", str(gpu_predictions.BATCH))


def networks(run: Run, machine: Machine, seconds: float) -> Result:
    """Whole networks against their peers."""
    return _benchmark(run, "networks", seconds)


def _benchmark(run: Run, what: str, seconds: float, *options: str) -> Result:
    out = run.out / f"{what}.json"
    out.unlink(missing_ok=True)
    # what has begun when its time is over is measured to its end
    allowed = max(0.65 * seconds, seconds - 30)
    command = [run.python, "-m", "benchmarks", what, "--device", "cuda", "--out", str(out), *options]
    command += ["--seconds", f"{max(1.0, allowed):.0f}"]
    code, taken = run.call(command, run.out / "benchmarks.log", seconds)
    return Result(code == 0, taken, f"{_ended(code)}{gpu_summary.of_benchmark(out)}")


class Stage(NamedTuple):
    """A stage, and its share of the time beside the shares of those behind it."""

    run: Callable[[Run, Machine, float], Result]
    share: float


STAGES: dict[str, Stage] = {
    "build": Stage(build, 10),
    "tests": Stage(tests, 5),
    "sanitizer": Stage(sanitizer, 2),
    "kernels": Stage(kernels, 1),
    "networks": Stage(networks, 4),
}
HALVES = {"right": ("build", "tests", "sanitizer"), "fast": ("build", "kernels", "networks")}


def share_of(name: str, chosen: Sequence[str], left: float) -> float:
    """The seconds of ``left`` that a stage gets when it and those behind it in ``chosen`` are still to run."""
    behind = chosen[chosen.index(name) :]
    return left * STAGES[name].share / sum(STAGES[each].share for each in behind)


def _ended(code: int | None) -> str:
    """ "" for a good end, else how it was."""
    if code == 0:
        return ""
    return "out of time; " if code is None else f"exit code {code}; "


def _has(run: Run, module: str) -> bool:
    return subprocess.run([run.python, "-c", f"import {module}"], capture_output=True).returncode == 0


# ---- all of it -------------------------------------------------------------------------------------------------------


def find_machine() -> Machine | str:
    """The GPU as this Python's torch sees it, or a sentence why there is none."""
    code = (
        "import json, torch; p = torch.cuda.get_device_properties(0); "
        "print(json.dumps([p.name, f'{p.major}.{p.minor}', torch.cuda.device_count(), torch.__version__, "
        "torch.version.cuda]))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if found.returncode == 0:
        return Machine(*json.loads(found.stdout.splitlines()[-1]))
    if "No module named 'torch'" in found.stderr:
        return f"there is no torch in {sys.executable}"
    return f"the torch of {sys.executable} sees no NVIDIA GPU here"


def run_stages(
    run: Run, machine: Machine, chosen: Sequence[str], stages: Mapping[str, Stage] = STAGES
) -> dict[str, Result]:
    """Runs the chosen stages in their order; one that breaks has failed and stops none of the others, but that nothing
    is run of what could not be built."""
    results: dict[str, Result] = {}
    for name in chosen:
        seconds = share_of(name, chosen, run.left())
        print(f"{name}: at most {seconds:.0f} s", flush=True)
        start = run.clock()
        try:
            if "build" in results and not results["build"].passed:
                results[name] = Result(False, 0.0, "not run: there is no build")
            else:
                results[name] = stages[name].run(run, machine, seconds)
        except Exception as error:  # whatever it is, the next stages still have something to say
            results[name] = Result(False, run.clock() - start, f"{type(error).__name__}: {error}")
        result = results[name]
        print(f"{name}: {'passed' if result.passed else 'FAILED'}, {result.seconds:.0f} s {result.remark}", flush=True)
        gpu_summary.write(run.summary, machine.line, results, chosen)
    return results


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make gpu", description="Build, tests and benchmarks on an NVIDIA GPU.")
    parser.add_argument("half", choices=HALVES)
    parser.add_argument("--out", type=Path, required=True, help="folder for at most eight files")
    parser.add_argument("--stages", help="some of the half's")
    parser.add_argument("--seconds", type=float, default=350.0, help="for all of them")
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "gpu", help="environment that is made or used")
    options = parser.parse_args(arguments)
    stages = HALVES[options.half]
    wanted = stages if options.stages is None else options.stages.split()
    if not wanted or not set(wanted) <= set(stages):
        parser.error(f"--stages: expected some of {', '.join(stages)}, got {options.stages!r}")
    machine = find_machine()
    if isinstance(machine, str):
        print(f"make gpu: {machine}.", file=sys.stderr)
        return 2
    print(machine.line, flush=True)
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    run = Run(out, options.venv.resolve(), options.seconds, half=options.half)
    results = run_stages(run, machine, [name for name in stages if name in wanted])
    print(run.summary.read_text(encoding="utf-8"))
    return 0 if all(result.passed for result in results.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
