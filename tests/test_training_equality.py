"""Whole training runs: losses, parameters and buffers against the usual formulation and against torchvision."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

import densenet_ext as dx
from densenet_ext import reference
from densenet_ext.units.block import layer_values
from densenet_ext.units.entry import unit_of
from densenet_ext.units.parts import norm_of
from tests.support.helpers import generator
from tests.support.peers import torchvision_densenet


def reference_scores(model: dx.DenseNet, x: torch.Tensor) -> torch.Tensor:
    """``model``'s scores in the usual formulation, with its parameters and buffers."""
    features = model.features
    x = features.conv0(x)
    if "norm0" in features._modules:
        x = reference.stem(x, norm_of(features.norm0))
    for name, module in features.named_children():
        if name.startswith("denseblock"):
            x = reference.dense_block(
                x, [layer_values(unit_of(module), layer) for layer in module.values()], save=module.save
            )
        elif name.startswith("transition"):
            x = reference.transition(x, norm_of(module.norm), module.conv.weight)
    return model.classifier(reference.head(x, norm_of(features.norm5)))


def losses(model, scores, steps, size, frozen=()):
    """The losses of ``steps`` steps of SGD on the same random images; ``scores(model, x)`` runs the model."""
    noise = generator(7)
    model.train()
    for name in frozen:
        model.get_submodule(name).eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=1e-3)
    values = []
    for _ in range(steps):
        x = torch.randn((6, 3, size, size), dtype=torch.float64, generator=noise)
        y = (x.mean((1, 2, 3)) * 1000).long() % 4
        loss = F.cross_entropy(scores(model, x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        values.append(loss.item())
    return torch.tensor(values, dtype=torch.float64)


def assert_same_state(ours: torch.nn.Module, theirs: torch.nn.Module, tolerance: float) -> None:
    for (name, a), b in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("small_inputs, size", [(True, 8), (False, 32)])
def test_the_first_50_losses_are_those_of_the_usual_formulation(save, small_inputs, size):
    torch.manual_seed(5)
    model = dx.DenseNet(
        3, (2, 3), 6, bn_size=2, num_classes=4, compression=0.6, small_inputs=small_inputs, save=save
    ).double()
    usual = copy.deepcopy(model)
    ours = losses(model, lambda m, x: m(x), 50, size)
    theirs = losses(usual, reference_scores, 50, size)
    assert ours[0] > 0 and not torch.equal(ours, ours[:1].expand(50))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)
    assert_same_state(model, usual, 1e-8)


@pytest.mark.parametrize("frozen", [(), ("features.denseblock1", "features.transition1.norm")])
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_parameters_and_buffers_after_three_steps_are_torchvisions(save, frozen):
    peer = torchvision_densenet()
    torch.manual_seed(5)
    ours = dx.DenseNet(4, (2, 3, 2), 8, bn_size=2, num_classes=4, save=save).double()
    theirs = peer.DenseNet(4, (2, 3, 2), 8, bn_size=2, num_classes=4).double()
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(
        losses(ours, lambda m, x: m(x), 3, 64, frozen),
        losses(theirs, lambda m, x: m(x), 3, 64, frozen),
        rtol=1e-10,
        atol=1e-12,
    )
    assert_same_state(ours, theirs, 1e-10)
    assert ours.features.norm5.num_batches_tracked == 3
