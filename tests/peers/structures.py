"""DenseNets as other packages and copies structure them, written for the tests: their names, containers and calls.

Each network is small, takes [N, 3, H, W], and says in its docstring whose structure it has.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def _norm_relu_conv(channels: int, out: int, size: int, **kwargs: Any) -> tuple[nn.Module, ...]:
    conv = nn.Conv2d(channels, out, size, padding=size // 2, **{"bias": False, **kwargs})
    return nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv


# ---- mmpretrain ------------------------------------------------------------------------------------------------------


class _ListLayer(nn.Module):
    """One activation for both places, the features in a list, and no other input allowed."""

    def __init__(self, channels: int, growth: int, act: nn.Module, drop_rate: float, memory_efficient: bool) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(channels), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        self.act = act
        self.norm2, self.conv2 = nn.BatchNorm2d(4 * growth), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        self.drop_rate, self.memory_efficient = float(drop_rate), memory_efficient

    def bottleneck_fn(self, xs: list[Tensor]) -> Tensor:
        return self.conv1(self.act(self.norm1(torch.cat(xs, 1))))

    def forward(self, x: list[Tensor]) -> Tensor:
        assert isinstance(x, list)
        if self.memory_efficient and any(t.requires_grad for t in x):
            z = checkpoint(lambda *xs: self.bottleneck_fn(list(xs)), *x, use_reentrant=False)
        else:
            z = self.bottleneck_fn(x)
        new = self.conv2(self.act(self.norm2(z)))
        return F.dropout(new, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else new


class _ListBlock(nn.Module):
    def __init__(self, depth: int, channels: int, growth: int, **kwargs: Any) -> None:
        super().__init__()
        layers = [_ListLayer(channels + i * growth, growth, nn.ReLU(inplace=True), **kwargs) for i in range(depth)]
        self.block = nn.ModuleList(layers)

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for layer in self.block:
            features.append(layer(features))
        return torch.cat(features, 1)


class MMPretrain(nn.Module):
    """mmpretrain: stages and transitions in two lists, one ReLU object in the stem and behind the last norm."""

    def __init__(self, drop_rate: float = 0.0, memory_efficient: bool = False, frozen_stages: int = 0) -> None:
        super().__init__()
        self.act = nn.ReLU(inplace=True)
        self.frozen_stages = frozen_stages
        stem = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(16), self.act
        self.stem = nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1))
        self.stages, self.transitions = nn.ModuleList(), nn.ModuleList()
        channels = 16
        for i in range(2):
            settings = {"drop_rate": drop_rate, "memory_efficient": memory_efficient}
            self.stages.append(_ListBlock(2, channels, 8, **settings))
            channels += 16
            if i == 0:
                transition = nn.Sequential()
                for name, module in zip(("norm", "act", "conv"), _norm_relu_conv(channels, 16, 1), strict=True):
                    transition.add_module(name, module)
                transition.add_module("pool", nn.AvgPool2d(2, 2))
                channels = 16
            else:
                transition = nn.Sequential(nn.BatchNorm2d(channels), self.act)
            self.transitions.append(transition)
        self.train()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x, outs = self.stem(x), []
        for stage, transition in zip(self.stages, self.transitions, strict=True):
            x = transition(stage(x))
            outs.append(x)
        return tuple(outs)

    def train(self, mode: bool = True) -> Any:
        super().train(mode)
        for i in range(self.frozen_stages):
            for part in (self.stages[i], self.transitions[i]):
                part.eval().requires_grad_(False)
        return self


# ---- torchvision 0.3 -------------------------------------------------------------------------------------------------


class _DenseLayer(nn.Sequential):
    """A Sequential that takes the features as arguments and calls its children by name."""

    def __init__(self, channels: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        for i, parts in enumerate(
            (_norm_relu_conv(channels, 4 * growth, 1), _norm_relu_conv(4 * growth, growth, 3)), 1
        ):
            for name, part in zip(("norm", "relu", "conv"), parts, strict=True):
                self.add_module(f"{name}{i}", part)
        self.drop_rate = drop_rate

    def forward(self, *prev_features: Tensor) -> Tensor:
        z = self.conv1(self.relu1(self.norm1(torch.cat(prev_features, 1))))
        new = self.conv2(self.relu2(self.norm2(z)))
        return F.dropout(new, p=self.drop_rate, training=self.training) if self.drop_rate > 0 else new


class _DenseBlock(nn.Module):
    def __init__(self, depth: int, channels: int, growth: int, drop_rate: float) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"denselayer{i + 1}", _DenseLayer(channels + i * growth, growth, drop_rate))

    def forward(self, init_features: Tensor) -> Tensor:
        features = [init_features]
        for _, layer in self.named_children():
            features.append(layer(*features))
        return torch.cat(features, 1)


class _Transition(nn.Sequential):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        for name, part in zip(("norm", "relu", "conv"), _norm_relu_conv(channels, out, 1), strict=True):
            self.add_module(name, part)
        self.add_module("pool", nn.AvgPool2d(kernel_size=2, stride=2))


class TorchvisionOld(nn.Module):
    """torchvision 0.3 and its many copies: the features as arguments, the head in functions."""

    def __init__(self, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("conv0", nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False))
        self.features.add_module("norm0", nn.BatchNorm2d(16))
        self.features.add_module("relu0", nn.ReLU(inplace=True))
        self.features.add_module("pool0", nn.MaxPool2d(3, stride=2, padding=1))
        self.features.add_module("denseblock1", _DenseBlock(2, 16, 8, drop_rate))
        self.features.add_module("transition1", _Transition(32, 16))
        self.features.add_module("denseblock2", _DenseBlock(2, 16, 8, drop_rate))
        self.features.add_module("norm5", nn.BatchNorm2d(32))
        self.classifier = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.features(x)
        out = F.relu(features, inplace=True)
        return self.classifier(F.adaptive_avg_pool2d(out, (1, 1)).view(features.size(0), -1))


# ---- CondenseNet -----------------------------------------------------------------------------------------------------


class _Conv(nn.Sequential):
    def __init__(self, channels: int, out: int, size: int) -> None:
        super().__init__()
        for name, part in zip(("norm", "relu", "conv"), _norm_relu_conv(channels, out, size), strict=True):
            self.add_module(name, part)


class _CondenseLayer(nn.Module):
    """Convolutions with a norm and a ReLU of their own, named as CondenseNet's, without groups."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.conv_1, self.conv_2 = _Conv(channels, 4 * growth, 1), _Conv(4 * growth, growth, 3)

    def forward(self, x: Tensor) -> Tensor:
        x_ = x
        x = self.conv_1(x)
        x = self.conv_2(x)
        return torch.cat([x_, x], 1)


class _CondenseBlock(nn.Sequential):
    def __init__(self, depth: int, channels: int, growth: int) -> None:
        super().__init__()
        for i in range(depth):
            self.add_module(f"denselayer_{i + 1}", _CondenseLayer(channels + i * growth, growth))


class Condense(nn.Module):
    """CondenseNet's names: blocks without compression between them, a bare pooling as transition."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential()
        self.features.add_module("init_conv", nn.Conv2d(3, 16, 3, stride=2, padding=1, bias=False))
        self.features.add_module("denseblock_1", _CondenseBlock(2, 16, 8))
        self.features.add_module("transition_1", nn.AvgPool2d(2))
        self.features.add_module("denseblock_2", _CondenseBlock(2, 32, 16))
        self.features.add_module("norm_last", nn.BatchNorm2d(64))
        self.features.add_module("relu_last", nn.ReLU(inplace=True))
        self.classifier = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean((2, 3)))


# ---- convolutions with a bias ----------------------------------------------------------------------------------------


class _BookBlock(nn.Module):
    """Sequentials of norm, ReLU and convolution with nn.Conv2d's default bias; the block joins."""

    def __init__(self, depth: int, channels: int, growth: int) -> None:
        super().__init__()
        self.net = nn.Sequential(
            *(nn.Sequential(*_norm_relu_conv(channels + i * growth, growth, 3, bias=True)) for i in range(depth))
        )

    def forward(self, X: Tensor) -> Tensor:
        for block in self.net:
            Y = block(X)
            X = torch.cat((X, Y), dim=1)
        return X


def book() -> nn.Sequential:
    """d2l: a book's DenseNet, one flat Sequential, every convolution with a bias."""
    transition = nn.Sequential(*_norm_relu_conv(32, 16, 1, bias=True), nn.AvgPool2d(2, 2))
    stem = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1))
    blocks = stem, _BookBlock(2, 16, 8), transition, _BookBlock(2, 16, 8)
    return nn.Sequential(
        *blocks, nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(), nn.Linear(32, 5)
    )


class _TiramisuLayer(nn.Sequential):
    def __init__(self, channels: int, growth: int, p: float) -> None:
        super().__init__()
        self.add_module("norm", nn.BatchNorm2d(channels))
        self.add_module("relu", nn.ReLU(True))
        self.add_module("conv", nn.Conv2d(channels, growth, 3, stride=1, padding=1, bias=True))
        self.add_module("drop", nn.Dropout2d(p))


class _TiramisuBlock(nn.Module):
    """Returns only the new features where it upsamples afterwards."""

    def __init__(self, channels: int, growth: int, depth: int, p: float, upsample: bool = False) -> None:
        super().__init__()
        self.upsample = upsample
        self.layers = nn.ModuleList([_TiramisuLayer(channels + i * growth, growth, p) for i in range(depth)])

    def forward(self, x: Tensor) -> Tensor:
        if self.upsample:
            new = []
            for layer in self.layers:
                out = layer(x)
                x = torch.cat([x, out], 1)
                new.append(out)
            return torch.cat(new, 1)
        for layer in self.layers:
            out = layer(x)
            x = torch.cat([x, out], 1)
        return x


class Tiramisu(nn.Module):
    """FC-DenseNet as it is copied around: layers without bottleneck, biases, Dropout2d."""

    def __init__(self, p: float = 0.2) -> None:
        super().__init__()
        self.firstconv = nn.Conv2d(3, 16, 3, padding=1)
        self.denseBlocksDown = nn.ModuleList([_TiramisuBlock(16, 4, 3, p)])
        down = nn.BatchNorm2d(28), nn.ReLU(True), nn.Conv2d(28, 28, 1, bias=True), nn.Dropout2d(p), nn.MaxPool2d(2)
        self.transDown = nn.Sequential(*down)
        self.bottleneck = _TiramisuBlock(28, 4, 3, p, upsample=True)
        self.transUp = nn.ConvTranspose2d(12, 12, 3, stride=2, bias=True)
        self.up = _TiramisuBlock(40, 4, 2, p)
        self.finalConv = nn.Conv2d(48, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.denseBlocksDown[0](self.firstconv(x))
        out = self.transUp(self.bottleneck(self.transDown(skip)))[:, :, : skip.shape[2], : skip.shape[3]]
        return F.log_softmax(self.finalConv(self.up(torch.cat([out, skip], 1))), dim=1)


# ---- drop rates on both convolutions ---------------------------------------------------------------------------------


class _Bottleneck(nn.Module):
    def __init__(self, channels: int, growth: int, droprate: float) -> None:
        super().__init__()
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, growth * 4, 1, stride=1, padding=0, bias=False)
        self.bn2 = nn.BatchNorm2d(growth * 4)
        self.conv2 = nn.Conv2d(growth * 4, growth, 3, stride=1, padding=1, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        out = self.conv2(self.relu(self.bn2(out)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        return torch.cat([x, out], 1)


class _Layers(nn.Module):
    """Layers in a Sequential inside the block."""

    def __init__(self, depth: int, channels: int, growth: int, droprate: float) -> None:
        super().__init__()
        self.layer = nn.Sequential(*(_Bottleneck(channels + i * growth, growth, droprate) for i in range(depth)))

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class _PooledTransition(nn.Module):
    def __init__(self, channels: int, out: int, droprate: float) -> None:
        super().__init__()
        self.bn1, self.relu, self.conv1 = _norm_relu_conv(channels, out, 1)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        return F.avg_pool2d(out, 2)


class TwiceDropped(nn.Module):
    """andreasveit/densenet-pytorch: both convolutions of a layer, and the transition's, drop features."""

    def __init__(self, droprate: float = 0.2) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1, self.trans1 = _Layers(2, 16, 8, droprate), _PooledTransition(32, 16, droprate)
        self.block2, self.bn1, self.relu = _Layers(2, 16, 8, droprate), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        self.fc = nn.Linear(32, 5)

    def forward(self, x: Tensor) -> Tensor:
        out = self.block2(self.trans1(self.block1(self.conv1(x))))
        out = F.avg_pool2d(self.relu(self.bn1(out)), 8)
        return self.fc(out.mean((2, 3)))
