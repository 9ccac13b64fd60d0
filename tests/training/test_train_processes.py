"""Training in several processes under torchrun, on gloo: equal to one process with the whole batch."""

from __future__ import annotations

import functools
import json
import shutil
import signal
import time

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from densenet_ext.cli import errors_told
from densenet_ext.errors import Interrupted, SharedError, UserError
from tests.support.forks import Fork, torchrun
from tests.support.training_data import cifar
from tests.support.training_runs import MEASURED, checkpoint, differences, run, start
from tests.training import two_processes

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed"),
]

SHARDED = ("--sync-bn", "--fsdp")


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    cifar(root, per_batch=31, test=31)  # parts of unequal size, and the last batches of evaluation have an empty one
    data = ("--data", "cifar10", "--root", root)
    return (*data, "--model", "densenet_bc:10,4", "--batch-size", 30, "--lr", 0.005, "--epochs", 6)


@pytest.fixture(scope="module")
def alone(options, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one") / "run"
    assert run("train", *options, "--out", folder).code == 0
    return folder


@pytest.fixture(scope="module")
def several(options, tmp_path_factory):
    """Makes runs in two processes, each with other options once: the folder and what was printed."""

    @functools.cache
    def make(*how):
        folder = tmp_path_factory.mktemp("two") / "run"
        ended = start("train", *options, *how, "--out", folder, processes=2).finish()
        assert ended.code == 0, ended.output
        return folder, ended

    return make


@pytest.mark.parametrize("how", [("--sync-bn",), SHARDED], ids=["ddp", "fsdp"])
def test_two_processes_equal_one_with_the_whole_batch(alone, several, how):
    folder, ended = several(*how)
    for line in ("2 processes; everything goes into", "epoch 6/6", "test accuracy"):
        assert ended.text.count(line) == 1  # only one process speaks
    one, two = checkpoint(alone), checkpoint(folder)
    for name in MEASURED:
        rows = [[row[name] for row in state["history"]] for state in (one, two)]
        assert rows[1] == pytest.approx(rows[0], rel=1e-3), name
    for name, value in one["model"].items():
        assert two["model"][name].shape == value.shape
        torch.testing.assert_close(two["model"][name], value, rtol=1e-2, atol=1e-3)
    for name, state in one["optimizer"]["state"].items():
        momentum = two["optimizer"]["state"][name]["momentum_buffer"]
        torch.testing.assert_close(momentum, state["momentum_buffer"], rtol=2e-2, atol=2e-3)


def test_statistics_of_each_part_are_not_those_of_the_whole_batch(alone, several):
    """Without --sync-bn, as DistributedDataParallel has it: the first process's running statistics are kept."""
    name = "features.norm5.running_var"
    assert not torch.allclose(checkpoint(several()[0])["model"][name], checkpoint(alone)["model"][name], rtol=1e-3)


def test_stopped_processes_go_on_to_the_same_bits(options, several, tmp_path):
    stopped = start("train", *options, *SHARDED, "--out", tmp_path / "stopped", processes=2)
    while not (tmp_path / "stopped" / "checkpoint.pt").exists() and stopped.poll() is None:
        time.sleep(0.01)
    stopped.send_signal(signal.SIGTERM)  # torchrun passes it on
    ended = stopped.finish()
    assert "everything is saved in" in ended.text, ended.output
    assert len(checkpoint(tmp_path / "stopped")["history"]) < 6
    ended = start("train", "--resume", "--out", tmp_path / "stopped", processes=2).finish()
    assert ended.code == 0, ended.output
    assert differences(tmp_path / "stopped", several(*SHARDED)[0]) == []


def test_another_number_of_processes_goes_on(several, tmp_path):
    """What two processes have sharded is whole in the checkpoint: one process measures the same with it."""
    folder, before = several(*SHARDED)
    shutil.copytree(folder, tmp_path / "run")
    ended = run("train", "--resume", "--no-fsdp", "--out", tmp_path / "run")
    assert ended.code == 0 and "going on after epoch 6 of 6" in ended.text, ended.output
    one, two = (json.loads((where / "result.json").read_text())["test"] for where in (tmp_path / "run", folder))
    assert one == {**two, "loss": pytest.approx(two["loss"], rel=1e-5)}
    assert differences(tmp_path / "run", folder) == []


@pytest.fixture(scope="module")
def failed():
    """What two processes of which the second one fails at the end have printed."""
    return Fork(torchrun, 2, two_processes.main).finish()


def test_what_holds_in_each_process(failed):
    for name in ("buffers_are_shared", "overflow_skips_the_step_everywhere", "dropout_differs"):
        assert f"held: {name}" in failed.text, failed.output


def test_an_error_in_one_process_ends_all_with_a_sentence(failed):
    assert failed.code != 0 and failed.text.count("Error in process 1: no more images") == 1, failed.output
    assert "[rank" not in failed.output and "terminate called" not in failed.output  # no traceback but torchrun's


def test_the_first_process_has_time_to_tell_an_error_of_all():
    ended = Fork(torchrun, 2, two_processes.refuse).finish()
    assert ended.code != 0 and ended.text.count("Error: --batch-size: expected less") == 1, ended.output


def test_who_says_nothing_waits_but_after_a_signal(monkeypatch, capsys):
    """torchrun waits for all processes after a signal, and ends them after an error of one."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    monkeypatch.setenv("RANK", "1")
    for error, count in ((UserError("wrong"), 1), (Interrupted("saved", signal.SIGTERM), 1), (SharedError("gone"), 2)):
        with pytest.raises(SystemExit) as ended, errors_told():
            raise error
        assert ended.value.code == error.exit_code and len(waited) == count
    assert capsys.readouterr() == ("", "")


def test_errors_are_told_once(options, tmp_path):
    ended = start("train", *options, "--batch-size", 1000, "--out", tmp_path / "run", processes=2).finish()
    assert ended.code != 0 and ended.text.count("--batch-size: expected") == 1, ended.output
    assert "Traceback" not in ended.text.partition("torch/distributed/elastic")[0]
    assert not (tmp_path / "run").exists()
