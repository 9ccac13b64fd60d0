"""The machine code of compiled GPU kernels, as NVIDIA's cuobjdump and nvdisasm print it, and what must hold of it.

Each check returns sentences about what does not hold, none where all does.

    python -m tests.cuda.machine_code FILE [PATTERN]

prints the loops of the kernels in FILE, a wheel, a library or what nvcc -cubin made, whose names match.
"""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from build_backend import extension

PROGRAMS = ("cuobjdump", "nvdisasm")


class Loop(NamedTuple):
    depth: int  # 0: in no other loop
    instructions: Counter[str]  # once around it, without those of loops in it


class Code(NamedTuple):
    name: str  # demangled, without its arguments
    architecture: str
    instructions: Counter[str]  # by their names with modifiers, such as "STG.E.128"
    loops: Sequence[Loop] = ()  # as they begin

    def count(self, name: str) -> int:
        """How many instructions there are of a name, with any modifiers."""
        return sum(n for full, n in self.instructions.items() if full == name or full.startswith(f"{name}."))

    def widths(self, name: str) -> Counter[int]:
        """How many instructions of a name move how many bytes of a thread."""
        found: Counter[int] = Counter()
        for full, n in self.instructions.items():
            if full.split(".")[0] == name:
                bits = re.search(r"\.[US]?(8|16|64|128)(?=\.|$)", full)
                found[int(bits[1]) // 8 if bits else 4] += n
        return found


def demangled(names: Iterable[str]) -> list[str]:
    """The names as in the source, without namespaces and arguments."""
    text = "\n".join(names)
    lines = subprocess.run(["c++filt"], input=text, capture_output=True, text=True, check=True).stdout.splitlines()
    return [re.sub(r"^void |dx::cuda::|dx::|\(anonymous namespace\)::|\(.*\)$", "", line) for line in lines]


# ---- reading it -----------------------------------------------------------------------------------------------------
def find_programs(toolkit: Path) -> list[Path] | None:
    """Returns where PROGRAMS are: the toolkit's, on PATH, or in NVIDIA's wheels of these names; None without both.

    The toolkit's come first, since they know what its compiler makes.
    """
    found = [shutil.which(name, path=f"{toolkit}/bin{os.pathsep}{os.environ['PATH']}") for name in PROGRAMS]
    if all(found):
        return [Path(str(program)) for program in found]
    installed = [in_wheel(name) for name in PROGRAMS]
    return [program for program in installed if program] if all(installed) else None


def in_wheel(name: str) -> Path | None:
    """Returns the program of the distribution nvidia-cuda-<name>."""
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = [Path(str(file.locate())) for file in files if file.name == name]
    return next((path for path in paths if os.access(path, os.X_OK)), None)


def disassemble(file: Path, programs: Sequence[Path], folder: Path) -> list[Code]:
    """Returns the code of all kernels of a library, or of the one in a wheel; writes to `folder`."""
    cuobjdump, nvdisasm = programs
    if file.suffix == ".whl":
        zipfile.ZipFile(file).extractall(folder)
        (file,) = folder.glob("*/_C*.so")
    if file.suffix == ".cubin":
        shutil.copy(file, folder)
    else:
        subprocess.run([cuobjdump, "-xelf", "all", file.resolve()], cwd=folder, capture_output=True, check=True)
    kernels = []
    for cubin in sorted(folder.glob("*.cubin")):
        command = [nvdisasm, "--print-code", "--no-dataflow", cubin]
        kernels += read(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    return kernels


def read(listing: str) -> list[Code]:
    """The kernels of what nvdisasm prints of one architecture."""
    target = re.search(r"\.target\s+(sm_\w+)", listing)
    assert target is not None, listing[:200]
    names, found = [], []
    for line in listing.splitlines():
        if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
            names.append(section[1])
            found.append(Listing({}, [], []))
        elif label := re.match(r"\.(L_x_\w+):", line):
            found[-1].labels[label[1]] = len(found[-1].instructions)
        elif instruction := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*)", line):
            if target_of := re.search(r"\.(L_x_\w+)", instruction[2]):
                found[-1].branches.append((len(found[-1].instructions), target_of[1]))
            found[-1].instructions.append(instruction[1])
    return [
        Code(name, target[1], Counter(of.instructions), of.loops())
        for name, of in zip(demangled(names), found, strict=True)
    ]


class Listing(NamedTuple):
    labels: dict[str, int]  # the instructions that they stand before
    branches: list[tuple[int, str]]  # which instruction, to which label
    instructions: list[str]

    def loops(self) -> list[Loop]:
        """From a label to the last branch back to it."""
        ends: dict[int, int] = {}
        for at, label in self.branches:
            if self.labels.get(label, at) < at:  # behind a kernel's end stands a branch to itself
                ends[self.labels[label]] = at
        loops = []
        for begin, end in sorted(ends.items()):
            inside = [(b, e) for b, e in ends.items() if begin <= b and e <= end and (b, e) != (begin, end)]
            own = [
                name
                for i, name in enumerate(self.instructions[begin : end + 1], begin)
                if not any(b <= i <= e for b, e in inside)
            ]
            depth = sum(b <= begin and end <= e for b, e in ends.items()) - 1
            loops.append(Loop(depth, Counter(own)))
        return loops


def matching(kernels: Iterable[Code], pattern: str, architectures: Iterable[str]) -> list[Code]:
    """The kernels of a pattern, of which there must be one for each architecture: a new name leaves no check idle."""
    found = [kernel for kernel in kernels if re.fullmatch(pattern, kernel.name)]
    assert {kernel.architecture for kernel in found} >= set(architectures), f"no {pattern}"
    return found


# ---- what must hold of it -------------------------------------------------------------------------------------------
HALF = "(bf|f)loat16"
TILES_FORWARD = r"bn_relu_conv1x1_tiles"
TILES_BACKWARD = r"bn_relu_conv1x1_backward_tiles"

# Kernel: bytes of a store to global memory, how many of them there are at least. Rows of a tile or of a thread, once
# each.
STORES = {
    rf"{TILES_FORWARD}<{HALF}, .*, (96|128), .*>": (16, 4),
    rf"{TILES_FORWARD}<{HALF}, .*, 64, .*>": (16, 2),
    rf"{TILES_FORWARD}<float, .*, 128, .*>": (16, 8),
    rf"{TILES_BACKWARD}<{HALF}, .*, (96|128|192), .*, true, .*>": (16, 4),
    rf"{TILES_BACKWARD}<{HALF}, .*, 64, .*, true, .*>": (16, 2),
    rf"{TILES_BACKWARD}<float, .*, true, (true|false)>": (16, 2),
    rf"bn_relu_conv3x3_tiles<{HALF}, .*>": (8, 1),
    rf"conv3x3_dgrad_tiles<({HALF}|float), .*>": (16, 2),
    rf"conv3x3_wgrad_tiles<{HALF}, .*>": (8, 36),
}

# Kernel: stores narrower than 16 bytes that it may have, all of other things than rows (sums, bytes that say where a
# maximum was): these kernels run only where all rows consist of whole aligned pieces.
NARROW_STORES = {
    rf"{TILES_FORWARD}<({HALF}|float), .*, true>": {4: 3},  # a column's moments
    rf"bn_relu_kernel<({HALF}, 8|float, 4)>": {},
    rf"bn_relu_backward_kernel<({HALF}, 8|float, 4)>": {},
    rf"feature_grad_kernel<({HALF}, 8|float, 4)>": {},
    rf"bn_relu_backward_reduce_kernel<({HALF}, 8|float, 4)>": {4: 32},  # two sums of each column, and again in pairs
    rf"moments<({HALF}, 8|float, 4)>": {4: 40},  # of one slab two numbers of each column, of several three
    rf"complete_gradient<({HALF}, 8|float, 4)>": {4: 16},
    rf"backward<({HALF}, 8|float, 4)>": {},  # of both kinds of pooling
    rf"forward<{HALF}, 8>": {8: 1},
    r"forward<float, 4>": {4: 1},
}

# Arithmetic, as the kernels' names have it: the tensor cores' instruction.
PRODUCTS = {
    "TensorMath<bfloat16>": "HMMA.16816.F32.BF16",
    "TensorMath<float16>": "HMMA.16816.F32",
    "Tf32Math": "HMMA.1688.F32.TF32",
}

# Kernels to which rows or weights come by asynchronous copies, and those to which nothing comes in another way.
COPIES = (rf"{TILES_FORWARD}<.*>", rf"{TILES_BACKWARD}<.*>", r"(bn_relu_conv|conv)3x3_(\w+_)?tiles<.*>")
NOTHING_BUT_COPIES = (rf"{TILES_BACKWARD}<.*, true, (true|false), (true|false)>",)


def narrow_stores(kernels: Sequence[Code], architectures: Iterable[str]) -> list[str]:
    """Of kernels whose rows are stored in smaller pieces than they should: several partial writes of one sector."""
    wrong = []
    for pattern, (size, least) in STORES.items():
        for kernel in matching(kernels, pattern, architectures):
            if kernel.widths("STG")[size] < least:
                wrong.append(f"{label(kernel)}: {kernel.widths('STG')[size]} stores of {size} bytes, not {least}")
    for pattern, allowed in NARROW_STORES.items():
        for kernel in matching(kernels, pattern, architectures):
            stores = kernel.widths("STG")
            if not stores[16]:
                wrong.append(f"{label(kernel)}: no stores of 16 bytes")
            narrow = {size: n for size, n in stores.items() if size < 16 and n > allowed.get(size, 0)}
            if narrow:
                wrong.append(f"{label(kernel)}: narrow stores, by their bytes: {narrow}")
    return wrong


def local_memory(kernels: Sequence[Code]) -> list[str]:
    """Of kernels that keep something in local memory, which is global memory."""
    return [
        f"{label(kernel)}: {n} accesses to local memory"
        for kernel in kernels
        if (n := kernel.count("LDL") + kernel.count("STL"))
    ]


def wrong_products(kernels: Sequence[Code], architectures: Iterable[str]) -> list[str]:
    """Of kernels that should multiply on the tensor cores and don't, or do it in another arithmetic than their own."""
    wrong = []
    for arithmetic, product in PRODUCTS.items():
        for kernel in matching(kernels, rf"\w+_tiles<\w+, {arithmetic}.*>", architectures):
            products = {name for name in kernel.instructions if name.startswith("HMMA.")}
            if products != {product}:
                wrong.append(f"{label(kernel)}: {sorted(products) or 'no products'}, not {product}")
            if arithmetic != "Tf32Math" and not kernel.count("LDSM"):
                wrong.append(f"{label(kernel)}: operands without ldmatrix")
    return wrong


def missing_copies(kernels: Sequence[Code], architectures: Iterable[str]) -> list[str]:
    """Of kernels without asynchronous copies of 16 bytes, or with loads in their place."""
    wrong = []
    for pattern in COPIES:
        for kernel in matching(kernels, pattern, architectures):
            copies = kernel.widths("LDGSTS")
            if set(copies) != {16}:
                wrong.append(f"{label(kernel)}: asynchronous copies, by their bytes: {dict(copies)}")
    for pattern in NOTHING_BUT_COPIES:
        for kernel in matching(kernels, pattern, architectures):
            if kernel.count("LDG"):
                wrong.append(f"{label(kernel)}: {kernel.count('LDG')} loads into registers")
    return wrong


def label(kernel: Code) -> str:
    return f"{kernel.architecture} {kernel.name}"


# ---- printing it ----------------------------------------------------------------------------------------------------
# What a line counts beside the sum: products, and what goes to and from shared and global memory.
COUNTED = ("HMMA", "FFMA", "LDSM", "LDS", "STS", "LDGSTS", "LDG", "STG", "BAR")


def main() -> None:
    toolkit = extension.find_toolkit() or Path("/usr/local/cuda")
    programs = find_programs(toolkit)
    if programs is None:
        raise SystemExit(f"needs {' and '.join(PROGRAMS)}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    file, pattern = Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else ".*"
    with tempfile.TemporaryDirectory() as folder:
        for kernel in disassemble(file, programs, Path(folder)):
            if re.fullmatch(pattern, kernel.name):
                print(f"{label(kernel)}: {kernel.instructions.total()} instructions")
                for loop in kernel.loops:
                    of = Code("", "", loop.instructions)
                    counts = ", ".join(f"{n} {name}" for name in COUNTED if (n := of.count(name)))
                    print(f"  {'  ' * loop.depth}loop of {loop.instructions.total()}: {counts}")


if __name__ == "__main__":
    main()
