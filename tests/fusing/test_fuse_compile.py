"""torch.compile of a fused network: one graph, compiled once, also when it is fused afterwards."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend

import densenet_ext as dx
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, images, net, rows
from tests.support.helpers import DEVICE


class Graphs:
    """A backend that notes what it is given, and runs forward and backward graph eagerly."""

    def __init__(self) -> None:
        self.fused_ops: list[int] = []  # per graph: how many of its operations are ours

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.fused_ops.append(sum("densenet_ext" in str(node.target) for node in graph.graph.nodes))
        return lookup_backend("aot_eager")(graph, inputs)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def small() -> Any:
    """A network with every kind of unit."""
    return net(block_config=(2, 1))


UNITS = 5  # stem, two blocks, transition, head


def tiny() -> Any:
    """A network that is traced in half the time, for what does not depend on how many units there are."""
    return net(block_config=(2,))


TINY_UNITS = 3  # stem, block, head


def step(model: nn.Module, parameters: list[nn.Parameter], x: Tensor) -> Tensor:
    out = model(x)
    out.square().mean().backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
    return out


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_training_compiles_once(save: str) -> None:
    plain, graphs = small(), Graphs()
    model = dx.fuse(small(), save=save)
    compiled = torch.compile(model, fullgraph=True, backend=graphs, dynamic=False)
    for i in range(4):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = step(compiled, list(model.parameters()), images() + i)
        torch.testing.assert_close(got, step(plain, list(plain.parameters()), images() + i))
    assert graphs.fused_ops == [UNITS]
    assert_same_state(model, plain)


def test_a_changing_rate_and_scheduler_do_not_recompile() -> None:
    model, graphs = dx.fuse(tiny()), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)
    for _ in range(4):
        optimizer.zero_grad()
        compiled(images()).square().mean().backward()
        optimizer.step()
        scheduler.step()
    assert graphs.fused_ops == [TINY_UNITS]


@pytest.mark.parametrize("training", [True, False])
def test_a_dynamic_batch_compiles_once(training: bool) -> None:
    plain, graphs = small().train(training), Graphs()
    model = dx.fuse(copy.deepcopy(plain))
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for n in (4, 2, 7, 3):
        x = images(n)
        torch._dynamo.mark_dynamic(x, 0)
        got, wanted = compiled(x), plain(images(n))
        torch.testing.assert_close(got, wanted)
        got.square().mean().backward()
        wanted.square().mean().backward()
    assert graphs.fused_ops == [UNITS]
    assert_same_gradients(model, plain)
    assert_same_state(model, plain)


def test_sizes_become_dynamic_by_themselves() -> None:
    plain, graphs = tiny().eval(), Graphs()
    compiled = torch.compile(dx.fuse(copy.deepcopy(plain)), fullgraph=True, backend=graphs)
    with torch.no_grad():
        for n, size in ((2, 32), (3, 32), (5, 48), (6, 64), (7, 40)):
            torch.testing.assert_close(compiled(images(n, size)), plain(images(n, size)))
    assert len(graphs.fused_ops) <= 3 and set(graphs.fused_ops) == {TINY_UNITS}


def test_training_evaluation_and_back() -> None:
    models = dx.fuse(tiny()), tiny()
    graphs = Graphs()
    compiled = torch.compile(models[0], fullgraph=True, backend=graphs)
    for mode in (True, False, True, False):
        for model in models:
            model.train(mode)
        torch.testing.assert_close(compiled(images()), models[1](images()))
    assert graphs.fused_ops == [TINY_UNITS, TINY_UNITS]
    assert_same_state(*models)


@pytest.mark.parametrize("in_place", [True, False])
def test_fusing_and_unfusing_a_compiled_model_runs_the_graph_of_each_form(in_place: bool) -> None:
    model, plain, graphs = tiny(), tiny(), Graphs()
    if in_place:
        model.compile(fullgraph=True, backend=graphs)
    run = model if in_place else torch.compile(model, fullgraph=True, backend=graphs)
    for change, ops in (
        (None, [0]),
        (dx.fuse, [0, TINY_UNITS]),
        (dx.unfuse, [0, TINY_UNITS]),
        (dx.fuse, [0, TINY_UNITS]),
    ):
        if change is not None:
            change(model)
        torch.testing.assert_close(run(images()), plain(images()))
        assert graphs.fused_ops == ops
    assert_same_state(model, plain)


def test_fusing_what_torch_compile_returned() -> None:
    plain, graphs = tiny(), Graphs()
    compiled = torch.compile(tiny(), fullgraph=True, backend=graphs)
    assert dx.fuse(compiled) is compiled and all(row.fused for row in dx.report(compiled))
    torch.testing.assert_close(compiled(images()), plain(images()))
    assert graphs.fused_ops == [TINY_UNITS]
    dx.unfuse(compiled)
    torch.testing.assert_close(compiled(images()), plain(images()))
    assert graphs.fused_ops == [TINY_UNITS, 0]


def test_changes_inside_a_block_are_seen() -> None:
    models, graphs = (dx.fuse(tiny()), tiny()), Graphs()
    compiled = torch.compile(models[0], fullgraph=True, backend=graphs)

    def compare() -> None:
        torch.testing.assert_close(compiled(images()), models[1](images()))
        assert_same_state(*models)

    compare()
    for model in models:
        model.features.denseblock1.denselayer1.norm1.eval()
    compare()
    for momentum in (None, 0.5):  # PyTorch's own norm cannot be compiled with None
        for model in models:
            model.features.denseblock1.denselayer2.norm2.momentum = momentum
        compare()
    assert set(graphs.fused_ops) == {TINY_UNITS}
    for model in models:
        model.features.denseblock1.denselayer1.relu1 = nn.SiLU()
    compare()
    assert graphs.fused_ops[-1] == TINY_UNITS - 1
    assert rows(models[0])["features.denseblock1"].reason == "denselayer1.relu1 is a SiLU, not a ReLU"


def test_a_later_hook_needs_dynamos_guards_on_hooks() -> None:
    """Dynamo does not look for later hooks, in any model; where it is told to, it compiles again."""
    models, graphs = (dx.fuse(tiny()), tiny()), Graphs()
    with torch._dynamo.config.patch(skip_nnmodule_hook_guards=False):
        compiled = torch.compile(models[0], fullgraph=True, backend=graphs)
        compiled(images())
        models[1](images())
        for model in models:
            model.features.denseblock1.denselayer1.conv1.register_forward_hook(lambda module, args, out: out * 2)
        torch.testing.assert_close(compiled(images()), models[1](images()))
    assert graphs.fused_ops == [TINY_UNITS, TINY_UNITS - 1]


def test_only_the_gradients_that_are_asked_for() -> None:
    models, graphs = (dx.fuse(small()), small()), Graphs()
    for model in models:
        model.features.denseblock1.requires_grad_(False)
    compiled = torch.compile(models[0], fullgraph=True, backend=graphs)
    x, y = images().requires_grad_(), images().requires_grad_()
    compiled(x).square().mean().backward()
    models[1](y).square().mean().backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert_same_gradients(*models)
    assert models[0].features.denseblock1.denselayer1.conv1.weight.grad is None


def test_autocast_has_the_dtypes_of_eager() -> None:
    model, graphs = dx.fuse(tiny().float()), Graphs()
    other = copy.deepcopy(model)
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got, wanted = compiled(images().float()), other(images().float())
    assert got.dtype == wanted.dtype and graphs.fused_ops == [TINY_UNITS]
    torch.testing.assert_close(got, wanted, rtol=0.05, atol=0.05)


def test_compiled_copies() -> None:
    model, graphs = dx.fuse(tiny()), Graphs()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    compiled(images())
    twin = copy.deepcopy(compiled)
    torch.testing.assert_close(twin(images()), compiled(images()))
    assert_same_state(twin, compiled)
    assert set(graphs.fused_ops) == {TINY_UNITS}


@pytest.mark.slow
@torch._inductor.config.patch({"cpp.vec_isa_ok": True})  # compiles no program to see whether the compiler knows AVX
@pytest.mark.parametrize("training", [True, False])
def test_inductor(training: bool) -> None:
    plain = small().train(training)
    model = dx.fuse(copy.deepcopy(plain))
    compiled = torch.compile(model, fullgraph=True)
    for i in range(2):
        with torch._dynamo.config.patch(error_on_recompile=i > 0):
            got = compiled(images())
        wanted = plain(images())
        torch.testing.assert_close(got, wanted)
        got.square().mean().backward()
        wanted.square().mean().backward()
    assert_same_gradients(model, plain)
    assert_same_state(model, plain)
