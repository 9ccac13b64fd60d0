"""`densenet-ext train` on archives and folders of images, as they should be and as they should not."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tqdm")

from densenet_ext.training.learner import Learner
from tests.support.forks import Fork
from tests.support.training_data import cifar, image_folder
from tests.support.training_runs import checkpoint, differences, run, without_pictures
from tests.training import killed_workers

MODEL = ("--model", "densenet_bc:10,4", "--epochs", 1)


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They have tests of their own, and test_train.py sees that a run leaves them."""
    with without_pictures():
        yield


@pytest.fixture
def photos(tmp_path):
    image_folder(tmp_path / "photos" / "train", per_class=8)
    image_folder(tmp_path / "photos" / "val", per_class=3)
    return tmp_path / "photos"


def folder_options(root, *others):
    return ("--data", "imagefolder", "--root", root, *MODEL, "--image-size", 32, "--batch-size", 8, *others)


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path, name, classes):
    cifar(tmp_path, name, per_batch=40, test=20)
    ended = run("train", "--data", name, "--root", tmp_path, *MODEL, "--batch-size", 16, "--out", tmp_path / "run")
    assert ended.code == 0, ended.output
    assert f"{name}: images of 3 x 32 x 32 in {classes} classes" in ended.text and "20 for the test" in ended.text
    state = checkpoint(tmp_path / "run")
    assert state["model"]["classifier.weight"].shape[0] == classes == len(state["classes"])


def test_a_folder_of_images(photos, tmp_path):
    ended = run("train", *folder_options(photos), "--workers", 1, "--out", tmp_path / "run")
    assert ended.code == 0, ended.output
    assert "24 to train on, 9 for validation" in ended.text and "test accuracy" not in ended.text
    assert checkpoint(tmp_path / "run")["classes"] == ["ant", "bee", "cat"]


def test_a_densenet_121_for_large_images(photos, tmp_path):
    options = ("--data", "imagefolder", "--root", photos, "--image-size", 64, "--batch-size", 12, "--epochs", 1)
    ended = run("train", *options, "--save", "features", "--out", tmp_path / "run")
    assert ended.code == 0 and "densenet121: 6,956,931 parameters, fused" in ended.text, ended.output


def test_corrupt_images_are_named_and_refused_or_skipped(photos, tmp_path):
    (photos / "train" / "bee" / "1.png").write_bytes(b"no picture at all")
    whole = (photos / "train" / "cat" / "2.jpg").read_bytes()
    (photos / "train" / "cat" / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (photos / "val" / "ant" / "0.jpg").write_bytes(b"")
    ended = run("train", *folder_options(photos), "--out", tmp_path / "run")
    assert ended.code == 2 and "3 of the 33 images" in ended.text and "--on-corrupt skip" in ended.text, ended.output
    for name in ("train/bee/1.png", "train/cat/2.jpg", "val/ant/0.jpg"):
        assert name in ended.text
    assert not (tmp_path / "run").exists()

    ended = run("train", *folder_options(photos), "--on-corrupt", "skip", "--out", tmp_path / "run")
    assert ended.code == 0 and "22 to train on, 8 for validation" in ended.text, ended.output
    assert "left out: 3 of the 33 images" in ended.text
    assert run("train", "--resume", "--out", tmp_path / "run").code == 0

    for name in ("train/bee/1.png", "train/cat/2.jpg", "val/ant/0.jpg"):
        (photos / name).unlink()
    assert run("train", *folder_options(photos), "--out", tmp_path / "clean").code == 0
    assert differences(tmp_path / "run", tmp_path / "clean") == []


def spoil_nothing(photos):
    return photos / "nowhere"


def spoil_class(photos):
    for path in (photos / "train" / "bee").iterdir():
        path.unlink()
    return photos


def spoil_validation(photos):
    (photos / "val" / "bee").rename(photos / "val" / "wasp")
    return photos


@pytest.mark.parametrize("spoil, words", [(spoil_nothing, "nowhere"), (spoil_class, "bee"), (spoil_validation, "wasp")])
def test_wrong_folders_end_with_exit_code_2(photos, tmp_path, spoil, words):
    ended = run("train", *folder_options(spoil(photos)), "--out", tmp_path / "run")
    assert ended.code == 2 and ended.text.startswith("Error: --root: ") and words in ended.text, ended.output
    assert not (tmp_path / "run").exists()


def test_no_root_and_a_root_without_an_archive_end_with_exit_code_2(tmp_path):
    ended = run("train", "--data", "cifar10", *MODEL, "--out", tmp_path / "run")
    assert ended.code == 2 and "--root: expected" in ended.text, ended.output
    ended = run("train", "--data", "cifar10", "--root", tmp_path, *MODEL, "--out", tmp_path / "run")
    assert ended.code == 2 and "cifar-10-batches-py" in ended.text and "--download" in ended.text, ended.output


def test_an_image_that_vanishes_on_the_way_is_named_and_the_checkpoint_kept(photos, tmp_path, monkeypatch):
    end_epoch = Learner.end_epoch

    def delete(self, *figures):
        (photos / "train" / "cat" / "3.png").unlink(missing_ok=True)
        return end_epoch(self, *figures)

    monkeypatch.setattr(Learner, "end_epoch", delete)
    ended = run("train", *folder_options(photos), "--epochs", 3, "--workers", 1, "--out", tmp_path / "run")
    assert ended.code == 1 and "train/cat/3.png" in ended.text and "Error: " in ended.text, ended.output
    assert len(checkpoint(tmp_path / "run")["history"]) == 1


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(photos, tmp_path):
    """In a process of its own: PyTorch tells of each of its loaders' workers wherever the process is when the next
    signal comes, and here that can be pytest's own code, which looks at something else."""
    options = folder_options(photos, "--epochs", 3, "--workers", 1, "--out", tmp_path / "run")
    ended = Fork(killed_workers.command, ["train", *map(str, options)]).finish()
    told = (
        "Error: DataLoader worker (pid",
        "Error: DataLoader worker ended: [Errno 104]",
    )  # the second: in the middle of a batch
    assert ended.code == 1 and any(words in ended.text for words in told), ended.output
    assert "try fewer --workers; the last checkpoint is kept" in ended.text
    assert len(checkpoint(tmp_path / "run")["history"]) == 1


def test_a_resume_with_other_images_ends_with_exit_code_2(photos, tmp_path):
    assert run("train", *folder_options(photos), "--out", tmp_path / "run").code == 0
    (photos / "train" / "cat" / "3.png").unlink()
    ended = run("train", "--resume", "--out", tmp_path / "run")
    assert ended.code == 2 and "the images or their labels are not those of the run's start" in ended.text, ended.output


def test_networks_of_timm_train_on_folders(photos, tmp_path):
    from tests.support import peers

    peers.timm_densenet()
    options = folder_options(photos)
    ended = run("train", *options, "--model", "timm:densenet121", "--image-size", 64, "--out", tmp_path / "run")
    assert ended.code == 0 and "timm:densenet121" in ended.text and "fused" in ended.text, ended.output
    assert torch.isfinite(checkpoint(tmp_path / "run")["model"]["classifier.weight"]).all()
