"""``densenet-ext reuse``."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import command_line, own_code

pytest.importorskip("matplotlib")

from PIL import Image

import densenet_ext as dx
from densenet_ext import files


def run(*arguments: Any) -> Any:
    return command_line.run("reuse", *arguments)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = dx.DenseNet(4, (3, 1), 8, 2, num_classes=5)
    torch.save({"model": model.state_dict(), "epoch": 3}, tmp_path / "best.pt")
    return tmp_path / "best.pt"


def test_the_command_draws_beside_the_checkpoint_and_prints_a_table(checkpoint: Path) -> None:
    held = checkpoint.read_bytes()
    result = run(checkpoint)
    assert result.code == 0, result.output
    lines = result.output.splitlines()
    assert re.split(r"\s{2,}", lines[0])[:3] == ["block", "reader", "from the input"]
    rows = [re.split(r"\s{2,}", line) for line in lines[2:6]]
    assert [row[:2] for row in rows] == [
        ["denseblock1", "layers 2 to 3"],
        ["", "transition"],
        ["denseblock2", "layer 1"],  # it has the input only
        ["", "classifier"],
    ]
    transition = torch.load(checkpoint)["model"]["features.transition1.conv.weight"].abs()
    part = 100 * transition[:, :8].sum() / transition.sum()
    assert rows[1][2] == f"{part:.0f} % (40 %)"  # 8 of 20 features
    assert [re.sub(r"^\d+ % ", "", cell) for cell in rows[1][3:]] == ["(40 %)", "(20 %)"]
    assert lines[-1] == f"picture: {checkpoint.parent / 'best-reuse.png'}"
    assert "--new-first" not in result.output
    assert Image.open(checkpoint.parent / "best-reuse.png").format == "PNG"
    assert checkpoint.read_bytes() == held


def test_the_command_with_out_and_blocks_of_unknown_names(tmp_path: Path) -> None:
    torch.save(own_code.NetWithTransitions(own_code.Transition).state_dict(), tmp_path / "own.pt")
    result = run(tmp_path / "own.pt", "--out", tmp_path / "a.svg")
    assert result.code == 0 and "say --new-first" in result.output
    first = (tmp_path / "a.svg").read_text()
    result = run(tmp_path / "own.pt", "--out", tmp_path / "a.svg", "--new-first")
    assert result.code == 0 and "say --new-first" not in result.output
    assert (tmp_path / "a.svg").read_text() != first
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.svg", "own.pt"]


def test_the_command_never_overwrites_a_checkpoint(checkpoint: Path) -> None:
    folder = checkpoint.parent
    named = folder / "weights.png"  # a checkpoint may be called so
    checkpoint.rename(named)
    (folder / "link.png").symlink_to(named)
    os.link(named, folder / "same.png")
    held = named.read_bytes()
    for out in ("weights.png", "link.png", "same.png"):
        result = run(named, "--out", folder / out)
        assert result.code == 2 and "is the checkpoint itself" in result.output
    result = run(named, "--out", folder / "weights.pt")
    assert result.code == 2 and "expected the name of a picture" in result.output
    assert named.read_bytes() == held and sorted(p.name for p in folder.iterdir()) == [
        "link.png",
        "same.png",
        "weights.png",
    ]


def test_what_the_command_refuses(tmp_path: Path, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"a.weight": torch.ones(3)}, tmp_path / "other.pt")
    for arguments, told in (
        ([tmp_path / "nowhere.pt"], "cannot read the checkpoint"),
        ([tmp_path / "other.pt"], "no dense blocks; it holds a.weight"),
        ([checkpoint, "--out", tmp_path / "a.gif"], "ends in .png, .svg, .pdf"),
    ):
        result = run(*arguments)
        assert result.code == 2 and told in result.output and "Traceback" not in result.output

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    result = run(checkpoint)
    assert result.code == 1 and "No space left on device" in result.output
