"""Shows that the tests of the emulated kernels see faults: each of a list of mutations of the kernels must be caught.

    python -m tests.cuda.emulation.mutations [--only PATTERN] [--list]

A mutation (mutation_list.py, mutation_backward.py, mutation_rows.py, mutation_conv3x3.py) replaces a few words in a
temporary copy of the sources: a barrier goes, a stride or an index of a fragment is another, a bound is left out. The
copy is compiled for the emulator and runs its cases; one of them has to fail, be it by the emulator's checks or by its
numbers. Exit code 0: all were caught; 1: some were not, or a case fails without any mutation.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from tests.cuda.emulation import mutation_backward, mutation_conv3x3, mutation_list, mutation_rows
from tests.cuda.emulation.library import Library, compile_library
from tests.cuda.emulation.mutation_cases import Case
from tests.cuda.emulation.mutation_list import FAMILIES, Mutation
from tests.support.forks import Fork

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[2]
_LISTS = (mutation_list, mutation_backward, mutation_rows, mutation_conv3x3)
MUTATIONS = [mutation for own in _LISTS for mutation in own.MUTATIONS]
# For the test suite: one of each kind, of kernels that are compiled soon; about 50 seconds of a processor in all.
FEW = (
    "forward: no barrier before a chunk is multiplied",
    "forward: no wait for a chunk's weights",
    "tensor cores: halves of the transposed left operand exchanged",
    "statistics: the last slab counts as a whole one",
    "rows: what the convolution reads again is not rectified",
    "weights: the second launch begins again",
    "3x3: no wait for a step's rows",
    "3x3 backward: the ring is not gone around",
)
# The families of kernels that cases call, where these are few: of a header that many include only they are compiled.
CALLED = {
    **dict.fromkeys(("forward", "backward", "forward_streamed", "forward_unaligned"), "DX_CONV1X1"),
    **dict.fromkeys(("forward3x3", "forward3x3_of_several_tiles", "backward3x3_of_several_tiles"), "DX_CONV3X3"),
    "statistics": "DX_STATISTICS",
    "weights": "DX_COPY_TAPS",
}
CASES: dict[str, Case] = {case.__name__: case for mutation in MUTATIONS for case in mutation.cases}
MOST_SECONDS = 120  # of processor time, for a mutation's cases: one that hangs is caught too, whatever else runs


def place(mutation: Mutation, root: Path = ROOT) -> Path:
    """The file that a mutation changes."""
    return root / "csrc" / "cuda" / mutation.file


class Workshop:
    """A copy of the sources in a temporary folder. What they are compiled to stays in the emulator's cache, by content:
    the same mutation of the same sources is compiled once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / "csrc", folder / "csrc", ignore=ignored)
        shutil.copytree(HERE, folder / "tests" / "cuda" / "emulation", ignore=ignored)
        self.library = self.compile()

    def compile(self, cases: Sequence[Case] = ()) -> Path:
        """The kernels that the cases call, by default all that are mutated."""
        called = {CALLED.get(case.__name__) for case in cases} or {None}
        families = FAMILIES if None in called else [family for family in FAMILIES if family in called]
        return compile_library(families, root=self.folder)

    def seconds(self, cases: Sequence[Case], library: Path) -> tuple[str | None, float]:
        """What the first case that failed said, or None, and how long it took."""
        start = time.monotonic()
        run = Fork(run_cases, str(library), [case.__name__ for case in cases]).finish(timeout=20 * MOST_SECONDS)
        if run.code == -signal.SIGXCPU:
            return "does not end", time.monotonic() - start
        lines = [line for line in run.output.splitlines() if line.strip()]
        said = None if run.code == 0 else lines[-1] if lines else f"ended by signal {-run.code}"
        return said, time.monotonic() - start

    def mutate(self, mutation: Mutation) -> tuple[str | None, float]:
        """How the mutation was seen, or None, and how long its cases took."""
        file = place(mutation, self.folder)
        text = file.read_text()
        if text.count(mutation.old) != 1:
            raise ValueError(f"{mutation.name}: {mutation.file} has {text.count(mutation.old)} times {mutation.old!r}")
        try:
            file.write_text(text.replace(mutation.old, mutation.new))
            return self.seconds(mutation.cases, self.compile(mutation.cases))
        finally:
            file.write_text(text)


def run_cases(library: str, names: Sequence[str]) -> None:
    """Runs cases of the library's kernels; raises what one of them does, and ends where they take too long."""
    resource.setrlimit(resource.RLIMIT_CPU, (MOST_SECONDS, MOST_SECONDS + 1))
    kernels = Library(Path(library))
    for name in names:
        torch.manual_seed(0)
        CASES[name](kernels)


def run(mutations: Sequence[Mutation]) -> list[str]:
    """Prints how each mutation was seen; returns what went wrong, in words."""
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        workshop = Workshop(Path(folder))
        cases = list(dict.fromkeys(case for mutation in mutations for case in mutation.cases))
        said, _ = workshop.seconds(cases, workshop.library)
        if said is not None:
            return [f"a case fails without any mutation: {said}"]
        for mutation in mutations:
            said, taken = workshop.mutate(mutation)
            print(f"{'NOT CAUGHT' if said is None else 'caught'} in {taken:.0f} s  {mutation.name}: {said}", flush=True)
            wrong += [f"not caught: {mutation.name}"] if said is None else []
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="those whose names have this in them")
    parser.add_argument("--list", action="store_true", help="print their names and end")
    options = parser.parse_args()
    chosen = [mutation for mutation in MUTATIONS if options.only in mutation.name]
    if options.list:
        print("\n".join(mutation.name for mutation in chosen))
        return 0
    wrong = run(chosen)
    print("\n".join([f"{len(chosen) - len(wrong)} of {len(chosen)} caught", *wrong]))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
