"""What changes in a fused model after its first call, and is found at the next one."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units.norms import NORM_TENSORS
from tests.support import own_code as own
from tests.support.helpers import DEVICE, generator


def twins() -> tuple[Any, Any]:
    """A fused model, and the same unfused."""
    torch.manual_seed(0)
    model = dx.DenseNet(4, (2, 2), 8, num_classes=5)
    for value in model.state_dict().values():
        if value.is_floating_point() and value.dim() == 1:
            value.copy_(torch.rand(value.shape) + 0.5)
    return model, dx.unfuse(copy.deepcopy(model))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", ["conv1", "norm2"])
def test_a_tensor_in_the_place_of_a_parameter(name: str, training: bool) -> None:
    """As networks that compute the weights of others put it there, anew for each call."""
    images, results = torch.randn(2, 3, 64, 64, generator=generator(1)), []
    for model in twins():
        model.train(training)
        part = getattr(model.features.denseblock1.denselayer1, name)
        assert name == "conv1" or all(hasattr(part, tensor) for tensor in NORM_TENSORS)
        weight = part.weight.detach().clone()
        del part.weight
        with torch.set_grad_enabled(training):
            for factor in (1.0, 3.0):
                part.weight = last = (weight * factor).requires_grad_(training)
                out = model(images)
        if training:
            out.square().sum().backward()
            assert last.grad is not None
            results.append((out.detach(), last.grad))
        else:
            results.append((out,))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4)


def zeros_of(module: nn.Module, x: Tensor) -> float:
    return (module(x) == 0).double().mean().item()


def test_a_rate_that_rises_from_zero() -> None:
    torch.manual_seed(0)
    model: Any = dx.fuse(own.NetWithTransitions(own.transition_of_modules)).train()
    x = torch.randn(8, 20, 16, 16)
    assert any(row.name == "trans1" and row.fused for row in dx.report(model)) and zeros_of(model.trans1, x) < 0.1
    model.trans1[3].p = 0.9
    assert zeros_of(model.trans1, x) > 0.5


def test_the_divisor_of_a_pool() -> None:
    torch.manual_seed(0)
    model: Any = dx.fuse(own.NetWithTransitions(own.transition_of_modules)).eval()
    x = torch.randn(8, 20, 16, 16, device=DEVICE)
    with torch.no_grad():
        before = model.trans1(x)
        model.trans1[4].divisor_override = 1
        torch.testing.assert_close(model.trans1(x), before * 4)
