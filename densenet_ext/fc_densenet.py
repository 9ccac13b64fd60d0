"""FC-DenseNet: DenseNet for semantic segmentation, over one buffer per dense block.

Source: Jegou, Drozdzal, Vazquez, Romero & Bengio, "The One Hundred Layers Tiramisu: Fully Convolutional DenseNets for
Semantic Segmentation" (CVPR Workshops 2017), sections 3 and 4, tables 1 and 2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.modules import DenseBlock, enter_as_usual
from densenet_ext.units.entry import Unit
from densenet_ext.units.single import Inside
from densenet_ext.units.single import TransitionDown as FusedTransitionDown


class TransitionDown(nn.Module):
    """BN, ReLU, 1x1 convolution that keeps the number of features, dropout, 2x2 max-pooling.

    Norm and ReLU happen inside the convolution's read; nothing but the input is kept for their backward pass.
    """

    def __init__(self, num_features: int, drop_rate: float) -> None:
        super().__init__()
        self.drop_rate = drop_rate
        self.norm = nn.BatchNorm2d(num_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(num_features, num_features, kernel_size=1, bias=False)
        self.pool = nn.MaxPool2d(kernel_size=2, stride=2)
        enter_as_usual(self, TransitionDown)

    def unit(self) -> Unit:
        """Returns what the transition runs as."""
        return FusedTransitionDown()

    def forward(self, x: Tensor) -> Tensor:
        """Returns [N, C, H // 2, W // 2] of ``x`` [N, C, H, W]."""
        out = self.conv(self.relu(self.norm(x)))
        return self.pool(F.dropout(out, self.drop_rate, self.training))


class TransitionUp(nn.Module):
    """Transposed 3x3 convolution of stride 2, cut to the size of the skip connection and concatenated with it."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.conv = nn.ConvTranspose2d(num_features, num_features, kernel_size=3, stride=2, bias=False)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        """Returns [N, C + S, H, W] of ``x`` [N, C, H // 2, W // 2] and ``skip`` [N, S, H, W]."""
        x = self.conv(x)
        top, left = ((n - m) // 2 for n, m in zip(x.shape[2:], skip.shape[2:], strict=True))
        return torch.cat([x[:, :, top : top + skip.shape[2], left : left + skip.shape[3]], skip], 1)


class FCDenseNet(nn.Module):
    """Dense blocks down, one at the bottom, dense blocks up with skip connections, and a 1x1 convolution.

    Layers are BN, ReLU, 3x3 convolution, dropout. A block on the way down hands on its input as well; the bottom one
    and those on the way up hand on their new features, but for the last. Weights are drawn as in the paper (uniform, He
    et al.). Only the last convolution has a bias: norms take any other one away, and it makes up for the rest. There is
    no level of saving: a block keeps its output.

    The paper's 3.5 and 9.4 million parameters of FC-DenseNet67 and 103 count running statistics as well.

    Args:
        num_classes: classes.
        in_channels: channels of the images.
        growth_rate: k, the number of features that a layer adds.
        block_config: layers per dense block on the way down; the way up has the same in reverse.
        bottleneck_layers: layers of the block at the bottom.
        num_init_features: features of the first convolution.
        drop_rate: probability of dropping a value, in dense layers and transitions down.

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(
        self,
        num_classes: int = 11,
        in_channels: int = 3,
        *,
        growth_rate: int = 16,
        block_config: Sequence[int] = (4, 5, 7, 10, 12),
        bottleneck_layers: int = 15,
        num_init_features: int = 48,
        drop_rate: float = 0.2,
    ) -> None:
        super().__init__()
        checks.integer("num_classes", num_classes, 1)
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        k = checks.integer("growth_rate", growth_rate, 1)
        depths = checks.block_depths("block_config", block_config)
        checks.integer("bottleneck_layers", bottleneck_layers, 1)
        channels = checks.integer("num_init_features", num_init_features, 1)
        checks.probability("drop_rate", drop_rate)

        self.conv0 = nn.Conv2d(in_channels, channels, kernel_size=3, padding=1, bias=False)
        self.down_blocks, self.down_transitions = nn.ModuleList(), nn.ModuleList()
        skips = []
        for depth in depths:
            self.down_blocks.append(DenseBlock(depth, channels, None, k, drop_rate))
            channels += depth * k
            skips.append(channels)
            self.down_transitions.append(TransitionDown(channels, drop_rate))
        self.bottleneck = DenseBlock(bottleneck_layers, channels, None, k, drop_rate, returns="new")
        self.up_transitions, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        new = bottleneck_layers * k
        for i, (depth, skip) in enumerate(zip(reversed(depths), reversed(skips), strict=True), start=1):
            self.up_transitions.append(TransitionUp(new))
            returns = "all" if i == len(depths) else "new"
            self.up_blocks.append(DenseBlock(depth, new + skip, None, k, drop_rate, returns=returns))  # type: ignore[arg-type]
            channels, new = new + skip + depth * k, depth * k
        self.classifier = nn.Conv2d(channels, num_classes, kernel_size=1)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")
        nn.init.zeros_(cast(Tensor, self.classifier.bias))
        enter_as_usual(self, FCDenseNet)

    def unit(self) -> Unit:
        """Returns what the model runs as."""
        return Inside()

    def forward(self, x: Tensor) -> Tensor:
        """Returns class scores [N, num_classes, H, W] of images [N, in_channels, H, W].

        H and W need not be even, but have to survive the transitions: 2 ** len(block_config) pixels at least.
        """
        x = self.conv0(x)
        skips = []
        for block, down in zip(self.down_blocks, self.down_transitions, strict=True):
            skips.append(block(x))
            x = down(skips[-1])
        x = self.bottleneck(x)
        for up, block in zip(self.up_transitions, self.up_blocks, strict=True):
            x = block(up(x, skips.pop()))
        return self.classifier(x)


def fc_densenet56(num_classes: int = 11, in_channels: int = 3, **kwargs: Any) -> FCDenseNet:
    """Makes FC-DenseNet56 (k = 12, four layers in every block); keywords as `FCDenseNet`."""
    defaults = {"growth_rate": 12, "block_config": (4,) * 5, "bottleneck_layers": 4}
    return FCDenseNet(num_classes, in_channels, **cast(Any, {**defaults, **kwargs}))


def fc_densenet67(num_classes: int = 11, in_channels: int = 3, **kwargs: Any) -> FCDenseNet:
    """Makes FC-DenseNet67 (k = 16, five layers in every block); keywords as `FCDenseNet`."""
    defaults = {"growth_rate": 16, "block_config": (5,) * 5, "bottleneck_layers": 5}
    return FCDenseNet(num_classes, in_channels, **cast(Any, {**defaults, **kwargs}))


def fc_densenet103(num_classes: int = 11, in_channels: int = 3, **kwargs: Any) -> FCDenseNet:
    """Makes FC-DenseNet103 (k = 16; 4, 5, 7, 10, 12, 15, 12, 10, 7, 5, 4 layers); keywords as `FCDenseNet`."""
    return FCDenseNet(num_classes, in_channels, **kwargs)
