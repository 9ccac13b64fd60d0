"""README.md and docs/: their Python runs as it stands there, and prints what the pages show.

The blocks of a page run in order in one namespace and one folder. A block in ```text behind one in ```python is what
that prints, warnings included; one in ```console holds a command line and what it prints. Outputs are compared where
the compiled part computes. A block whose libraries are not installed is skipped. Three things stand for others: the
look-alike for the efficient implementation's files, aot_eager for the default backend of torch.compile, which takes
longer, and two processes on gloo for those of the pages that are run by torchrun. The page on CUDA graphs and
the commands in ```sh have test files of their own.
"""

from __future__ import annotations

import functools
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from densenet_ext import kernels
from tests.support.forks import Fork, environment, torchrun
from tests.support.pages import (
    FENCE,
    PAGES,
    ROOT,
    STAND_INS,
    Block,
    assert_shown,
    blocks,
    page_named,
    programs,
    require,
    run,
    script,
)

ONLY_UNDER_TORCHRUN, ONLY_ON_GPUS = page_named("many-processes.md"), page_named("cuda-graphs.md")
WITH_COMMANDS = page_named("command-line.md")
UNDER_TORCHRUN = [ONLY_UNDER_TORCHRUN, page_named("lightning.md")]
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
ELSEWHERE = (ONLY_UNDER_TORCHRUN, ONLY_ON_GPUS, WITH_COMMANDS)
CODE = [block for page in PAGES if page not in ELSEWHERE for block in programs(page)]
COMMANDS = [block for page in PAGES for block in blocks(page) if block.language == "console"]
# What a script does before the page's first line, where torchvision's wheel belongs to another build of torch
# and where compiling takes long.
IMPORT_TORCHVISION = "from benchmarks import peers; peers.torchvision_densenet()"
COMPILE_FAST = "import functools, torch; torch.compile = functools.partial(torch.compile, backend='aot_eager')"


@functools.cache
def namespace_of(page: Path) -> dict[str, Any]:
    return {"__name__": page.stem}


@functools.cache
def run_once(block: Block) -> str:
    return run(block, namespace_of(block.page))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where each page has a folder for the files that it writes and reads."""
    return tmp_path_factory.mktemp("pages")


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, module in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    yield
    torch._dynamo.reset()


def run_up_to(block: Block, folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the block prints in its page's folder, after the blocks above it."""
    folder.mkdir(exist_ok=True)
    monkeypatch.chdir(folder)
    for earlier in CODE[: CODE.index(block)]:
        if earlier.page == block.page:
            run_once(earlier)
    return run_once(block)


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("block", CODE, ids=str)
def test_code(block: Block, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_shown(block, run_up_to(block, folders / block.page.stem, monkeypatch))


@pytest.mark.usefixtures("surroundings")
def test_what_is_served_needs_nothing_of_ours(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_named("compile-and-export.md")
    (block,) = (block for block in CODE if block.page == page and 'torch.load("weights.pt")' in block.code)
    run_up_to(block, folders / page.stem, monkeypatch)
    # The helper that imports torchvision is ours: it is found in an empty package, which loads no operators, and goes.
    empty = f"ours = types.ModuleType('densenet_ext'); ours.__path__ = [{str(ROOT / 'densenet_ext')!r}]"
    gone = "[sys.modules.pop(n) for n in list(sys.modules) if n.startswith('densenet_ext')]"
    before = f"import sys, types; {empty}; sys.modules['densenet_ext'] = ours; {IMPORT_TORCHVISION}; {gone}"
    first_line = f"{before}; sys.modules['densenet_ext'] = None"
    command = [sys.executable, "-c", script([block], first_line)]
    result = subprocess.run(
        command, env=environment(), cwd=folders / page.stem, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("block", COMMANDS, ids=str)
def test_command_line(block: Block) -> None:
    from tests.support.command_line import run as run_command

    name, *arguments = shlex.split(block.code)
    assert name == "densenet-ext"
    ended = run_command(*arguments)
    assert ended.code == 0, ended.output
    assert_shown(block, ended.output)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
@pytest.mark.parametrize("page", UNDER_TORCHRUN, ids=lambda page: page.name)
def test_code_under_torchrun(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = programs(page)
    for block in code:
        require(block.code)
    first_line = COMPILE_FAST
    if any("import torchvision" in block.code for block in code):
        first_line += f"; {IMPORT_TORCHVISION}"
    file = tmp_path / "page.py"
    file.write_text(script(code, first_line))
    monkeypatch.chdir(tmp_path)
    ended = Fork(torchrun, 2, runpy.run_path, str(file), None, "__main__").finish()
    assert ended.code == 0, ended.output


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not missing


def test_readme_leads_to_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    pages = [page.relative_to(ROOT).as_posix() for page in PAGES if page.parent.name == "users"]
    assert pages and [page for page in pages if f"({page})" not in text] == []
    assert len(text.splitlines()) < 250


def test_what_is_run_and_compared() -> None:
    page = Path("a page.md")
    text = """
```python
import warnings

print("a", 3.7)
warnings.warn("b")
```

```text
a 3.7
UserWarning: b
```

```console
$ densenet-ext plan --save features
c
```

```bash
make
```
"""
    code, command = blocks(page, text)
    assert (code.line, code.output) == (3, "a 3.7\nUserWarning: b\n")
    assert (command.code, command.output) == ("densenet-ext plan --save features", "c\n")
    assert_shown(code, run(code, {}))
    if kernels.backend("cpu") == "compiled":
        for other in ("a 3.7\n", "a 3.8\nUserWarning: b\n", None):
            with pytest.raises(AssertionError, match="a page.md:3 prints"):
                assert_shown(code._replace(output=other), run(code, {}))
    with pytest.raises(AssertionError, match="the output of which block"):
        blocks(page, "```python\n```\nwords\n```text\n```\n")
    with pytest.raises(pytest.skip.Exception, match="nowhere_to_be_found is not installed"):
        require("from nowhere_to_be_found.at_all import anything")
