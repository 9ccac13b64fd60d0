"""Builds the compiled part of densenet_ext with the torch that is installed; the metadata stand in pyproject.toml."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import Any

from setuptools import setup

from build_backend import environment
from build_backend.extension import extension
from build_backend.readme import for_index

ROOT = Path(__file__).resolve().parent


def options() -> dict[str, Any]:
    """What setuptools is told where something is compiled; prints what was decided and why."""
    environment.check()
    environment.put_ninja_on_path()
    try:
        import torch
        from torch.utils.cpp_extension import BuildExtension
    except ImportError as error:
        raise environment.BuildError(f"the installed torch cannot be imported: {error}.") from error

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Installs, editable or not, otherwise compile in a temporary folder, everything each time.
            self.build_temp = str(ROOT / "build" / f"temp-{sysconfig.get_config_var('SOABI')}")

        def build_extensions(self) -> None:
            try:
                super().build_extensions()
            except RuntimeError as error:
                raise environment.BuildError(f"{error}; the compiler's own message stands above.") from error
            except ValueError as error:
                # torch knows which architectures there are; it raises this for all others.
                raise environment.BuildError(f"TORCH_CUDA_ARCH_LIST: {error}.") from error

    module, cuda = extension(ROOT)
    print(f"densenet_ext: torch {torch.__version__}, C++ compiler {environment.cxx_compiler()}")
    print(f"densenet_ext: GPU kernels: {'yes' if cuda.build else 'no'} ({cuda.why})")
    if cuda.build:
        print(f"densenet_ext: GPU architectures: {cuda.architectures}")
    print(f"densenet_ext: {environment.find_ninja() or 'no ninja: one file at a time, everything each time'}")
    sys.stdout.flush()
    return {"ext_modules": [module], "cmdclass": {"build_ext": Build}}


def compiles(arguments: list[str]) -> bool:
    """Whether setuptools is to build anything: a source archive and the metadata need neither torch nor a compiler."""
    return not {"sdist", "egg_info", "dist_info"}.intersection(arguments)


with environment.one_sentence():
    setup(
        long_description=for_index((ROOT / "README.md").read_text(encoding="utf-8")),
        long_description_content_type="text/markdown",
        **(options() if compiles(sys.argv[1:]) else {}),
    )
