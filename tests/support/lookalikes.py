"""A DenseNet with the names and the structure of gpleiss/efficient_densenet_pytorch, written for the tests.

Layers take the features as arguments, ``efficient`` recomputes their first half, the last norm is ``norm_final``, and
ReLU, average and classifier stand in the model's ``forward``.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _first_half(layer: nn.Module, *features: Tensor) -> Tensor:
    x = torch.cat(features, 1)
    for name in ("norm1", "relu1", "conv1"):
        x = layer.get_submodule(name)(x)
    return x


class _DenseLayer(nn.Module):
    def __init__(self, channels: int, growth_rate: int, bn_size: int, drop_rate: float, efficient: bool) -> None:
        super().__init__()
        width = bn_size * growth_rate
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, growth_rate, 3, padding=1, bias=False)
        self.drop_rate = drop_rate
        self.efficient = efficient

    def forward(self, *features: Tensor) -> Tensor:
        if self.efficient and any(x.requires_grad for x in features):
            z = checkpoint(_first_half, self, *features, use_reentrant=False)
        else:
            z = _first_half(self, *features)
        new = self.conv2(self.relu2(self.norm2(z)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class _DenseBlock(nn.Module):
    def __init__(
        self, depth: int, channels: int, bn_size: int, growth_rate: int, drop_rate: float, efficient: bool
    ) -> None:
        super().__init__()
        for i in range(depth):
            layer = _DenseLayer(channels + i * growth_rate, growth_rate, bn_size, drop_rate, efficient)
            self.add_module(f"denselayer{i + 1}", layer)

    def forward(self, x: Tensor) -> Tensor:
        so_far = [x]
        for layer in self.children():
            so_far.append(layer(*so_far))
        return torch.cat(so_far, 1)


class _Transition(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(channels, out, 1, bias=False)
        self.pool = nn.AvgPool2d(2)


class DenseNet(nn.Module):
    def __init__(
        self,
        growth_rate: int = 12,
        block_config: tuple[int, ...] = (2, 2, 2),
        compression: float = 0.5,
        num_init_features: int = 24,
        bn_size: int = 4,
        drop_rate: float = 0,
        num_classes: int = 10,
        small_inputs: bool = True,
        efficient: bool = False,
    ) -> None:
        super().__init__()
        stem = _small_stem(num_init_features) if small_inputs else _large_stem(num_init_features)
        self.features = nn.Sequential()
        for name, module in stem:
            self.features.add_module(name, module)
        channels = num_init_features
        for i, depth in enumerate(block_config, start=1):
            block = _DenseBlock(depth, channels, bn_size, growth_rate, drop_rate, efficient)
            self.features.add_module(f"denseblock{i}", block)
            channels += depth * growth_rate
            if i < len(block_config):
                self.features.add_module(f"transition{i}", _Transition(channels, int(channels * compression)))
                channels = int(channels * compression)
        self.features.add_module("norm_final", nn.BatchNorm2d(channels))
        self.classifier = nn.Linear(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        maps = F.relu(self.features(x), inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(maps, (1, 1)).flatten(1))


def _small_stem(out: int) -> Iterator[tuple[str, nn.Module]]:
    yield "conv0", nn.Conv2d(3, out, 3, padding=1, bias=False)


def _large_stem(out: int) -> Iterator[tuple[str, nn.Module]]:
    yield "conv0", nn.Conv2d(3, out, 7, stride=2, padding=3, bias=False)
    yield "norm0", nn.BatchNorm2d(out)
    yield "relu0", nn.ReLU(inplace=True)
    yield "pool0", nn.MaxPool2d(3, stride=2, padding=1)
