from __future__ import annotations

import multiprocessing
import os
import random
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
pytest.importorskip("tqdm")

from densenet_ext.errors import UserError
from densenet_ext.training.data.datasets import Examples
from densenet_ext.training.data.loading import Batches
from densenet_ext.training.options import Options
from tests.support.training_data import Process, data_of, image_folder, needs_torchvision

needs_torchvision()


def noisy(image):
    """A transform that draws random numbers."""
    return image + torch.rand(1)


def examples_of(count: int = 23, images: object = None) -> Examples:
    """Image i is full of the number i, [1, 2, 2]; its label is i % 3. In training a number from 0 to 1 is added."""
    if images is None:
        images = torch.arange(count).reshape(-1, 1, 1, 1).expand(-1, 1, 2, 2)
    return Examples(images, torch.arange(count) % 3, (1, 2, 2), torch.Tensor.float, noisy)


def epochs_of(batches: Batches, numbers=(1, 2), start: int = 0) -> list:
    """All batches of the epochs ``numbers``, each as [n, 2] numbers: the images' and the labels."""
    found = []
    for number in numbers:
        for images, labels in batches.epoch(number, start):
            assert images.dtype == torch.float32 and images.shape == (len(labels), 1, 2, 2)
            assert labels.dtype == torch.int64
            found.append(torch.stack([images[:, 0, 0, 0], labels.float()], 1))
    return found


def equal(first: list, second: list) -> bool:
    return len(first) == len(second) and all(map(torch.equal, first, second))


def indices(batches: list) -> list[int]:
    return [int(value) for batch in batches for value in batch[:, 0]]


def batches_of(examples: Examples, batch_size: int, seed: int, shuffle: bool, rank=0, size=1, workers=0) -> Batches:
    options = Options.of({"batch_size": batch_size, "seed": seed, "workers": workers})
    return Batches(examples, options, Process(rank, size), shuffle)


def training(batch_size: int = 5, seed: int = 3, count: int = 23, **options) -> Batches:
    return batches_of(examples_of(count), batch_size, seed=seed, shuffle=True, **options)


def evaluation(batch_size: int = 5, count: int = 23, **options) -> Batches:
    return batches_of(examples_of(count), batch_size, seed=3, shuffle=False, **options)


# Order


def test_an_epoch_has_every_image_once_in_an_order_of_its_own():
    batches = training()
    first, second = epochs_of(batches, [1]), epochs_of(batches, [2])
    assert sorted(indices(first)) == sorted(indices(second)) == list(range(23))
    assert indices(first) != indices(second) and indices(first) != list(range(23))
    assert equal(first, epochs_of(training(), [1]))
    assert [len(batch) for batch in first] == [5, 5, 5, 5, 3] == batches.counts
    assert all(batch[:, 1].equal(batch[:, 0].floor() % 3) for batch in first)


def test_augmentation_differs_between_images_epochs_and_seeds():
    def added(batches, epoch):
        return {
            index: value % 1
            for index, value in ((int(v), v.item()) for b in epochs_of(batches, [epoch]) for v in b[:, 0])
        }

    first, second, third = added(training(), 1), added(training(), 2), added(training(seed=4), 1)
    assert len(set(first.values())) == 23
    assert all(len({first[index], second[index], third[index]}) == 3 for index in range(23))


def test_seeds_have_their_own_orders():
    orders = {tuple(indices(epochs_of(training(seed=seed), [1]))) for seed in (0, 1, 2**63 - 1)}
    assert len(orders) == 3


def test_evaluation_takes_the_images_as_they_are():
    batches = evaluation()
    found = epochs_of(batches, [1])
    assert torch.cat(found)[:, 0].tolist() == list(range(23)) and len(batches.counts) == len(found) == 5
    assert equal(found, epochs_of(evaluation(), [2]))


@pytest.mark.parametrize("make", [training, evaluation])
def test_the_number_of_workers_changes_nothing(make):
    alone = epochs_of(make())
    assert equal(alone, epochs_of(make(workers=1))) and equal(alone, epochs_of(make(workers=2)))


@pytest.mark.parametrize("make", [training, evaluation])
@pytest.mark.parametrize("size, workers", [(2, 0), (3, 0), (2, 1)])
def test_processes_share_each_batch(make, size, workers):
    whole = epochs_of(make(6), [4])
    parts = [epochs_of(make(6, rank=rank, size=size, workers=workers), [4]) for rank in range(size)]
    if make is training and size == 3:
        whole = whole[:-1]  # the last 5 images: one of the three would have a single one
    assert equal([torch.cat(step) for step in zip(*parts, strict=True)], whole)
    for step in zip(*parts, strict=True):
        sizes = [len(part) for part in step]
        assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_goes_on_at_any_step(workers):
    whole = epochs_of(training(), [7])
    for start in (1, 4, 5):
        assert equal(epochs_of(training(workers=workers), [7], start), whole[start:])


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_that_was_left_early_disturbs_no_other(workers):
    expected = epochs_of(training(), [2])
    batches = training(workers=workers)
    for _ in batches.epoch(1):
        break
    assert equal(epochs_of(batches, [2]), expected)


# Sizes


@pytest.mark.parametrize("count, size, steps", [(21, 1, 4), (22, 1, 5), (23, 2, 4), (24, 2, 5), (20, 2, 4)])
def test_a_last_batch_with_less_than_two_images_per_process_is_dropped(count, size, steps):
    batches = training(count=count, size=size)
    assert len(batches.counts) == len(epochs_of(batches, [1])) == steps


def test_batches_of_one_image_are_kept():
    batches = training(1)
    assert len(batches.counts) == 23 and len(epochs_of(batches, [1])) == 23


@pytest.mark.parametrize("workers", [0, 1])
def test_a_part_may_be_empty_in_evaluation(workers):
    batches = evaluation(rank=3, size=4, workers=workers)
    found = epochs_of(batches, [1])
    assert [len(part) for part in found] == [1, 1, 1, 1, 0] and batches.counts[4] == 3


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(UserError, match=r"^--batch-size: expected at most 23, the training images, got 24$"):
        training(24)
    assert training(23).counts == evaluation(24).counts == [23]


def test_a_batch_smaller_than_the_processes_is_refused():
    with pytest.raises(UserError, match=r"^--batch-size: expected at least 4, an image for each process, got 3$"):
        training(3, size=4)


# Random numbers and threads


@pytest.mark.parametrize("workers", [0, 2])
def test_no_global_random_number_is_drawn(workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    epochs_of(training(workers=workers))
    epochs_of(evaluation(workers=workers))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]


class InWorker:
    """Images that tell about the process that loads them."""

    def __init__(self, tell) -> None:
        self.tell = tell

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((1, 2, 2), float(self.tell(index)))


def told(tell, workers: int, count: int = 4) -> list[float]:
    batches = batches_of(examples_of(count, InWorker(tell)), 1, seed=0, shuffle=False, workers=workers)
    return [batch[0, 0].item() for batch in epochs_of(batches, [1])]


def test_workers_use_one_thread_and_ignore_ctrl_c():
    assert told(lambda _: torch.get_num_threads(), 2) == [1] * 4
    assert told(lambda _: signal.getsignal(signal.SIGINT) is signal.SIG_IGN, 2) == [True] * 4
    assert told(lambda _: os.getpid(), 0) == [float(os.getpid())] * 4
    assert len(set(told(lambda _: os.getpid(), 2))) == 2


def test_a_signal_for_the_whole_group_does_not_end_workers():
    batches = batches_of(examples_of(8, InWorker(lambda _: os.getpid())), 1, seed=0, shuffle=False, workers=2)
    pids = set()
    for step, (images, _) in enumerate(batches.epoch(1)):
        pid = int(images[0, 0, 0, 0])
        pids.add(pid)
        if step < 2:
            os.kill(pid, signal.SIGINT)
            os.kill(pid, signal.SIGTERM)
    assert step == 7 and len(pids) == 2 and all(map(alive, pids))
    del batches
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# Start methods


@pytest.fixture(params=["spawn", "forkserver"])
def start_method(request):
    before = multiprocessing.get_start_method(allow_none=True)
    multiprocessing.set_start_method(request.param, force=True)
    yield
    multiprocessing.set_start_method(before, force=True)


def test_other_ways_to_start_workers(tmp_path, start_method):
    image_folder(tmp_path)
    examples = data_of("imagefolder", tmp_path, image_size=8, validation=0).train
    alone = batches_of(examples, 6, seed=1, shuffle=True)
    expected = [tensor for batch in alone.epoch(1) for tensor in batch]
    batches = batches_of(examples, 6, seed=1, shuffle=True, workers=1)
    found = [tensor for batch in batches.epoch(1) for tensor in batch]
    assert len(found) == len(expected) == 6 and all(map(torch.equal, found, expected))
