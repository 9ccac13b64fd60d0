"""Layers that look like dense layers and do something more: they are never fused into something else.

Each layer agrees with a dense layer on small random inputs; the inputs here are those on which it does not.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.peers.twins import pair, same

SETTINGS = {"scale": 1.0}
SEEN: list[float] = []


class Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.n1, self.c1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
        self.n2, self.c2 = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def new(self, x: Tensor) -> Tensor:
        return self.c2(F.relu(self.n2(self.c1(F.relu(self.n1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1)


class Clamped(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.clamp(max=60), self.new(x)], 1)


class HardActivation(Layer):
    def new(self, x: Tensor) -> Tensor:
        return self.c2(F.relu(self.n2(self.c1(F.hardtanh(F.relu(self.n1(x)), 0, 30)))))


class BranchOnValues(Layer):
    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        return torch.cat([x, new * 2 if x.abs().max() > 50 else new], 1)


class BranchOnSize(Layer):
    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        return torch.cat([x, new * 2 if x.shape[2] > 20 else new], 1)


class BranchOnBatch(Layer):
    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        return torch.cat([x, new * 2 if x.shape[0] == 1 else new], 1)


class ScaledBySetting(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x) * SETTINGS["scale"]], 1)


class ScaledByAttribute(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x) * getattr(self, "scale", 1.0)], 1)


class Logging(Layer):
    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(x.detach().sum().item())
        return torch.cat([x, self.new(x)], 1)


class Detached(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x.detach())], 1)


class OnlyInEvaluation(Layer):
    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        return torch.cat([x, new if self.training else new * 2], 1)


class GradientHook(Layer):
    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        if new.requires_grad:
            new.register_hook(lambda grad: grad * 0.5)
        return torch.cat([x, new], 1)


class Counting(Layer):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([x, self.new(x)], 1)


KINDS = [
    *(Layer, Clamped, HardActivation, BranchOnValues, BranchOnSize, BranchOnBatch, ScaledBySetting),
    *(ScaledByAttribute, Logging, Detached, OnlyInEvaluation, GradientHook, Counting),
]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_layers_that_do_more(kind: Any, training: bool) -> None:
    def run(model: Any) -> Any:
        SEEN.clear()
        SETTINGS["scale"], results = 1.0, []
        for i, x in enumerate((torch.randn(2, 8, 6, 6), torch.randn(1, 8, 25, 25), torch.randn(3, 8, 7, 7) * 100 + 1)):
            if i == 2:
                SETTINGS["scale"] = 2.0
                for layer in model:
                    layer.scale = 2.0
            x = x.double().requires_grad_()
            out = model(x)
            out.square().mean().backward()
            results.append((out, x.grad))
        return results, len(SEEN), [getattr(layer, "calls", 0) for layer in model]

    torch.manual_seed(0)
    same(pair(nn.Sequential(kind(8), kind(12), kind(16)).double().train(training)), run)
