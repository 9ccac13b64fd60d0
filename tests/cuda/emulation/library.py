"""The CUDA kernels compiled for the emulator, to be called one by one on CPU tensors, or as torch's operators."""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import re
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from . import params

ROOT = Path(__file__).resolve().parents[3]
CACHE = ROOT / "build" / "emulation"
INCLUDE = re.compile(r'^\s*#\s*include\s+"([^"]+)"', re.MULTILINE)
FAMILIES = {  # kernel files, and the macro by which launchers.cpp knows that they are linked in
    "DX_STATISTICS": ["statistics.cu"],
    "DX_BN_RELU": ["bn_relu.cu"],
    "DX_COPY_TAPS": ["copy_taps.cu"],
    "DX_AVG_POOL": ["avg_pool.cu"],
    "DX_MAX_POOL": ["max_pool.cu"],
    "DX_CONV1X1": ["conv1x1.cu", "conv1x1_backward.cu"],
    "DX_CONV3X3": ["conv3x3.cu", "conv3x3_backward.cu", "conv3x3_choice.cu"],
}
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


class EmulationError(RuntimeError):
    """A check of the emulator failed: bounds, races, barriers."""


EMULATOR = ("emulated.cpp", "shadow.cpp", "driver.cpp")


def compile_library(families: Sequence[str] = tuple(FAMILIES), root: Path = ROOT, cache: Path = CACHE) -> Path:
    """Compiles the families' kernels and the emulator with the C++ compiler; returns the library's path.

    ``root`` has the sources: this project, or a copy of its csrc and tests/cuda/emulation. In ``cache`` each file stays
    under a name that follows from all that it is made from, so that what has not changed is compiled once, also by
    tests in several processes; `make clean` removes it.
    """
    others = {"launchers.cpp": [f"-D{family}" for family in families], "faults.cpp": [], "warp.cpp": []}
    return _compile(families, others, root=root, cache=cache)


def compile_operators(cache: Path = CACHE) -> Path:
    """Compiles all kernels, the emulator and the CUDA operators over them; returns the library's path.

    ``torch.ops.load_library`` of it registers the operators ``densenet_ext_emulated::*``.
    """
    from torch.utils import cpp_extension

    flags = [f"-isystem{path}" for path in cpp_extension.include_paths()]
    flags += [f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}", "-DUSE_CUDA"]
    # -Bsymbolic: what operators.cpp stands in for is in torch's libraries too
    linker = ["-Wl,-Bsymbolic", *(f"-L{path}" for path in cpp_extension.library_paths()), "-ltorch_cpu"]
    errors = ROOT / "csrc" / "ops" / "out_of_memory.cpp"
    others = {"operators.cpp": flags, errors: [*flags, f"-isystem{sysconfig.get_path('include')}"]}
    return _compile(tuple(FAMILIES), others, linker, cache=cache)


def _compile(
    families: Sequence[str],
    others: Mapping[str | Path, Sequence[str]],  # further files, in the emulator's folder or of a whole path: flags
    linker: Sequence[str] = (),
    root: Path = ROOT,
    cache: Path = CACHE,
) -> Path:
    emulation = root / "tests" / "cuda" / "emulation"
    sources = {root / "csrc" / "cuda" / name: [] for family in families for name in FAMILIES[family]}
    sources |= {emulation / name: list(flags) for name, flags in others.items()}
    sources |= {emulation / name: ["-O2"] for name in EMULATOR}  # small files, in which the time of a launch is spent
    options = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-ffp-contract=off", "-fPIC"]
    # Some distributions' compilers otherwise add checks that take a jump to another fiber's stack for an attack.
    options += ["-U_FORTIFY_SOURCE", "-DDX_EMULATE"]
    compiler = os.environ.get("CXX", "g++").split()
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout

    def build(source: Path) -> Path:
        flags = [*options, *sources[source]]
        key = _key(compiler, version, torch.__version__, flags, *_texts(source, emulation))
        command = [*compiler, *flags, f"-I{emulation}", "-x", "c++", "-c", str(source)]
        return _made(cache / f"{source.stem}-{key}.o", command)

    cache.mkdir(parents=True, exist_ok=True)
    with (cache / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with ThreadPoolExecutor(2) as pool:
            objects = sorted(map(str, pool.map(build, sources)))
        key = _key(compiler, version, linker, *(Path(name).name for name in objects))
        return _made(cache / f"emulated-{key}.so", [*compiler, "-shared", *objects, *linker])


def _made(target: Path, command: Sequence[str]) -> Path:
    """The target, made by the command unless it is there."""
    if not target.exists():
        unfinished = target.with_suffix(".unfinished")
        run = subprocess.run([*command, "-o", str(unfinished)], capture_output=True, text=True)
        if run.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}\n{run.stderr}")
        unfinished.rename(target)
    return target


def _key(*parts: object) -> str:
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def _texts(source: Path, emulation: Path) -> list[str]:
    """The text of a source and of all files of this project that it includes, whatever the conditions around that."""
    found: dict[Path, str] = {}
    waiting = [source.resolve()]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found[file] = file.read_text(encoding="utf-8")
            places = [at / name for name in INCLUDE.findall(found[file]) for at in (file.parent, emulation)]
            waiting += [place.resolve() for place in places if place.exists()]
    return [found[file] for file in sorted(found)]


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

    def copy_taps(self, sources: Sequence[torch.Tensor], targets: Sequence[torch.Tensor]) -> None:
        """Copies weights [N, C, taps] into others of the same shape, of which one side is in the acc dtype."""
        self._add_memory(
            {f"weight {i}": t for i, t in enumerate((*sources, *targets))},
            {f"weight {len(sources) + i}" for i in range(len(targets))},
        )
        copies = [
            params.TapsCopy(*a.shape, params.taps(a), params.taps(b)) for a, b in zip(sources, targets, strict=True)
        ]
        back = sources[0].element_size() < targets[0].element_size()
        dtype = DTYPES.index((sources if back else targets)[0].dtype)
        array = (params.TapsCopy * len(copies))(*copies)
        assert self.c.dx_copy_taps(dtype, ctypes.c_bool(back), array, ctypes.c_size_t(len(copies))) == 0
        self.raise_error()

    def has_room_for_conv3x3(self, size: Sequence[int], C: int, N: int, dims: int = 2) -> bool:
        """Whether a block has the shared memory for bf16 images of ``size`` [N, D, H, W]."""
        window = (ctypes.c_int64 * 3)(*[1] * (3 - dims), *[3] * dims)
        p = params.STRUCT["BnReluConv3x3"](C=C, N=N, images=params.images(size), window=window)
        self.c.dx_has_room_for_conv3x3.restype = ctypes.c_bool
        return self.c.dx_has_room_for_conv3x3(DTYPES.index(torch.bfloat16), ctypes.byref(p))

    def __call__(self, operator: str, **arguments: object) -> None:
        """Runs an operator; arguments by the names of its schema, tensors on the CPU.

        Raises EmulationError for what the emulator finds, and for an argument that was written without being one of
        the operator's results.
        """
        self._run(operator, {operator: arguments})

    def run_unmerged(
        self, first: str, first_arguments: dict[str, object], second: str, second_arguments: dict[str, object]
    ) -> None:
        """Runs two operators, of which the second merges what the blocks of the first have left."""
        self._run(f"{first}_then_{second}", {first: first_arguments, second: second_arguments})

    def _run(self, launcher: str, calls: Mapping[str, Mapping[str, object]]) -> None:
        given: list[object] = []
        memory: dict[str, torch.Tensor] = {}
        written: set[str] = set()
        for operator, arguments in calls.items():
            struct, results = params.OPERATORS[operator]
            p = params.make(struct, dict(arguments))
            tensors = {name: value for name, value in arguments.items() if isinstance(value, torch.Tensor)}
            dtype = DTYPES.index(next(tensors[name] for name in ("x", "src", "grad") if name in tensors).dtype)
            tensors["workspace"] = self._workspace(operator, dtype, p)
            memory |= {f"{operator}: {name}": value for name, value in tensors.items()}
            written |= {f"{operator}: {name}" for name in (*results.split(), "workspace")}
            given += [ctypes.byref(p), ctypes.c_void_p(tensors["workspace"].data_ptr())]
        self._add_memory(memory, written)
        code = getattr(self.c, f"dx_{launcher}")(dtype, *given)
        self.raise_error()
        if code != 0:
            raise EmulationError(f"{launcher}: error {code}")

    def _workspace(self, operator: str, dtype: int, p: ctypes.Structure) -> torch.Tensor:
        if not hasattr(self.c, f"dx_{operator}_workspace"):
            return torch.empty(0, dtype=torch.uint8)
        size = getattr(self.c, f"dx_{operator}_workspace")
        size.restype = ctypes.c_size_t
        # What a kernel does not write itself it must not read: NaN in every floating-point format.
        workspace = torch.full((size(dtype, ctypes.byref(p)) + 256,), 0xFF, dtype=torch.uint8)
        return workspace[-workspace.data_ptr() % 256 :]

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
