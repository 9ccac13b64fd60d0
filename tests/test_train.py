from __future__ import annotations

import csv
import errno
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("typer")

from typer.testing import CliRunner

import densenet_ext as dx
from densenet_ext.cli import app
from densenet_ext.training import (
    CheckpointError,
    Settings,
    checkpoint,
    load_checkpoint,
    load_digits,
    loop,
    save_checkpoint,
    train,
)
from densenet_ext.training import data as data_module

SMALL = Settings(epochs=2, batch_size=128, depth=10, growth_rate=4)


@pytest.fixture(scope="module")
def digits():
    split = load_digits()
    return data_module.Split(split.images[:256], split.labels[:256], split.held_out_images, split.held_out_labels)


@pytest.fixture
def few_digits(monkeypatch, digits):
    monkeypatch.setattr("densenet_ext.training.load_digits", lambda: digits)


def run(*arguments):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200", "NO_COLOR": "1"})


def text(result) -> str:
    return re.sub(r"\x1b\[[0-9;]*m|[│\s]+", " ", result.output)


def test_a_small_run_leaves_metrics_and_a_checkpoint(tmp_path, few_digits):
    out = tmp_path / "new" / "folder"
    result = run("--epochs", 2, "--batch-size", 128, "--depth", 10, "--growth-rate", 4, "--out", out)
    assert result.exit_code == 0, result.output
    assert "held-out accuracy" in text(result) and "img/s" in text(result)
    assert "loss=" in text(result) and "error=" in text(result)
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert set(rows[0]) == {
        "epoch",
        "lr",
        "loss",
        "error",
        "held_out_loss",
        "held_out_error",
        "images_per_s",
        "seconds",
    }
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert state["metrics"]["epoch"] == 2 and state["settings"]["depth"] == 10
    model = dx.densenet_bc(10, 4, num_classes=10, in_channels=1)
    model.load_state_dict(state["model"])
    assert os.listdir(out) and not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_a_run_is_repeatable(tmp_path, digits):
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
        train(SMALL, digits, folder, show_progress=False)
    a, b = (load_checkpoint(folder / "checkpoint.pt")["model"] for folder in folders)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_checkpoints_hold_the_weights_that_were_measured(tmp_path, digits):
    history = train(SMALL, digits, tmp_path, show_progress=False)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    model = loop.build(Settings(**state["settings"]), digits)
    model.load_state_dict(state["model"])
    loss, error = loop.evaluate(model, digits.held_out_images, digits.held_out_labels)
    assert (loss, error) == (history[-1].held_out_loss, history[-1].held_out_error)


@pytest.mark.parametrize(
    "option, value",
    [
        ("--epochs", "0"),
        ("--epochs", "many"),
        ("--batch-size", "-1"),
        ("--batch-size", "1.5"),
        ("--lr", "0"),
        ("--lr", "fast"),
        ("--seed", str(2**64)),
        ("--lr", "nan"),
        ("--save", "everything"),
        ("--seed", "-1"),
        ("--depth", "41"),
        ("--depth", "4"),
        ("--growth-rate", "0"),
    ],
)
def test_wrong_options_are_named_with_exit_code_2(option, value, tmp_path):
    result = run(option, value, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert re.search(f"Invalid value for '{option}'.*{value}", text(result))
    assert not (tmp_path / "out").exists()


def test_a_file_where_the_folder_should_be_is_named_with_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        result = run("--out", out)
        assert result.exit_code == 2 and "Invalid value for '--out'" in text(result)


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_named_with_exit_code_2(tmp_path):
    tmp_path.chmod(0o500)
    result = run("--out", tmp_path)
    assert result.exit_code == 2 and "Invalid value for '--out'" in text(result)


def test_unknown_options_and_commands_end_with_exit_code_2():
    assert run("--colour", "red").exit_code == 2
    assert CliRunner().invoke(app, ["draw"]).exit_code == 2


def test_python_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "densenet_ext", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--batch-size" in done.stdout


class FullDisk:
    """Stands for open(): a file that takes a few bytes and then has no space left."""

    def __init__(self, path, mode):
        self._file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        self._file.write(data[:100])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_leaves_the_last_good_checkpoint(tmp_path, monkeypatch):
    path = tmp_path / "checkpoint.pt"
    save_checkpoint({"model": {"w": torch.ones(1000)}}, path)
    good = path.read_bytes()
    monkeypatch.setattr(checkpoint, "open", FullDisk, raising=False)
    message = "cannot write the checkpoint .*checkpoint.pt .*No space left on device; the last good checkpoint is still"
    with pytest.raises(CheckpointError, match=message):
        save_checkpoint({"model": {"w": torch.zeros(1000)}}, path)
    assert path.read_bytes() == good and os.listdir(tmp_path) == ["checkpoint.pt"]
    with pytest.raises(CheckpointError, match="nothing was written"):
        save_checkpoint({"model": {}}, tmp_path / "other.pt")


def test_a_full_disk_ends_the_run_with_a_message(tmp_path, monkeypatch, few_digits):
    monkeypatch.setattr(checkpoint, "open", FullDisk, raising=False)
    result = run("--epochs", 2, "--batch-size", 128, "--depth", 10, "--growth-rate", 4, "--out", tmp_path)
    assert result.exit_code == 1
    assert "Error: cannot write the checkpoint" in text(result) and "No space left on device" in text(result)
    assert "Traceback" not in text(result)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_under_the_metrics_is_a_message(tmp_path, few_digits):
    (tmp_path / "metrics.csv").symlink_to("/dev/full")
    result = run("--epochs", 1, "--batch-size", 128, "--depth", 10, "--growth-rate", 4, "--out", tmp_path)
    assert result.exit_code == 1
    assert "Error: cannot write the metrics" in text(result) and "No space left on device" in text(result)


def test_an_interrupted_write_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint({"model": {}}, tmp_path / "checkpoint.pt")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "content, message",
    [(None, "No such file"), (b"PK\x03\x04 half a file", "expected one of train"), ({"epoch": 3}, "holds no model")],
)
def test_other_files_are_refused(tmp_path, content, message):
    path = tmp_path / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif content is not None:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"cannot read the checkpoint .*checkpoint.pt: .*{message}"):
        load_checkpoint(path)


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, few_digits):
    result = run("--lr", "1e30", "--epochs", 1, "--depth", 10, "--growth-rate", 4, "--out", tmp_path)
    assert result.exit_code == 1 and "try a smaller --lr" in text(result)


def test_digits_are_split_once_and_for_all():
    first, second = load_digits(), load_digits()
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert first.images.shape == (1437, 1, 16, 16) and first.held_out_images.shape == (360, 1, 16, 16)
    assert abs(first.images.mean()) < 1e-5 and abs(first.images.std() - 1) < 1e-5
    everything = torch.cat([first.images, first.held_out_images]).flatten(1)
    assert len(everything.unique(dim=0)) == 1797  # no image is on both sides


def test_shifts_move_by_one_pixel_at_most():
    images = torch.zeros(200, 2, 5, 6)
    images[:, :, 2, 3] = 1
    moved = data_module.shifted(images, torch.Generator().manual_seed(0))
    assert moved.shape == images.shape and torch.equal(moved.sum((2, 3)), torch.ones(200, 2))
    places = moved[:, 0].flatten(1).argmax(1)
    assert set(places.tolist()) == {6 * (2 + dy) + 3 + dx for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    assert torch.equal(moved[:, 0], moved[:, 1])


def test_an_epoch_has_every_image_once():
    images, labels = torch.arange(10.0).view(10, 1, 1, 1).expand(10, 1, 3, 3), torch.arange(10)
    seen = list(data_module.batches(images, labels, 4, torch.Generator().manual_seed(0)))
    assert [len(y) for _, y in seen] == [4, 4, 2]
    assert sorted(torch.cat([y for _, y in seen]).tolist()) == list(range(10))
    assert all(torch.equal(x[:, 0, 1, 1].long(), y) for x, y in seen)
