"""Graph captures and transforms of a fused model: the unfused form runs, or the two custom operations do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from tests.support import own_code
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, images, net


def fused_ops(graph: Any) -> list[str]:
    return [str(node.target) for node in graph.nodes if "densenet_ext" in str(node.target)]


def test_export_runs_the_unfused_form() -> None:
    model = dx.fuse(net()).eval()
    x = images()
    program = torch.export.export(model, (x,))
    assert not fused_ops(program.graph)
    torch.testing.assert_close(program.module()(x), model(x))
    assert not fused_ops(torch.export.export(model, (x,), strict=True).graph)


def test_trace_runs_the_unfused_form() -> None:
    model = dx.fuse(net()).eval()
    x = images()
    traced = torch.jit.trace(model, (x,))
    assert "densenet_ext" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), model(x))


def test_fx_traces_the_unfused_form() -> None:
    model = dx.fuse(net()).eval()
    traced = torch.fx.symbolic_trace(model)
    assert not fused_ops(traced.graph) and sum(node.op == "call_module" for node in traced.graph.nodes) > 30
    torch.testing.assert_close(traced(images()), model(images()))


def test_script_compiles_the_usual_form() -> None:
    own = dx.DenseNet(4, (2, 2), 8, num_classes=3, small_inputs=True)
    for model, x in (
        (own.eval(), images().float()),
        (dx.fuse(own_code.NetWithTransitions(own_code.Transition)).eval(), images().float()),
    ):
        for whole in (model, nn.Sequential(model)):
            scripted = torch.jit.script(whole)
            assert "densenet_ext::" not in str(scripted.inlined_graph)
            torch.testing.assert_close(scripted(x), whole(x))
        assert all(row.fused for row in dx.report(model))


def test_func_transforms_equal_the_unfused() -> None:
    plain = net().eval()
    fused = dx.fuse(copy.deepcopy(plain))
    x, found = images(), []
    for model in (fused, plain):
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(parameters: dict[str, Tensor], image: Tensor, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, parameters, (image[None],)).square().sum()

        per_sample = torch.func.vmap(torch.func.grad(loss), (None, 0))(parameters, x)
        found.append((per_sample, torch.func.jvp(model, (x,), (torch.ones_like(x),))))
    torch.testing.assert_close(*found)


def test_forward_mode_equals_the_unfused() -> None:
    plain = net()
    fused = dx.fuse(copy.deepcopy(plain))
    x, found = images(), []
    for model in (fused, plain):
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
            found.append(torch.autograd.forward_ad.unpack_dual(model(dual)))
    torch.testing.assert_close(*(tuple(pair) for pair in found))


def test_gradient_penalty_equals_the_unfused() -> None:
    models = [dx.fuse(net()), net()]
    for model in models:
        x = images().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert_same_gradients(*models)


@pytest.mark.parametrize("training", [True, False])
def test_compile_without_graph_breaks(training: bool) -> None:
    fused = dx.fuse(net(block_config=(2, 1))).train(training)
    eager = copy.deepcopy(fused)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    x = images()
    for _ in range(2):
        outs = compiled(x), eager(x)
        torch.testing.assert_close(*outs)
        for out in outs:
            out.square().sum().backward()
    assert_same_gradients(fused, eager)
    assert_same_state(fused, eager)
