"""The modules of the algorithm import one another in one direction only."""

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
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found & names


def graph() -> dict[str, set[str]]:
    """By module of the algorithm, the reference included: those of them that it imports."""
    files = {f"densenet_ext.algorithm.{path.stem}": path for path in (PACKAGE / "algorithm").glob("[!_]*.py")}
    files["densenet_ext.reference"] = PACKAGE / "reference.py"
    return {name: imported(path, set(files)) for name, path in files.items()}


def test_the_algorithm_has_no_circle_of_imports() -> None:
    found = graph()
    assert found["densenet_ext.reference"] and found["densenet_ext.algorithm.block"]
    tuple(TopologicalSorter(found).static_order())  # raises CycleError, which names the circle


def test_values_and_reference_stand_at_the_ground() -> None:
    found = graph()
    assert not found["densenet_ext.algorithm.values"]
    assert found["densenet_ext.reference"] == {"densenet_ext.algorithm.values"}


def test_imports_inside_functions_count(tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text("import a.b\ndef f():\n    from a import c, d\n    import e\n", encoding="utf-8")
    assert imported(path, {"a", "a.b", "a.c", "e", "f"}) == {"a", "a.b", "a.c", "e"}
