"""What `make` installs: tools/prepare_venv.py."""

from __future__ import annotations

import sys
from pathlib import Path

import prepare_venv
import pytest


@pytest.mark.parametrize(
    "torch, torchvision",
    [("2.13.0+cpu", "0.28.0"), ("2.11.0+cu130", "0.26.0"), ("2.14.1", "0.29.1"), ("2.15.0", "0.29.2")],
)
def test_each_torch_has_its_torchvision(torch, torchvision):
    assert prepare_venv.torchvision_release(torch) == torchvision


def test_who_develops_can_train():
    train, dev = (prepare_venv.wanted(extra) for extra in ("train", "dev"))
    assert {"tqdm", "matplotlib", "tensorboard", "ninja"} < train.keys() < dev.keys()
    assert {name: pin for name, pin in dev.items() if pin}.keys() >= {"ruff", "mypy", "pytest"}


def test_every_library_has_a_version_that_was_tried():
    pins = {**prepare_venv.pinned(), "torchvision": "with torch"}
    needed = {name for library, others in prepare_venv.PEERS.items() for name in (library, *others)}
    assert needed <= pins.keys()


def test_an_environment_that_was_cut_short_is_made_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = tmp_path / "deeper" / "venv"
    python, made = folder / "bin" / "python", []

    def make(path: Path, **options: bool) -> None:
        made.append(options["clear"])
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        if len(made) == 1:
            raise KeyboardInterrupt  # while it installs pip, say

    class Run(Exception):
        pass

    def execv(program: Path, arguments: list[str]) -> None:
        assert program == python
        raise Run

    monkeypatch.setattr(prepare_venv.venv, "create", make)
    monkeypatch.setattr(prepare_venv.os, "execv", execv)
    monkeypatch.setattr(prepare_venv, "usable_torch", lambda python: False)
    monkeypatch.setattr(sys, "argv", ["prepare_venv.py", str(folder), "train"])
    with pytest.raises(KeyboardInterrupt):
        prepare_venv.main()
    for _ in range(2):  # made again once, then used as it is
        with pytest.raises(Run):
            prepare_venv.main()
    assert made == [True, True]
    assert [path.name for path in folder.parent.iterdir()] == ["venv"]
