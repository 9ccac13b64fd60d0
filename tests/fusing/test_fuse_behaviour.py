"""What goes on working in a fused model: copies, hooks, replicas, parameters, memory formats, state dicts."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units.entry import unit_of
from tests.support.fusing_helpers import (
    assert_same_gradients,
    assert_same_state,
    gradients,
    images,
    net,
    rows,
    three_steps,
)
from tests.support.helpers import DEVICE, no_warnings

# ---- fusing itself ---------------------------------------------------------------------------------------------------


def test_fuse_and_unfuse_leave_no_trace() -> None:
    model = net()
    hook = model.features.denseblock1.register_forward_hook(lambda module, args, out: None)
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    names = [list(model.state_dict()), [name for name, _ in model.named_modules()]]
    load_hooks = list(model._load_state_dict_pre_hooks)
    kinds = [type(module) for module in model.modules()]
    assert dx.fuse(model) is model
    for module, kind in zip(model.modules(), kinds, strict=True):
        assert isinstance(module, kind) and type(module).__qualname__ == kind.__qualname__
        assert type(module).__module__ == kind.__module__ and repr(type(module)) == repr(kind)
    assert [list(model.state_dict()), [name for name, _ in model.named_modules()]] == names
    assert all(row.fused for row in dx.report(model))
    assert dx.unfuse(model) is model
    assert [type(module) for module in model.modules()] == kinds
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before
    assert list(model._load_state_dict_pre_hooks) == load_hooks
    hook.remove()


def test_optimizer_goes_on_after_fuse() -> None:
    x, models = images(), [net(), net()]
    for i, model in enumerate(models):
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for step in range(4):
            if step == 2 and i == 0:
                dx.fuse(model)
            optimizer.zero_grad()
            model(x).square().mean().backward()
            optimizer.step()
    assert_same_state(*models)


def test_fusing_twice_and_unfusing_the_unfused() -> None:
    model = dx.fuse(net())
    units = [unit_of(module) for module in model.modules()]
    with pytest.warns(UserWarning, match="this DenseNet runs fused already, it is unchanged$"):
        assert dx.fuse(model) is model
    assert [unit_of(module) for module in model.modules()] == units
    dx.fuse(model, save="features")
    assert {row.save for row in dx.report(model) if row.kind == "dense block"} == {"features"}
    assert len(model._load_state_dict_pre_hooks) == 1
    dx.unfuse(model)
    with pytest.warns(UserWarning, match="nothing in this DenseNet runs fused"):
        assert dx.unfuse(model) is model


def test_nothing_to_fuse() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.warns(UserWarning, match="no dense block was recognised in this Sequential"):
        assert dx.fuse(model) is model
    assert not model._load_state_dict_pre_hooks and len(dx.report(model)) == 0
    blocked = net(block_config=(2,))
    blocked.features.denseblock1.denselayer1.relu1 = nn.SiLU()
    with pytest.warns(UserWarning, match="denselayer1.relu1 is a SiLU, not a ReLU"):
        dx.fuse(blocked)
    with pytest.raises(TypeError, match="fuse: model: expected a torch.nn.Module, got str"):
        dx.fuse("densenet121")  # type: ignore[type-var]
    fresh = net()
    with pytest.raises(ValueError, match="save: expected one of 'bottlenecks', 'features', got 'all'"):
        dx.fuse(fresh, save="all")
    assert not any(unit_of(module) for module in fresh.modules())


def test_a_submodule_and_what_was_added_later() -> None:
    model = net()
    dx.fuse(model.features.denseblock2)
    found = rows(model)
    assert [name for name, row in found.items() if row.fused] == ["features.denseblock2"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx.fuse(model, save="features")  # the rest; the level is set everywhere
    assert all(row.fused for row in dx.report(model))
    assert {row.save for row in dx.report(model) if row.kind == "dense block"} == {"features"}


def test_own_models_run_fused_by_themselves() -> None:
    model = dx.DenseNet(4, (2, 2), 8, num_classes=3)
    assert all(row.fused for row in dx.report(model))
    with pytest.warns(UserWarning, match="runs fused already"):
        dx.fuse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dx.fuse(model, save="features")
    assert model.save == "features"
    assert {row.save for row in dx.report(model) if row.kind == "dense block"} == {"features"}
    twin = copy.deepcopy(model)
    assert not any(row.fused for row in dx.report(dx.unfuse(model)))
    assert type(model) is dx.DenseNet and type(model.features.denseblock1) is dx.DenseBlock
    x = images().float()
    torch.testing.assert_close(twin(x), model(x))
    assert all(row.fused for row in dx.report(dx.fuse(model)))


# ---- hooks -----------------------------------------------------------------------------------------------------------


def test_hooks_on_whole_units_are_called_and_the_units_stay_fused() -> None:
    model = dx.fuse(net())
    seen = []
    for name in ("features.denseblock1", "features.transition1", "features.conv0", "classifier", ""):
        model.get_submodule(name).register_forward_hook(lambda module, args, out, name=name: seen.append(name))
    model(images())
    assert seen == ["features.conv0", "features.denseblock1", "features.transition1", "classifier", ""]
    assert all(row.fused for row in dx.report(model))


def test_a_hook_on_features_sees_what_eager_gives() -> None:
    plain, seen = net(), []
    fused = dx.fuse(copy.deepcopy(plain))
    for model in (plain, fused):
        model.features.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
    x = images()
    torch.testing.assert_close(fused(x), plain(x))
    torch.testing.assert_close(*seen)
    assert rows(fused)[""].reason == "features has a forward hook"


def test_an_inner_hook_comes_and_goes() -> None:
    model, seen = dx.fuse(net()), []
    relu = model.features.denseblock1.denselayer1.relu1
    handle = relu.register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model(images())
    assert seen == [(2, 8, 8, 8)] and not rows(model)["features.denseblock1"].fused
    handle.remove()
    model(images())
    assert len(seen) == 1 and rows(model)["features.denseblock1"].fused


def test_hooks_on_all_modules_are_called() -> None:
    model, seen = dx.fuse(net()), set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: seen.add(type(module).__name__))
    try:
        model(images())
        assert {row.reason for row in dx.report(model)} == {"hooks are registered for all modules"}
    finally:
        handle.remove()
    assert {"BatchNorm2d", "ReLU", "_DenseLayer", "_DenseBlock", "MaxPool2d", "AvgPool2d"} <= seen


def test_gradients_between_units_equal_eagers() -> None:
    names = ["features.pool0", *(f"features.denseblock{i}" for i in (1, 2, 3)), "features.transition1"]
    found: list[list[Tensor]] = []
    for model in (dx.fuse(net()), net()):
        kept: list[Tensor] = []

        def keep(module: nn.Module, args: Any, out: Tensor, kept: list[Tensor] = kept) -> None:
            out.retain_grad()
            kept.append(out)

        for name in names:
            model.get_submodule(name).register_forward_hook(keep)
        model(images()).square().sum().backward()
        found.append([out.grad for out in kept if out.grad is not None])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


# ---- copies ----------------------------------------------------------------------------------------------------------


def _saved(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "clone", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), _saved], ids=["deepcopy", "pickle", "torch.save"]
)
def test_copies_are_fused_and_their_own(clone: Callable[[nn.Module], nn.Module]) -> None:
    model = dx.fuse(net(), save="features")
    twin = clone(model)
    assert all(row.fused for row in dx.report(twin))
    assert {row.save for row in dx.report(twin) if row.kind == "dense block"} == {"features"}
    assert [unit_of(module) for module in twin.modules()] == [unit_of(module) for module in model.modules()]
    before, x = copy.deepcopy(model.state_dict()), images()
    assert_same_state(three_steps(twin, x), three_steps(net(), x))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    twin.load_state_dict({f"module.{name}": tensor for name, tensor in before.items()})
    torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    assert not any(unit_of(module) for module in dx.unfuse(twin).modules())
    assert not twin._load_state_dict_pre_hooks


def test_a_fused_model_is_freed_with_its_last_reference() -> None:
    model = dx.fuse(net())
    model(images()).sum().backward()
    gone = weakref.ref(model.features.denseblock1)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()


def _replica(model: nn.Module) -> nn.Module:
    """As torch.nn.parallel.replicate: parameters become plain tensors that hang on the original's."""
    replicas = {name: module._replicate_for_data_parallel() for name, module in model.named_modules()}
    for name, module in model.named_modules():
        for child in module._modules:
            replicas[name]._modules[child] = replicas[f"{name}.{child}" if name else child]
        for key, parameter in module._parameters.items():
            setattr(replicas[name], key, None if parameter is None else parameter.clone())
    return replicas[""]


def test_data_parallel_replicas_run_fused_with_their_own_parameters() -> None:
    model, plain = dx.fuse(net()), net()
    replica = _replica(model)
    assert all(row.fused for row in dx.report(replica))
    with torch.no_grad():
        for module in (*replica.modules(), *plain.modules()):
            if isinstance(module, nn.BatchNorm2d):
                module.weight.mul_(1.5)
    x = images()
    outs = replica(x), plain(x)
    torch.testing.assert_close(*outs)
    for out in outs:
        out.square().sum().backward()
    assert_same_gradients(model, plain)  # through the replica's parameters to the original's


def test_averaged_model_and_update_bn() -> None:
    averaged = []
    for model in (dx.fuse(net()), net()):
        average = torch.optim.swa_utils.AveragedModel(model)
        three_steps(model, images())
        average.update_parameters(model)
        torch.optim.swa_utils.update_bn([images(), images() * 2 + 1], average)
        averaged.append(average)
    assert_same_state(*averaged)


# ---- parameters ------------------------------------------------------------------------------------------------------


def test_functional_call() -> None:
    plain = net()
    fused = dx.fuse(copy.deepcopy(plain))
    other = {name: (p.detach() * 1.1).requires_grad_() for name, p in plain.named_parameters()}
    x, grads = images(), []
    for model in (fused, plain):
        out = torch.func.functional_call(model, other, (x,))
        grads.append(torch.autograd.grad(out.square().sum(), list(other.values())))
    torch.testing.assert_close(*grads)


def test_frozen_part_gets_no_gradient_and_gives_no_warning() -> None:
    models = [dx.fuse(net()), net()]
    for model in models:
        for name in ("conv0", "norm0", "denseblock1"):
            model.features.get_submodule(name).requires_grad_(False)
        model.features.denseblock2.denselayer1.norm1.weight.requires_grad_(False)
        with no_warnings():
            model(images()).square().sum().backward()
    assert gradients(models[0])["features.denseblock1.denselayer1.conv1.weight"] is None
    assert_same_gradients(*models)


def test_several_forwards_before_a_backward() -> None:
    models = [dx.fuse(net(), save="features"), net()]
    for model in models:
        total = model(images()).square().sum() + model(images() * 2).square().sum()
        total.backward(retain_graph=True)
        total.backward()
    assert_same_gradients(*models)
    assert_same_state(*models)


# ---- memory format, dtypes, shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("small_inputs", [True, False])
def test_memory_format(small_inputs: bool) -> None:
    """Whoever looks on sees eager's."""
    seen: list[list[Any]] = []
    for model in (dx.fuse(net(small_inputs=small_inputs)).float(), net(small_inputs=small_inputs).float()):
        found: list[Any] = []
        seen.append(found)
        for name in ("conv0", "denseblock1", "transition1", "denseblock3"):
            model.features.get_submodule(name).register_forward_hook(
                lambda module, args, out, found=found: found.append((args[0].stride(), out.stride()))
            )
        x = images().float()  # cuDNN has no channels_last in float64
        found.append(model.features(x).stride())
        found.append(model.features(x.contiguous(memory_format=torch.channels_last)).stride())
        found.append(model.features[:5](x).stride())
    assert seen[0] == seen[1]


def test_autocast_has_eagers_dtypes() -> None:
    plain = net().float()
    fused = dx.fuse(copy.deepcopy(plain))
    x, dtypes = images().float(), []
    for model in (fused, plain):
        found: list[torch.dtype] = []
        for name in ("denseblock1", "transition1", "denseblock2"):
            model.features.get_submodule(name).register_forward_hook(
                lambda module, args, out, found=found: found.append(out.dtype)
            )
        with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
            found.append(model(x).dtype)
        dtypes.append(found)
    assert dtypes[0] == dtypes[1]


def test_empty_batch() -> None:
    models = [dx.fuse(net()).eval(), net().eval()]
    assert models[0](images()[:0]).shape == models[1](images()[:0]).shape == (0, 10)


def test_bad_input_is_named() -> None:
    model = dx.fuse(net())
    with pytest.raises(RuntimeError, match=r"x: expected 8 channels, \[N, 8, H, W\], got shape"):
        model.features.denseblock1(images())
    with pytest.raises(RuntimeError, match="x: expected dtype torch.float64"):
        model.features.denseblock1(torch.zeros(2, 8, 4, 4))
    with pytest.raises(RuntimeError, match="input: expected at least 2 pixels"):
        model.features.transition1(torch.zeros(2, 16, 1, 1, dtype=torch.float64))
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        model.features.denseblock1(torch.zeros(1, 8, 1, 1, dtype=torch.float64))


def test_arguments_by_name_and_signature() -> None:
    model, x = dx.fuse(net()).eval(), images()
    assert torch.equal(model(x=x), model(x))
    assert inspect.signature(model.forward) == inspect.signature(net().forward)
    assert torch.equal(model.features(input=x), model.features(x))
    with pytest.raises(TypeError, match="2 positional arguments but 3 were given"):
        model(x, x)


# ---- state dicts -----------------------------------------------------------------------------------------------------


def test_a_fused_model_loads_the_names_of_others() -> None:
    model, source = dx.fuse(net()), net()
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.add_(1)
    other = {}
    for name, tensor in source.state_dict().items():
        name = name.replace("norm_final", "norm5")
        for kind in ("norm", "conv"):
            for i in "12":
                name = name.replace(f"{kind}{i}.", f"{kind}.{i}.") if "denselayer" in name else name
        if "num_batches_tracked" not in name:
            other[f"module.{name}"] = tensor
    model.load_state_dict(other)
    assert_same_state(model, source)
    model.load_state_dict(source.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key|none of the"):
        dx.unfuse(model).load_state_dict(other)


def test_a_model_that_contains_a_fused_one_loads_too() -> None:
    model = dx.fuse(nn.Sequential(net(), nn.Linear(10, 2).double()))
    model.load_state_dict({f"module.{name}": tensor for name, tensor in model.state_dict().items()})
    model[0].load_state_dict({f"module.{name}": tensor for name, tensor in net().state_dict().items()})
    dx.unfuse(model)
    assert not any(module._load_state_dict_pre_hooks for module in model.modules())
