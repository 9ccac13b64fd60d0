"""Checkpoints of any trainer as files, and files that are none."""

from __future__ import annotations

import argparse
import pickle
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.errors import UserError
from densenet_ext.reuse.weights_file import read_weights_file


def small() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return dict(dx.DenseNet(4, (3, 2), 8, 2, num_classes=5).state_dict())


def assert_holds(state: Any, wanted: dict[str, Tensor]) -> None:
    assert set(state) == set(wanted)
    for name, value in state.items():
        assert value.device.type == "cpu" and torch.equal(value, wanted[name].cpu()), name


@pytest.mark.parametrize("zipped", [True, False])
def test_a_file_of_torch_save(tmp_path: Path, zipped: bool) -> None:
    path = tmp_path / "last.ckpt"
    torch.save({"epoch": 3, "state_dict": small()}, path, _use_new_zipfile_serialization=zipped)
    content = read_weights_file(path)
    assert content["epoch"] == 3
    assert_holds(content["state_dict"], small())


def test_what_trainers_put_beside_the_weights(tmp_path: Path) -> None:
    arguments = argparse.Namespace(lr=0.1, folder="here")
    torch.save({"args": arguments, "epoch": 3, "state_dict": small()}, tmp_path / "last.pth.tar")  # timm
    assert_holds(read_weights_file(tmp_path / "last.pth.tar")["state_dict"], small())


def test_a_file_of_safetensors(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.torch")
    library.save_file(small(), tmp_path / "model.safetensors")
    assert_holds(read_weights_file(tmp_path / "model.safetensors"), small())
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=r"cut.safetensors is damaged"):
        read_weights_file(tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match="the checkpoint .*nowhere|cannot read the checkpoint .*nowhere"):
        read_weights_file(tmp_path / "nowhere.safetensors")


def cut(path: Path) -> None:
    torch.save(small(), path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_legacy(path: Path) -> None:
    torch.save(small(), path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path: Path) -> None:
    torch.save(small(), path)
    content = bytearray(path.read_bytes())
    content[content.index(small()["classifier.weight"].numpy().tobytes()) + 5] ^= 1
    path.write_bytes(content)


DAMAGED = CODE = r"x.pt is damaged, or holds Python objects, which could run code; save a state_dict\(\)"


@pytest.mark.parametrize(
    "write, told",
    [
        (lambda path: None, "cannot read the checkpoint .*x.pt: No such file"),
        (lambda path: path.mkdir(), r"cannot read the checkpoint .*x.pt: Is a directory"),
        (lambda path: path.write_bytes(b""), DAMAGED),
        (lambda path: path.write_text("hello world"), DAMAGED),
        (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(100)), DAMAGED),
        (lambda path: path.write_bytes(pickle.dumps({"a": 1}, protocol=4)), DAMAGED),
        (cut, f"cannot read the checkpoint .*|{DAMAGED}"),
        (cut_legacy, DAMAGED),
        (flip, DAMAGED),
        (lambda path: torch.save(nn.Linear(2, 2), path), CODE),
        (lambda path: torch.save({"model": small(), "network": nn.ReLU()}, path), CODE),
        (lambda path: torch.jit.script(nn.Linear(2, 2)).save(str(path)), CODE),
        (lambda path: torch.save([torch.ones(3)], path), "holds a list, expected a state dict"),
    ],
    ids=[
        "missing",
        "folder",
        "empty",
        "text",
        "image",
        "pickle",
        "cut",
        "cut legacy",
        "flipped",
        "model",
        "network",
        "script",
        "list",
    ],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_files_that_are_refused(tmp_path: Path, write: Callable[[Path], None], told: str) -> None:
    write(tmp_path / "x.pt")
    with warnings.catch_warnings(record=True) as warned, pytest.raises(UserError, match=told):
        warnings.simplefilter("always")
        read_weights_file(tmp_path / "x.pt")
    assert not warned  # one sentence is enough


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(UserError, match=r"cannot read the checkpoint .*x.pt: Permission denied"):
        read_weights_file(tmp_path / "x.pt")
