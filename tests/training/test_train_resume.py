"""Runs that are killed, stopped or broken off, and resumed: equal to uninterrupted ones to the last bit."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import time

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

import densenet_ext as dx
from densenet_ext.errors import UserError
from densenet_ext.reuse.weights_file import read_weights_file
from densenet_ext.training import checkpoints, loop, running
from densenet_ext.training.learner import Learner
from densenet_ext.training.options import Options
from densenet_ext.training.processes import make_processes
from tests.support.training_data import cifar
from tests.support.training_runs import TINY, checkpoint, differences, run, start, without_pictures


@pytest.fixture(scope="module", autouse=True)
def no_pictures():
    """They have tests of their own, and test_train.py sees that a run leaves them."""
    with without_pictures():
        yield


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    cifar(root, per_batch=40)  # 200 images to train on
    return ("--data", "cifar10", "--root", root, "--model", "densenet_bc:10,4", "--batch-size", 32, "--epochs", 8)


@pytest.fixture(scope="module")
def whole(options, tmp_path_factory):
    """A run that nothing stops, without workers, and with the one thread of the others."""
    out = tmp_path_factory.mktemp("whole") / "run"
    ended = start("train", *options, "--out", out).finish()
    assert ended.code == 0, ended.output
    return out


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Three short epochs that nothing stops."""
    out = tmp_path_factory.mktemp("tiny") / "run"
    assert run("train", *TINY, "--epochs", 3, "--out", out).code == 0
    return out


@pytest.fixture
def finished(tiny, tmp_path):
    """A copy of it."""
    return shutil.copytree(tiny, tmp_path / "finished")


def wait_for_epoch(process, folder, epoch):
    """Until the run has saved that epoch; fails when it ends before."""
    while process.poll() is None:
        if (folder / "metrics.csv").exists() and len((folder / "metrics.csv").read_text().splitlines()) > epoch:
            return
        time.sleep(0.01)
    pytest.fail(f"ended before epoch {epoch}: {process.output()}")


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(options, whole, tmp_path):
    killed = start("train", *options, "--workers", 1, "--out", tmp_path)
    wait_for_epoch(killed, tmp_path, 2)
    killed.kill()
    assert killed.finish().code == -signal.SIGKILL
    assert 2 <= len(checkpoint(tmp_path)["history"]) < 8
    ended = start("train", "--resume", "--out", tmp_path).finish()
    assert ended.code == 0 and "going on after epoch" in ended.text, ended.output
    assert differences(tmp_path, whole) == []
    rows = list(csv.DictReader((tmp_path / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == [str(epoch) for epoch in range(1, 9)]


@pytest.mark.slow
def test_a_stopped_run_saves_and_goes_on_to_the_same_bits(options, whole, tmp_path):
    stopped = start("train", *options, "--workers", 2, "--out", tmp_path)
    wait_for_epoch(stopped, tmp_path, 1)
    stopped.send_signal(signal.SIGTERM)
    ended = stopped.finish()
    assert ended.code == 143
    assert "everything is saved in" in ended.text and "Traceback" not in ended.text, ended.output
    assert len(checkpoint(tmp_path)["history"]) < 8
    # With other workers, and the same threads: sums of a kernel's parts depend on how many there are.
    ended = start("train", "--resume", "--out", tmp_path, "--workers", 0).finish()
    assert ended.code == 0, ended.output
    assert differences(tmp_path, whole) == []


def interrupt_after(monkeypatch, steps, number=signal.SIGTERM):
    """Sends a signal to this process when that many steps are done."""
    step = Learner.step

    def counted(self, *arguments):
        if self.steps + 1 == steps:
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Learner, "step", counted)


# the first step; within the second epoch; the last one of an epoch
@pytest.mark.parametrize("steps, number", [(1, signal.SIGTERM), (8, signal.SIGINT), (12, signal.SIGTERM)])
def test_a_run_goes_on_within_an_epoch(tiny, tmp_path, monkeypatch, steps, number):
    interrupt_after(monkeypatch, steps, number)
    ended = run("train", *TINY, "--epochs", 3, "--out", tmp_path / "cut")
    monkeypatch.undo()
    place = f"epoch {(steps - 1) // 6 + 1}, step {(steps - 1) % 6 + 1} of 6"
    assert ended.code == 128 + number and f"stopped in {place}; everything is saved" in ended.text, ended.output
    state = checkpoint(tmp_path / "cut")
    assert state["steps"] == steps and len(state["history"]) == (steps - 1) // 6
    assert run("train", "--resume", "--out", tmp_path / "cut").code == 0
    assert differences(tmp_path / "cut", tiny) == []


@pytest.mark.parametrize("part, place", [(2, "epoch 2, step 6 of 6"), (4, "the test after the last epoch")])
def test_a_run_goes_on_from_its_evaluation(tiny, tmp_path, monkeypatch, part, place):
    evaluate, calls = Learner.evaluate, []

    def interrupted(self, batches):
        calls.append(None)
        if len(calls) == part:
            os.kill(os.getpid(), signal.SIGTERM)
        return evaluate(self, batches)

    monkeypatch.setattr(Learner, "evaluate", interrupted)
    ended = run("train", *TINY, "--epochs", 3, "--out", tmp_path / "cut")
    monkeypatch.undo()
    assert ended.code == 143 and f"stopped in {place}; everything is saved" in ended.text, ended.output
    state = checkpoint(tmp_path / "cut")
    assert state["steps"] == (12 if part == 2 else 18) and len(state["history"]) == part - 1
    assert run("train", "--resume", "--out", tmp_path / "cut").code == 0
    assert differences(tmp_path / "cut", tiny) == []
    results = [(folder / "result.json").read_text() for folder in (tmp_path / "cut", tiny)]
    assert json.loads(results[0])["test"] == json.loads(results[1])["test"]


def test_the_comparison_of_runs_sees_a_bit(tiny, finished):
    state = checkpoint(finished)
    weight = state["model"]["features.conv0.weight"].view(-1)
    weight[0] = torch.nextafter(weight[0], torch.tensor(9.0))
    torch.save(state, finished / "checkpoint.pt")
    assert differences(tiny, finished) == ["model.features.conv0.weight"]


@pytest.mark.parametrize("amp", ["off", "fp16"])
def test_dropout_draws_the_same_after_a_resume(amp):
    """Random state is no part of a checkpoint: what a step draws follows from the seed and its number."""
    options = Options.of({"epochs": 2, "batch_size": 8, "amp": amp})
    images, labels = torch.randn(6, 8, 1, 16, 16), torch.randint(10, (6, 8))

    def learner():
        torch.manual_seed(0)
        network = dx.DenseNet(4, (2, 2), 8, drop_rate=0.5, num_classes=10, small_inputs=True, in_channels=1)
        return Learner(network, options, make_processes(amp=amp))

    def steps(one, indices):
        return [one.step(images[i], labels[i], 8).tolist() for i in indices]

    whole, first, second = learner(), learner(), learner()
    expected = steps(whole, range(6))
    got = steps(first, range(3))
    torch.manual_seed(99)
    second.load_state(first.state())
    got += steps(second, range(3, 6))
    assert got == expected
    pairs = zip(whole.network.state_dict().values(), second.network.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert steps(learner(), [1]) != [expected[1]]  # dropout is on, and another step draws something else


class Killed(Exception):
    pass


def kill_at(patch, call, place, name):
    """Ends the run without a word at that call of a function."""
    usual, calls = getattr(place, name), []

    def killed(*arguments):
        calls.append(arguments)
        if len(calls) == call:
            raise Killed
        return usual(*arguments)

    patch.setattr(place, name, killed)


@pytest.fixture(scope="module")
def killed_in_training(tmp_path_factory):
    """A run that was killed in its third and last epoch."""
    out = tmp_path_factory.mktemp("killed") / "run"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_at(patch, 3, Learner, "end_epoch")
        running.train({"model": "densenet_bc:10,4", "batch_size": 256, "epochs": 3}, out)
    return out


@pytest.mark.parametrize("where", ["training", "tensorboard", "checkpoint", "metrics"])
def test_metrics_have_every_epoch_once_after_a_kill(killed_in_training, tmp_path, monkeypatch, where):
    """Killed in the last epoch before anything is written, or before TensorBoard, the checkpoint or metrics.csv."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = shutil.copytree(killed_in_training, tmp_path / "run")
    if where != "training":
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_at(
                patch,
                *{
                    "tensorboard": (1, loop.metrics, "log"),
                    "checkpoint": (1, loop, "save_checkpoint"),
                    "metrics": (2, loop.metrics, "write_csv"),  # the first one is that of the start
                }[where],
            )
            running.train({}, out, resume=True)
    assert run("train", "--resume", "--out", out).code == 0
    history = checkpoint(out)["history"]
    assert [row["epoch"] for row in history] == [1, 2, 3]
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [float(row["loss"]) for row in rows] == [pytest.approx(row["loss"], rel=1e-5) for row in history]
    events = accumulator.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    points = [(point.step, pytest.approx(point.value)) for point in events.Scalars("loss/training")]
    assert points == [(row["epoch"], row["loss"]) for row in history]


def test_a_finished_run_stays_as_it_is(finished):
    before = {name: (finished / name).read_bytes() for name in ("checkpoint.pt", "metrics.csv")}
    (finished / "metrics.csv").unlink()
    ended = run("train", "--resume", "--out", finished)
    assert ended.code == 0 and "going on after epoch 3 of 3" in ended.text and "test accuracy" in ended.text
    assert {name: (finished / name).read_bytes() for name in before} == before


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed, words",
    [
        (("--lr", 0.2), "--lr is 0.1 there, got 0.2"),
        (("--epochs", 9), "--epochs is 3 there, got 9"),
        (("--seed", 1, "--amp", "bf16"), "--amp is 'off' there, got 'bf16'; --seed is 0 there, got 1"),
        (("--model", "densenet_bc:16,4"), "--model is 'densenet_bc:10,4' there, got 'densenet_bc:16,4'"),
    ],
)
def test_other_options_are_refused(finished, changed, words):
    ended = run("train", "--resume", "--out", finished, *changed)
    assert ended.code == 2 and words in ended.text, ended.output


def test_the_same_options_and_another_number_of_workers_are_taken(tmp_path, monkeypatch):
    interrupt_after(monkeypatch, 3)
    assert run("train", *TINY, "--epochs", 2, "--out", tmp_path / "cut").code == 143
    monkeypatch.undo()
    assert run("train", "--resume", *TINY, "--epochs", 2, "--workers", 1, "--out", tmp_path / "cut").code == 0


def test_a_checkpoint_of_another_network_is_refused(finished, tmp_path):
    assert run("train", "--model", "densenet_bc:10,8", "--epochs", 1, "--out", tmp_path / "b").code == 0
    (tmp_path / "b" / "checkpoint.pt").replace(finished / "checkpoint.pt")
    ended = run("train", "--resume", "--out", finished)
    assert ended.code == 2 and "checkpoint.pt: the checkpoint is of another network" in ended.text
    assert "features.conv0.weight: expected [8, 1, 3, 3], got [16, 1, 3, 3]" in ended.text


def test_folders_without_a_run_are_refused(tmp_path):
    ended = run("train", "--resume", "--out", tmp_path / "nowhere")
    assert ended.code == 2 and "--resume: expected the folder of a run" in ended.text
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (b"PK\x03\x04 half a file", "is damaged, or holds Python objects"),
        ({"epoch": 3}, "it lacks 'data'"),
        ({"model": {}}, "it lacks 'data'"),
        ({"network": torch.nn.Linear(2, 2)}, "is damaged, or holds Python objects"),
    ],
)
def test_damaged_checkpoints_are_refused(finished, content, message):
    path = finished / "checkpoint.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif "model" in content:
        torch.save({"model": checkpoint(finished)["model"]}, path)
    else:
        torch.save(content, path)
    ended = run("train", "--resume", "--out", finished)
    assert ended.code == 2 and "checkpoint.pt" in ended.text and message in ended.text, ended.output
    assert "weights_only" not in ended.text  # no advice to load it unsafely


def test_flipped_bytes_are_refused_or_change_nothing(tmp_path):
    """By the archive's checksums; between its parts there is padding that nobody reads."""
    path = tmp_path / "checkpoint.pt"
    state = {"model": {"weight": torch.arange(2000.0)}, "steps": 3}
    checkpoints.save_checkpoint(state, path)
    whole, refused = path.read_bytes(), 0
    for place in range(0, len(whole), 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :])
        try:
            found = read_weights_file(path)
        except UserError as error:
            refused += 1
            assert "is damaged, or holds Python objects" in str(error)
        else:
            assert torch.equal(found["model"]["weight"], state["model"]["weight"]) and found["steps"] == 3
    assert refused > 8000 / 97


@pytest.mark.slow
def test_of_two_processes_that_go_on_with_one_run_only_the_first_writes(options, tmp_path):
    first = start("train", *options, "--epochs", 900, "--workers", 1, "--out", tmp_path)
    wait_for_epoch(first, tmp_path, 1)
    ended = run("train", "--resume", "--out", tmp_path)
    assert ended.code == 2 and f"another process is training in {tmp_path}" in ended.text, ended.output
    first.kill()
    first.finish()
    checkpoints.locked(tmp_path / "options.json").close()  # whoever is killed leaves no lock


@pytest.mark.parametrize("content", ["", "{}", '{"options": {"data": "digits"}}', '{"options": {"colour": 1}}'])
def test_damaged_options_are_refused(tmp_path, content):
    (tmp_path / "options.json").write_text(content)
    ended = run("train", "--resume", "--out", tmp_path)
    assert ended.code == 2 and "options.json" in ended.text


def test_the_best_epoch_is_the_first_with_the_smallest_error():
    def row(epoch, error):
        return loop.Epoch(epoch, 0.1, 1.0, 10.0, None if error is None else 1.0, error, 1.0, 1.0, 1.0)

    rows = [row(1, 9.0), row(2, 4.0), row(3, 4.0), row(4, 5.0)]
    assert loop.best_of(rows) is rows[1] and loop.best_of([row(1, 0.0), row(2, 1.0)]).epoch == 1
    assert loop.best_of([row(1, None)]) is None
