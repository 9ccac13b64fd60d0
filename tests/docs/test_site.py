"""The site of docs/: it builds without a warning, and what leads nowhere is found."""

from __future__ import annotations

import shutil
from pathlib import Path

import build_site
import pytest

import densenet_ext as dx

needs_site = pytest.mark.skipif(build_site.why_not() is not None, reason=str(build_site.why_not()))


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What the site is made of, to be spoiled."""
    for name in ("docs", "densenet_ext"):
        shutil.copytree(build_site.ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    for name in ("mkdocs.yml", "CHANGELOG.md"):
        shutil.copy(build_site.ROOT / name, tmp_path)
    return tmp_path


@needs_site
def test_the_site_builds_without_a_warning(project: Path) -> None:
    assert build_site.build(project) == []
    site = project / "build" / "site"
    assert "cat_bn_relu" in (site / "api" / "functional.html").read_text()
    assert (site / "pictures" / "compare-digits.png").exists()


UNREADABLE = '''

def f():
    """Does it.

    Raises:
        in words
    """
'''


@needs_site
def test_what_is_wrong_is_found(project: Path) -> None:
    def add(file: str, text: str) -> None:
        with (project / file).open("a", encoding="utf-8") as page:
            page.write(f"\n{text}\n")

    add("docs/new.md", "# New")
    add("docs/index.md", "![a](pictures/none.png)")
    add("densenet_ext/_version.py", UNREADABLE)
    add("docs/api/index.md", "::: densenet_ext._version.f")
    wrong = "\n".join(build_site.build(project))
    for words in ("pictures/none.png leads nowhere", "new.md: not in the navigation", "griffe"):
        assert words in wrong
    add("docs/index.md", "[a](users/none.md), [b](users/memory.md#none), [`c`][densenet_ext.none]")
    wrong = "\n".join(build_site.build(project))
    for words in ("page does not exist", "anchor does not exist", "unresolved autoref"):
        assert words in wrong


def test_links_are_followed_in_the_built_pages(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "index.html").write_text('<h1 id="top"></h1><a href="deep/">a</a><a href="#gone">b</a>')
    (tmp_path / "deep" / "index.html").write_text(
        '<a href="../index.html#top">a</a><a href="https://example.org/none">b</a><img src="../none.png">'
    )
    assert build_site.broken_links(tmp_path) == [
        "deep/index.html: ../none.png leads nowhere",
        "index.html: #gone leads nowhere",
    ]


def test_the_navigation_is_held_against_the_folder(tmp_path: Path) -> None:
    pytest.importorskip("yaml")
    (tmp_path / "docs").mkdir()
    for name in ("index.md", "other.md"):
        (tmp_path / "docs" / name).touch()
    (tmp_path / "mkdocs.yml").write_text("nav:\n  - index.md\n  - Pages:\n      - gone.md\n")
    assert build_site.outside_of_navigation(tmp_path) == [
        "other.md: not in the navigation of mkdocs.yml",
        "gone.md: in the navigation, but not in docs/",
    ]


def test_every_public_name_is_on_an_api_page() -> None:
    pages = "".join(page.read_text() for page in (build_site.ROOT / "docs" / "api").glob("*.md"))
    functions = [f"functional.{name}" for name in ("cat_bn_relu", "bottleneck")]
    for name in {*dx.__all__, *functions} - {"__version__", "functional"}:
        # the modules of some functions have their names: griffe takes these for what is meant
        full = {"verify": "fusing.verify.verify", "report": "report.report"}.get(name, name)
        assert f"::: densenet_ext.{full}\n" in pages, name
