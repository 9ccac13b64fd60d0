"""What `make` installs: tools/prepare_venv.py."""

from __future__ import annotations

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
    assert {"typer", "tqdm", "matplotlib", "tensorboard", "ninja"} < train.keys() < dev.keys()
    assert {name: pin for name, pin in dev.items() if pin}.keys() >= {"ruff", "mypy", "pytest"}


def test_every_library_has_a_version_that_was_tried():
    pins = {**prepare_venv.pinned(), "torchvision": "with torch"}
    needed = {name for library, others in prepare_venv.PEERS.items() for name in (library, *others)}
    assert needed <= pins.keys()
