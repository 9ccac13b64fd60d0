"""The modules of the package import one another in one direction only."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import densenet_ext

PACKAGE = Path(densenet_ext.__file__).parent


def imported(path: Path, names: set[str]) -> set[str]:
    """The modules among ``names`` that the file at ``path`` imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found.update(inner if inner <= names else inner | {node.module})
    return found & names


def name_of(path: Path) -> str:
    parts = ("densenet_ext", *path.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph() -> dict[str, set[str]]:
    """By module of the package: those of it that it imports, and the packages that come with them.

    What a package's ``__init__`` imports is not counted for its inner modules: they are found without it.
    """
    files = {name_of(path): path for path in PACKAGE.rglob("*.py")}
    found = {name: imported(path, set(files)) - {name} for name, path in files.items()}
    del found["densenet_ext"], found["densenet_ext.__main__"]  # which gather and start everything
    return {name: {other for other in others if other in found} for name, others in found.items()}


def test_the_package_has_no_circle_of_imports() -> None:
    found = graph()
    assert found["densenet_ext.reference"] and found["densenet_ext.algorithm.block"] and len(found) > 60
    tuple(TopologicalSorter(found).static_order())  # raises CycleError, which names the circle


def test_layers_know_only_what_is_below() -> None:
    found = graph()
    for name, others in found.items():
        room = name.split(".")[1]
        rooms = {other.split(".")[1] for other in others}
        if room in ("algorithm", "reference"):
            assert rooms <= {"algorithm", "reference", "kernels", "checks"}, name
        if room == "units":
            assert rooms <= {"units", "algorithm", "checks", "_extension"}, (
                name
            )  # compiled, what is asked at every call
        if room in ("modules", "models"):
            assert rooms <= {"units", "modules", "checks", "state_dict"}, name
        if room == "fusing":
            assert not rooms & {"memory", "report", "training", "cli"}, name
        if room == "arguments":
            assert rooms <= {"checks"}, name
        if room == "training":
            assert not rooms & {"compare", "cli"}, name
        if room == "compare":
            inner = {other.partition(".training.")[2] for other in others if ".training." in other}
            assert inner <= {"options", "metrics", "learner", "processes", "running", "data.datasets"}, name
        if room == "reuse":
            assert rooms <= {"reuse", "errors", "files", "figures", "text"}, name


def test_values_and_reference_stand_at_the_ground() -> None:
    found = graph()
    assert not found["densenet_ext.algorithm.values"]
    assert found["densenet_ext.reference"] == {"densenet_ext.algorithm.values"}


def test_imports_inside_functions_count(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b\ndef f():\n    from a import c, d\n    import e\n", encoding="utf-8")
    assert imported(path, {"a", "a.b", "a.c", "e", "f"}) == {"a", "a.b", "a.c", "e"}
