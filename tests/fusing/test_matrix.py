"""Library by property: what `fuse` promises, against each real library; the run ends with the table (matrix_table.py).

The properties in depth, and what is particular to a library, are tested in the library's own file.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import densenet_ext as dx
from densenet_ext.units.entry import unit_of
from tests.support import library_checks as checks
from tests.support import lookalikes, matrix_table, own_code, peers
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, three_steps
from tests.support.helpers import generator

SMALL: dict[str, Any] = {"growth_rate": 4, "block_config": (2, 1), "bn_size": 2}
UNITS = {"stem": 1, "dense block": 2, "transition": 1, "head": 1}


class Library(NamedTuple):
    """A library's DenseNet in a small size."""

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of an input
    layer: str = "features.denseblock1.denselayer2"
    part: str = "relu1"  # a module inside of the layer
    units: dict[str, int] = UNITS


def monai(dims: int) -> Library:
    def build() -> nn.Module:
        settings = {**SMALL, "init_features": 8}
        return peers.monai_densenet().DenseNet(dims, in_channels=2, out_channels=10, **settings)

    return Library(build, (3, 2, *[(64, 32, 24)[dims - 1]] * dims), part="layers.relu1")


LIBRARIES = {
    "torchvision": Library(
        lambda: peers.torchvision_densenet().DenseNet(**SMALL, num_init_features=8, num_classes=10), (3, 3, 32, 32)
    ),
    "efficient (look-alike)": Library(
        lambda: lookalikes.DenseNet(**SMALL, num_init_features=8, small_inputs=False), (3, 3, 32, 32)
    ),
    "timm": Library(lambda: peers.timm_densenet().DenseNet(**SMALL, num_classes=10), (3, 3, 32, 32), part="norm1.act"),
    "MONAI 1-D": monai(1),
    "MONAI 2-D": monai(2),
    "MONAI 3-D": monai(3),
    "torchxrayvision": Library(
        lambda: peers.torchxrayvision_models().DenseNet(**SMALL, num_init_features=8), (3, 1, 32, 32)
    ),
    "own code": Library(
        lambda: own_code.NetWithTransitions(own_code.Transition),
        (3, 3, 32, 32),
        layer="dense1.1",
        part="bn1",
        units={"dense block": 2, "transition": 2},
    ),
}


@pytest.fixture(params=LIBRARIES)
def library(request: pytest.FixtureRequest) -> Library:
    return LIBRARIES[request.param]


@pytest.fixture
def plain(library: Library) -> Any:
    """The library's own model in float64, never fused."""
    return library.build().double()


@pytest.fixture
def x(library: Library) -> Tensor:
    return torch.randn(library.shape, dtype=torch.float64, generator=generator(1))


def assert_own_units(twin: nn.Module, model: nn.Module, x: Tensor) -> None:
    """``twin`` is fused as ``model`` is, gives its numbers, and training it leaves ``model`` alone."""
    assert dx.report(twin).rows == dx.report(model).rows
    units = [unit_of(module) for module in twin.modules()]
    assert any(unit is not None for unit in units) and units == [unit_of(module) for module in model.modules()]
    before = copy.deepcopy(model.state_dict())
    assert torch.equal(twin.eval()(x), model.eval()(x))
    three_steps(twin.train(), x)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_train(plain: Any, x: Tensor) -> None:
    checks.check_training(plain, x)


def test_eval(plain: Any, x: Tensor) -> None:
    three_steps(plain, x).zero_grad()  # its running statistics are those of data
    checks.check_evaluation(plain, x)


def test_state_dict(library: Library, plain: Any, x: Tensor) -> None:
    """From the unfused to the fused model and, trained, back again."""
    fused = dx.fuse(library.build().double())
    assert list(fused.state_dict()) == list(plain.state_dict())
    fused.load_state_dict(plain.state_dict())
    assert_same_state(fused, plain)
    three_steps(fused, x)
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain.eval()(x), fused.eval()(x))


def test_pickle(plain: Any, x: Tensor) -> None:
    fused = dx.fuse(plain)
    file = io.BytesIO()
    torch.save(fused, file)
    file.seek(0)
    for twin in (pickle.loads(pickle.dumps(fused)), torch.load(file, weights_only=False)):
        assert_own_units(twin, fused, x)


def test_deepcopy(plain: Any, x: Tensor) -> None:
    fused = dx.fuse(plain)
    assert_own_units(copy.deepcopy(fused), fused, x)


def test_compile(plain: Any, x: Tensor) -> None:
    """In evaluation; :func:`test_batch_sizes` compiles training."""
    torch._dynamo.reset()
    checks.check_compile(plain, x)


def test_batch_sizes(library: Library, plain: Any, x: Tensor) -> None:
    """In training: one graph for all batch sizes, by itself from the second one on, or from the first when told so.

    What dynamo finds out by itself are the units' sizes, of one to three dimensions, and not the library's: of two
    dimensions in test_fuse_compile.py, here of the others.
    """
    torch._dynamo.reset()
    fused = checks.fused_copy(plain)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(fused, fullgraph=True, backend=counter)
    told = library not in [LIBRARIES[name] for name in ("MONAI 1-D", "MONAI 3-D")]
    for n in (3, 2, 5):
        batch = torch.cat([x, -x])[:n]
        if told:
            torch._dynamo.mark_dynamic(batch, 0)
        outs = compiled(batch), plain(batch)
        torch.testing.assert_close(*outs)
        for out in outs:
            out.square().sum().backward()
    assert counter.frame_count == (1 if told else 2)
    assert_same_gradients(fused, plain)
    assert_same_state(fused, plain)


def test_autocast(plain: Any, x: Tensor) -> None:
    checks.check_autocast(plain, x)


def test_hooks(library: Library, plain: Any, x: Tensor) -> None:
    checks.check_hooks(plain, x, library.layer, f"{library.layer}.{library.part}")


def test_report(library: Library, plain: Any, x: Tensor) -> None:
    """Every unit, before and after, and the bytes that it keeps."""
    for row in dx.report(plain):
        assert not row.fused and row.reason == "densenet_ext.fuse has not been called"
    found = dx.report(dx.fuse(plain), x.shape)
    kinds = [row.kind for row in found]
    assert {kind: kinds.count(kind) for kind in kinds} == library.units
    assert checks.unfused_units(plain) == {}
    assert found.kept is not None and found.kept_unfused is not None and found.kept < found.kept_unfused
    assert all(row.name in str(found) and (row.reason or "") in str(found) for row in found)


def test_unfuse(plain: Any, x: Tensor) -> None:
    """Every attribute of every module is as it was, and so are the bits of the results."""
    never = copy.deepcopy(plain)
    checks.check_no_trace(plain)
    for model in (never, plain):
        three_steps(model, x)
    for name, value in never.state_dict().items():
        assert torch.equal(plain.state_dict()[name], value), name


def test_the_table() -> None:
    def report(name: str, outcome: Any, when: Any = "call") -> pytest.TestReport:
        return pytest.TestReport(f"tests/fusing/test_matrix.py::test_{name}", ("", 0, ""), {}, outcome, None, when)

    stats = {
        "passed": [report("train[a b]", "passed"), report("state_dict[a b]", "passed"), report("other", "passed")],
        "failed": [report("train[c]", "failed")],
        "skipped": [report("state_dict[c]", "skipped")],
        "error": [report("train[a b]", "failed", "teardown")],
        "warnings": [SimpleNamespace(nodeid="tests/fusing/test_matrix.py::test_eval[a b]")],
    }
    assert matrix_table.text_of(matrix_table.outcomes(stats)).splitlines() == [
        "library  state dict  train",
        "-------  ----------  ------",
        "c        skipped     failed",
        "a b      passed      error",
    ]
