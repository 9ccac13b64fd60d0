"""The build backend (PEP 517 and PEP 660): setuptools, built against the torch that is already installed.

An isolated build usually sees an empty environment, so that an extension of torch either fails to find torch or
downloads another one. Here every hook first puts the interpreter's own site-packages back, finds ninja, and asks only
for what is then still missing. What cannot work (no torch, one too old, no compiler) ends in one sentence.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from build_backend import environment

_Settings = dict[str, Any] | None


def _requires() -> list[str]:
    environment.restore_own_packages()
    with environment.one_sentence():
        environment.check()
    return environment.missing_requirements()


def _setuptools() -> Any:
    """setuptools' own backend, in a restored and checked environment."""
    environment.restore_own_packages()
    with environment.one_sentence():
        environment.check()
    environment.put_ninja_on_path()
    from setuptools import build_meta

    return build_meta


def get_requires_for_build_wheel(config_settings: _Settings = None) -> list[str]:
    return _requires()


def get_requires_for_build_editable(config_settings: _Settings = None) -> list[str]:
    return _requires()


def get_requires_for_build_sdist(config_settings: _Settings = None) -> list[str]:
    return _requires()


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: _Settings = None) -> str:
    return str(_setuptools().prepare_metadata_for_build_wheel(metadata_directory, config_settings))


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: _Settings = None) -> str:
    return str(_setuptools().prepare_metadata_for_build_editable(metadata_directory, config_settings))


def build_wheel(wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None) -> str:
    backend = _setuptools()
    # Modules deleted from the source stay in build/lib and would be packed; build/temp keeps the object files.
    for stale in Path("build").glob("lib*"):
        shutil.rmtree(stale)
    with environment.one_sentence():
        return str(backend.build_wheel(wheel_directory, config_settings, metadata_directory))


def build_editable(
    wheel_directory: str, config_settings: _Settings = None, metadata_directory: str | None = None
) -> str:
    backend = _setuptools()
    with environment.one_sentence():
        return str(backend.build_editable(wheel_directory, config_settings, metadata_directory))


def build_sdist(sdist_directory: str, config_settings: _Settings = None) -> str:
    return str(_setuptools().build_sdist(sdist_directory, config_settings))
