"""`densenet-ext train` on the digits: what it leaves behind, what it prints, what it refuses."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("tqdm")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import densenet_ext as dx
from densenet_ext import files
from densenet_ext.training import learner, networks, running
from densenet_ext.training.loop import best_of
from densenet_ext.training.metrics import Epoch, Row, Sums
from densenet_ext.training.options import Options
from densenet_ext.training.processes import make_processes
from tests.support import command_line
from tests.support.forks import environment
from tests.support.training_runs import MEASURED, TINY, checkpoint, differences, run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run that nothing disturbs: its folder, which tests leave as it is, and what was printed."""
    out = tmp_path_factory.mktemp("tiny") / "new" / "folder"
    ended = run("train", *TINY, "--epochs", 2, "--seed", 3, "--out", out)
    assert ended.code == 0, ended.output
    return out, ended


def test_a_run_leaves_options_metrics_and_checkpoints(tiny):
    out, ended = tiny
    assert "1293 to train on, 144 for validation, 360 for the test" in ended.text
    assert "epoch 2/2: lr 0.01, loss" in ended.text and re.search(r"images/s, \d+ MiB", ended.text)
    rows = list(csv.DictReader((out / "metrics.csv").open()))
    assert [row["epoch"] for row in rows] == ["1", "2"] and [*rows[0]][:6] == list(MEASURED)
    assert float(rows[1]["loss"]) < float(rows[0]["loss"])
    kept = json.loads((out / "options.json").read_text())
    assert kept["options"]["seed"] == 3 and kept["options"]["weight_decay"] == 1e-4
    assert kept["versions"]["torch"] == torch.__version__
    state = checkpoint(out)
    model = dx.densenet_bc(10, 4, num_classes=10, in_channels=1)
    model.load_state_dict(state["model"])
    test = json.loads((out / "result.json").read_text())["test"]
    assert f"test accuracy {100 - test['error']:.2f} % ({test['wrong']} of 360 wrong)" in ended.text
    assert {"curves.png", "reuse.png", "tensorboard"} < set(os.listdir(out))
    best = best_of([Epoch(**row) for row in state["history"]])
    assert checkpoint(out, "best.pt")["history"][-1]["epoch"] == best.epoch
    assert not [name for name in os.listdir(out) if name.endswith(".tmp")]


def test_tensorboard_has_a_point_for_every_epoch(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tiny[0] / "tensorboard"))
    events.Reload()
    history = checkpoint(tiny[0])["history"]
    for tag, name in (("loss/training", "loss"), ("error/validation", "validation_error"), ("lr", "lr")):
        points = [(point.step, pytest.approx(point.value)) for point in events.Scalars(tag)]
        assert points == [(row["epoch"], row[name]) for row in history]


def test_without_out_runs_are_repeatable_in_new_folders_and_the_seed_matters(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (3, 4):
        assert run("train", *TINY, "--epochs", 2, "--seed", seed).code == 0
    assert sorted(os.listdir("runs")) == ["digits", "digits-2"]
    assert differences(tiny[0], tmp_path / "runs" / "digits") == []
    assert "model.classifier.weight" in differences(tiny[0], tmp_path / "runs" / "digits-2")


def test_fused_and_unfused_runs_agree_up_to_rounding(tmp_path):
    pairs = {}
    for name, option in (("fused", "--fused"), ("unfused", "--no-fused")):
        ended = run("train", *TINY, "--epochs", 1, "--lr", 0.01, option, "--out", tmp_path / name)
        assert ended.code == 0 and (", fused, on" if name == "fused" else "in the usual formulation") in ended.text
        pairs[name] = checkpoint(tmp_path / name)
    for name, value in pairs["unfused"]["model"].items():
        torch.testing.assert_close(pairs["fused"]["model"][name], value, rtol=1e-3, atol=1e-4)
    assert differences(tmp_path / "fused", tmp_path / "unfused"), "the same code ran twice"


def test_a_folder_with_a_run_is_never_overwritten(tiny):
    before = (tiny[0] / "checkpoint.pt").read_bytes()
    ended = run("train", *TINY, "--epochs", 1, "--out", tiny[0])
    assert ended.code == 2 and "holds a run already: --resume goes on with it" in ended.text
    assert (tiny[0] / "checkpoint.pt").read_bytes() == before


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_mixed_precision_trains(tmp_path, amp):
    ended = run("train", *TINY, "--epochs", 2, "--amp", amp, "--out", tmp_path)
    assert ended.code == 0, ended.output
    history = checkpoint(tmp_path)["history"]
    assert history[1]["loss"] < history[0]["loss"]
    assert checkpoint(tmp_path)["model"]["classifier.weight"].dtype == torch.float32


def test_without_validation_images_there_is_no_best_epoch(tmp_path):
    ended = run("train", *TINY, "--epochs", 1, "--validation", 0, "--out", tmp_path)
    assert ended.code == 0 and "1437 to train on, 360 for the test" in ended.text
    assert not (tmp_path / "best.pt").exists() and checkpoint(tmp_path)["history"][0]["validation_error"] is None
    assert next(csv.DictReader((tmp_path / "metrics.csv").open()))["validation_error"] == ""


@pytest.mark.filterwarnings("ignore:Detected call of")  # no step is made between them
@pytest.mark.parametrize("factors", [[1], [1, 1, 1, 0.1, 0.01], [1, 1, 1, 1, 0.1, 0.1, 0.01, 0.01]])
def test_the_learning_rate_is_that_of_the_paper(factors):
    """Divided by 10 from 50 % and 75 % of the epochs on, also where these fall within an epoch."""
    options = Options.of({"epochs": len(factors), "lr": 0.3})
    one = learner.Learner(torch.nn.Linear(2, 2), options, make_processes())
    for factor in factors:
        lr = one.optimizer.param_groups[0]["lr"]
        assert one.end_epoch(Sums(8.0, 1, 4), None).lr == lr == pytest.approx(0.3 * factor, rel=1e-12)


@pytest.mark.filterwarnings("ignore:Detected call of")
def test_an_epoch_ends_with_its_figures():
    one = learner.Learner(torch.nn.Linear(2, 2), Options.of({"epochs": 2}), make_processes())
    assert one.end_epoch(Sums(8.0, 1, 4), Sums(1.0, 1, 2)) == Row(1, 0.1, 2.0, 25.0, 0.5, 50.0)
    assert one.end_epoch(Sums(6.0, 0, 4), None) == Row(2, pytest.approx(0.01), 1.5, 0.0, None, None)


def test_options_of_the_optimizer_are_those_of_the_paper(tiny):
    (group,) = checkpoint(tiny[0])["optimizer"]["param_groups"]
    assert {name: group[name] for name in ("momentum", "nesterov", "weight_decay", "initial_lr")} == {
        "momentum": 0.9,
        "nesterov": True,
        "weight_decay": 1e-4,
        "initial_lr": 0.1,
    }


def test_steps_and_evaluation_need_no_float64():
    """Not every device has it, as Apple's GPUs; sums over batches are taken on the host."""
    found = []

    class Watching(TorchDispatchMode):
        def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
            out = operator(*args, **(kwargs or {}))
            found.extend(operator for leaf in tree_leaves(out) if getattr(leaf, "dtype", None) == torch.float64)
            return out

    def watched():
        with Watching():
            yield images, labels

    images, labels = torch.randn(8, 1, 16, 16), torch.randint(10, (8,))
    network = networks.build("densenet_bc:10,4", classes=10, channels=1, save="bottlenecks")
    one = learner.Learner(network, Options.of({}), make_processes())
    with Watching():
        one.step(images, labels, 8)
    one.evaluate(watched())
    assert found == []


def test_evaluation_adds_up_parts_some_of_which_are_empty():
    torch.manual_seed(0)
    images, labels = torch.randn(8, 1, 16, 16), torch.randint(10, (8,))
    network = networks.build("densenet_bc:10,4", classes=10, channels=1, save="bottlenecks")
    one = learner.Learner(network, Options.of({}), make_processes())
    whole = one.evaluate([(images, labels)])
    parts = one.evaluate([(images[:5], labels[:5]), (images[:0], labels[:0]), (images[5:], labels[5:])])
    with torch.no_grad():
        scores = network(images)
    assert (whole.wrong, whole.images) == (int((scores.argmax(1) != labels).sum()), 8)
    assert whole.mean_loss == pytest.approx(torch.nn.functional.cross_entropy(scores, labels).item())
    assert parts == Sums(pytest.approx(whole.loss), whole.wrong, 8)
    assert one.evaluate([]) == Sums()


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option, value",
    [
        ("--epochs", "0"),
        ("--epochs", "many"),
        ("--batch-size", "-1"),
        ("--batch-size", "1.5"),
        ("--lr", "0"),
        ("--lr", "fast"),
        ("--lr", "nan"),
        ("--seed", "-1"),
        ("--seed", str(2**64)),
        ("--save", "everything"),
        ("--data", "mnist"),
        ("--model", "resnet50"),
        ("--model", "densenet_bc:41,12"),
        ("--model", "densenet_bc:40"),
        ("--model", "timm:"),
        ("--amp", "fp8"),
        ("--validation", "1.1"),
        ("--validation", "-0.1"),
        ("--workers", "-1"),
        ("--on-corrupt", "repair"),
    ],
)
def test_wrong_options_are_named_with_exit_code_2(option, value, tmp_path):
    ended = run("train", option, value, "--out", tmp_path / "out")
    assert ended.code == 2
    assert re.search(f"argument {option}: .*{re.escape(value)}", ended.text), ended.text
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("--batch-size", 1294), "--batch-size: expected .*1293.*, got 1294"),
        (("--validation", 1), "--validation: a part of 1 of 1437 images leaves none to validate with, or to train on"),
        (("--device", "tpu9"), "--device: expected one of cpu.*, got 'tpu9'"),
        (("--device", "meta"), "--device: expected one of cpu.*, got 'meta'"),
        (("--model", "densenet121"), r"--model: densenet121 does not take images \[1, 16, 16\]"),
        (("--fsdp",), "--fsdp: expected several processes: torchrun"),
        (("--resume",), "--resume: name the folder of the run"),
    ],
)
def test_what_does_not_go_together_is_refused_with_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = run("train", *arguments)
    assert ended.code == 2 and re.search(message, ended.text), ended.text
    assert not (tmp_path / "runs").exists()


def test_images_of_one_channel_are_refused_by_torchvisions_networks(tmp_path):
    from tests.support import peers

    peers.torchvision_densenet()
    ended = run("train", "--model", "torchvision:densenet121", "--out", tmp_path / "run")
    assert ended.code == 2 and "torchvision:densenet121 does not take images [1, 16, 16]: " in ended.text


def test_a_file_where_the_folder_should_be_is_named_with_exit_code_2(tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        ended = run("train", *TINY, "--out", out)
        assert ended.code == 2 and "--out: expected a folder to write into" in ended.text


def test_of_two_runs_that_start_in_one_folder_the_first_keeps_it(tmp_path, monkeypatch):
    loaded = running.load_data

    def load_while_another_run_begins(*arguments):
        monkeypatch.setattr(running, "load_data", loaded)
        assert run("train", *TINY, "--epochs", 1, "--out", tmp_path / "run").code == 0
        return loaded(*arguments)

    monkeypatch.setattr(running, "load_data", load_while_another_run_begins)
    ended = run("train", *TINY, "--epochs", 2, "--out", tmp_path / "run")
    assert ended.code == 2 and "holds a run already" in ended.text
    assert len(checkpoint(tmp_path / "run")["history"]) == 1


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_named_with_exit_code_2(tmp_path):
    tmp_path.chmod(0o500)
    ended = run("train", *TINY, "--out", tmp_path)
    assert ended.code == 2 and "--out: expected a folder to write into" in ended.text


def test_unknown_options_and_commands_end_with_exit_code_2():
    assert run("train", "--colour", "red").code == 2
    assert run("draw").code == command_line.run().code == 2


def test_python_m_runs_the_command_line():
    done = subprocess.run([sys.executable, "-m", "densenet_ext", "train", "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "--batch-size" in done.stdout and "%%" not in done.stdout


def test_a_missing_library_is_named():
    code = "import sys; sys.modules['tqdm'] = None; sys.argv = ['', 'train']; from densenet_ext.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment())
    assert done.returncode == 1 and "this needs tqdm: pip install 'densenet_ext[train]'" in done.stderr


# ---- what goes wrong on the way --------------------------------------------------------------------------------------


def test_a_loss_that_is_no_number_ends_the_run_where_it_appears(tmp_path):
    ended = run("train", *TINY, "--lr", "1e30", "--epochs", 1, "--out", tmp_path)
    assert ended.code == 1
    assert re.search(r"Error: the loss is nan in epoch 1, step \d of 6; no epoch was complete", ended.text), ended.text
    assert "Try a smaller --lr" in ended.text and not (tmp_path / "checkpoint.pt").exists()


def test_weights_that_are_no_numbers_are_never_saved(tmp_path, monkeypatch):
    end_epoch = learner.Learner.end_epoch

    def spoil(self, *figures):
        with torch.no_grad():
            self.network.classifier.bias[0] = float("inf")
        return end_epoch(self, *figures)

    monkeypatch.setattr(learner.Learner, "end_epoch", spoil)  # after the check of epoch 1, before that of epoch 2
    ended = run("train", *TINY, "--epochs", 2, "--out", tmp_path)
    assert ended.code == 1 and re.search(
        r"loss is nan in epoch 2, step 1 of 6; .*checkpoint.pt keeps epoch 1", ended.text
    )


class FullDisk:
    """Stands for open(): a file that takes a few bytes and then has no space left."""

    def __init__(self, path, mode):
        self._file = open(path, mode)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._file.close()

    def write(self, data):
        self._file.write(bytes(data[:100]))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_ends_the_run_and_leaves_the_last_good_checkpoint(tiny, tmp_path, monkeypatch):
    end_epoch = learner.Learner.end_epoch

    def fill(self, *figures):
        if self.steps == 12:
            monkeypatch.setattr(files, "open", FullDisk, raising=False)
        return end_epoch(self, *figures)

    monkeypatch.setattr(learner.Learner, "end_epoch", fill)
    ended = run("train", *TINY, "--epochs", 2, "--seed", 3, "--out", tmp_path / "full")
    assert ended.code == 1 and f"Error: cannot write {tmp_path / 'full' / 'best.pt'}: No space left" in ended.text
    monkeypatch.undo()
    assert len(checkpoint(tmp_path / "full")["history"]) == 1
    assert run("train", "--resume", "--out", tmp_path / "full").code == 0
    assert differences(tmp_path / "full", tiny[0]) == []


def test_a_run_without_a_checkpoint_begins_again(tiny, tmp_path, monkeypatch):
    def full(path, mode):
        return FullDisk(path, mode) if "checkpoint.pt" in path.name else open(path, mode)

    with monkeypatch.context() as patch:
        patch.setattr(files, "open", full, raising=False)
        ended = run("train", *TINY, "--epochs", 2, "--seed", 3, "--out", tmp_path / "full")
    assert ended.code == 1 and "checkpoint.pt: No space left on device" in ended.text
    ended = run("train", "--resume", "--out", tmp_path / "full")
    assert ended.code == 0 and "going on after epoch 0 of 2" in ended.text
    assert differences(tmp_path / "full", tiny[0]) == []


# ---- what is shown ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", ["80", "0"])
def test_a_terminal_sees_a_bar_that_fits_80_columns(tmp_path, monkeypatch, width):
    """Also one that does not know its width, as in a container."""

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    monkeypatch.setenv("COLUMNS", width)
    monkeypatch.setattr(sys, "stderr", stream)
    running.train({"model": "densenet_bc:10,4", "batch_size": 256, "epochs": 2}, tmp_path / "run")
    shown = [line for line in re.split(r"[\r\n]+", stream.getvalue()) if line.startswith("epoch")]
    assert max(map(len, shown)) <= 80
    for part in ("epoch 2/2: 100%|", " left, ", "img/s, loss ", ", error "):
        assert part in shown[-1]
    assert re.search(r"\d+M$", shown[-1].rstrip())
