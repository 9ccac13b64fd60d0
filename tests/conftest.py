"""Fixtures for every test (a fixed seed, two threads, the kernels that a test runs on) and the device of the run.

``--device cuda`` runs the same tests on a GPU. torch's default device is set once, before any test file is imported:
factory functions, modules and what stands at module level land there, so that no test has to name a device and none can
be forgotten. What the default device does not reach asks ``helpers``: random generators (``helpers.generator``), the
names of devices in autocast and in messages (``helpers.DEVICE``) and the allocator (``helpers.allocations``). float64
on the same device stays the reference, and "as good as eager" means eager on the same device. On a GPU the
convolutions' TF32 is off, since the tests in float32 are about float32 (test_cuda.py turns it on), and PyTorch's own
operators are deterministic where they can be, since tests compare bits of whole networks; PyTorch then also fills
every fresh tensor with NaN, so that a kernel that leaves a value out is seen.

What does not run on a GPU stands with its reason in ``support/devices.py`` and is printed at the end.
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch

from densenet_ext import kernels
from tests.cuda.emulation import library
from tests.support import covering, devices, matrix_table, order, slow
from tests.support.lost_gpu import pytest_runtest_protocol  # noqa: F401  (a hook)

try:
    import hypothesis
except ImportError:  # the tests that need it skip themselves
    hypothesis = None  # type: ignore[assignment]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where the tests run: cpu, cuda or cuda:N")


def pytest_configure(config: pytest.Config) -> None:
    if hypothesis is not None:
        examples = os.environ.get("FUZZ_EXAMPLES")
        hypothesis.settings.register_profile(
            "densenet_ext",
            max_examples=int(examples or 50),
            derandomize=not examples,  # the suite makes the same calls in each run; `make fuzz` new ones
            database=None,
            deadline=None,
            print_blob=True,
        )
        hypothesis.settings.load_profile("densenet_ext")
    name = config.getoption("--device")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise pytest.UsageError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type == "cpu":
        return
    if device.type != "cuda" or not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {name}: there is no such device here")
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what makes cuBLAS deterministic; read at its first call
    torch.set_default_device(device)
    torch.backends.cudnn.allow_tf32 = False
    torch.use_deterministic_algorithms(True, warn_only=True)
    # PyTorch warns once when a thread's first use of cuBLAS is in a backward pass: not in a test that forbids warnings.
    x = torch.ones(1, 1, requires_grad=True)
    (x @ x).sum().backward()


@pytest.hookimpl(tryfirst=True)  # marks are there before -m is looked at
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if slow.reason_to_wait(item.nodeid):
            item.add_marker("slow")
    if torch.get_default_device().type == "cpu":
        items.sort(key=lambda item: order.place(item.nodeid))
        return
    # on a GPU the order is the caller's: the time may end before all have run
    left_out = [item for item in items if devices.reason_to_leave_out(item.nodeid)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    matrix = matrix_table.outcomes(terminalreporter.stats)
    if matrix:
        terminalreporter.section("library by property")
        terminalreporter.line(matrix_table.text_of(matrix))
    for report in (*terminalreporter.stats.get("passed", ()), *terminalreporter.stats.get("failed", ())):
        for name, text in report.user_properties:
            if name == "ptxas":
                terminalreporter.section("registers and memory of the CUDA kernels")
                terminalreporter.line(text)
    if torch.get_default_device().type == "cpu":
        return
    terminalreporter.section(f"not run on {torch.get_default_device()}")
    for pattern, reason in devices.LEFT_OUT.items():
        terminalreporter.line(f"{pattern}: {reason}")


@pytest.fixture(scope="module", autouse=True)
def _known_objects() -> None:
    """What lives when a file begins, modules and thousands of tests, is no garbage of that file.

    Python's collector would otherwise look through it, half a second each time; what measures memory collects often.
    """
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, threads))
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def emulated_operators() -> SimpleNamespace:
    """The CUDA operators over emulated kernels (tests/cuda/emulation), for CPU tensors."""
    if shutil.which(os.environ.get("CXX", "g++").split()[0]) is None:
        pytest.skip("no C++ compiler")
    torch.ops.load_library(library.compile_operators())
    names = [name for name in (*kernels.OPS, *kernels.UNIT_OPS, *kernels.KEPT_OPS) if name not in kernels.CPU_OPS]
    return SimpleNamespace(**{name: getattr(torch.ops.densenet_ext_emulated, name).default for name in names})


@pytest.fixture(params=covering.BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Runs the test on the compiled kernels, on plain PyTorch, and on the GPU's kernels as they are emulated.

    The first is skipped while nothing is compiled, the last is for CPU tensors.
    """
    if request.param == "plain":
        with kernels.force_plain():
            yield "plain"
        return
    missing = kernels.why_plain(torch.get_default_device())
    if missing is not None:
        pytest.skip(f"no compiled part: {missing}")
    if request.param == "emulated":
        monkeypatch.setattr(kernels, "_compiled", request.getfixturevalue("emulated_operators"))
    yield request.param
