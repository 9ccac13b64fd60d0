"""Folders of images: how they are split, corrupt files, empty classes."""

from __future__ import annotations

import os

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from PIL import Image

from densenet_ext import vision
from densenet_ext.errors import UserError
from tests.support.training_data import (
    corrupt_files,
    data_of,
    image_folder,
    in_processes,
    message_of,
    needs_torchvision,
    truncate,
)

needs_torchvision()


def test_a_folder_with_classes_is_split_by_class(tmp_path):
    data = data_of("imagefolder", image_folder(tmp_path, per_class=10), validation=0.2, image_size=24)
    assert data.classes == ("ant", "bee", "cat") and data.test is None and data.notes == ()
    assert data.train.labels.bincount().tolist() == [8, 8, 8] and data.validation.labels.bincount().tolist() == [2] * 3
    kept, held_out = set(data.train.images), set(data.validation.images)
    assert len(kept | held_out) == 30 and not kept & held_out
    assert [path.split("/")[-2] for path in data.train.images] == ["ant"] * 8 + ["bee"] * 8 + ["cat"] * 8
    again = data_of("imagefolder", tmp_path, validation=0.2)
    assert again.validation.images == data.validation.images
    assert [path[-5] for path in data.validation.images] != ["0", "1"] * 3


def test_small_classes_share_what_is_held_out(tmp_path):
    image_folder(tmp_path, tuple("abcdef"), per_class=2)
    data = data_of("imagefolder", tmp_path, validation=0.25)
    assert len(data.validation) == 3 and min(data.train.labels.bincount()) == 1
    data = data_of("imagefolder", tmp_path, validation=0.9)
    assert len(data.train) == 6 and data.train.labels.tolist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize("name", ["val", "valid", "validation"])
def test_folders_for_training_validation_and_test(tmp_path, name):
    for part, count in (("train", 4), (name, 2), ("test", 3)):
        image_folder(tmp_path / part, per_class=count)
    for fraction in (0, 0.5):
        data = data_of("imagefolder", tmp_path, validation=fraction)
        assert [len(data.train), len(data.validation), len(data.test)] == [12, 6, 9]
    assert data.train.shape == (3, 224, 224) and data.classes == ("ant", "bee", "cat")
    assert all(f"/{name}/" in path for path in data.validation.images)


def test_a_folder_for_training_without_one_for_validation(tmp_path):
    image_folder(tmp_path / "train")
    data = data_of("imagefolder", tmp_path, validation=0.5)
    assert [len(data.train), len(data.validation), data.test] == [9, 9, None]


def test_a_class_may_be_called_train(tmp_path):
    data = data_of("imagefolder", image_folder(tmp_path, ("bus", "car", "train")))
    assert data.classes == ("bus", "car", "train")


def test_links_that_lead_back_and_hidden_files_are_no_images(tmp_path):
    outside = image_folder(tmp_path / "elsewhere", ("dog",))
    root = image_folder(tmp_path / "data")
    (root / "ant" / ".hidden.png").write_bytes((root / "ant" / "1.png").read_bytes())
    (root / "ant" / ".cache").mkdir()
    (root / "ant" / ".cache" / "1.png").write_bytes((root / "ant" / "1.png").read_bytes())
    (root / "ant" / "again").symlink_to(root)
    (root / "bee" / "above").symlink_to(tmp_path)
    (root / "bee" / "itself").symlink_to(root / "bee")
    (root / "wasp").symlink_to(root / "bee")
    (root / "dog").symlink_to(outside / "dog")
    (outside / "dog" / "round").symlink_to(outside)
    data = data_of("imagefolder", root, validation=0)
    assert data.classes == ("ant", "bee", "cat", "dog") and data.notes == () and len(data.train) == 24


def test_a_pipe_with_the_name_of_an_image_is_named_and_not_waited_for(tmp_path):
    os.mkfifo(image_folder(tmp_path) / "ant" / "pipe.png")
    assert "pipe.png (no file but a pipe or a device)" in message_of("imagefolder", tmp_path)
    assert len(data_of("imagefolder", tmp_path, validation=0, on_corrupt="skip").train) == 18


def test_folders_with_a_dot_are_no_classes(tmp_path):
    image_folder(tmp_path)
    (tmp_path / ".ipynb_checkpoints").mkdir()
    assert data_of("imagefolder", tmp_path).classes == ("ant", "bee", "cat")


def test_other_classes_in_validation(tmp_path):
    image_folder(tmp_path / "train", ("ant", "bee", "cat"))
    image_folder(tmp_path / "val", ("ant", "bee", "cow"))
    assert f"{tmp_path / 'train'}, found none that can be read in ['cow']" in message_of("imagefolder", tmp_path)
    image_folder(tmp_path / "train", ("cow",))
    assert f"{tmp_path / 'val'}, found none that can be read in ['cat']" in message_of("imagefolder", tmp_path)


def test_images_for_evaluation_are_resized_and_cropped(tmp_path):
    data = data_of("imagefolder", image_folder(tmp_path), image_size=32)
    v2 = vision.import_torchvision().transforms.v2
    for index in (0, 1, 2):
        path = data.train.images[index]
        image = vision.import_torchvision().datasets.folder.pil_loader(path)
        image = v2.functional.center_crop(v2.functional.resize(image, 37), 32)
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
        mean, deviation = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        expected = (pixels - mean[:, None, None]) / deviation[:, None, None]
        torch.testing.assert_close(data.train[index][0], expected)


def test_images_for_training_are_cropped_and_mirrored(tmp_path):
    data = data_of("imagefolder", image_folder(tmp_path), image_size=20)
    images = [data.train[0, seed][0] for seed in range(20)]
    assert {tuple(image.shape) for image in images} == {(3, 20, 20)} and images[0].dtype == torch.float32
    assert len({image.numpy().tobytes() for image in images}) == 20
    assert type(images[0]) is torch.Tensor


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_images_of_more_than_8_bits_are_named_since_pillow_would_clip_them(tmp_path, dtype):
    image_folder(tmp_path)
    Image.fromarray(np.zeros((9, 9), dtype)).save(tmp_path / "bee" / "x.tif")
    assert f"{tmp_path / 'bee' / 'x.tif'} (pixels of more than 8 bits" in message_of("imagefolder", tmp_path)


def test_corrupt_images_are_refused_by_name(tmp_path):
    corrupt = corrupt_files(image_folder(tmp_path) / "bee")
    message = message_of("imagefolder", tmp_path)
    assert len(corrupt) == 5 and all(str(path) in message for path in corrupt.values())
    assert "5 of the 23 images" in message and "--on-corrupt skip" in message
    assert "text.jpg (no image)" in message and "gone.jpg (No such file or directory)" in message


def test_corrupt_images_are_left_out(tmp_path):
    whole = data_of("imagefolder", image_folder(tmp_path), validation=0.5)
    corrupt = corrupt_files(tmp_path / "bee")
    data = data_of("imagefolder", tmp_path, validation=0.5, on_corrupt="skip")
    assert data.train.images == whole.train.images and len(data.validation) == 9
    assert all(str(path) in data.notes[0] for path in corrupt.values())
    assert all(torch.isfinite(data.train[index][0]).all() for index in range(len(data.train)))


def test_ten_corrupt_images_are_named_and_the_others_counted(tmp_path):
    image_folder(tmp_path)
    for number in range(13):
        (tmp_path / "cat" / f"z{number:02}.png").touch()
    message = message_of("imagefolder", tmp_path)
    assert "13 of the 31" in message and "z09.png" in message and "z10.png" not in message and "and 3 more" in message


def test_every_process_knows_the_corrupt_images_of_the_others(tmp_path):
    image_folder(tmp_path, per_class=20)
    for name in ("ant/3.png", "bee/7.png", "cat/18.jpg"):
        truncate(tmp_path / name)
    alone = data_of("imagefolder", tmp_path, on_corrupt="skip")
    for data in in_processes(3, lambda process: data_of("imagefolder", tmp_path, process, on_corrupt="skip")):
        assert data.notes == alone.notes and data.train.images == alone.train.images
    found = in_processes(3, lambda process: data_of("imagefolder", tmp_path, process))
    assert {type(error) for error in found} == {UserError} and len(set(map(str, found))) == 1


def test_processes_that_see_other_images(tmp_path):
    first, second = (image_folder(tmp_path / name / "data") for name in ("a", "b"))
    (second / "ant" / "0.jpg").rename(second / "ant" / "9.jpg")
    found = in_processes(2, lambda process: data_of("imagefolder", (first, second)[process.global_rank], process))
    assert all("expected the same images for every process" in str(error) for error in found)


def test_a_folder_that_one_process_does_not_see_ends_all(tmp_path):
    image_folder(tmp_path / "a")
    found = in_processes(2, lambda process: data_of("imagefolder", tmp_path / "ab"[process.global_rank], process))
    assert all(isinstance(error, UserError) and f"cannot read {tmp_path / 'b'}" in str(error) for error in found)


def test_an_empty_class(tmp_path):
    (image_folder(tmp_path) / "dog").mkdir()
    message = message_of("imagefolder", tmp_path)
    assert "none that can be read in ['dog']" in message and str(tmp_path) in message and ".jpg" in message
    (tmp_path / "dog" / "readme.txt").touch()
    assert "['dog']" in message_of("imagefolder", tmp_path)


def test_a_class_whose_images_are_all_corrupt(tmp_path):
    image_folder(tmp_path, ("ant", "bee"), per_class=2)
    for path in (tmp_path / "bee").iterdir():
        truncate(path)
    message = message_of("imagefolder", tmp_path, on_corrupt="skip")
    assert "none that can be read in ['bee']" in message


def test_folders_that_are_not_what_they_should_be(tmp_path):
    assert f"{tmp_path / 'none'}: No such file" in message_of("imagefolder", tmp_path / "none")
    (tmp_path / "file").touch()
    assert f"{tmp_path / 'file'}: Not a directory" in message_of("imagefolder", tmp_path / "file")
    assert message_of("imagefolder", tmp_path).endswith(f"at least two classes in {tmp_path}, found []")
    image_folder(tmp_path / "images")
    assert message_of("imagefolder", tmp_path).endswith(f"in {tmp_path}, found ['images']")
    assert "--root" in message_of("imagefolder")
