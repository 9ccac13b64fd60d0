"""Every function of the package that computes something is named in a test of its room.

So whoever changes one finds its test by its name, and whoever adds one is told that it has none.
"""

from __future__ import annotations

import ast
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest

import densenet_ext
from densenet_ext import kernels

PACKAGE, TESTS = Path(densenet_ext.__file__).parent, Path(__file__).parent
# Folder or file of the package: where its tests are. The commands and their files are tested by running them.
ROOMS = {
    "algorithm": ("algorithm",),
    "fusing": ("fusing",),
    "kernels": ("kernels",),
    "reuse": ("reuse", "training"),
    "memory": ("memory",),
    "units": ("units",),
    "_extension.py": ("build_backend",),
    "arguments.py": ("",),
    "checks.py": ("",),
    "fc_densenet.py": ("",),
    "functional.py": ("",),
    "models.py": ("",),
    "modules.py": ("", "units"),
    "reference.py": ("", "algorithm"),
    "report.py": ("fusing",),
    "state_dict.py": ("",),
    "text.py": ("",),
}
# Functions, or files whose functions are all parts of one, that are tested under another name.
UNDER_ANOTHER_NAME = {
    "algorithm/block_steps.py": "the block layer by layer: test_block_operators against the operation, and test_block",
    "algorithm/step.py": "the halves of a dense layer: dense_block and dense_layer against the reference",
    "algorithm/block.py:block_forward": "dense_block, and torch.ops.densenet_ext in test_compile",
    "algorithm/block.py:block_backward": "the gradients of dense_block",
    "algorithm/layer.py:dense_block_by_layers": "dense_block of norms in several groups, in tests/distributed",
    "algorithm/concat.py:split": "cat_bn_relu and bottleneck",
    "algorithm/concat.py:gather": "bottleneck of features that are no neighbours",
    "algorithm/operation.py:register": "every operation that test_compile compiles",
    "algorithm/single.py:allocate_stats": "transition, stem and head",
    "algorithm/single.py:allocate_shared_stats": "transition, stem and head, in tests/distributed",
    "algorithm/single.py:input_sums": "the gradients of transition, stem and head",
    "algorithm/sync.py:merge_stats": "needs several processes: tests/distributed",
    "algorithm/sync.py:merge_sums": "needs several processes: tests/distributed",
    "kernels/fakes.py:register": "tensors without data and of other kinds, in test_operator_arguments",
    "kernels/plain_rows.py:affine": "bn_relu",
    "kernels/plain_rows.py:dropped": "append_features, feature_grad and the 3x3 convolution with dropout",
    "kernels/plain_rows.py:rstd_scale": "what eager gives in conv3x3_calls.py, for test_conv3x3 and test_winograd",
    "modules.py:enter_as_usual": "subclasses of ours with a forward of their own, in test_modules",
    "units/norms.py:tensors_of": "changed parameters and buffers of blocks and of transitions, in test_reading",
    "units/sequence.py:first_mismatch": "errors of a Sequential's units, in tests/fusing",
}


def functions(path: Path) -> list[str]:
    """The public functions at the top of a file."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return [n.name for n in tree.body if isinstance(n, ast.FunctionDef) and not n.name.startswith("_")]


def names(paths: Iterable[Path]) -> set[str]:
    """Every name that the files read, import or look up."""
    found = set()
    for path in paths:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Name):
                found.add(node.id)
            elif isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.alias):
                found.add(node.name.rpartition(".")[2])
            elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.isidentifier():
                found.add(node.value)  # what getattr is given
    return found


def rooms() -> Iterator[tuple[Path, set[str]]]:
    """Each file of the package and the names in the tests of its room."""
    for room, folders in ROOMS.items():
        tests = [path for folder in folders for path in (TESTS / folder).glob("test_*.py")]
        named = names(tests) | (set(kernels.OPS) if room == "kernels" else set())  # which are parameters of tests
        for path in sorted((PACKAGE / room).rglob("*.py")) if (PACKAGE / room).is_dir() else [PACKAGE / room]:
            yield path, named


@cache
def unnamed() -> list[str]:
    """The functions that no test of their room names, as "folder/file.py:function"."""
    return [
        f"{path.relative_to(PACKAGE).as_posix()}:{function}"
        for path, named in rooms()
        for function in functions(path)
        if function not in named
    ]


def test_every_function_is_named_in_a_test_of_its_room() -> None:
    left_out = [name for name in unnamed() if not {name, name.partition(":")[0]} & UNDER_ANOTHER_NAME.keys()]
    assert not left_out, "\n".join(left_out)


@pytest.mark.parametrize("name", UNDER_ANOTHER_NAME)
def test_what_is_tested_under_another_name_is_there_and_is_not_named(name: str) -> None:
    assert [found for found in unnamed() if name in (found, found.partition(":")[0])]


def test_every_room_of_the_package_has_tests() -> None:
    there = {path.name for path in PACKAGE.iterdir() if path.suffix == ".py" or path.is_dir()}
    commands = {"cli.py", "training", "compare", "errors.py", "files.py", "figures.py", "vision.py"}
    without = {"__pycache__", "__init__.py", "__main__.py", "_version.py", *commands}
    assert there - without == ROOMS.keys()


def test_names_are_found_however_they_are_written(tmp_path: Path) -> None:
    path = tmp_path / "a.py"
    path.write_text('from a import b as c\nimport d.e\nf.g(h)\n"i"\ndef j(): ...\ndef _k(): ...\n', encoding="utf-8")
    assert names([path]) == {"b", "e", "f", "g", "h", "i"} and functions(path) == ["j"]
