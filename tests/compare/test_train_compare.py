"""`densenet-ext compare`: both forms from the same weights through the same batches, and what is told of them."""

from __future__ import annotations

import csv
import importlib.util
import json
import os
import re
import signal
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("lightning_fabric")
pytest.importorskip("tqdm")
if importlib.util.find_spec("torchvision") is None:  # its import goes through training.vision
    pytest.skip("torchvision is not installed", allow_module_level=True)

import densenet_ext as dx
from benchmarks import measure
from densenet_ext.compare import command as comparing
from densenet_ext.compare import comparison, lockstep
from densenet_ext.compare.comparison import FORMS, SeedRun, StepBytes
from densenet_ext.errors import Interruption
from densenet_ext.memory import measuring
from densenet_ext.training import networks, options, running
from densenet_ext.training.data import datasets
from densenet_ext.training.data.datasets import Examples
from densenet_ext.training.learner import Learner
from densenet_ext.training.loop import Run
from densenet_ext.training.options import Options
from densenet_ext.training.processes import make_processes
from tests.support import command_line

MODEL = "densenet_bc:10,4"
SMALL = Options.of({"model": MODEL, "epochs": 2, "batch_size": 60})  # 4 steps of 60 images and one of 16
ALONE = make_processes()


def few(part: Examples, count: int) -> Examples:
    return Examples(part.images[:count], part.labels[:count], part.shape, part.evaluation, part.augmentation)


@pytest.fixture(scope="module")
def data():
    whole = datasets.digits(SMALL)
    return replace(whole, train=few(whole.train, 256), validation=few(whole.validation, 50), test=few(whole.test, 50))


@pytest.fixture
def few_digits(monkeypatch, data):
    monkeypatch.setattr(running, "load_data", lambda *_: data)


def run(*arguments):
    given = ["compare", "--model", MODEL, "--epochs", 2, "--batch-size", 60, *arguments]
    return command_line.run(*given)


def comparer(data, chosen=SMALL, seeds=1, folder=Path("none")):
    return comparing.Comparer(chosen, data, ALONE, seeds, folder)


def in_lockstep(data, chosen=SMALL, seed=0) -> SeedRun:
    learners = {form: comparer(data, chosen).learner(form, seed) for form in FORMS}
    return lockstep.train_in_lockstep(learners, data, Interruption())


# ---- what the command leaves -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def compared(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "new" / "folder"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "load_data", lambda *_: data)
        result = run("--seeds", 2, "--out", out, "--root", out.parent)
    assert result.code == 0, result.output
    return out, result.output


def test_a_comparison_leaves_its_figures_and_a_picture(compared):
    out, _ = compared
    assert set(os.listdir(out)) == {"options.json", "comparison.csv", "comparison.json", "comparison.png"}
    assert options.load(out) == replace(SMALL, root=str(out.parent))
    assert (out / "comparison.png").read_bytes().startswith(b"\x89PNG")
    with (out / "comparison.csv").open() as file:
        rows = list(csv.DictReader(file))
    places = [(row["seed"], row["form"], row["epoch"]) for row in rows]
    assert places == [(seed, form, epoch) for seed in "01" for form in FORMS for epoch in "12"]
    found = json.loads((out / "comparison.json").read_text())
    assert (found["data"], found["model"], found["seeds_asked"]) == ("digits", MODEL, 2)
    assert found["options"]["epochs"] == 2 and found["machine"]["torch"] == torch.__version__
    assert str(out.parent) not in json.dumps(found)
    for seed in found["seeds"]:
        for form in FORMS:
            first, last = (row for row in rows if row["seed"] == str(seed["seed"]) and row["form"] == form)
            assert seed[form]["loss"] == pytest.approx(float(last["loss"]))
            assert seed[form]["error"] == pytest.approx(float(last["error"]))
            errors = [float(row["validation_error"]) for row in (first, last)]
            assert seed[form]["validation_error_last"] == pytest.approx(errors[1])
            assert seed[form]["validation_error_best"] == pytest.approx(min(errors))
    assert found["step"]["timed"] == 2 * (2 * 4 - lockstep.WARM_UP)  # seeds, epochs, whole batches


def test_the_words_on_the_terminal_are_those_of_the_files(compared):
    out, text = compared
    found = json.loads((out / "comparison.json").read_text())
    assert comparing.table(comparison.cells(found)) in text
    for sentence in comparison.sentences(found):
        assert sentence in text
    for seed in (0, 1):
        for epoch in (1, 2):
            assert len(re.findall(rf"^seed {seed}, epoch {epoch}: loss .* unfused$", text, re.MULTILINE)) == 1
    rows = [
        line for line in text.splitlines() if line.startswith(tuple(title for title, _ in comparison.COSTS.values()))
    ]
    assert len(rows) == 3
    assert re.search(r"^kept for the backward pass, MiB .* times less$", text, re.MULTILINE)


# ---- the same weights, the same batches ------------------------------------------------------------------------------


def test_both_forms_start_from_the_same_weights(data):
    networks_of = {(form, seed): comparer(data).learner(form, seed).network for form in FORMS for seed in (0, 1)}
    states = {key: network.state_dict() for key, network in networks_of.items()}
    for seed in (0, 1):
        assert list(states["fused", seed]) == list(states["unfused", seed])
        for a, b in zip(states["fused", seed].values(), states["unfused", seed].values(), strict=True):
            assert torch.equal(a, b)
    name = "features.conv0.weight"
    assert not torch.equal(states["fused", 0][name], states["fused", 1][name])
    reports = {form: dx.report(networks_of[form, 0]) for form in FORMS}
    kinds = {form: {row.fused for row in report if row.kind == "dense block"} for form, report in reports.items()}
    assert kinds == {"fused": {True}, "unfused": {False}}


def test_both_see_the_same_batches_and_take_turns_at_being_first(data, monkeypatch):
    seen = []
    step = Learner.step

    def noted(self, images, labels, count):
        seen.append((self.options.fused, images.clone(), labels.clone(), count))
        return step(self, images, labels, count)

    monkeypatch.setattr(Learner, "step", noted)
    in_lockstep(data)
    first, second = seen[::2], seen[1::2]
    assert [fused for fused, *_ in first] == [True, False] * 5
    assert [fused for fused, *_ in second] == [False, True] * 5
    for (_, images, labels, count), (_, other_images, other_labels, other_count) in zip(first, second, strict=True):
        assert torch.equal(images, other_images) and torch.equal(labels, other_labels)
        assert count == other_count == len(labels)
    assert not torch.equal(first[0][1], first[5][1])  # another epoch, another order


@pytest.mark.parametrize("form", FORMS)
def test_each_form_learns_what_train_would_have_taught_it(data, tmp_path, form):
    seed = 1
    found = in_lockstep(data, seed=seed).forms[form]
    learner = comparer(data).learner(form, seed)
    alone = Run(learner, data, tmp_path)
    test = alone.train()
    for row, expected in zip(found.history, alone.history, strict=True):
        assert asdict(row) == {name: value for name, value in asdict(expected).items() if name in asdict(row)}
    assert found.test == test


def test_losses_differ_by_rounding_alone(data):
    found = in_lockstep(data).differences
    assert len(found) == 10 and max(found[:2]) < 2e-6  # of losses of about 2.3
    pixels = {part: getattr(data, part) for part in ("train", "validation", "test")}
    exact = replace(
        data,
        **{
            name: Examples(part.images.double(), part.labels, part.shape, part.evaluation, part.augmentation)
            for name, part in pixels.items()
        },
    )
    learners = {form: comparer(data).learner(form, 0) for form in FORMS}
    for learner in learners.values():
        learner.network.double()
    # The losses themselves are taken in float32.
    assert max(lockstep.train_in_lockstep(learners, exact, Interruption()).differences) < 5e-7


def test_steps_are_timed_when_they_are_warm_and_whole(data):
    for compiled, timed in ((False, 2 * 4 - lockstep.WARM_UP), (True, 4)):  # the first epoch compiles
        learners = {form: comparer(data).learner(form, 0) for form in FORMS}
        learners["fused"].options = replace(SMALL, compile=compiled)  # as if it did
        found = lockstep.train_in_lockstep(learners, data, Interruption())
        for form in FORMS:
            assert len(found.forms[form].seconds) == timed and min(found.forms[form].seconds) > 0


# ---- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_bytes_are_those_that_the_benchmarks_count(data, save):
    chosen = replace(SMALL, save=save)
    fused = comparer(data, chosen).learner("fused", 0)
    images, labels = next(fused.batches(data.train, shuffle=True).epoch(1))
    taken = {}
    for form in FORMS:
        taken[form] = lockstep.step_bytes(comparer(data, chosen).learner(form, 0), images, labels)
        network = comparer(data, chosen).learner(form, 0).network.train()
        step = measure.Step(network, images, labels)
        step()
        known = [*network.parameters(), *network.buffers(), images, labels]
        assert taken[form].kept == measuring.saved_bytes(step.forward, known)
        memory = measuring.allocations(step.forward, step.backward)
        # SGD with weight decay and Nesterov's momentum, one tensor after the other, needs a few parameters' room more.
        assert memory.peak == pytest.approx(
            taken[form].peak, abs=4 * max(p.nbytes for p in network.parameters()) + 2048
        )
    assert 2 * taken["fused"].kept < taken["unfused"].kept and taken["fused"].peak < taken["unfused"].peak
    taken_whole = lockstep.step_bytes(comparer(data).learner("fused", 0), images, labels)
    assert (taken["fused"].kept < taken_whole.kept) == (save == "features")


def test_peak_bytes_are_over_the_start():
    held = torch.zeros(5000)
    step = lambda: torch.zeros(1000) + torch.zeros(1000)  # noqa: E731  # three of them at once
    assert measuring.peak_bytes(step, torch.device("cpu")) == pytest.approx(3 * 4000, abs=64)
    assert measuring.peak_bytes(step, torch.device("meta")) is None
    del held


def test_counting_bytes_leaves_what_is_compared_as_it_is(compared, monkeypatch, few_digits, tmp_path):
    taken = dict.fromkeys(FORMS, StepBytes(1, None))
    monkeypatch.setattr(comparing.Comparer, "_bytes", lambda self: taken)
    result = run("--seeds", 1, "--out", tmp_path / "out")
    assert result.code == 0, result.output
    counted = (compared[0] / "comparison.csv").read_text().splitlines()
    assert (tmp_path / "out" / "comparison.csv").read_text().splitlines() == counted[: 1 + 4]
    assert "peak of a step" not in result.output and "kept for the backward pass" in result.output


def test_a_broken_form_is_visible(few_digits, tmp_path, monkeypatch):
    build = networks.build

    def broken(*given, fused, **keywords):
        network = build(*given, fused=fused, **keywords)
        if fused:
            with torch.no_grad():
                network.classifier.weight.mul_(1.5)
        return network

    monkeypatch.setattr(networks, "build", broken)
    result = run("--seeds", 1, "--out", tmp_path / "out")
    assert result.code == 0, result.output
    [first] = re.findall(r"Losses of the first step: at most (\S+) apart", result.output)
    assert float(first) > 1e-3


# ---- ends before its time --------------------------------------------------------------------------------------------


def stopping(monkeypatch, seed: int, number: signal.Signals) -> None:
    """Sends the process a signal in the second epoch of ``seed``."""
    step = Learner.step

    def stop(self, *arguments):
        if (self.options.seed, self.options.fused, self.steps) == (seed, True, 6):
            os.kill(os.getpid(), number)
        return step(self, *arguments)

    monkeypatch.setattr(Learner, "step", stop)


def test_an_interrupted_comparison_keeps_its_complete_seeds(monkeypatch, few_digits, tmp_path, compared):
    stopping(monkeypatch, 1, signal.SIGTERM)
    result = run("--seeds", 3, "--out", tmp_path / "out")
    assert result.code == 128 + signal.SIGTERM, result.output
    assert f"stopped in seed 1, epoch 2, step 2 of 5; {tmp_path / 'out'} keeps 1 of 3 seeds" in result.output
    whole = (compared[0] / "comparison.csv").read_text().splitlines()
    assert (tmp_path / "out" / "comparison.csv").read_text().splitlines() == whole[: 1 + 4]
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert len(found["seeds"]) == 1 and found["seeds_asked"] == 3
    assert sorted(os.listdir(tmp_path / "out")) == ["comparison.csv", "comparison.json", "options.json"]


def test_without_a_complete_seed_there_is_nothing_to_compare(monkeypatch, few_digits, tmp_path):
    stopping(monkeypatch, 0, signal.SIGINT)
    result = run("--seeds", 2, "--out", tmp_path / "out")
    assert result.code == 130, result.output
    assert f"stopped in seed 0, epoch 2, step 2 of 5; {tmp_path / 'out'} keeps 0 of 2 seeds" in result.output
    assert os.listdir(tmp_path / "out") == ["options.json"]


def test_a_loss_that_is_no_number_names_form_and_seed(monkeypatch, few_digits, tmp_path):
    step = Learner.step

    def diverging(self, images, labels, count):
        figures = step(self, images, labels, count)
        is_bad = self.options.seed == 1 and not self.options.fused and self.steps == 3
        return figures * float("nan") if is_bad else figures

    monkeypatch.setattr(Learner, "step", diverging)
    result = run("--seeds", 2, "--out", tmp_path / "out")
    assert result.code == 1, result.output
    assert "seed 1, unfused: the loss is nan in epoch 1, step 3 of 5. Try a smaller --lr" in result.output
    assert "keeps 1 of 2 seeds" in result.output
    assert len(json.loads((tmp_path / "out" / "comparison.json").read_text())["seeds"]) == 1


def test_a_weight_that_is_no_number_is_found_at_the_end_of_the_epoch(monkeypatch, data):
    monkeypatch.setattr(Learner, "is_finite", lambda self: self.options.fused)
    with pytest.raises(lockstep.SharedError, match="seed 3, unfused: a weight is no number after epoch 1"):
        in_lockstep(data, seed=3)


# ---- bad input -------------------------------------------------------------------------------------------------------


def test_bad_input_is_refused(few_digits, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    options.save(SMALL, tmp_path)
    cases = [
        (("--seeds", 0), "at least 1"),
        (("--data", "faces"), "invalid choice: 'faces'"),
        (("--model", "resnet50"), "expected densenet121"),
        (("--batch-size", 1000, "--out", tmp_path / "out"), "--batch-size: expected at most 256"),
        (("--out", tmp_path), "holds a run already"),
        (("--out", tmp_path / "file"), "expected a folder to write into"),
        (("--device", "gpu", "--out", tmp_path / "out"), "--device: expected one of cpu"),
        (("--resume",), "unrecognized arguments: --resume"),
    ]
    for arguments, words in cases:
        result = run(*arguments)
        assert result.code == 2 and words in result.text, (arguments, result.output)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    result = run("--out", tmp_path / "out")
    assert result.code == 2 and "expected to run in one process, got torchrun" in result.output
    assert not (tmp_path / "out").exists()


def test_a_default_folder_is_a_new_one_below_runs(few_digits, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(comparing.Comparer, "compare", lambda self, images: {})
    for _ in range(2):
        assert run().code == 0
    assert set(os.listdir("runs")) == {"compare-digits", "compare-digits-2"}
