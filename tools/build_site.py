"""Builds the site of docs/ into build/site: ``python tools/build_site.py [FOLDER]``, which `make docs` runs.

Every warning is an error. zensical finds links to pages, anchors and names of the API that do not exist; looked at here
besides are pages that the navigation leaves out or does not have, docstrings that griffe cannot read, and every link,
picture and anchor of the pages as they were built. Links to other hosts are not followed. Exit code 0: all is well.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

ROOT = Path(__file__).resolve().parents[1]
NEEDED = ("zensical", "mkdocstrings", "mkdocstrings_handlers")
WARNING = re.compile(r"^.*(?:griffe|warning|error|mkdocstrings).*$", re.IGNORECASE | re.MULTILINE)


def why_not() -> str | None:
    """Returns what is missing to build the site, in words, or None."""
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    return f"the site needs {', '.join(missing)}: pip install '.[docs]'" if missing else None


def outside_of_navigation(root: Path = ROOT) -> list[str]:
    """Returns the pages that the navigation leaves out, and those that it names and that do not exist."""
    import yaml

    named = sorted(_leaves(yaml.safe_load((root / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    there = sorted(path.relative_to(root / "docs").as_posix() for path in (root / "docs").rglob("*.md"))
    left_out = [f"{page}: not in the navigation of mkdocs.yml" for page in there if page not in named]
    return left_out + [f"{page}: in the navigation, but not in docs/" for page in named if page not in there]


def _leaves(nav: Any) -> Iterator[str]:
    if isinstance(nav, str):
        yield nav
    for entry in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
        yield from _leaves(entry)


class Page(HTMLParser):
    """The anchors of a page and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors: set[str] = set()
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("id", "name") and value:
                self.anchors.add(value)
            if name in ("href", "src") and value:
                self.links.append(value)


def broken_links(site: Path) -> list[str]:
    """Returns every link of the built pages that leads to no file or no anchor of the site."""
    pages = {path.resolve(): Page(path.read_text(encoding="utf-8")) for path in sorted(site.rglob("*.html"))}
    broken = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links are those of the host's root
            continue
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            anchor = unquote(parts.fragment)
            if not target.is_file() or (anchor and target in pages and anchor not in pages[target].anchors):
                broken.append(f"{path.relative_to(site.resolve())}: {link} leads nowhere")
    return broken


def build(root: Path = ROOT) -> list[str]:
    """Builds the site of ``root`` into its build/site; returns what is wrong with it, a line each."""
    # what an earlier build has left would hide what this one leaves out
    shutil.rmtree(root / "build" / "site", ignore_errors=True)
    command = [sys.executable, "-m", "zensical", "build", "--strict", "--clean"]
    run = subprocess.run(command, cwd=root, capture_output=True, text=True)
    said = f"{run.stdout}\n{run.stderr}"
    if run.returncode != 0:
        return [said]
    return [*WARNING.findall(said), *outside_of_navigation(root), *broken_links(root / "build" / "site")]


def main() -> int:
    missing = why_not()
    if missing is not None:
        print(f"make docs: {missing}", file=sys.stderr)
        return 2
    wrong = build()
    print("\n".join(wrong) if wrong else f"{ROOT / 'build' / 'site' / 'index.html'}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
