"""`fuse` on transitions of somebody's own code."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable

import pytest
import torch
from torch import nn

import densenet_ext as dx
from densenet_ext.fusing.find import find_units
from densenet_ext.units.entry import enter
from tests.support import own_code as own
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, images, rows, three_steps
from tests.support.helpers import F64, assert_equal, kept_for_backward

TRANSITIONS = {
    "functions": own.Transition,
    "modules": own.transition_of_modules,
    "dropout at rate 0": own.DroppingTransition,
}
FRESH = "densenet_ext.fuse has not been called"


@pytest.mark.parametrize("style", TRANSITIONS)
def test_trains_as_the_unfused_model(style: str, backend: str) -> None:
    torch.manual_seed(0)
    plain = own.NetWithTransitions(TRANSITIONS[style]).double()
    model = dx.fuse(copy.deepcopy(plain))
    found = {row.name: (row.kind, row.fused) for row in dx.report(model)}
    assert found == {
        "dense1": ("dense block", True),
        "trans1": ("transition", True),
        "dense2": ("dense block", True),
        "trans2": ("transition", True),
    }
    x = images(2)
    model, plain = three_steps(model, x), three_steps(plain, x)
    assert_same_state(model, plain)
    assert_same_gradients(model, plain)
    kept = []
    for each in (model, plain):
        with kept_for_backward(each.parameters()) as saved:
            out = each(x)
        kept.append(saved.bytes)
        del out
    assert 2 * kept[0] < kept[1]
    assert_equal([model.eval()(x)], [plain.eval()(x)])
    other = pickle.loads(pickle.dumps(model))
    assert all(row.fused for row in dx.report(other)) and torch.equal(other(x), model(x))
    assert all(row.reason == FRESH for row in dx.report(dx.unfuse(model)))


def test_layout_is_the_inputs() -> None:
    model = dx.fuse(own.NetWithTransitions(own.Transition).double())
    x = torch.randn(2, 20, 6, 5, dtype=F64)
    assert model.trans1(x).is_contiguous()
    assert model.trans1(x.to(memory_format=torch.channels_last)).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("dims", [1, 3])
def test_other_dimensions(dims: int) -> None:
    kinds = (nn.BatchNorm1d, nn.Conv1d, nn.AvgPool1d) if dims == 1 else (nn.BatchNorm3d, nn.Conv3d, nn.AvgPool3d)
    norm, conv, pool = kinds
    module = nn.Sequential(norm(6), nn.ReLU(), conv(6, 3, 1, bias=False), pool(2)).double()
    plain = copy.deepcopy(module)
    (found,) = find_units(module)
    enter(module, found.unit)
    assert rows(module)[""].fused
    x = torch.randn(2, 6, *(7, 4, 5)[:dims], dtype=F64)
    assert_equal([module(x), *module.buffers()], [plain(x), *plain.buffers()])


def test_other_modules_are_no_transitions() -> None:
    for layer in (own.PooledByMaximum, own.NormBehind):
        (row,) = dx.report(layer(6, 3))
        assert row.reason == (
            f"{layer.__name__} is not a known transition: its values are not those of norm, ReLU, 1x1 convolution and "
            "average pooling of window 2"
        )
    ceiling = nn.AvgPool2d(2, 2, ceil_mode=True)
    for module in (
        own.Unpooled(6, 3),
        nn.Sequential(nn.BatchNorm2d(6), nn.Conv2d(6, 3, 3)),
        nn.Sequential(nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)),
        nn.Sequential(nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 1, bias=False), ceiling),
    ):
        assert len(dx.report(module)) == 0


def test_words_for_what_stands_in_the_way() -> None:
    def reason(change: Callable[[nn.Module], object], make: Callable[..., nn.Module] = own.Transition) -> str | None:
        module = make(6, 3)
        change(module)
        return rows(module)[""].reason

    assert reason(lambda m: None) == FRESH
    assert reason(lambda m: m.conv.register_forward_hook(print)) == "conv has a forward hook"
    assert reason(lambda m: setattr(m, "conv", nn.Conv2d(6, 3, 1))) == FRESH  # a bias is no obstacle
    modules = own.transition_of_modules
    assert reason(lambda m: m.__setitem__(1, nn.SiLU()), modules) == "1 is a SiLU, not a ReLU"
    assert reason(lambda m: setattr(m[3], "p", 0.1), modules) == "3 drops at rate 0.1"


def test_changes_after_fusing_run_unfused() -> None:
    model = dx.fuse(own.NetWithTransitions(own.DroppingTransition).double())
    model.trans1.droprate = 0.5
    assert rows(model)["trans1"].reason == "it has droprate 0.5, which was 0.0 when its forward was tried out"
    model.trans2.bn1 = None
    assert rows(model)["trans2"].reason == "bn1 is missing"


@pytest.mark.parametrize("training", [True, False])
def test_compiles_without_graph_break(training: bool) -> None:
    torch._dynamo.reset()
    plain = own.NetWithTransitions(own.Transition).double().train(training)
    model = torch.compile(dx.fuse(copy.deepcopy(plain)), fullgraph=True, backend="aot_eager")
    x = images(2)
    for _ in range(2):
        got, expected = model(x), plain(x)
        assert_equal([got], [expected])
    got.square().sum().backward()
    expected.square().sum().backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in plain.parameters()])
    assert_equal(list(model.buffers()), list(plain.buffers()))
