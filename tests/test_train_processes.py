"""Training in several processes under torchrun, on gloo: equal to one process with the whole batch."""

from __future__ import annotations

import signal
import time

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")
pytest.importorskip("typer")

from training_data import cifar
from training_runs import MEASURED, checkpoint, differences, finish, run, start

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed"),
]


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    cifar(root, per_batch=31, test=31)  # parts of unequal size, and the last batches of evaluation have an empty one
    data = ("--data", "cifar10", "--root", root)
    return (*data, "--model", "densenet_bc:10,4", "--batch-size", 30, "--lr", 0.02, "--epochs", 2)


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    assert run("train", *options, "--out", folder).code == 0
    return folder


@pytest.mark.parametrize("how", [("--sync-bn",), ("--sync-bn", "--fsdp")], ids=["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_whole_batch(options, alone, tmp_path, how):
    ended = finish(start("train", *options, *how, "--out", tmp_path / "run", processes=2))
    assert ended.code == 0, ended.output
    for line in ("2 processes; everything goes into", "epoch 2/2", "test accuracy"):
        assert ended.text.count(line) == 1  # only one process speaks
    one, two = checkpoint(alone), checkpoint(tmp_path / "run")
    for name in MEASURED:
        rows = [[row[name] for row in state["history"]] for state in (one, two)]
        assert rows[1] == pytest.approx(rows[0], rel=1e-3), name
    for name, value in one["model"].items():
        assert two["model"][name].shape == value.shape
        torch.testing.assert_close(two["model"][name], value, rtol=1e-2, atol=1e-3)
    for name, state in one["optimizer"]["state"].items():
        momentum = two["optimizer"]["state"][name]["momentum_buffer"]
        torch.testing.assert_close(momentum, state["momentum_buffer"], rtol=2e-2, atol=2e-3)


def test_statistics_of_each_part_are_not_those_of_the_whole_batch(options, alone, tmp_path):
    """Without --sync-bn, as DistributedDataParallel has it: the first process's running statistics are kept."""
    ended = finish(start("train", *options, "--out", tmp_path / "run", processes=2))
    assert ended.code == 0, ended.output
    name = "features.norm5.running_var"
    assert not torch.allclose(checkpoint(tmp_path / "run")["model"][name], checkpoint(alone)["model"][name], rtol=1e-3)


def test_stopped_processes_go_on_to_the_same_bits(options, tmp_path):
    how = (*options, "--sync-bn", "--fsdp", "--epochs", 6)
    stopped = start("train", *how, "--out", tmp_path / "stopped", processes=2)
    metrics = tmp_path / "stopped" / "metrics.csv"
    while not metrics.exists() and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)  # torchrun passes it on
    ended = finish(stopped)
    assert "everything is saved in" in ended.text, ended.output
    assert len(checkpoint(tmp_path / "stopped")["history"]) < 6
    ended = finish(start("train", "--resume", "--out", tmp_path / "stopped", processes=2))
    assert ended.code == 0, ended.output
    ended = finish(start("train", *how, "--out", tmp_path / "whole", processes=2))
    assert ended.code == 0, ended.output
    assert differences(tmp_path / "stopped", tmp_path / "whole") == []


def test_errors_are_told_once(options, tmp_path):
    ended = finish(start("train", *options, "--batch-size", 1000, "--out", tmp_path / "run", processes=2))
    assert ended.code != 0 and ended.text.count("--batch-size: expected") == 1, ended.output
    assert "Traceback" not in ended.text.partition("torch/distributed/elastic")[0]
    assert not (tmp_path / "run").exists()
