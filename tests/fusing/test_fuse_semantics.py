"""What people do to the DenseNets that they have goes on working in a fused one, with the same numbers.

Each test does the same to a fused and to an unfused network and compares outputs, gradients and buffers.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

import densenet_ext as dx
from densenet_ext.units.entry import unit_of
from tests.support.fusing_helpers import BLOCK, assert_same_state, close, images, layer, net, pair, rows


def train_step(model: nn.Module, x: Tensor | None = None) -> None:
    """Forward and backward pass, and a step of plain gradient descent."""
    model(images() if x is None else x).square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
                parameter.grad = None


# ---- looking inside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", [BLOCK, "features.transition1", "features"])
def test_grad_cam_by_hooks(target: str) -> None:
    found = []
    for model in pair():
        model.eval()
        seen: dict[str, Tensor] = {}

        def look(module: nn.Module, args: Any, out: Tensor, seen: dict[str, Tensor] = seen) -> None:
            seen["maps"] = out.detach().clone()  # the ReLU behind features is in place
            out.register_hook(lambda grad: seen.update(grad=grad.clone()))

        module = model.get_submodule(target)
        module.register_forward_hook(look)
        if target != "features":  # the ReLU behind them refuses what a full backward hook returns, in eager too
            module.register_full_backward_hook(lambda module, into, out, seen=seen: seen.update(full=out[0].clone()))
        model(images().requires_grad_())[:, 3].sum().backward()
        assert torch.equal(seen.get("full", seen["grad"]), seen["grad"])
        weights = seen["grad"].mean((2, 3), keepdim=True)
        found.append((F.relu((weights * seen["maps"]).sum(1)), seen["grad"]))
    close(found)
    assert found[0][1].abs().max() > 0


def test_grad_cam_by_autograd_grad() -> None:
    found = []
    for model in pair():
        kept: list[Tensor] = []
        model.get_submodule(BLOCK).register_forward_hook(lambda module, args, out, kept=kept: kept.append(out))
        score = model.eval()(images())[:, 1].sum()
        found.append(torch.autograd.grad(score, kept))
    close(found)


def test_grad_cam_of_own_models_stays_fused() -> None:
    model = dx.DenseNet(4, (2, 2), 8, num_classes=3).double().eval()
    kept: list[Tensor] = []
    model.features.denseblock1.register_forward_hook(lambda module, args, out: kept.append(out))  # type: ignore[union-attr]
    score = model(images())[:, 1].sum()
    (grad,) = torch.autograd.grad(score, kept)
    assert all(row.fused for row in dx.report(model))
    maps = kept[0].detach().requires_grad_()
    features = model.features
    again = F.relu(features.norm5(features.denseblock2(features.transition1(maps)))).mean((2, 3))  # type: ignore[operator]
    torch.testing.assert_close(grad, torch.autograd.grad(model.classifier(again)[:, 1].sum(), maps)[0])


def test_integrated_gradients() -> None:
    x, found = images(1), []
    for model in pair():
        model.eval()
        path = torch.linspace(0, 1, 5, dtype=x.dtype).view(-1, 1, 1, 1) * x
        (grad,) = torch.autograd.grad(model(path.requires_grad_())[:, 2].sum(), path)
        found.append(x[0] * grad.mean(0))
    close(found)


class _Guided(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.clamp_min(0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.clamp_min(0) * (ctx.saved_tensors[0] > 0)


class GuidedReLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return _Guided.apply(x)


def _guide(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.ReLU):
            setattr(module, name, GuidedReLU())
        _guide(child)


@pytest.mark.parametrize("when", ["before", "after"])
def test_guided_backpropagation_by_replaced_relus(when: str) -> None:
    found = []
    for fused in (True, False):
        model = net().eval()
        if fused and when == "after":
            dx.fuse(model)
        _guide(model)
        if fused and when == "before":
            with pytest.warns(UserWarning, match="relu1 is a GuidedReLU, not a ReLU"):
                dx.fuse(model)
        x = images().requires_grad_()
        found.append(torch.autograd.grad(model(x)[:, 0].sum(), x))
    close(found)
    with torch.no_grad():
        plain = net().eval()
    x = images().requires_grad_()
    assert not torch.allclose(found[0][0], torch.autograd.grad(plain(x)[:, 0].sum(), x)[0])


def test_backward_hooks_on_relus_of_deconvnet() -> None:
    found = []
    for model in pair():
        model.eval()
        for module in model.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
                module.register_full_backward_hook(lambda module, into, out: (into[0].clamp_min(0),))
        x = images().requires_grad_()
        found.append(torch.autograd.grad(model(x)[:, 0].sum(), x))
    close(found)


def test_feature_extraction_by_fx() -> None:
    model, plain = pair()
    traced = torch.fx.symbolic_trace(model.eval())
    output = next(node for node in traced.graph.nodes if node.op == "output")
    wanted = [node for node in traced.graph.nodes if node.target in ("features.pool0", "features.transition1.pool")]
    output.args = ({node.target: node for node in wanted},)
    traced.graph.eliminate_dead_code()
    traced.recompile()
    found: dict[str, Tensor] = {}
    for name in ("features.pool0", "features.transition1.pool"):
        plain.get_submodule(name).register_forward_hook(
            lambda module, args, out, name=name: found.update({name: out.clone()})
        )
    plain.eval()(images())
    torch.testing.assert_close(traced(images()), found)


# ---- changed parameters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["weight_norm", "spectral_norm"])
def test_parametrisations_come_and_go(kind: str) -> None:
    models = pair()
    for model in models:
        torch.manual_seed(3)
        getattr(parametrizations, kind)(layer(model, "denselayer2").conv1)
        train_step(model)
    assert rows(models[0])[BLOCK].reason == "denselayer2.conv1 is parametrised"
    assert_same_state(*models)
    for model in models:
        parametrize.remove_parametrizations(layer(model, "denselayer2").conv1, "weight")
        train_step(model)
    assert rows(models[0])[BLOCK].fused
    assert_same_state(*models)


def test_the_old_weight_norm() -> None:
    models = pair()
    for model in models:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            nn.utils.weight_norm(layer(model).conv2)
        train_step(model)
    assert not rows(models[0])[BLOCK].fused
    assert_same_state(*models)
    for model in models:
        nn.utils.remove_weight_norm(layer(model).conv2)
        train_step(model)
    assert rows(models[0])[BLOCK].fused
    assert_same_state(*models)


def test_pruning_and_its_removal() -> None:
    models = pair()
    for model in models:
        for conv in (layer(model).conv1, model.features.transition1.conv):
            prune.l1_unstructured(conv, "weight", 0.5)
        train_step(model)
        train_step(model)
    assert rows(models[0])[BLOCK].reason == "denselayer1.conv1 has a forward pre-hook"
    assert_same_state(*models)
    for model in models:
        for conv in (layer(model).conv1, model.features.transition1.conv):
            prune.remove(conv, "weight")
    assert all(row.fused for row in dx.report(models[0]))
    close([model(images()) for model in models])
    assert (layer(models[0]).conv1.weight == 0).sum() == layer(models[0]).conv1.weight.numel() // 2


def test_norms_in_evaluation_inside_a_training_network() -> None:
    models = pair()
    for model in models:
        train_step(model)
        layer(model).norm1.eval()
        layer(model, "denselayer2").norm2.eval()
        train_step(model)
        model.features.transition1.norm.eval()
        model.train()
        layer(model, "denselayer2").norm1.eval()
        train_step(model)
    assert_same_state(*models)
    counts = [int(module.num_batches_tracked) for module in models[0].modules() if isinstance(module, nn.BatchNorm2d)]
    assert set(counts) == {2, 3}


def test_the_momentum_changes_between_steps() -> None:
    models = pair()
    for model in models:
        for momentum in (0.1, 0.9, None, 0.0):
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.momentum = momentum
            train_step(model)
    assert_same_state(*models)


def test_parameters_are_replaced_and_filled_in_place() -> None:
    models = pair()
    for model in models:
        train_step(model)
        with torch.no_grad():
            layer(model).conv1.weight.mul_(2)
            layer(model).norm2.bias.data.fill_(0.3)
        layer(model).norm1.weight = nn.Parameter(torch.full_like(layer(model).norm1.weight, 0.7))
        model.get_submodule(BLOCK).denselayer2.norm1.running_var = torch.full((12,), 2.0, dtype=torch.float64)
        train_step(model)
    assert_same_state(*models)
    close([model.eval()(images()) for model in models])


def test_freezing_and_thawing() -> None:
    models = pair()
    for model in models:
        for frozen in (True, False):
            model.features.requires_grad_(not frozen)
            train_step(model)
    assert_same_state(*models)


def test_a_moving_average_with_buffers() -> None:
    averages = []
    for model in pair():
        average = torch.optim.swa_utils.AveragedModel(
            model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
        )
        for _ in range(2):
            train_step(model)
            average.update_parameters(model)
        averages.append(average)
        assert all(row.fused for row in dx.report(average)) == (model is not None and len(averages) == 1)
    assert_same_state(*averages)
    close([average.eval()(images()) for average in averages])


# ---- copies ----------------------------------------------------------------------------------------------------------


def test_a_shallow_copy_runs_fused_with_its_own_children() -> None:
    model, plain = pair()
    for name in (BLOCK, "features.transition1", "features", ""):
        twin = copy.copy(model.get_submodule(name))
        assert unit_of(twin) is not None and unit_of(twin) == unit_of(model.get_submodule(name))
    block, x = model.get_submodule(BLOCK), torch.randn(2, 8, 4, 4, dtype=torch.float64)
    twin, wanted = copy.copy(block), copy.copy(plain.get_submodule(BLOCK))
    for shallow in (twin, wanted):  # children are the copy's own to take away, as in any module
        shallow._modules = dict(shallow._modules)
        del shallow._modules["denselayer2"]
    close([twin(x), wanted(x)])
    close([block(x), plain.get_submodule(BLOCK)(x)])
    assert not rows(twin)[""].fused and rows(block)[""].fused
    assert_same_state(block, plain.get_submodule(BLOCK))


def test_a_class_with_a_state_of_its_own() -> None:
    module = dx.fuse(net()).get_submodule(BLOCK)
    kind = type("Noting", (type(module),), {"__getstate__": lambda self: {**self.__dict__, "noted": True}})
    module.__class__ = kind
    assert copy.copy(module).noted and copy.deepcopy(module).noted
    assert unit_of(copy.copy(module)) is not None and unit_of(copy.deepcopy(module)) is not None


def test_a_fused_block_in_another_model() -> None:
    model, plain = pair()
    block = model.features.denseblock1
    other = nn.Sequential(block, nn.BatchNorm2d(16).double())
    del model
    close(
        [
            other[0](images()[:, :1].expand(-1, 8, -1, -1)),
            plain.features.denseblock1(images()[:, :1].expand(-1, 8, -1, -1)),
        ]
    )
    del block, other
