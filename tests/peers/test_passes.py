"""Running statistics and several passes before a backward pass: as unfused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

from tests.peers.twins import (
    IDENTITY,
    assert_alike,
    assert_all_fused,
    images,
    pair,
    same,
    state,
    torchvision_net,
    train_step,
    without_inplace,
)

BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def test_versions_of_statistics_do_not_move() -> None:
    def run(model: nn.Module) -> Any:
        before = [b._version for b in model.buffers()]
        model(images())
        return [b._version - v for b, v in zip(model.buffers(), before, strict=True)]

    plain, fused = (run(model) for model in pair(torchvision_net().double()))
    counters = [i for i, moved in enumerate(plain) if moved]
    assert [moved for i, moved in enumerate(fused) if i not in counters] == [0] * (len(plain) - len(counters))


def test_evaluation_and_training_before_one_backward() -> None:
    """A frozen pass keeps the statistics that it used, whatever moves them before its backward pass.

    PyTorch's own norm does not: its gradients are those of the moved statistics. So each pass is compared with one that
    is followed by its own backward pass.
    """
    plain, model = pair(torchvision_net().double())
    passes = [(False, 1.0), (True, 2.0), (False, 3.0)]

    def step(network: Any, training: bool, scale: float, x: Tensor) -> Tensor:
        return network.train(training)(x * scale).square().mean()

    wanted = images().requires_grad_()
    for training, scale in passes:
        step(plain, training, scale, wanted).backward()
    x = images().requires_grad_()
    sum(step(model, training, scale, x) for training, scale in passes).backward()
    if not IDENTITY:
        assert_alike(x.grad, wanted.grad)
        assert_alike(state(model), state(plain))


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan"), 0.0, -1.0])
@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_odd_statistics(value: float, name: str) -> None:
    def run(model: Any) -> Any:
        for norm in (model.features.denseblock1.denselayer1.norm2, model.features.transition1.norm):
            getattr(norm, name)[3] = value
        return train_step(model)

    for training in (True, False):
        same(pair(torchvision_net().double().train(training)), run)


def test_two_passes_one_backward_and_retained_graphs() -> None:
    def run(model: nn.Module) -> Any:
        x = images().requires_grad_()
        one, two = model(x), model(x.flip(0) * 2)
        loss = (one * two).sum()
        loss.backward(retain_graph=True)
        loss.backward()
        return one, two, x.grad

    same(pair(torchvision_net().double()), run)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint_around_units(reentrant: bool) -> None:
    def run(model: Any) -> Any:
        x = images().requires_grad_()
        out = checkpoint(model, x, use_reentrant=reentrant)
        parts = checkpoint_sequential(model.features, 3, x, use_reentrant=reentrant)
        (out.square().mean() + parts.square().mean()).backward()
        return out, parts, x.grad

    same(pair(without_inplace(torchvision_net().double())), run)


@BOTH
def test_passes_without_gradients(training: bool) -> None:
    def run(model: nn.Module) -> Any:
        with torch.no_grad():
            one = model(images())
        with torch.inference_mode():
            two = model(images())
        model.requires_grad_(False)
        three = model(images())
        return one, two.clone(), two.is_inference(), three.requires_grad, model(images().requires_grad_()).requires_grad

    models = pair(torchvision_net().double().train(training))
    same(models, run)
    assert_all_fused(models[1])


def test_gradients_of_chosen_inputs() -> None:
    def run(model: Any) -> Any:
        x = images().requires_grad_()
        out = model(x).square().mean()
        chosen = [model.features.denseblock1.denselayer2.norm1.weight, model.features.transition1.conv.weight, x]
        first = torch.autograd.grad(out, chosen[:1], retain_graph=True)
        return first, torch.autograd.grad(out, chosen, create_graph=True), [p.grad for p in model.parameters()]

    same(pair(torchvision_net().double()), run)
