"""Dense blocks as people write them: other names, other containers, functional calls, either order of concatenation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Narrow(nn.Module):
    """A bottleneck layer that calls F.relu and puts the new features in front."""

    def __init__(self, channels: int, growth: int, width: int = 8) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv1 = nn.Conv2d(channels, width, kernel_size=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth, kernel_size=3, padding=1, bias=False)

    def new(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.relu(self.bn1(x))))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.new(x), x], 1)


class NarrowBehind(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat((x, self.new(x)), dim=1)


class Shared(nn.Module):
    """A bottleneck layer with one ReLU module for both places, and a drop rate of its own."""

    def __init__(self, channels: int, growth: int, width: int = 8, droprate: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, width, 1, stride=1, padding=0, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, growth, 3, stride=1, padding=1, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        if self.droprate > 0:
            new = F.dropout(new, p=self.droprate, training=self.training)
        return torch.cat([x, new], 1)


class TwiceDropped(Shared):
    """Drops the bottleneck's features as well."""

    def forward(self, x: Tensor) -> Tensor:
        z = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            z = F.dropout(z, p=self.droprate, inplace=False, training=self.training)
        new = self.conv2(self.relu(self.bn2(z)))
        if self.droprate > 0:
            new = F.dropout(new, p=self.droprate, inplace=False, training=self.training)
        return torch.cat([x, new], 1)


class Single(nn.Module):
    """A layer without a bottleneck."""

    def __init__(self, channels: int, growth: int, droprate: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, growth, kernel_size=3, stride=1, padding=1, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            new = F.dropout(new, p=self.droprate, training=self.training)
        return torch.cat([x, new], 1)


class SingleInFront(Single):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.conv1(self.relu(self.bn1(x))), x], 1)


class InSequence(nn.Sequential):
    """A layer that is a Sequential and joins in its own forward, as torchvision's once was."""

    def __init__(self, channels: int, growth: int, drop_rate: float = 0.0) -> None:
        super().__init__()
        self.add_module("norm1", nn.BatchNorm2d(channels))
        self.add_module("relu1", nn.ReLU(inplace=True))
        self.add_module("conv1", nn.Conv2d(channels, 8, kernel_size=1, bias=False))
        self.add_module("norm2", nn.BatchNorm2d(8))
        self.add_module("relu2", nn.ReLU(inplace=True))
        self.add_module("conv2", nn.Conv2d(8, growth, kernel_size=3, padding=1, bias=False))
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        new = super().forward(x)
        if self.drop_rate > 0:
            new = F.dropout(new, p=self.drop_rate, training=self.training)
        return torch.cat([x, new], 1)


class Returning(nn.Module):
    """A layer that returns the new features only; its parts stand in an inner Sequential, dropout is a module."""

    def __init__(self, channels: int, growth: int, dropout: float = 0.2, dims: int = 2) -> None:
        super().__init__()
        norm = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[dims - 1]
        conv = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dims - 1]
        self.composite = nn.Sequential(
            norm(channels), nn.ReLU(), conv(channels, growth, 3, padding=1, bias=False), nn.Dropout(dropout)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.composite(x)


class Grown(nn.Module):
    """A block over a ModuleList of layers that return the new features; ``everything`` or only those come out."""

    def __init__(self, channels: int, growth: tuple[int, ...], everything: bool = True, dims: int = 2) -> None:
        super().__init__()
        self.everything = everything
        self.layers = nn.ModuleList()
        for k in growth:
            self.layers.append(Returning(channels, k, dims=dims))
            channels += k

    def forward(self, x: Tensor) -> Tensor:
        news = []
        for layer in self.layers:
            new = layer(x)
            x = torch.cat([x, new], 1)
            news.append(new)
        return x if self.everything else torch.cat(news, 1)


class Listed(nn.Module):
    """A block with layers as attributes, that are given a list."""

    class Layer(nn.Module):
        def __init__(self, channels: int, growth: int) -> None:
            super().__init__()
            # parts in another order than they run in
            self.conv2, self.conv1 = None, nn.Conv2d(channels, 8, 1, bias=False)
            self.first, self.second = nn.BatchNorm2d(channels), nn.BatchNorm2d(8)
            self.conv2 = nn.Conv2d(8, growth, 3, padding="same", bias=False)

        def forward(self, features: list[Tensor]) -> Tensor:
            z = self.conv1(self.first(torch.cat(features, 1)).relu())
            return self.conv2(torch.relu(self.second(z)))

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__()
        self.a = Listed.Layer(channels, growth)
        self.b = Listed.Layer(channels + growth, growth)

    def forward(self, x: Tensor) -> Tensor:
        first = self.a([x])
        return torch.cat([x, first, self.b([x, first])], 1)


class Checkpointed(Narrow):
    """Saves memory by running its layers again in the backward pass."""

    def __init__(self, channels: int, growth: int, reentrant: bool = False, efficient: bool = True) -> None:
        super().__init__(channels, growth)
        self.reentrant, self.efficient = reentrant, efficient

    def forward(self, x: Tensor) -> Tensor:
        if self.efficient and x.requires_grad:
            return torch.cat([x, checkpoint(self.new, x, use_reentrant=self.reentrant)], 1)
        return torch.cat([x, self.new(x)], 1)


class Wrapped(nn.Module):
    """A block that is no more than a Sequential with a name."""

    def __init__(self, layers: nn.Sequential) -> None:
        super().__init__()
        self.layer = layers

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def chain(layer: Callable[..., nn.Module], channels: int = 8, growth: tuple[int, ...] = (4, 4, 4), **kwargs: float):
    """A Sequential of layers that concatenate."""
    layers = []
    for k in growth:
        layers.append(layer(channels, k, **kwargs))
        channels += k
    return nn.Sequential(*layers)


class Net(nn.Module):
    """A network around blocks, three for images of ``size``, of 8 channels in and ``channels`` out; it calls view."""

    def __init__(self, blocks: list[nn.Module], channels: int, size: int = 32) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, kernel_size=3, padding=1, bias=False)
        self.blocks = nn.ModuleList(blocks)
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in blocks)
        self.trans = nn.ModuleList(nn.Conv2d(channels, 8, kernel_size=1, bias=False) for _ in blocks)
        self.linear = nn.Linear(8 * (size // 8) ** 2, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        for block, norm, conv in zip(self.blocks, self.norms, self.trans, strict=True):
            x = block(x)
            x.view(x.size(0), -1)
            x = F.avg_pool2d(conv(F.relu(norm(x))), 2)
        return self.linear(x.view(x.size(0), -1))


class Transition(nn.Module):
    def __init__(self, channels: int, out: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels)
        self.conv = nn.Conv2d(channels, out, kernel_size=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(self.conv(F.relu(self.bn(x))), 2)


class DroppingTransition(nn.Module):
    def __init__(self, channels: int, out: int, droprate: float = 0.0) -> None:
        super().__init__()
        self.bn1, self.relu = nn.BatchNorm2d(channels), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(channels, out, kernel_size=1, stride=1, padding=0, bias=False)
        self.droprate = droprate

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv1(self.relu(self.bn1(x)))
        if self.droprate > 0:
            out = F.dropout(out, p=self.droprate, inplace=False, training=self.training)
        return F.avg_pool2d(out, 2)


def transition_of_modules(channels: int, out: int) -> nn.Sequential:
    conv = nn.Conv2d(channels, out, 1, bias=False)
    return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(inplace=True), conv, nn.Dropout(0.0), nn.AvgPool2d(2, 2))


class PooledByMaximum(Transition):
    def forward(self, x: Tensor) -> Tensor:
        return F.max_pool2d(self.conv(F.relu(self.bn(x))), 2)


class NormBehind(Transition):
    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(F.relu(self.conv(self.bn(x))), 2)


class Unpooled(Transition):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.relu(self.bn(x)))


class NetWithTransitions(nn.Module):
    """For 32x32 images."""

    def __init__(self, transition: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.dense1, self.trans1 = chain(Shared), transition(20, 8)
        self.dense2, self.trans2 = chain(Shared), transition(20, 8)
        self.linear = nn.Linear(8 * 8 * 8, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.trans2(self.dense2(self.trans1(self.dense1(self.conv1(x)))))
        return self.linear(x.view(x.size(0), -1))


# ---- nearly dense blocks ---------------------------------------------------------------------------------------------


class Scaled(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, 0.5 * self.new(x)], 1)


class Activated(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.relu(self.new(x))], 1)


class Leaky(Narrow):
    def new(self, x: Tensor) -> Tensor:
        return self.conv2(F.relu(self.bn2(self.conv1(F.leaky_relu(self.bn1(x), 0.01)))))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x)], 1)


class Detached(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.new(x.detach())], 1)


class ActivationFirst(Narrow):
    """ReLU, norm, convolution."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv2(self.bn2(F.relu(self.conv1(self.bn1(F.relu(x))))))], 1)


class SkipOfNormalised(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.relu(self.bn1(x)), self.new(x)], 1)


class ScaledInEvaluation(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        return torch.cat([x, new if self.training else 0.9 * new], 1)


class Noisy(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        new = self.new(x)
        return torch.cat([x, new + 0.1 * torch.randn_like(new) if self.training else new], 1)


class Counting(Narrow):
    def __init__(self, channels: int, growth: int) -> None:
        super().__init__(channels, growth)
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return torch.cat([x, self.new(x)], 1)


class FixedRate(Narrow):
    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, F.dropout(self.new(x), 0.2, self.training)], 1)


class AlwaysDropping(Shared):
    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return torch.cat([x, F.dropout(new, self.droprate, training=True)], 1)


class DroppingWithTheNorm(Shared):
    """Which differs only where a norm is frozen while its layer trains."""

    def forward(self, x: Tensor) -> Tensor:
        new = self.conv2(self.relu(self.bn2(self.conv1(self.relu(self.bn1(x))))))
        return torch.cat([x, F.dropout(new, self.droprate, training=self.bn1.training)], 1)


class Extra(Narrow):
    """Another parameter takes part."""

    def __init__(self, channels: int, growth: int) -> None:
        super().__init__(channels, growth)
        self.gain = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.gain * self.new(x)], 1)
