"""Loads the compiled part and tells what it is, or why it is missing.

The package works without the compiled part: every operation also exists in plain PyTorch. What is lost is speed, so
the reason is kept in words, for `build_info` and `report`.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from densenet_ext._version import __version__

_NAME = "densenet_ext._C"


def _path_in(folder: Path) -> Path:
    """Returns the file that this Python would load as the compiled part."""
    return folder / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"


def _explain(error: ImportError, folder: Path) -> str:
    """Returns one sentence for a compiled part that `folder` lacks, or that did not load."""
    if _path_in(folder).exists():
        return f"the compiled part does not load with torch {torch.__version__}: {error}; build densenet_ext again"
    others = sorted(path.name for path in folder.glob("_C.*.so"))
    if others:
        needed = _path_in(folder).name
        return f"the compiled part was built for another Python ({', '.join(others)}; this one needs {needed})"
    if (folder.parent / "csrc").is_dir():
        return (
            f"the package was imported from its source folder {folder.parent}, where it has not been compiled; "
            "`pip install -e .` there compiles it in place"
        )
    return f"the compiled part is not installed beside the package: {error}"


def _load() -> tuple[ModuleType | None, str | None]:
    # torch comes first (imported above): its libraries have to be in the process when the compiled part is linked in.
    folder = Path(__file__).resolve().parent
    try:
        return importlib.import_module(_NAME), None
    except ImportError as error:
        reason = _explain(error, folder)
        if _path_in(folder).exists():
            # It was built for this Python and is expected to run: a CUDA build under a torch without CUDA, say.
            warnings.warn(f"densenet_ext runs in plain PyTorch: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason


def _choose_simd_level(module: ModuleType, wanted: str | None) -> None:
    """Sets the SIMD level of the CPU kernels to that of DENSENET_EXT_SIMD, if it is set; RuntimeError without it."""
    levels = module.simd_levels()
    if wanted and wanted not in levels:
        raise RuntimeError(
            f"DENSENET_EXT_SIMD: expected one of the levels of this build on this processor ({', '.join(levels)}), "
            f"got {wanted!r}"
        )
    if wanted:
        module.set_simd_level(wanted)


def _choose_winograd(module: ModuleType, wanted: str | None) -> None:
    """Sets where 3x3 convolutions take Winograd's products from DENSENET_EXT_WINOGRAD; RuntimeError if unknown."""
    if not wanted:
        return
    try:
        module.set_winograd(wanted)
    except ValueError as error:
        raise RuntimeError(f"DENSENET_EXT_WINOGRAD: {error}") from None


module, why_missing = _load()
if module is not None:
    _choose_simd_level(module, os.environ.get("DENSENET_EXT_SIMD"))
    _choose_winograd(module, os.environ.get("DENSENET_EXT_WINOGRAD"))
_facts: dict[str, Any] = module.build_facts() if module is not None else {}
has_cpu: bool = module is not None
has_cuda: bool = bool(_facts.get("cuda"))


def _explain_no_cuda(facts: dict[str, Any], torch_cuda: str | None) -> str:
    """Returns why there are no GPU kernels; if this torch has CUDA, that another one was built with."""
    reason = str(facts.get("why_no_cuda") or why_missing)
    if torch_cuda is not None and "torch without CUDA" in reason:
        return f"{reason}, and torch {torch.__version__} has CUDA {torch_cuda}; build densenet_ext again"
    return reason


why_no_cuda: str | None = None if has_cuda else _explain_no_cuda(_facts, torch.version.cuda)


def build_info() -> dict[str, Any]:
    """Tells what the compiled part was built with and runs on.

    Returns a dict with

    * ``version``: of this package;
    * ``compiled``: whether the compiled part is loaded, and ``why_missing``: a sentence if it is not, else None;
    * ``torch_built_with``, ``torch_running``: version strings;
    * ``compiler``: the C++ compiler;
    * ``cuda``: the CUDA version the GPU kernels were compiled with, None without them, and then ``why_no_cuda`` says
      why; ``cuda_architectures``: a list such as ``["9.0", "9.0+PTX"]``;
    * ``simd``: the SIMD level in use on the CPU, and ``simd_available``: every level this processor runs.

    Entries that only the compiled part knows are None (lists: empty) when it is missing.
    """
    return {
        "version": __version__,
        "compiled": module is not None,
        "why_missing": why_missing,
        "torch_built_with": _facts.get("torch") or None,
        "torch_running": str(torch.__version__),
        "compiler": _facts.get("compiler") or None,
        "cuda": _facts.get("cuda") or None,
        "why_no_cuda": why_no_cuda,
        "cuda_architectures": str(_facts.get("cuda_architectures") or "").replace(";", " ").split(),
        "simd": module.simd_level() if module is not None else None,
        "simd_available": list(module.simd_levels()) if module is not None else [],
    }
