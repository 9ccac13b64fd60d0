"""What must hold for `fuse` on the model of any library: one function a property, called by each library's tests.

``plain`` is the library's own model in float64, never fused; ``x`` its input.
"""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units.entry import unit_of
from tests.support.fusing_helpers import assert_same_gradients, assert_same_state, three_steps
from tests.support.helpers import DEVICE, kept_for_backward


def fused_copy(plain: nn.Module, save: str | None = None) -> Any:
    return dx.fuse(copy.deepcopy(plain), save=save)


def unfused_units(model: nn.Module) -> dict[str, str | None]:
    """The reasons of `report` by name, of the units that do not run fused."""
    return {row.name: row.reason for row in dx.report(model) if not row.fused}


def kept_bytes(model: nn.Module, x: Tensor) -> int:
    with kept_for_backward([x, *model.parameters(), *model.buffers()]) as kept:
        out = model(x)  # held: what it needs for its backward pass lives as long
    del out
    return kept.bytes


def check_training(plain: nn.Module, x: Tensor) -> None:
    """Three steps give the same parameters and buffers, each level keeps less than the one before."""
    kept = [kept_bytes(copy.deepcopy(plain), x)]
    fused = []
    for save in ("bottlenecks", "features"):
        fused.append(three_steps(fused_copy(plain, save), x))
        kept.append(kept_bytes(copy.deepcopy(fused[-1]), x))
    three_steps(plain, x)
    for model in fused:
        assert_same_state(model, plain)
    assert kept[0] > kept[1] > kept[2], kept


def check_evaluation(plain: nn.Module, x: Tensor) -> None:
    """Outputs and gradients with frozen statistics are the same, and no statistics move."""
    fused = fused_copy(plain.eval())
    before = copy.deepcopy(plain.state_dict())
    outs = fused(x), plain(x)
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_same_gradients(fused, plain)
    for name, tensor in fused.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def check_no_trace(plain: nn.Module) -> None:
    """`fuse` changes no name, class or tensor, and `unfuse` leaves every attribute as it was."""
    before = {name: dict(module.__dict__) for name, module in plain.named_modules()}
    names, kinds = list(plain.state_dict()), [type(module) for module in plain.modules()]
    dx.fuse(plain)
    assert list(plain.state_dict()) == names
    assert all(isinstance(module, kind) for module, kind in zip(plain.modules(), kinds, strict=True))
    dx.unfuse(plain)
    assert [type(module) for module in plain.modules()] == kinds
    assert {name: dict(module.__dict__) for name, module in plain.named_modules()} == before
    assert not any(module._load_state_dict_pre_hooks for module in plain.modules())


def check_copies(plain: nn.Module, x: Tensor) -> None:
    """Copies of a fused model are fused, their own, and give the same numbers."""
    model = fused_copy(plain.eval(), "features")
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)):
        assert dx.report(twin).rows == dx.report(model).rows
        for name, module in twin.named_modules():
            assert unit_of(module) == unit_of(model.get_submodule(name))
        torch.testing.assert_close(twin(x), plain(x))


def check_state_dicts(plain: nn.Module, other: nn.Module, *foreign: dict[str, Tensor]) -> None:
    """A fused model takes the unfused one's state dict, and its tensors under the names of the ``foreign`` ones.

    ``other``: the same network with other values. The foreign state dicts hold the values of ``plain``.
    """
    model = dx.fuse(other)
    state = plain.state_dict()
    wrapped = {f"module.{name}": tensor for name, tensor in state.items() if "num_batches_tracked" not in name}
    dotted = {}
    for name, tensor in state.items():
        for kind in ("norm1.", "norm2.", "conv1.", "conv2."):
            if "denselayer" in name:
                name = name.replace(kind, f"{kind[:4]}.{kind[4:]}")
        dotted[name] = tensor
    assert set(dotted) != set(state)
    for given in (state, wrapped, dotted, *foreign):
        with torch.no_grad():
            for tensor in (*model.parameters(), *model.buffers()):
                tensor.zero_()
        model.load_state_dict(given)
        for name, tensor in plain.named_parameters():
            assert torch.equal(model.get_parameter(name), tensor), name
    plain.load_state_dict(model.state_dict())


def check_compile(plain: nn.Module, x: Tensor) -> None:
    """One graph in evaluation, with eager's numbers."""
    plain.eval()
    fused = fused_copy(plain)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    outs = compiled(x), plain(x)
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_same_gradients(fused, plain)
    assert_same_state(fused, plain)


def check_autocast(plain: nn.Module, x: Tensor) -> None:
    """Every unit and the model give eager's dtype under bf16 autocast, values near eager's, and finite gradients."""
    plain = plain.float()
    fused, x = fused_copy(plain), x.float()
    names = [row.name for row in dx.report(fused) if row.kind in ("dense block", "transition")]
    assert names
    outs, dtypes = [], []
    for model in (fused, plain):
        found: list[torch.dtype] = []
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, args, out, found=found: found.append(out.dtype)
            )
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            outs.append(model(x))
        dtypes.append([*found, outs[-1].dtype])
        outs[-1].float().square().mean().backward()
    assert dtypes[0] == dtypes[1]
    error = (outs[0] - outs[1]).abs().max() / outs[1].abs().max()
    assert error < 0.1, error
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in fused.parameters())


def check_hooks(plain: nn.Module, x: Tensor, layer: str, part: str) -> None:
    """A hook on a ``layer`` or on a ``part`` of it is called with eager's values, and its block says so."""
    block = layer.rpartition(".")[0]
    for name in (layer, part):
        seen: list[Tensor] = []
        fused, eager = fused_copy(plain), copy.deepcopy(plain)
        for model in (fused, eager):
            model.get_submodule(name).register_forward_hook(lambda module, args, out, seen=seen: seen.append(out + 0))
        torch.testing.assert_close(fused(x), eager(x))
        assert len(seen) == 2
        torch.testing.assert_close(*seen)
        reasons = unfused_units(fused)
        assert set(reasons) - set(unfused_units(fused_copy(plain))) == {block}
        assert "has a forward hook" in (reasons[block] or "")


def check_captures(plain: nn.Module, x: Tensor, scripts: bool = True) -> None:
    """Export, tracing, scripting and second derivatives run the unfused form.

    ``scripts``: TorchScript takes the library's code; else the error is TorchScript's own, fused or not.
    """
    fused = fused_copy(plain.eval())
    before = dx.report(fused).rows
    program = torch.export.export(fused, (x,))
    assert "densenet_ext" not in str(program.graph)
    torch.testing.assert_close(program.module()(x), plain(x))
    traced = torch.jit.trace(fused, (x,))
    assert "densenet_ext" not in str(traced.inlined_graph)
    torch.testing.assert_close(traced(x), plain(x))
    check_script(fused, plain, x, scripts)
    assert dx.report(fused).rows == before
    for model in (fused.train(), plain.train()):
        model.zero_grad()
        x = x.detach().requires_grad_()
        (grad,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
        grad.square().sum().backward()
    assert_same_gradients(fused, plain)


def check_script(fused: nn.Module, plain: nn.Module, x: Tensor, scripts: bool) -> None:
    """TorchScript compiles the usual form of the fused model, with its numbers and gradients."""
    if not scripts:
        for model in (fused, plain):
            with pytest.raises(RuntimeError) as caught:
                torch.jit.script(model)
            assert "unfuse" not in str(caught.value)
        return
    for training in (False, True):
        scripted, eager = torch.jit.script(copy.deepcopy(fused).train(training)), copy.deepcopy(plain).train(training)
        assert "densenet_ext::" not in str(scripted.inlined_graph)
        outs = scripted(x), eager(x)
        torch.testing.assert_close(*outs)
        for out in outs:
            out.square().sum().backward()
        assert_same_gradients(scripted, eager)
        assert_same_state(scripted, eager)
