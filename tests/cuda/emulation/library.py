"""The CUDA kernels compiled for the emulator, to be called one by one on CPU tensors, or as torch's operators."""

from __future__ import annotations

import ctypes
import os
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import params

ROOT = Path(__file__).resolve().parents[3]
FAMILIES = {  # kernel files, and the macro by which launchers.cpp knows that they are linked in
    "DX_STATISTICS": ["statistics.cu"],
    "DX_BN_RELU": ["bn_relu.cu"],
    "DX_AVG_POOL": ["avg_pool.cu"],
    "DX_MAX_POOL": ["max_pool.cu"],
    "DX_CONV1X1": ["conv1x1.cu", "conv1x1_backward.cu"],
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class EmulationError(RuntimeError):
    """A check of the emulator failed: bounds, races, barriers."""


def _is_new(target: Path) -> bool:
    """Whether an object is newer than all that it was made from, by the compiler's own list."""
    listed = target.with_suffix(".d")
    if not (target.exists() and listed.exists()):
        return False
    files = [Path(word) for word in listed.read_text().replace("\\\n", " ").split(":", 1)[1].split()]
    return all(f.exists() and f.stat().st_mtime <= target.stat().st_mtime for f in files)


EMULATOR = ("emulated.cpp", "shadow.cpp", "driver.cpp")
CALLED_BY_TESTS = ("launchers.cpp", "faults.cpp", "warp.cpp")


def compile_library(folder: Path, families: Sequence[str] = tuple(FAMILIES), root: Path = ROOT) -> Path:
    """Compiles the families' kernels and the emulator with the C++ compiler; returns the library's path.

    Objects are kept in the folder and compiled again when a file that they include has changed. ``root`` has the
    sources: this project, or a copy of its csrc and tests/cuda/emulation.
    """
    return _compile(folder, families, CALLED_BY_TESTS, root=root)


def compile_operators(folder: Path) -> Path:
    """Compiles all kernels, the emulator and the CUDA operators over them; returns the library's path.

    ``torch.ops.load_library`` of it registers the operators ``densenet_ext_emulated::*``.
    """
    from torch.utils import cpp_extension

    include = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    # -Bsymbolic: what operators.cpp stands in for is in torch's libraries too
    linker = ["-Wl,-Bsymbolic", *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    return _compile(folder, tuple(FAMILIES), ("operators.cpp",), [*include, abi, "-DUSE_CUDA"], linker)


def _compile(
    folder: Path,
    families: Sequence[str],
    others: Sequence[str],
    flags: Sequence[str] = (),
    linker: Sequence[str] = (),
    root: Path = ROOT,
) -> Path:
    emulation = root / "tests" / "cuda" / "emulation"
    sources = [root / "csrc" / "cuda" / name for family in families for name in FAMILIES[family]]
    sources += [emulation / name for name in (*EMULATOR, *others)]
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC", "-MMD"]
    # Some distributions' compilers otherwise add checks that take a jump to another fiber's stack for an attack.
    options += ["-U_FORTIFY_SOURCE", "-DDX_EMULATE", f"-I{emulation}"]
    options += [f"-D{family}" for family in families] + list(flags)
    compiler = os.environ.get("CXX", "g++").split()

    def build(source: Path) -> Path:
        target = folder / f"{source.name}.o"
        if source.name != "launchers.cpp" and _is_new(target):
            return target
        command = [*compiler, *options, "-x", "c++", "-c", str(source), "-o", str(target)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        return target

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(build, sources))
    library = folder / f"emulated{os.getpid()}.so"
    subprocess.run([*compiler, "-shared", "-o", str(library), *map(str, objects), *linker], check=True)
    return library


class Library:
    def __init__(self, path: Path) -> None:
        self.c = ctypes.CDLL(str(path))
        self.c.dx_tiles_of_a_block.argtypes, self.c.dx_tiles_of_a_block.restype = [ctypes.c_int64] * 3, ctypes.c_int64
        self.c.dx_add_memory.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_char_p]
        self.c.dx_fault.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p]
        self.c.dx_warp.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]

    def set_order(self, order: int) -> None:
        """In which order a block's threads run: 0 first to last, 1 last to first, others shuffled by this seed."""
        self.c.dx_set_order(order)

    def raise_error(self) -> None:
        text = ctypes.create_string_buffer(1000)
        self.c.dx_take_error(text, ctypes.c_size_t(1000))
        if text.value:
            raise EmulationError(text.value.decode())

    def fault(self, name: str, source: torch.Tensor, out: torch.Tensor) -> None:
        self._add_memory({"source": source, "out": out}, {"out"})
        assert self.c.dx_fault(name.encode(), source.data_ptr(), out.data_ptr()) != -1, name
        self.raise_error()

    def warp(self, name: str, a: torch.Tensor, b: torch.Tensor, d: torch.Tensor) -> None:
        self._add_memory({"a": a, "b": b, "d": d}, {"d"})
        assert self.c.dx_warp(name.encode(), a.data_ptr(), b.data_ptr(), d.data_ptr()) == 0, name
        self.raise_error()

    def __call__(self, operator: str, **arguments: object) -> None:
        """Runs an operator; arguments by the names of its schema, tensors on the CPU.

        Raises EmulationError for what the emulator finds, and for an argument that was written without being one of
        the operator's results.
        """
        struct, written = params.OPERATORS[operator]
        p = params.make(struct, arguments)
        tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
        first = next(tensors[name] for name in ("x", "src", "grad") if name in tensors)
        dtype = DTYPES.index(first.dtype)
        workspace = torch.empty(0, dtype=torch.uint8)
        if hasattr(self.c, f"dx_{operator}_workspace"):
            size = getattr(self.c, f"dx_{operator}_workspace")
            size.restype = ctypes.c_size_t
            # What a kernel does not write itself it must not read: NaN in every floating-point format.
            workspace = torch.full((size(dtype, ctypes.byref(p)) + 256,), 0xFF, dtype=torch.uint8)
            workspace = workspace[-workspace.data_ptr() % 256 :]
        self._add_memory({**tensors, "workspace": workspace}, {*written.split(), "workspace"})
        code = getattr(self.c, f"dx_{operator}")(dtype, ctypes.byref(p), ctypes.c_void_p(workspace.data_ptr()))
        self.raise_error()
        if code != 0:
            raise EmulationError(f"{operator}: error {code}")

    def _add_memory(self, tensors: dict[str, torch.Tensor], written: set[str]) -> None:
        self.c.dx_clear_memory()
        regions: dict[tuple[int, int], tuple[bool, str]] = {}
        for name, tensor in tensors.items():
            for region in _memory_of(tensor):
                writable, names = regions.get(region, (False, ""))
                regions[region] = (writable or name in written, f"{names} {name}".strip())
        for (begin, size), (writable, names) in regions.items():
            self.c.dx_add_memory(begin, size, int(writable), names.encode())


def _memory_of(tensor: torch.Tensor) -> list[tuple[int, int]]:
    """Begin and size of the memory that kernels may touch: all that the tensor is a slice of, or, where that is too
    much to keep account of, its rows."""
    storage = tensor.untyped_storage()
    if storage.nbytes() <= 2**28:
        return [(storage.data_ptr(), storage.nbytes())] if storage.nbytes() > 0 else []
    return [(row.data_ptr(), row.numel() * row.element_size()) for row in tensor]
