"""The commands of README.md and docs/users/command-line.md: each ends well, in order, on small made data.

They run as they stand there but for what makes them short, which is appended: the last of two values counts.
"""

from __future__ import annotations

import os
import shlex

import pytest
import torch

pytest.importorskip("tqdm")

from tests.support import pages, peers
from tests.support.training_data import cifar, image_folder
from tests.support.training_runs import Ended, run, start

SHORT = {
    "digits": ("--epochs", 1, "--validation", 0.9),  # 144 images to train on
    "cifar10": ("--epochs", 1, "--model", "densenet_bc:10,4", "--batch-size", 32),
    "imagefolder": ("--epochs", 1, "--image-size", 32, "--batch-size", 8),
}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """With the data that the pages speak of."""
    cifar(tmp_path / "data", per_batch=16, test=16)
    image_folder(tmp_path / "photos", per_class=5)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def shortened(words: list[str]) -> list[str]:
    """The command in little time, without what would be fetched."""
    words = [word for word in words if word != "--download"]
    if "--resume" in words or not {"train", "compare"} & set(words):
        return words
    data = words[words.index("--data") + 1] if "--data" in words else "digits"
    # The networks that are the default of each data set train on these pages, too.
    twice = ("--model", "densenet_bc:10,4", "--seeds", 1) if "compare" in words else ()
    return [*words, *map(str, (*SHORT[data], *twice))]


def execute(line: str) -> Ended:
    words = shlex.split(line, comments=True)
    if words[0] == "densenet-ext":
        name, *arguments = shortened(words[1:])
        return run(name, *arguments)
    launcher, option, processes, m, package, *others = words
    assert (launcher, option, m, package) == ("torchrun", "--nproc-per-node", "-m", "densenet_ext"), line
    name, *arguments = shortened(others)
    return start(name, *arguments, processes=int(processes)).finish()


def command_lines(block: pages.Block) -> list[str]:
    return [line for line in block.code.splitlines() if line.strip()]


@pytest.mark.slow
@pytest.mark.parametrize("page", [pages.PAGES[0], pages.page_named("command-line.md")], ids=lambda page: page.name)
def test_commands_of_the_page(page, folder):
    peers.timm_densenet()
    commands = [block for block in pages.blocks(page) if block.language == "sh"]
    assert commands
    namespace = {"__name__": page.stem}
    for block in pages.blocks(page):
        if block.language == "sh":
            for line in command_lines(block):
                ended = execute(line)
                assert ended.code == 0, f"{page.name}:{block.line}: {line}\n{ended.output}"
        elif block.language == "python" and page.name == "command-line.md":
            pages.assert_shown(block, pages.run(block, namespace))
    for name in os.listdir("runs"):
        if not name.startswith("compare"):
            torch.load(folder / "runs" / name / "checkpoint.pt", weights_only=True)


def test_commands_are_shortened_by_what_is_appended():
    assert shortened(["train", "--download", "--lr", "1"]) == [
        "train",
        "--lr",
        "1",
        "--epochs",
        "1",
        "--validation",
        "0.9",
    ]
    assert shortened(["reuse", "file"]) == ["reuse", "file"] and shortened(["train", "--resume"])[-1] == "--resume"
    assert shortened(["compare", "--seeds", "5"])[-4:] == ["--model", "densenet_bc:10,4", "--seeds", "1"]
