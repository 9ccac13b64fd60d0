"""README.md and docs/: their Python runs as it stands there, and prints what the pages show.

The blocks of a page run in order in one namespace. A block in ```text behind one in ```python is what that prints,
warnings included; one in ```console holds a command line and what it prints. Outputs are compared where the compiled
part computes. A block whose libraries are not installed is skipped. Three things stand for others: the look-alike for
the efficient implementation's files, aot_eager for the default backend of torch.compile, which takes longer, and two
processes on gloo for those of the page that is run by torchrun.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
import io
import os
import re
import shlex
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lookalikes
import peers
import pytest
import torch

from densenet_ext import kernels

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
UNDER_TORCHRUN = ROOT / "docs" / "many-processes.md"
PEERS = {
    "torchvision": peers.torchvision_densenet,
    "timm": peers.timm_densenet,
    "monai": peers.monai_densenet,
    "torchxrayvision": peers.torchxrayvision_models,
}
STAND_INS = {"models": lookalikes}  # gpleiss/efficient_densenet_pytorch is a folder, not a package
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")


class Block(NamedTuple):
    """Code on a page, or a command line, and what the page says that it prints."""

    page: Path
    line: int
    language: str
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path, text: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8") if text is None else text
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(text):
        language, content = fence.groups()
        line = text.count("\n", 0, fence.start(2)) + 1
        if language == "python":
            found.append(Block(page, line, language, content, None))
        elif language == "console":
            command, _, output = content.partition("\n")
            found.append(Block(page, line, language, command.removeprefix("$ "), output))
        elif language == "text":
            assert found and not text[end : fence.start()].strip(), f"{page.name}:{line}: the output of which block?"
            found[-1] = found[-1]._replace(output=content)
        end = fence.end()
    return found


BLOCKS = [block for page in PAGES for block in blocks(page)]


def require(code: str) -> None:
    """Skips the test unless what the code imports is installed."""
    for node in ast.walk(ast.parse(code)):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in (name.partition(".")[0] for name in names):
            if name in PEERS:
                PEERS[name]()
            elif name not in STAND_INS and importlib.util.find_spec(name) is None:
                pytest.skip(f"{name} is not installed")


def run(block: Block, namespace: dict[str, Any]) -> str:
    """What the block prints, and what Python warns of in its lines."""
    require(block.code)
    printed = io.StringIO()
    code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec", dont_inherit=True)
    with contextlib.redirect_stdout(printed), warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        exec(code, namespace)
    here = [w for w in warned if w.filename == str(block.page)]
    return printed.getvalue() + "".join(f"{w.category.__name__}: {w.message}\n" for w in here)


def assert_shown(block: Block, printed: str) -> None:
    if kernels.backend("cpu") != "compiled":
        return
    assert (block.output or "") == printed, f"{block} prints\n{printed}"


@functools.cache
def namespace_of(page: Path) -> dict[str, Any]:
    return {"__name__": page.stem}


@functools.cache
def run_once(block: Block) -> str:
    return run(block, namespace_of(block.page))


@pytest.fixture
def surroundings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for name, module in STAND_INS.items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    monkeypatch.chdir(tmp_path)
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("surroundings")
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python" and b.page != UNDER_TORCHRUN], ids=str)
def test_code(block: Block) -> None:
    for earlier in BLOCKS[: BLOCKS.index(block)]:
        if earlier.page == block.page and earlier.language == "python":
            run_once(earlier)
    assert_shown(block, run_once(block))


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "console"], ids=str)
def test_command_line(block: Block) -> None:
    runner = pytest.importorskip("typer.testing").CliRunner()
    from densenet_ext.cli import app

    name, *arguments = shlex.split(block.code)
    assert name == "densenet-ext"
    result = runner.invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert_shown(block, result.output)


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch was built without torch.distributed")
def test_code_under_torchrun(tmp_path: Path) -> None:
    lines: list[str] = []
    for block in (b for b in BLOCKS if b.page == UNDER_TORCHRUN and b.language == "python"):
        require(block.code)
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    script = tmp_path / "page.py"  # with the page's line numbers
    script.write_text("\n".join(lines))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script)]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    missing = [link for link in LINK.findall(text) if not (page.parent / link).exists()]
    assert not missing


def test_readme_leads_to_every_page() -> None:
    text = PAGES[0].read_text(encoding="utf-8")
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name})" not in text] == []
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
