"""Pages as programs: their blocks of code, running them, and comparing what they print with what the page shows."""

from __future__ import annotations

import ast
import contextlib
import importlib.util
import io
import re
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from densenet_ext import kernels
from tests.support import lookalikes, peers

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
PEERS = {
    "torchvision": peers.torchvision_densenet,
    "timm": peers.timm_densenet,
    "monai": peers.monai_densenet,
    "torchxrayvision": peers.torchxrayvision_models,
    "pytorch_lightning": peers.lightning,
}
STAND_INS = {"models": lookalikes}  # gpleiss/efficient_densenet_pytorch is a folder, not a package
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


class Block(NamedTuple):
    """Code on a page, command lines, or one command line with what the page says that it prints."""

    page: Path
    line: int
    language: str
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def page_named(name: str) -> Path:
    """The page of a user by its name."""
    return ROOT / "docs" / "users" / name


def blocks(page: Path, text: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8") if text is None else text
    found: list[Block] = []
    end = 0
    for fence in FENCE.finditer(text):
        language, content = fence.groups()
        line = text.count("\n", 0, fence.start(2)) + 1
        if language in ("python", "sh"):
            found.append(Block(page, line, language, content, None))
        elif language == "console":
            command, _, output = content.partition("\n")
            found.append(Block(page, line, language, command.removeprefix("$ "), output))
        elif language == "text":
            assert found and not text[end : fence.start()].strip(), f"{page.name}:{line}: the output of which block?"
            found[-1] = found[-1]._replace(output=content)
        end = fence.end()
    return found


def programs(page: Path) -> list[Block]:
    """The blocks of Python, in their order."""
    return [block for block in blocks(page) if block.language == "python"]


def script(blocks: list[Block], first_line: str = "") -> str:
    """One program of these blocks, on the page's line numbers; a page begins with a line of words."""
    lines = [first_line]
    for block in blocks:
        lines += [""] * (block.line - 1 - len(lines)) + block.code.splitlines()
    return "\n".join(lines)


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
