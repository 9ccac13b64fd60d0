"""Runs the operators' tests under AddressSanitizer and UndefinedBehaviorSanitizer, at each SIMD level there is.

``python tools/sanitize.py [arguments of pytest]``. The compiled part is built in a copy of the source, build/sanitize,
which later runs build on; its tests run there with the sanitizers' libraries loaded before all others. Variables: CXX,
MAX_JOBS and FUZZ_EXAMPLES as elsewhere; DENSENET_EXT_SIMD for one level alone.
"""

from __future__ import annotations

import filecmp
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_backend import environment  # noqa: E402

COPY = ROOT / "build" / "sanitize"
COPIED = (
    "csrc",
    "densenet_ext",
    "build_backend",
    "tests",
    "tools",
    "benchmarks",  # whose shapes tests take
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)
TESTS = tuple(
    f"tests/kernels/test_{name}.py" for name in ("kernels", "operator_arguments", "fuzz_operators", "first_conv")
)
# A file, followed by the process's number: pytest captures what is printed, and ends with the process.
REPORT = COPY / "report"
# No -fsanitize=vptr: it asks for type information that torch's libraries hide.
FLAGS = "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize=vptr -fno-sanitize-recover=all"


def copy(root: Path = ROOT, target: Path = COPY) -> None:
    """Brings ``target`` up to date; files that have not changed keep their time, so that they are not built again."""
    wanted = set()
    for name in COPIED:
        top = root / name
        for source in [top] if top.is_file() else sorted(path for path in top.rglob("*") if path.is_file()):
            if source.suffix in (".so", ".pyc"):
                continue
            relative = source.relative_to(root)
            wanted.add(relative)
            if not (target / relative).exists() or not filecmp.cmp(source, target / relative, shallow=False):
                (target / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(source, target / relative)
    for old in [path for name in COPIED if (target / name).is_dir() for path in (target / name).rglob("*")]:
        if old.is_file() and old.suffix not in (".so", ".pyc") and old.relative_to(target) not in wanted:
            old.unlink()


def runtime(name: str) -> str:
    """The path of a sanitizer's library, as the compiler that builds with it says."""
    compiler = environment.cxx_compiler() or "c++"
    found = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    if not Path(found).is_absolute():
        raise SystemExit(
            f"densenet_ext: {compiler} has no {name}; install the sanitizers' libraries or set CXX to a GCC."
        )
    return found


def reports(report: Path = REPORT) -> list[Path]:
    """What the sanitizers wrote, of one process each."""
    return sorted(report.parent.glob(f"{report.name}.*"))


def main() -> int:
    libraries = [runtime("libasan.so"), runtime("libubsan.so")]
    copy()
    # Not the GPU's kernels: what runs is the CPU's.
    build = {**os.environ, "CXXFLAGS": FLAGS, "LDFLAGS": "-fsanitize=address,undefined", "DENSENET_EXT_CUDA": "0"}
    subprocess.run([sys.executable, "setup.py", "build_ext", "--inplace"], cwd=COPY, env=build, check=True)
    environ = {
        **os.environ,
        "LD_PRELOAD": ":".join(libraries),
        # Python itself keeps what it allocates, and torch's libraries define some symbols twice.
        "ASAN_OPTIONS": f"detect_leaks=0:detect_odr_violation=0:allocator_may_return_null=1:log_path={REPORT}",
        "UBSAN_OPTIONS": f"print_stacktrace=1:log_path={REPORT}",
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": str(COPY),
    }
    levels = subprocess.run(
        [sys.executable, "-c", "import densenet_ext as dx; print(*dx.build_info()['simd_available'])"],
        cwd=COPY,
        env=environ,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    ).stdout.split()
    chosen = os.environ.get("DENSENET_EXT_SIMD")
    failed = []
    for level in [chosen] if chosen else levels:
        print(f"sanitize: {level}", flush=True)
        for old in reports():
            old.unlink()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *TESTS, *sys.argv[1:]]
        if subprocess.run(command, cwd=COPY, env={**environ, "DENSENET_EXT_SIMD": level}).returncode != 0:
            failed.append(level)
            for report in reports():
                print(report.read_text(errors="replace"), flush=True)
    print(f"sanitize: {', '.join(failed)} failed" if failed else "sanitize: nothing found")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
