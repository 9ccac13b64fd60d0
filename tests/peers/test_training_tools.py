"""Accelerate and Opacus prepare, wrap and unwrap fused models as they do unfused ones."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import densenet_ext as dx
from tests.peers.twins import (
    NETS,
    HeadedByModules,
    assert_alike,
    assert_all_fused,
    fuse,
    fused_kinds,
    images,
    library,
    monai_net,
    needs_fused,
    pair,
    same,
    torchvision_net,
    train_step,
    without_inplace,
)

EACH = pytest.mark.parametrize("name", NETS)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# ---- accelerate ------------------------------------------------------------------------------------------------------


def accelerator(**kwargs: Any) -> Any:
    state = library("accelerate.state")
    state.AcceleratorState._reset_state(reset_partial_state=True)
    return library("accelerate").Accelerator(cpu=True, **kwargs)


@EACH
def test_accelerate_trains_in_full_precision(name: str) -> None:
    def run(model: Any) -> Any:
        tool = accelerator()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prepared, optimizer = tool.prepare(model, optimizer)
        out = prepared(images())
        tool.backward(out.square().mean())
        optimizer.step()
        return out, prepared(images()), tool.unwrap_model(prepared)(images())

    models = pair(NETS[name]().double())
    same(models, run)
    assert_all_fused(models[1])


@pytest.mark.parametrize("keep", [True, False])
def test_accelerate_wraps_and_unwraps_mixed_precision(keep: bool) -> None:
    """bf16: `prepare` assigns ``forward``, `unwrap_model` puts the old one back or keeps its own."""

    def run(model: Any) -> Any:
        tool = accelerator(mixed_precision="bf16")
        prepared = tool.prepare(model)
        inside = prepared(images(dtype=torch.float32))
        inside.square().mean().backward()
        own = tool.unwrap_model(prepared, keep_fp32_wrapper=keep)
        assert own is model
        outside = own(images(dtype=torch.float32))
        assert inside.dtype == torch.float32
        return inside.shape, outside.dtype, "forward" in model.__dict__, torch.is_autocast_enabled("cpu")

    models = pair(torchvision_net())
    outs = [run(model) for model in models]
    assert outs[0] == outs[1]
    assert_all_fused(models[1], ("dense block", "transition", "stem"))
    if not keep:
        assert_all_fused(models[1])
        models[1].load_state_dict(models[0].state_dict())  # one step in bf16 is behind them
        for model in models:
            model.zero_grad()
        same((models[0].double().eval(), models[1].double().eval()), train_step)


def test_mixed_precision_is_as_good_as_unfused() -> None:
    def run(model: Any) -> Any:
        return accelerator(mixed_precision="bf16").prepare(model)(images(dtype=torch.float32))

    plain, model = pair(torchvision_net().eval())
    exact = copy.deepcopy(plain).double()(images())
    errors = [(run(m).double() - exact).abs().max().item() for m in (plain, model)]
    assert 0 < errors[1] <= 2 * errors[0]


@EACH
def test_hooks_of_accelerate_come_and_go(name: str) -> None:
    """`add_hook_to_module` assigns ``forward`` of a module; `remove_hook_from_module` assigns the old one again."""
    hooks = library("accelerate.hooks")

    class Doubling(hooks.ModelHook):  # type: ignore[name-defined,misc]
        def post_forward(self, module: nn.Module, output: Any) -> Any:
            return output * 2

    paths = ["features.denseblock1", "features.transition1", "features.denseblock2.denselayer1", ""]

    def run(model: Any) -> Any:
        results = []
        for path in paths:
            module = model.get_submodule(path)
            hooks.add_hook_to_module(module, Doubling())
            results.append(model(images()))
            hooks.remove_hook_from_module(module)
            results.append(model(images()))
        hooks.add_hook_to_module(model, Doubling(), append=True)
        results.append(train_step(model))
        hooks.remove_hook_from_module(model, recurse=True)
        return results, train_step(model)

    models = pair(NETS[name]().double())
    same(models, run)
    assert_all_fused(models[1])


def test_hook_inside_a_layer_comes_and_goes() -> None:
    hooks = library("accelerate.hooks")

    def run(model: Any) -> Any:
        part = model.features.denseblock1.denselayer1.conv1
        hooks.add_hook_to_module(part, hooks.ModelHook())
        inside = train_step(model)
        hooks.remove_hook_from_module(part)
        return inside, train_step(model)

    models = pair(torchvision_net().double())
    same(models, run)
    assert_all_fused(models[1])


def test_offload_of_weights() -> None:
    """`cpu_offload` leaves parameters on the meta device and brings them for each call of each module."""
    big = library("accelerate.big_modeling")
    hooks = library("accelerate.hooks")

    def run(model: Any) -> Any:
        big.cpu_offload(model, execution_device=torch.device("cpu"))
        assert any(p.is_meta for p in model.parameters())
        with torch.no_grad():
            offloaded = model(images())
        hooks.remove_hook_from_module(model, recurse=True)
        return offloaded

    same(pair(torchvision_net().double().eval()), run)


def test_empty_weights_then_a_checkpoint() -> None:
    """A model that was built and fused without memory for its weights, and filled afterwards."""
    accelerate = library("accelerate")
    plain = pair(torchvision_net().double())[0]
    with accelerate.init_empty_weights():
        model = fuse(torchvision_net().double())
    model.load_state_dict(plain.state_dict(), assign=True)
    same((plain, model), train_step)
    assert_all_fused(model)


def test_extracting_the_model_from_compile() -> None:
    other = library("accelerate.utils.other")

    def run(model: Any) -> Any:
        wrapped = torch.compile(model, backend="eager")
        own = other.extract_model_from_parallel(wrapped, keep_torch_compile=False)
        assert own is model
        return train_step(own)

    same(pair(torchvision_net().double()), run)


# ---- Opacus ----------------------------------------------------------------------------------------------------------


def per_sample(model: Any) -> Any:
    """Opacus's own gradients of each sample; the model has been made fit for it, so no BatchNorm is left."""
    sampled = library("opacus").GradSampleModule(model)
    sampled(images(3)).square().mean((1,)).sum().backward()
    return {name: p.grad_sample for name, p in sampled.named_parameters()}


def fixed(model: Any) -> Any:
    validators = library("opacus.validators")
    return validators.ModuleValidator.fix(model).double()  # its norms come in float32


SAMPLED = {"torchvision": HeadedByModules, "monai": lambda: without_inplace(monai_net())}


@pytest.mark.parametrize("name", SAMPLED)
def test_per_sample_gradients_with_nothing_fused(name: str) -> None:
    """timm's norms, which are activations as well, Opacus neither fixes nor takes."""
    torch.manual_seed(0)
    plain = fixed(SAMPLED[name]().double())
    model = fuse(copy.deepcopy(plain))
    assert not fused_kinds(model)
    same((plain, model), per_sample, layout=True)


def test_fix_of_a_fused_model() -> None:
    """`fix` clones the model by a file and replaces its norms: units with other norms run unfused."""
    plain, model = pair(HeadedByModules().double())
    torch.manual_seed(0)
    fixed_plain = fixed(plain)
    torch.manual_seed(0)
    fixed_model = fixed(model)
    assert "dense block" not in fused_kinds(fixed_model)
    same((fixed_plain, fixed_model), per_sample, layout=True)


def test_private_training_step() -> None:
    opacus = library("opacus")

    def run(model: Any) -> Any:
        torch.manual_seed(0)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        data = DataLoader(TensorDataset(images(4), torch.arange(4)), batch_size=4)
        engine = opacus.PrivacyEngine()
        private, optimizer, _ = engine.make_private(
            module=model, optimizer=optimizer, data_loader=data, noise_multiplier=0.0, max_grad_norm=0.1
        )
        nn.functional.cross_entropy(private(images(4)), torch.arange(4)).backward()
        optimizer.step()
        return list(private.parameters())

    torch.manual_seed(0)
    plain = fixed(HeadedByModules().double())
    same((plain, fuse(copy.deepcopy(plain))), run)


def test_strides_of_what_hooks_see_with_nothing_fused() -> None:
    """Where no unit is fused no layout changes: Opacus's hooks view what they are given."""

    def run(model: Any) -> Any:
        seen: list[torch.Tensor] = []
        for module in model.modules():
            if not list(module.children()):
                module.register_forward_hook(lambda module, args, out: seen.extend((args[0].clone(), out.clone())))
        model(images())
        return [tuple(t.stride()) for t in seen]

    torch.manual_seed(0)
    plain = fixed(HeadedByModules().double())
    same((plain, fuse(copy.deepcopy(plain))), run)


@needs_fused
def test_fixed_model_says_why_its_blocks_are_not_fused() -> None:
    torch.manual_seed(0)
    model = fixed(HeadedByModules().double())
    rows = list(dx.report(fuse(model)))
    reasons = [row.reason or "" for row in rows if row.kind == "dense block"]
    assert reasons and all("GroupNorm" in reason for reason in reasons), rows
    assert_alike(dx.verify(model, images()).max_output, 0.0)
