"""The build backend (PEP 517 and PEP 660): setuptools, built against the torch that is already installed.

An isolated build usually sees an empty environment, so that an extension of torch either fails to find torch or
downloads another one. Here every hook first puts the interpreter's own site-packages back, finds ninja, and asks only
for what is then still missing. What cannot work (no torch, one too old, no compiler) ends in one sentence.

A source archive and the metadata need neither torch nor a compiler. pip's builds see the environment that is installed
into, and pip fetches what the metadata ask for before it builds: there a missing torch is said at the first hook, or a
torch would be downloaded that the build then misses.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

# Who comes with an older one is to read this, and no TypeError.
if sys.version_info < (3, 10):  # noqa: UP036
    _found = ".".join(map(str, sys.version_info[:2]))
    raise SystemExit(f"densenet_ext: Python 3.10 or newer is needed, and {sys.executable} is Python {_found}.")

from build_backend import environment

_Settings = dict[str, Any] | None


def _requires(compiles: bool) -> list[str]:
    environment.restore_own_packages()
    if compiles and "PIP_BUILD_TRACKER" in os.environ:
        with environment.one_sentence():
            environment.check()
    return environment.missing_requirements(compiles)


def _setuptools(compiles: bool) -> Any:
    """setuptools' own backend, in a restored environment; one that is checked and has ninja, if it ``compiles``."""
    environment.restore_own_packages()
    with environment.one_sentence():
        environment.check_setuptools()
        if compiles:
            environment.check()
            environment.put_ninja_on_path()
    from setuptools import build_meta

    return build_meta


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    return _requires(compiles=True)


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    return _requires(compiles=True)


def get_requires_for_build_sdist(config_settings: _Settings = None) -> list[str]:
    return _requires(compiles=False)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: _Settings = None) -> str:
    backend = _setuptools(compiles=False)
    return str(backend.prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: _Settings = None) -> str:
    backend = _setuptools(compiles=False)
    return str(backend.prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None) -> str:
    backend = _setuptools(compiles=True)
    # Modules deleted from the source stay in build/lib and would be packed; build/temp keeps the object files.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    with environment.one_sentence():
        return str(backend.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None
) -> str:
    backend = _setuptools(compiles=True)
    with environment.one_sentence():
        return str(backend.build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: _Settings = None) -> str:
    return str(_setuptools(compiles=False).build_sdist(sdist_directory, config_settings))
