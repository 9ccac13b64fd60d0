"""torch.compile(fullgraph=True): the fused units as custom operations; torch.export: the usual operations."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_ext.algorithm.conversions import norm_tensors
from densenet_ext.algorithm.head import head
from densenet_ext.algorithm.operation import OPERATIONS, Config
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.step import parameters_of
from densenet_ext.algorithm.transition import transition
from densenet_ext.algorithm.values import Layer
from densenet_ext.functional import bottleneck, cat_bn_relu
from densenet_ext.units import captures
from densenet_ext.units.parts import norm_of
from tests.support.helpers import (
    DEVICE,
    F64,
    assert_equal,
    clone,
    dense_block,
    gradients,
    make_conv,
    make_input,
    make_layers,
    make_norm,
    norms_of,
    parameters,
)


class _Layer(nn.Module):
    def __init__(self, C: int, k: int, b: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(C), nn.Conv2d(C, b, 1, bias=False)
        self.norm2, self.conv2 = nn.BatchNorm2d(b), nn.Conv2d(b, k, 3, padding=1, bias=False)


class Net(nn.Module):
    """Every unit once, with norms of different kinds."""

    def __init__(self, save: str = "bottlenecks", drop_rate: float = 0.0) -> None:
        super().__init__()
        self.save, self.drop_rate = save, drop_rate
        self.conv0, self.norm0 = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.layers = nn.ModuleList(_Layer(4 + 3 * i, 3, 5) for i in range(3))
        self.layers[1].norm1.eval()
        self.norm, self.conv = nn.BatchNorm2d(13, momentum=None), nn.Conv2d(13, 6, 1, bias=False)
        self.norm_cat, self.norm_last = nn.BatchNorm2d(9), nn.BatchNorm2d(4, track_running_stats=False)
        self.weight = nn.Parameter(torch.randn(4, 9, 1, 1))

    def train(self, mode: bool = True) -> Net:
        super().train(mode)
        self.layers[1].norm1.eval()
        return self

    def forward(self, x: Tensor) -> Tensor:
        x = stem(self.conv0(x), norm_of(self.norm0))
        drop_rate = self.drop_rate if self.training else 0.0
        layers = [
            Layer(norm_of(m.norm1), m.conv1.weight, norm_of(m.norm2), m.conv2.weight, drop_rate) for m in self.layers
        ]
        assert captures.reason(x) is None
        x = transition(dense_block(x, layers, self.save), norm_of(self.norm), self.conv.weight)
        cat = self.norm_cat
        features = [x, x[:, 1:4] * 2]
        moving = (cat.running_mean, cat.running_var, cat.weight, cat.bias, cat.training)
        x = bottleneck(features, self.weight, *moving)
        return head(cat_bn_relu(x, None, None, training=True), norm_of(self.norm_last))


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("training", [True, False])
def test_a_whole_network_without_graph_break(training: bool, save: str) -> None:
    torch._dynamo.reset()
    net = Net(save).double().train(training)
    other = copy.deepcopy(net)
    compiled = torch.compile(other, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        x = make_input(2, 3, 14, 12)
        got, expected = compiled(x), net(x)
        assert_equal([got], [expected])
        (got_dx,) = torch.autograd.grad(got.square().sum(), [x], retain_graph=True)
        (expected_dx,) = torch.autograd.grad(expected.square().sum(), [x], retain_graph=True)
        assert_equal([got_dx], [expected_dx])
        got.square().sum().backward()
        expected.square().sum().backward()
        assert_equal([p.grad for p in other.parameters()], [p.grad for p in net.parameters()])
        # once per forward pass, however many backward passes there are
        assert_equal(list(other.buffers()), list(net.buffers()))
        with torch.no_grad():
            assert_equal([compiled(x)], [net(x)])
        assert_equal(list(other.buffers()), list(net.buffers()))


@pytest.mark.slow
@torch._inductor.config.patch({"cpp.vec_isa_ok": True})  # compiles no program to see whether the compiler knows AVX
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inductor(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    net = Net().train()
    other = copy.deepcopy(net)
    compiled = torch.compile(other, fullgraph=True)
    x = make_input(2, 3, 14, 12, dtype=torch.float32)
    for _ in range(2):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
            got, expected = compiled(x), net(x)
        assert_equal([got], [expected], 1e-4 if dtype == torch.float32 else 0.1)
        got.float().square().sum().backward()
        expected.float().square().sum().backward()
    if dtype == torch.float32:
        assert_equal([p.grad for p in other.parameters()], [p.grad for p in net.parameters()], 1e-3)
        assert_equal(list(other.buffers()), list(net.buffers()), 1e-4)


def test_dropout_draws_anew_at_every_call() -> None:
    torch._dynamo.reset()
    net = Net(drop_rate=0.5).double()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    x = make_input(2, 3, 14, 12)
    torch.manual_seed(1)
    first, second = compiled(x), compiled(x)
    torch.manual_seed(1)
    assert torch.equal(compiled(x), first) and not torch.equal(first, second)
    first.sum().backward()


def test_batches_of_other_sizes() -> None:
    torch._dynamo.reset()
    net = Net().double().eval()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager", dynamic=True)
    for n in (2, 3, 5):
        x = make_input(n, 3, 14, 12)
        assert_equal([compiled(x)], [net(x)])


def test_a_norm_that_occurs_twice_moves_twice() -> None:
    torch._dynamo.reset()
    layers = make_layers(count=2)
    layers[1] = layers[1]._replace(norm2=layers[0].norm2)
    others = clone(layers)
    others[1] = others[1]._replace(norm2=others[0].norm2)
    x = make_input(2, 5, 4, 3)
    compiled = torch.compile(dense_block, fullgraph=True, backend="aot_eager")
    assert_equal([compiled(x, layers)], [dense_block(x, others)])
    assert_equal(list(layers[0].norm2[2:5]), list(others[0].norm2[2:5]))


@pytest.mark.parametrize("batch", [False, [False, True, True, False]], ids=str)
def test_frozen_norms_keep_what_they_used(batch: Any) -> None:
    torch._dynamo.reset()
    layers, x = make_layers(count=2, batch=batch), make_input(2, 5, 4, 3)
    others = clone(layers)
    expected = gradients(dense_block(x, others), [x, *parameters(others)])
    out = torch.compile(dense_block, fullgraph=True, backend="aot_eager")(x, layers)
    for norm in norms_of(layers):
        if not norm.batch_stats:
            norm.running_mean.add_(1)
            norm.running_var.mul_(3)
    assert_equal(gradients(out, [x, *parameters(layers)]), expected)


def test_export_takes_the_usual_operations() -> None:
    class Cat(nn.Module):
        def forward(self, x: Tensor, y: Tensor, mean: Tensor, var: Tensor) -> Tensor:
            return cat_bn_relu([x, y], mean, var)

    args = (make_input(2, 3, 4, 4), make_input(2, 2, 4, 4), torch.zeros(5, dtype=F64), torch.ones(5, dtype=F64))
    for strict in (True, False):
        program = torch.export.export(Cat(), args, strict=strict)
        assert "densenet_ext" not in str(program.graph)
        assert_equal([program.module()(*args)], [cat_bn_relu(args[:2], *args[2:])])


def _operation_arguments(name: str) -> tuple[Any, ...]:
    """Arguments of the unit's forward operation."""
    norm, x, more = make_norm(3), make_input(2, 3, 4, 4), make_input(2, 1, 4, 4)
    seed, drops = torch.tensor([77]), {"drop_rates": (0.3, 0.3), "drop_channels": (False, True)}
    config = Config((True,), (1e-5,), F64, save="bottlenecks")
    flat: list[Tensor | None] = [x, *norm_tensors(norm)]
    if name == "basic_block":
        flat = [x, seed]
        for C in (3, 5):
            flat += [*norm_tensors(make_norm(C)), make_conv(2, C, 2, 3), make_input(2)]
        config = config._replace(batch_stats=(True,) * 2, eps=(1e-5,) * 2, new_first=True, **drops)
    elif name == "block":
        flat = [x, seed]
        modes = (
            True,
            False,
            True,
            False,
        )  # one frozen norm2 would leave a gap in z's statistics
        for layer in make_layers(3, 2, 4, 2, batch=modes):
            flat += parameters_of(layer._replace(conv1_bias=make_input(4), conv2_bias=make_input(2)))
        inner = {"inner_drop_rates": (0.2, 0.0), "inner_drop_channels": (True, False)}
        config = config._replace(batch_stats=modes, eps=(1e-5,) * 4, **drops, **inner)
    elif name == "layer":
        flat = [x, more, *parameters_of(make_layers(4, 2, 5, 1)[0]), seed]
        inner = {"inner_drop_rates": (0.2,), "inner_drop_channels": (False,)}
        config = config._replace(batch_stats=(True,) * 2, eps=(1e-5,) * 2, features=2, **inner)
    elif name in ("cat_bn_relu", "bottleneck"):
        flat = [x, more, *norm_tensors(make_norm(4))]
        config = config._replace(features=2)
        if name == "bottleneck":
            flat += [make_conv(2, 4, 2, 1), make_input(2)]
    elif name == "transition":
        flat += [make_conv(2, 3, 2, 1), make_input(2), torch.randn(3, dtype=F64), torch.rand(3, dtype=F64)]
        config = config._replace(window=(1, 2, 2))
    else:
        flat += [None] * 4
        config = config._replace(window=(1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1))
    config = config._replace(groups=("",) * len(config.batch_stats))
    values = [list(value) if isinstance(value, tuple) else value for value in config]
    return [t for t in flat if t is not None], [t is not None for t in flat], *values


@pytest.mark.parametrize("name", list(OPERATIONS))
def test_operations_keep_the_rules_of_the_dispatcher(name: str) -> None:
    torch.library.opcheck(getattr(torch.ops.densenet_ext, f"{name}_forward").default, _operation_arguments(name))
    assert getattr(torch.ops.densenet_ext, f"{name}_backward").default is not None
