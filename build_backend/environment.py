"""What a build needs of its environment: torch, setuptools, ninja, a compiler. No module here needs any of them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shlex
import shutil
import site
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MINIMUM_TORCH = (2, 11)
MINIMUM_SETUPTOOLS = 77  # the first with SPDX license expressions; torch itself asks for as much


class BuildError(Exception):
    """A build that cannot work; the text is one sentence for the user."""


@contextmanager
def one_sentence() -> Iterator[None]:
    """Ends the process with a `BuildError`'s text alone: pip shows what is printed, and nobody reads a traceback."""
    try:
        yield
    except BuildError as error:
        raise SystemExit(f"densenet_ext: {error}") from None


def own_paths() -> list[str]:
    """The module search path that this interpreter has outside of an isolated build."""
    hidden = {"PYTHONPATH", "PYTHONNOUSERSITE"}  # both set by pip for the isolated environment
    environ = {name: value for name, value in os.environ.items() if name not in hidden}
    code = "import json, sys; print(json.dumps([path for path in sys.path if path]))"
    run = subprocess.run([sys.executable, "-c", code], env=environ, stdout=subprocess.PIPE, check=True, text=True)
    return list(json.loads(run.stdout.splitlines()[-1]))


def restore_own_packages() -> None:
    """Puts the interpreter's own packages at the end of `sys.path`, behind what the build environment has."""
    for path in own_paths():
        if path not in sys.path:
            # addsitedir also reads the folder's .pth files, through which a package may be installed for development.
            site.addsitedir(path) if Path(path).name in ("site-packages", "dist-packages") else sys.path.append(path)
    importlib.invalidate_caches()
    installed = setuptools_versions()
    if installed and installed[0][0] < MINIMUM_SETUPTOOLS <= max(installed)[0]:
        # A new venv often brings an old setuptools, which hides the good one that came with a shared torch.
        sys.path.insert(0, max(installed)[1])


def setuptools_versions() -> list[tuple[int, str]]:
    """Major version and folder of every setuptools on the path; the first is the one that would be imported."""
    found = importlib.metadata.distributions(name="setuptools")
    return [(int(one.version.split(".")[0]), str(one.locate_file(""))) for one in found]


def torch_version() -> str | None:
    """The version of the importable torch, read without importing it (which takes seconds); None without one."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"__version__ *= *['\"]([^'\"]+)", (Path(spec.origin).parent / "version.py").read_text())
    return found[1] if found else None


def cxx_compiler(environ: dict[str, str] | None = None) -> str | None:
    """The path of the C++ compiler that the build will call (``CXX``, else ``c++``); None when there is none."""
    wanted = (os.environ if environ is None else environ).get("CXX") or "c++"
    return shutil.which(wanted) or shutil.which(shlex.split(wanted)[0])


def find_ninja() -> str | None:
    """The path of a ninja that runs: on PATH, beside the interpreter (a venv need not be activated), in its package."""
    places = [None, sysconfig.get_path("scripts"), str(Path(sys.executable).parent)]
    spec = importlib.util.find_spec("ninja")
    if spec is not None and spec.origin is not None:
        package = Path(spec.origin).parent
        places += [str(package / "data" / "bin"), str(package.parents[3] / "bin")]
    for place in places:
        ninja = shutil.which("ninja", path=place)
        # A launcher left on PATH by another interpreter may exist and not run.
        if ninja and subprocess.run([ninja, "--version"], capture_output=True).returncode == 0:
            return ninja
    return None


def put_ninja_on_path() -> None:
    """Makes a ninja outside of PATH callable by name, as torch's build calls it."""
    ninja = find_ninja()
    if ninja and shutil.which("ninja") != ninja:
        os.environ["PATH"] = os.pathsep.join([str(Path(ninja).parent), os.environ.get("PATH", "")])


def is_clang(compiler: str) -> bool:
    """Whether a C++ compiler is a clang, whatever it is called."""
    return "clang" in subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout


def missing_requirements(compiles: bool = True) -> list[str]:
    """What has to be fetched before building, of setuptools and, where something is compiled, ninja."""
    requirements = []
    installed = setuptools_versions()
    if not installed or installed[0][0] < MINIMUM_SETUPTOOLS:
        requirements.append(f"setuptools>={MINIMUM_SETUPTOOLS}")
    if compiles and find_ninja() is None:
        requirements.append("ninja")
    return requirements


def check_setuptools() -> None:
    """Raises `BuildError` without a setuptools, which front ends fetch only for an environment of the build's own."""
    installed = setuptools_versions()
    if not installed or installed[0][0] < MINIMUM_SETUPTOOLS:
        found = f"an older one ({installed[0][0]})" if installed else "none"
        raise BuildError(
            f"setuptools >= {MINIMUM_SETUPTOOLS} is needed, and {sys.executable} has {found}; install it first "
            f"(pip install 'setuptools>={MINIMUM_SETUPTOOLS}')."
        )


def check() -> None:
    """Raises `BuildError` for what no download of setuptools or ninja mends."""
    minimum = ".".join(map(str, MINIMUM_TORCH))
    version = torch_version()
    if version is None:
        raise BuildError(
            f"torch is not installed for {sys.executable}; install torch >= {minimum} first (pip install torch), or, "
            "if that is the interpreter of an environment made for this build, build in your own: pip install "
            "--no-build-isolation ., uv pip install --no-build-isolation ., python -m build --no-isolation."
        )
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_TORCH:
        raise BuildError(f"torch >= {minimum} is needed, and {sys.executable} has torch {version}.")
    if cxx_compiler() is None:
        wanted = os.environ.get("CXX")
        tried = f"CXX={wanted} was not found" if wanted else "no c++ on PATH"
        raise BuildError(f"a C++ compiler is needed ({tried}); install one, such as g++, or set CXX to its path.")
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.exists():
        raise BuildError(f"Python's headers are needed, and {header} does not exist; install python3-dev or the like.")
