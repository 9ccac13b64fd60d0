"""Digits, CIFAR, what an augmented image depends on, and the import of torchvision."""

from __future__ import annotations

import itertools
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from densenet_ext import vision
from densenet_ext.errors import UserError
from tests.support.training_data import (
    cifar,
    data_of,
    image_folder,
    in_processes,
    is_there,
    message_of,
    needs_torchvision,
)

needs_torchvision()


@pytest.fixture(autouse=True)
def made_archives(monkeypatch):
    """Archives that tests make are taken for the original ones."""
    monkeypatch.setattr(vision.import_torchvision().datasets.cifar, "check_integrity", is_there)


def same(first, second) -> bool:
    return len(first) == len(second) and all(torch.equal(first[i][0], second[i][0]) for i in range(len(first)))


def images_of(examples) -> torch.Tensor:
    return torch.stack([examples[index][0] for index in range(len(examples))])


@pytest.fixture(scope="module")
def digits():
    pytest.importorskip("sklearn")
    return data_of("digits")


@pytest.fixture(scope="module")
def cifar_root(tmp_path_factory):
    root = tmp_path_factory.mktemp("cifar")
    cifar(root)
    cifar(root, "cifar100", per_batch=120)
    return root


# Digits


def test_digits_are_split_into_three_parts_that_never_change(digits):
    assert [len(digits.train), len(digits.validation), len(digits.test)] == [1293, 144, 360]
    assert digits.train.shape == (1, 16, 16) and digits.classes == tuple("0123456789")
    again = data_of("digits", validation=0.5)
    assert same(again.test, digits.test) is False  # normalised by other training images
    assert torch.equal(again.test.labels, digits.test.labels)
    assert len(again.validation) == round(0.5 * 1437) and len(again.train) + len(again.validation) == 1437
    every = torch.cat([part.labels for part in (digits.train, digits.validation, digits.test)]).bincount()
    sklearn = pytest.importorskip("sklearn.datasets")
    assert torch.equal(every, torch.from_numpy(sklearn.load_digits().target).bincount())


def test_digits_have_mean_0_and_deviation_1_over_the_training_images(digits):
    images = images_of(digits.train)
    assert images.dtype == torch.float32 and images.shape[1:] == digits.train.shape == (1, 16, 16)
    assert abs(images.mean().item()) < 1e-5 and abs(images.std().item() - 1) < 1e-5
    assert abs(images_of(digits.test).mean().item()) > 1e-4


def test_digits_are_shifted_by_at_most_one_pixel_and_the_border_repeated(digits):
    image = digits.train[5][0]
    padded = torch.nn.functional.pad(image, (1, 1, 1, 1), mode="replicate")
    shifts = [padded[:, y : y + 16, x : x + 16] for y, x in itertools.product(range(3), repeat=2)]
    found = set()
    for seed in range(100):
        augmented, label = digits.train[5, seed]
        assert label == digits.train[5][1]
        found.add([torch.equal(augmented, shift) for shift in shifts].index(True))
    assert found == set(range(9))


def test_digits_of_another_size(digits):
    larger = data_of("digits", image_size=32)
    assert larger.train.shape == larger.train[0][0].shape == larger.train[0, 1][0].shape == (1, 32, 32)
    assert torch.equal(larger.train.labels, digits.train.labels)


def test_without_validation_all_images_are_trained_on():
    pytest.importorskip("sklearn")
    data = data_of("digits", validation=0)
    assert data.validation is None and len(data.train) == 1437


# Randomness


def test_an_augmented_image_depends_on_its_key_alone(cifar_root, digits):
    for examples in (digits.train, data_of("cifar10", cifar_root).train):
        first = [examples[3, 11][0], examples[3, 12][0], examples[3, 11][0]]
        torch.manual_seed(5)
        second = [examples[3, 11][0], examples[3, 12][0]]
        assert torch.equal(first[0], first[2])
        assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
        assert len({examples[3, seed][0].numpy().tobytes() for seed in range(30)}) > 5


def test_torchs_random_numbers_go_on_as_if_no_image_had_been_loaded(cifar_root, tmp_path):
    folder = data_of("imagefolder", image_folder(tmp_path), image_size=16)
    for examples in (data_of("cifar10", cifar_root).train, folder.train):
        state = torch.get_rng_state()
        examples[0], examples[0, 1]
        assert torch.equal(torch.get_rng_state(), state)


def test_after_an_image_that_fails_too(tmp_path):
    examples = data_of("imagefolder", image_folder(tmp_path)).train
    examples[0, 1]
    examples.augmentation = lambda image: torch.rand(1) / 0 + image
    state = torch.get_rng_state()
    with pytest.raises(TypeError):
        examples[0, 1]
    assert torch.equal(torch.get_rng_state(), state)


def test_examples_can_be_pickled_before_and_after_use(cifar_root):
    examples = data_of("cifar10", cifar_root).train
    before = pickle.loads(pickle.dumps(examples))
    image = examples[0, 1][0]
    after = pickle.loads(pickle.dumps(examples))
    assert torch.equal(before[0, 1][0], image) and torch.equal(after[0, 1][0], image)


# CIFAR


@pytest.mark.parametrize("name, classes, train, test", [("cifar10", 10, 100, 20), ("cifar100", 100, 120, 20)])
def test_cifar(cifar_root, name, classes, train, test):
    data = data_of(name, cifar_root)
    assert data.train.shape == (3, 32, 32) and len(data.classes) == classes
    assert [len(data.train), len(data.validation), len(data.test)] == [round(0.9 * train), train // 10, test]
    images = images_of(data.train)
    assert images.dtype == torch.float32 and images.shape[1:] == (3, 32, 32)
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3)), torch.ones(3), atol=1e-4, rtol=0)
    assert data.notes == ()
    again = data_of(name, cifar_root)
    assert same(again.validation, data.validation) and same(again.train, data.train)


def test_cifar_is_mirrored_and_shifted_by_at_most_four_pixels(cifar_root):
    examples = data_of("cifar10", cifar_root).train
    image = torch.nn.functional.pad(examples[7][0], (4, 4, 4, 4))
    crops = {}
    for y, x, mirrored in itertools.product(range(9), range(9), (False, True)):
        crop = image[:, y : y + 32, x : x + 32]
        crops[(crop.flip(2) if mirrored else crop).contiguous().numpy().tobytes()] = (y, x, mirrored)
    found = [crops[examples[7, seed][0].contiguous().numpy().tobytes()] for seed in range(200)]
    rows, columns, mirrored = (set(values) for values in zip(*found, strict=True))
    assert rows == columns == set(range(9)) and mirrored == {False, True}


def test_cifar_of_another_size(cifar_root):
    data = data_of("cifar10", cifar_root, image_size=48)
    shapes = {each.shape for each in (data.train, data.train[0][0], data.train[0, 1][0], data.test[0][0])}
    assert shapes == {(3, 48, 48)}


def test_cifar_needs_its_files(tmp_path):
    folder = cifar(tmp_path)
    (folder / "data_batch_3").unlink()
    (folder / "batches.meta").unlink()
    message = message_of("cifar10", tmp_path)
    assert f"cifar10 in {folder}: missing, or with other checksums: --download fetches it" in message
    assert str(tmp_path / "none") in message_of("cifar100", tmp_path / "none")
    assert "--root" in message_of("cifar10")


def test_files_that_are_not_the_original_ones_are_named_and_not_read(tmp_path, monkeypatch):
    """A pickle may run any code: torchvision's checksums come first."""
    cifar(tmp_path)
    monkeypatch.undo()
    monkeypatch.setattr(pickle, "load", lambda *_, **__: pytest.fail("read"))
    assert "other checksums" in message_of("cifar10", tmp_path)


def test_a_download_happens_in_the_first_process_and_the_others_wait(tmp_path, monkeypatch):
    kind, calls = vision.import_torchvision().datasets.CIFAR10, []

    made = kind.__init__

    def download(self, root, train, download=False):
        if download:
            calls.append((root, download))
            cifar(tmp_path)
        made(self, root, train)

    monkeypatch.setattr(kind, "__init__", download)
    found = in_processes(3, lambda process: data_of("cifar10", tmp_path, process, download=True))
    assert calls == [(str(tmp_path), True)]
    assert all(same(data.test, found[0].test) for data in found)


def test_a_download_that_fails_ends_every_process(tmp_path, monkeypatch):
    def download(self, root, train, download):
        raise OSError("no network")

    monkeypatch.setattr(vision.import_torchvision().datasets.CIFAR10, "__init__", download)
    found = in_processes(2, lambda process: data_of("cifar10", tmp_path, process, download=True))
    for error in found:
        assert isinstance(error, UserError) and "no network" in str(error) and str(tmp_path) in str(error)


def test_nothing_is_downloaded_unless_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(vision.import_torchvision().datasets.CIFAR10, "download", lambda self: pytest.fail("asked"))
    assert "--download" in message_of("cifar10", tmp_path)


@pytest.mark.parametrize("name, fraction", [("cifar10", 0.001), ("cifar10", 0.999), ("imagefolder", 0.001)])
def test_fractions_that_leave_nothing_on_one_side(tmp_path, name, fraction):
    cifar(tmp_path) if name == "cifar10" else image_folder(tmp_path)
    assert "--validation: " in message_of(name, tmp_path, validation=fraction)


# torchvision


@pytest.mark.parametrize(("version", "release"), [("2.13.1+cu130", "28"), ("2.14.1", "29"), ("2.15.0", "29")])
def test_without_torchvision_the_release_for_this_torch_is_named(monkeypatch, version, release):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    monkeypatch.setattr(torch, "__version__", version)
    with pytest.raises(UserError, match=rf"not installed.*--no-deps 'torchvision==0\.{release}\.\*'"):
        vision.import_torchvision.__wrapped__()


def test_the_missing_operators_of_torchvision_are_declared(tmp_path):
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(
        "import torch\nfrom torchvision import datasets\nfor name in ('nms', 'qnms'):\n"
        "    torch.library.register_fake(f'torchvision::{name}')(lambda *_: None)\n"
    )
    (package / "datasets.py").write_text("where = __file__\n")
    (package / "transforms").mkdir()
    (package / "transforms" / "v2.py").touch()
    code = "from densenet_ext import vision; print(vision.import_torchvision().datasets.where)"
    assert str(package / "datasets.py") in in_python(code, tmp_path)
    (package / "__init__.py").write_text("raise RuntimeError('compiled for CUDA 99')")
    code = "from densenet_ext import errors, vision\ntry: vision.import_torchvision()\n"
    assert "(compiled for CUDA 99): pip" in in_python(f"{code}except errors.UserError as error: print(error)", tmp_path)


def in_python(code: str, path: Path) -> str:
    """What ``code`` prints in a process that finds modules in ``path`` first."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(path), *sys.path])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_networks_are_reachable():
    assert vision.import_torchvision().models.get_model("densenet121", num_classes=2).classifier.out_features == 2
