"""Operations keep which tensors a block has from call to call; not their values, their memory or their form."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import densenet_ext as dx
from densenet_ext import kernels
from densenet_ext.algorithm.block import Layers
from densenet_ext.algorithm.kept import KeptLayers, Wanted, is_dense, new_gradient
from densenet_ext.algorithm.operation import check_data, kept_level
from densenet_ext.units.entry import observed, unit_of
from tests.support.helpers import make_layers

COMPILED = pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")
ops = torch.ops.densenet_ext


def test_a_parameters_gradient_has_its_layout() -> None:
    assert new_gradient(None, torch.float32) is None
    weight = torch.ones(4, 3, 3, 3, dtype=torch.bfloat16)
    last = weight.contiguous(memory_format=torch.channels_last)
    for x, stride in ((weight, weight.stride()), (last, last.stride()), (weight.transpose(0, 1), (36, 9, 3, 1))):
        grad = new_gradient(x, torch.float32)
        assert grad is not None
        assert grad.shape == x.shape and grad.dtype == torch.float32 and grad.stride() == stride
        assert is_dense(x) == (stride == x.stride())


@COMPILED
def test_tensors_are_kept_until_they_are_dropped() -> None:
    x = torch.ones(3)
    seen = weakref.ref(x)
    number = ops.keep_norms([x], [x], [], [0], [0], [0.1])
    del x
    assert ops.kept_hold(number)
    held = seen()
    assert held is not None
    held.data = torch.ones(3, dtype=torch.float64)
    assert not ops.kept_hold(number)
    del held
    ops.drop_kept(number)
    ops.drop_kept(number)
    assert seen() is None
    with pytest.raises(RuntimeError, match="densenet_ext: kept: expected the number of tensors that are kept"):
        ops.kept_hold(number)


@COMPILED
def test_the_form_of_any_tensors_is_kept() -> None:
    tensors = [torch.ones(3), torch.ones(2, 4, dtype=torch.bfloat16), torch.ones(())]
    number = ops.keep_tensors(tensors)
    assert ops.kept_hold(number)
    for x in tensors:
        before = x.data
        x.data = before + 1
        assert ops.kept_hold(number)
        for other in (before.double(), torch.ones(5, dtype=before.dtype)):
            x.data = other
            assert not ops.kept_hold(number)
        x.data = before
    assert ops.kept_hold(number)
    ops.drop_kept(number)


@COMPILED
def test_tensors_that_are_kept_for_something_else_are_refused() -> None:
    number = ops.keep_norms([], [], [], [], [], [])
    with pytest.raises(RuntimeError, match="densenet_ext: layers: expected the number of tensors that are kept"):
        ops.basic_layers(torch.ones(1, 1), number, [1, 1], None, torch.ones(1, 2), None, None, torch.ones(1))
    ops.drop_kept(number)
    with pytest.raises(RuntimeError, match="densenet_ext: keep_norms: expected lists of 1 entries, got 0"):
        ops.keep_norms([torch.ones(1)], [], [], [], [], [])


@COMPILED
@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"which": [1]}, "which: expected numbers below 1, got 1"),
        ({"starts": [2]}, r"starts: expected numbers in \[0, 1\], got 2"),
        ({"running_vars": [torch.ones(2)]}, "running_vars: expected 3"),
        ({"counters": [torch.zeros(2, dtype=torch.int64)]}, "counters: expected int64 tensors of one element"),
        ({"counters": [torch.zeros(())]}, "counters: expected int64 tensors of one element"),
    ],
)
def test_absurd_norms_are_named(changed: dict[str, Any], words: str) -> None:
    own = {
        "running_means": [torch.ones(3)],
        "running_vars": [torch.ones(3)],
        "counters": [torch.zeros((), dtype=torch.int64)],
        "which": [0],
        "starts": [1],
        "momenta": [0.5],
    }
    for more in ({}, changed):
        number = ops.keep_norms(**{**own, **more})
        if more:
            with pytest.raises(RuntimeError, match=f"densenet_ext: {words}"):
                ops.move_running_stats(number, [torch.zeros(4)], [torch.zeros(4)], 1.0)
        else:
            ops.move_running_stats(number, [torch.zeros(4)], [torch.zeros(4)], 1.0)
            assert own["running_means"][0].eq(0.5).all() and own["counters"][0] == 1
        ops.drop_kept(number)
    with pytest.raises(RuntimeError, match="densenet_ext: norms: expected the number of tensors that are kept"):
        ops.move_running_stats(-1, [torch.zeros(4)], [torch.zeros(4)], 1.0)


def block(training: bool) -> nn.Module:
    torch.manual_seed(0)
    return dx.DenseBlock(3, 5, 2, 3, 0.0).train(training)


def outcome(module: nn.Module, x: Tensor) -> list[Tensor]:
    """Output, gradients and buffers of a forward and backward pass."""
    x = x.clone().requires_grad_()
    out = module(x)
    grads = torch.autograd.grad(out.square().sum(), [x, *module.parameters()])
    return [out.detach(), *grads, *(buffer.clone() for buffer in module.buffers())]


@COMPILED
def test_the_operation_lays_gradients_out_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the parameter lies in memory where that is contiguous or channels_last, else contiguous."""
    found: list[Tensor] = []

    class Spy(Wanted):
        def gradients(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
            found.extend(grads)
            return super().gradients(grads)

    monkeypatch.setattr("densenet_ext.algorithm.block.Wanted", Spy)
    module, x = block(True), torch.randn(2, 5, 4, 4)
    other = copy.deepcopy(module)
    weights = [parameter for parameter in other.parameters() if parameter.dim() == 4]
    for i, weight in enumerate(weights):
        dims = (3, 2, 1, 0) if i < 3 else (0, 2, 3, 1)  # neither, or channels_last
        weight.data = weight.permute(*dims).contiguous().permute(*(dims.index(d) for d in range(4)))
    assert not is_dense(weights[1]) and is_dense(weights[3]) and not weights[3].is_contiguous()
    expected = outcome(module, x)
    found.clear()
    for ours, theirs in zip(outcome(other, x), expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    for parameter, grad in zip(other.parameters(), found, strict=True):
        like = new_gradient(parameter, torch.float32)
        assert like is not None and (grad.shape, grad.stride()) == (like.shape, like.stride())


def to_last(module: nn.Module) -> None:
    module.to(memory_format=torch.channels_last)


def to_double(module: nn.Module) -> None:
    module.double()


def to_other_memory(module: nn.Module) -> None:
    for parameter in module.parameters():
        parameter.data = parameter.data.clone().mul_(2)
    for buffer in module.buffers():
        buffer.data = buffer.data.clone().mul_(2)


def to_other_values(module: nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.1)


def to_other_statistics(module: nn.Module) -> None:
    for buffer in module.buffers():
        buffer.fill_(2)


def to_strided(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.dim() == 1:
            parameter.data = parameter.data.repeat_interleave(2)[::2]


def to_frozen(module: nn.Module) -> None:
    module.eval()


CHANGES = [to_last, to_double, to_other_memory, to_other_values, to_other_statistics, to_strided, to_frozen]


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("training", [True, False])
def test_a_block_that_has_changed_is_what_a_new_one_is(change: Callable[[nn.Module], None], training: bool) -> None:
    used, x = block(training), torch.randn(2, 5, 4, 4)
    fresh = copy.deepcopy(used)
    outcome(used, x)
    with torch.no_grad():
        used.train(training)(x)
    fresh.load_state_dict(used.state_dict())
    for module in (used, fresh):
        change(module)
    x = x.to(next(used.parameters()).dtype)
    for got, expected in zip(outcome(used, x), outcome(fresh, x), strict=True):
        assert got.dtype == expected.dtype and got.stride() == expected.stride() and torch.equal(got, expected)
    with torch.no_grad():
        assert torch.equal(used(x), fresh(x))


def test_parameters_of_other_shapes_run_unfused() -> None:
    module, x = block(True), torch.randn(2, 5, 4, 4)
    outcome(module, x)
    weight: Any = module.get_parameter("denselayer3.conv2.weight")
    weight.data = weight.data[:2].clone()
    with torch.no_grad():
        assert module(x).shape == (2, 13, 4, 4)
    ran: list[str] = []
    with observed(lambda _, kind: ran.append(kind)), torch.no_grad():
        module(x)
    assert unit_of(module) is not None and set(ran) == {"dense layer"}


@pytest.mark.parametrize("training", [True, False])
def test_hooks_of_autograd_that_give_other_tensors_back(training: bool) -> None:
    module, x = block(training), torch.randn(2, 5, 4, 4)
    expected = outcome(copy.deepcopy(module), x)
    packed: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        packed.append(tensor)
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        found = outcome(module, x)
    weight = next(p for p in module.parameters() if p.dim() == 4)
    assert any(tensor is weight for tensor in packed)
    for got, wanted in zip(found, expected, strict=True):
        assert torch.equal(got, wanted)


@COMPILED
def test_a_block_and_its_parameters_are_freed() -> None:
    module = block(True)
    outcome(module, torch.randn(2, 5, 4, 4))
    seen = [weakref.ref(tensor) for tensor in (*module.parameters(), *module.buffers())]
    del module
    gc.collect()
    assert not any(one() for one in seen)


@COMPILED
def test_layers_that_are_kept_know_their_parameters() -> None:
    layers = Layers(make_layers())
    kept = KeptLayers(torch.ones(1, dtype=torch.float64), layers.config, layers.parameters, 12)
    assert kept.hold() and kept.number > 0 and kept.dtype == torch.float64
    assert kept.are(list(layers.parameters)) and not kept.are(layers.parameters[:-1])
    assert not kept.are([None if x is None else x.detach() for x in layers.parameters])
    assert layers.repeated.hold() is None


def test_nothing_is_kept_where_no_backward_pass_can_follow() -> None:
    assert kept_level("features") == "features"
    with torch.no_grad():
        assert kept_level("bottlenecks") == "nothing"


def test_parameters_without_data_are_refused() -> None:
    x = torch.ones(2, device="cpu")
    check_data([x, None, x])
    check_data([x.to("meta"), None])
    with pytest.raises(ValueError, match=r"expected all parameters on cpu, as the features, got one of \[2\] on meta"):
        check_data([x, None, x.to("meta")])
