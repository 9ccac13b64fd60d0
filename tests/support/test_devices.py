"""The lists of what does not run on a GPU, what is slow and what takes longest: they name tests that exist."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch

from tests import conftest
from tests.support import devices, order, slow
from tests.support.selection import reason_of

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("pattern", [*devices.LEFT_OUT, *slow.SLOW])
def test_every_pattern_names_tests(pattern: str) -> None:
    name, _, parameter = pattern.rstrip("]").partition("[")
    file, _, function = name.partition("::")
    there = {path: path.relative_to(TESTS.parent).as_posix() for path in TESTS.rglob("test_*.py")}
    found = [path for path, name in there.items() if fnmatch(name if "/" in file else path.name, file)]
    assert found and all(f"def {function}(" in path.read_text() for path in found if function not in ("", "*"))
    level = TESTS.parent / "csrc" / "cpu" / f"level_{parameter}.cpp"
    assert not parameter or level.exists() or f'"{parameter}"' in (TESTS / "conftest.py").read_text()
    assert {**devices.LEFT_OUT, **slow.SLOW}[pattern]


def test_parameters_and_folders_do_not_matter() -> None:
    assert devices.reason_to_leave_out("tests/build_backend/test_build.py::test_cuda_decision[None-13.0/x]")
    assert devices.reason_to_leave_out("test_memory.py::test_backward_needs_one_gradient_buffer[features-plain]")
    assert devices.reason_to_leave_out("tests/algorithm/test_block.py::test_gradcheck[emulated-train-features]")
    assert devices.reason_to_leave_out("tests/algorithm/test_block.py::test_gradcheck[compiled-train-features]") is None
    assert devices.reason_to_leave_out("tests/memory/test_memory.py::test_a_fraction_of_eagers") is None
    assert devices.reason_to_leave_out("tests/algorithm/test_block.py::test_build.py") is None


def test_folders_matter_where_a_pattern_has_one() -> None:
    table = {"tests/peers/*": "peers", "test_a.py::test_b": "b"}
    assert reason_of("tests/peers/test_a.py::test_c[x]", table) == "peers"
    assert reason_of("tests/units/test_a.py::test_b[x]", table) == "b" == reason_of("test_a.py::test_b", table)
    assert reason_of("tests/units/test_a.py::test_c", table) is None


@pytest.mark.parametrize(
    "device, message", [("meta", "there is no such device here"), ("gpu", "expected cpu, cuda or cuda:N, got 'gpu'")]
)
def test_a_device_that_is_not_there_ends_the_run(device: str, message: str) -> None:
    with pytest.raises(pytest.UsageError, match=message):
        conftest.pytest_configure(SimpleNamespace(getoption=lambda name: device))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_gpu_runs_tests_in_the_order_that_was_asked_for(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "tests/cuda/test_cuda.py::test_a",
        "tests/cuda/test_emulation.py::test_b",
        "tests/docs/test_docs.py::test_c",
    ]
    names += ["tests/kernels/test_kernels.py::test_d[emulated]", "tests/kernels/test_kernels.py::test_d[compiled]"]
    items = [Mock(nodeid=name) for name in names]
    seconds = dict(zip((names[1], names[2], names[3]), (30, 20, 10), strict=True))
    monkeypatch.setattr(order, "LONGEST", {name.partition("::")[0]: each for name, each in seconds.items()})
    monkeypatch.setattr(torch, "get_default_device", lambda: torch.device(device))
    conftest.pytest_collection_modifyitems(Mock(), items)
    found = [names.index(item.nodeid) for item in items]
    assert found == ([1, 2, 3, 4, 0] if device == "cpu" else [0, 4])


def test_files_that_take_long_come_first() -> None:
    assert [name for name in order.LONGEST if not (TESTS.parent / name).is_file()] == []
    assert list(order.LONGEST.values()) == sorted(order.LONGEST.values(), reverse=True)
    names = ["tests/docs/test_docs.py::test_b", "tests/test_a.py::test_c[x]", "tests/docs/test_docs.py::test_a[1]"]
    names.insert(0, "tests/test_a.py::test_b")
    assert sorted(names, key=order.place) == [names[1], names[3], names[0], names[2]]
