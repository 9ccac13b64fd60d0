"""The compiled part: its sources, flags and macros, and whether it has GPU kernels."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

from build_backend.environment import BuildError, cxx_compiler, is_clang

# The GPU kernels and what registers them as operators.
CUDA_SOURCES = ("csrc/ops/cuda.cpp", "csrc/ops/out_of_memory.cpp", "csrc/cuda/*.cu")


# densenet_ext/_extension.py says more when the torch that runs has CUDA.
WITHOUT_CUDA = "built with a torch without CUDA"


class Cuda(NamedTuple):
    """Whether the GPU kernels are built, and why, in words; with them the toolkit and the architectures."""

    build: bool
    why: str
    home: Path | None = None
    architectures: str = ""


def sources(root: Path, cuda: bool) -> list[str]:
    """The source files, relative to `root` (as setuptools wants them), in a fixed order."""
    patterns = ["csrc/module.cpp", "csrc/ops/schemas.cpp", "csrc/ops/cpu.cpp", "csrc/cpu/*.cpp"]
    patterns += CUDA_SOURCES if cuda else ()
    return [str(path.relative_to(root)) for pattern in patterns for path in sorted(root.glob(pattern))]


def find_toolkit() -> Path | None:
    """The folder of a CUDA toolkit with compiler and headers: CUDA_HOME or CUDA_PATH, nvcc's, or the usual place."""
    given = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    places = [Path(given)] if given else []
    if nvcc and not given:
        places.append(Path(nvcc).resolve().parents[1])
    if not given:
        places.append(Path("/usr/local/cuda"))
    # nvcc on PATH may be a launcher that lies far from its toolkit, hence the look at the headers.
    for place in places:
        if (place / "bin" / "nvcc").exists() and (place / "include" / "cuda_runtime.h").exists():
            return place
    return None


def decide_cuda(forced: str | None, torch_cuda: str | None, toolkit: Path | None) -> Cuda:
    """Whether to build the GPU kernels. `forced` is DENSENET_EXT_CUDA: "0", "1", or None to decide by what is there.

    A visible GPU is no condition: builds often run on machines without one. Raises `BuildError` when "1" cannot be.
    """
    if forced not in (None, "", "0", "1"):
        raise BuildError(f"DENSENET_EXT_CUDA must be 0 or 1, and is {forced!r}.")
    if forced == "0":
        return Cuda(False, "DENSENET_EXT_CUDA=0")
    other_major = _other_major(torch_cuda, toolkit)
    if forced == "1":
        if toolkit is None:
            raise BuildError("DENSENET_EXT_CUDA=1, and no CUDA toolkit was found; set CUDA_HOME to its folder.")
        if other_major:
            raise BuildError(f"DENSENET_EXT_CUDA=1, and {other_major}; set CUDA_HOME to a toolkit that fits.")
        loads = "" if torch_cuda else "; this torch has no CUDA, so that the result compiles and does not load here"
        return Cuda(True, f"DENSENET_EXT_CUDA=1, toolkit in {toolkit}{loads}", toolkit)
    if torch_cuda is None:
        return Cuda(False, WITHOUT_CUDA)
    if toolkit is None:
        return Cuda(False, f"torch has CUDA {torch_cuda}, but no CUDA toolkit was found (CUDA_HOME, nvcc on PATH)")
    if other_major:
        return Cuda(False, other_major)
    return Cuda(True, f"torch has CUDA {torch_cuda}, toolkit in {toolkit}", toolkit)


def _other_major(torch_cuda: str | None, toolkit: Path | None) -> str | None:
    """In words that the toolkit's major version is not the one that torch was built with, or None."""
    if torch_cuda is None or toolkit is None:
        return None
    major, minor = toolkit_version(toolkit)
    if int(torch_cuda.split(".")[0]) == major:
        return None
    return f"torch has CUDA {torch_cuda}, but the toolkit in {toolkit} is {major}.{minor}, of another major version"


# Earlier GPUs have no bf16 arithmetic and no asynchronous copies; they run the package in plain PyTorch.
LEAST_CAPABILITY = (8, 0)
# What TORCH_CUDA_ARCH_LIST may call those, besides their numbers.
EARLIER_GENERATIONS = ("Kepler", "Kepler+Tesla", "Maxwell", "Maxwell+Tegra", "Pascal", "Volta", "Turing")


def default_architectures(toolkit_version: tuple[int, int]) -> list[str]:
    """One architecture per generation that the toolkit knows, with PTX of the newest for what comes after."""
    names = ["8.0", "9.0"]
    if toolkit_version >= (12, 8):
        names += ["10.0", "12.0"]
    if toolkit_version >= (13, 0):
        names.insert(-1, "11.0")
    return [*names[:-1], names[-1] + "+PTX"]


def toolkit_version(toolkit: Path) -> tuple[int, int]:
    """Major and minor version of a toolkit, as its nvcc says."""
    text = subprocess.run([str(toolkit / "bin" / "nvcc"), "--version"], capture_output=True, text=True).stdout
    release = text.partition("release ")[2].partition(",")[0].split(".")
    return int(release[0]), int(release[1])


def choose_architectures(toolkit: Path) -> list[str]:
    """TORCH_CUDA_ARCH_LIST if it is set, else the visible GPUs', else the default, in the words of that variable.

    Raises `BuildError` for what is neither a number nor a name, such as nvcc's sm_90.
    """
    import torch

    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for name in given:
        if not re.fullmatch(r"(\d+\.\d+[af]?|[A-Z][A-Za-z+]*)(\+PTX)?", name):
            number = re.fullmatch(r"(?:sm|compute)_?(\d+)(\d[af]?)", name)
            meant = f" (write {number[1]}.{number[2]})" if number else ""
            raise BuildError(
                f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as 9.0 or 8.0;9.0+PTX, got {name!r}{meant}."
            )
    if given:
        return given
    visible = {torch.cuda.get_device_capability(index) for index in range(torch.cuda.device_count())}
    if visible:
        names = [f"{major}.{minor}" for major, minor in sorted(visible)]
        return [*names[:-1], names[-1] + "+PTX"]
    return default_architectures(toolkit_version(toolkit))


def without_early_architectures(cuda: Cuda, architectures: list[str], forced: bool) -> Cuda:
    """The decision with those of `architectures` that the kernels can be built for, or against the GPU part when they
    can be built for none. Raises `BuildError` when the GPU part is forced then.
    """
    early = [name for name in architectures if _is_early(name)]
    if not early:
        return cuda._replace(architectures=";".join(architectures))
    least = ".".join(map(str, LEAST_CAPABILITY))
    reason = f"not for {', '.join(early)}: the kernels need compute capability {least} or later"
    if len(early) < len(architectures):
        kept = [name for name in architectures if name not in early]
        return cuda._replace(why=f"{cuda.why}; {reason}", architectures=";".join(kept))
    if forced:
        raise BuildError(f"DENSENET_EXT_CUDA=1, and TORCH_CUDA_ARCH_LIST or the visible GPUs are {reason}.")
    return Cuda(False, reason)


def _is_early(architecture: str) -> bool:
    """Whether a word of TORCH_CUDA_ARCH_LIST means GPUs below LEAST_CAPABILITY."""
    name = architecture.removesuffix("+PTX")
    number = name.rstrip("af").split(".")
    if len(number) == 2 and all(part.isdigit() for part in number):
        return (int(number[0]), int(number[1])) < LEAST_CAPABILITY
    return name in EARLIER_GENERATIONS


def optimisation_flags(environ: dict[str, str], clang: bool = False) -> list[str]:
    """-O3 without debug information, unless the standard variables say otherwise; CXXFLAGS come last and win."""
    user = shlex.split(environ.get("CFLAGS", "")) + shlex.split(environ.get("CXXFLAGS", ""))
    flags = [] if any(flag.startswith("-O") for flag in user) else ["-O3"]
    flags += [] if any(flag.startswith("-g") for flag in user) else ["-g0"]
    # GCC 12 warns about its own AVX-512 header once per use (its bug 105593); in our code clang would find it.
    flags += [] if clang else ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]
    return [*flags, "-fvisibility=hidden", *shlex.split(environ.get("CXXFLAGS", ""))]


def extension(root: Path) -> tuple[Any, Cuda]:
    """The setuptools extension `densenet_ext._C`, and the decision about its GPU part. Needs torch.

    Raises `BuildError` when the sources are incomplete or the environment asks for what is not there.
    """
    import torch
    from torch.utils import cpp_extension

    toolkit = find_toolkit()
    forced = os.environ.get("DENSENET_EXT_CUDA")
    cuda = decide_cuda(forced, torch.version.cuda, toolkit)
    macros: list[tuple[str, str | None]] = []
    include_dirs, library_dirs, libraries = [str(root / "csrc")], [], []
    if cuda.build and toolkit is not None:
        cuda = without_early_architectures(cuda, choose_architectures(toolkit), forced == "1")
    if cuda.build and toolkit is not None:
        # torch guesses the toolkit from nvcc's path, and does not look for one when it is built without CUDA.
        cpp_extension.CUDA_HOME = str(toolkit)
        os.environ["TORCH_CUDA_ARCH_LIST"] = cuda.architectures
        # The stable ABI hands out the current stream under this macro.
        macros.append(("USE_CUDA", "1"))
        include_dirs += cpp_extension.include_paths("cuda", torch_include_dirs=False)
        library_dirs += cpp_extension.library_paths("cuda", torch_include_dirs=False)
        libraries += ["cudart"] + (["torch_cuda"] if torch.version.cuda else [])
    facts = {
        "DX_BUILD_TORCH": torch.__version__,
        "DX_BUILD_CUDA": ".".join(map(str, toolkit_version(toolkit))) if cuda.build and toolkit else "",
        "DX_BUILD_ARCHS": cuda.architectures,
        "DX_BUILD_NO_CUDA": "" if cuda.build else cuda.why,
    }
    macros += [(name, f'"{value}"') for name, value in facts.items()]
    compiler = cxx_compiler()
    flags = optimisation_flags(dict(os.environ), compiler is not None and is_clang(compiler))
    # Messages name the source file: by its place in the project, wherever that was built.
    flags.append(f"-fmacro-prefix-map={root}{os.sep}=")
    files = sources(root, cuda.build)
    if "csrc/module.cpp" not in files:
        raise BuildError(f"the source csrc/module.cpp is missing from {root}.")
    module = cpp_extension.CppExtension(
        "densenet_ext._C",
        files,
        include_dirs=include_dirs,
        library_dirs=library_dirs,
        libraries=libraries,
        define_macros=macros,
        extra_compile_args={"cxx": flags, "nvcc": ["-O3"]},
    )
    return module, cuda
