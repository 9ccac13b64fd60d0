"""DenseNet models with torchvision's parameter names, order and initialisation, and the keywords of both worlds."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.modules import FREE, DenseBlock, Transition, enter_as_usual
from densenet_ext.state_dict import adapt_state_dict
from densenet_ext.units.around import Stem
from densenet_ext.units.built import built
from densenet_ext.units.entry import Unit, enter
from densenet_ext.units.head import Head
from densenet_ext.units.sequence import Sequence as FusedSequence


class DenseNet(nn.Module):
    """DenseNet-BC over one buffer per dense block.

    Source: Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017), table 1 and section 4.

    Args:
        growth_rate: k, the number of features that a layer adds.
        block_config: layers per dense block.
        num_init_features: features of the first convolution.
        bn_size: bottleneck features per new feature.
        drop_rate: probability of dropping a value of a layer's new features.
        num_classes: classes; 0 leaves the classifier out, and the model returns the pooled features.
        compression: the paper's theta: a transition keeps ``int(compression * features)``.
        small_inputs: True is the form for 32x32 images: a single 3x3 convolution as stem, the paper's initialisation.
        in_channels: channels of the images.
        save: what the blocks keep for the backward pass, "bottlenecks" (default) or "features".
        memory_efficient, efficient: torchvision's and the efficient implementation's keyword; either True means
            ``save="features"``. A ``save`` that is given wins.

    Raises TypeError or ValueError that names the argument.
    """

    __jit_unused_properties__ = ("save",)  # TorchScript would compile it

    def __init__(
        self,
        growth_rate: int = 32,
        block_config: Sequence[int] = (6, 12, 24, 16),
        num_init_features: int = 64,
        bn_size: int = 4,
        drop_rate: float = 0.0,
        num_classes: int = 1000,
        *,
        compression: float = 0.5,
        small_inputs: bool = False,
        in_channels: int = 3,
        save: str | None = None,
        memory_efficient: bool | None = None,
        efficient: bool | None = None,
    ) -> None:
        super().__init__()
        checks.integer("growth_rate", growth_rate, 1)
        checks.integer("num_init_features", num_init_features, 1)
        checks.integer("num_classes", num_classes, 0)
        checks.compression_factor("compression", compression)
        self.in_channels = checks.integer("in_channels", in_channels, 1)
        level = checks.save_level(save, memory_efficient, efficient)

        channels = num_init_features
        self.features = nn.Sequential(_stem_modules(in_channels, channels, small_inputs))
        depths = checks.block_depths("block_config", block_config)
        for i, depth in enumerate(depths, start=1):
            block = DenseBlock(depth, channels, bn_size, growth_rate, drop_rate, save=level)
            self.features.add_module(f"denseblock{i}", block)
            channels += depth * growth_rate
            if i < len(depths):
                compressed = int(channels * compression)
                if compressed < 1:
                    raise ValueError(
                        f"compression: expected to keep at least one of {channels} features, got {compression}"
                    )
                self.features.add_module(f"transition{i}", Transition(channels, compressed))
                channels = compressed
        self.features.add_module("norm5", nn.BatchNorm2d(channels))
        self.num_features = channels
        self.classifier = nn.Linear(channels, num_classes) if num_classes else nn.Identity()
        self._save = level
        self._initialise(small_inputs)
        self.register_load_state_dict_pre_hook(adapt_state_dict)
        enter_as_usual(self, DenseNet)
        enter(self.features, FusedSequence(() if small_inputs else (Stem("norm0", "relu0", "pool0"),)))

    def _initialise(self, as_in_the_paper: bool) -> None:
        for module in self.modules():
            if isinstance(module, nn.Conv2d) and as_in_the_paper:
                fan_out = math.prod(module.kernel_size) * module.out_channels
                nn.init.normal_(module.weight, std=math.sqrt(2.0 / fan_out))
            elif isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @property
    def save(self) -> str:
        """The level of saving, "bottlenecks" or "features"; setting it sets that of every dense block."""
        return self._save

    @save.setter
    def save(self, level: str) -> None:
        self._save = checks.choice("save", level, checks.LEVELS)
        for module in self.features.children():
            if isinstance(module, DenseBlock):
                module.save = level

    def unit(self) -> Unit:
        """Returns what the model runs as."""
        return Head("features", (), ("classifier",), 2, False, built(self, ("features", "classifier"), ("",), FREE))

    def forward(self, x: Tensor) -> Tensor:
        """Returns class scores [N, num_classes] of images [N, in_channels, H, W].

        What does not fit raises what eager's operations raise, in words that name the argument.
        """
        out = F.relu(self.features(x), inplace=True)
        out = torch.flatten(F.adaptive_avg_pool2d(out, (1, 1)), 1)
        return self.classifier(out)


def _stem_modules(in_channels: int, channels: int, small_inputs: bool) -> OrderedDict[str, nn.Module]:
    if small_inputs:
        return OrderedDict(conv0=nn.Conv2d(in_channels, channels, kernel_size=3, stride=1, padding=1, bias=False))
    return OrderedDict(
        conv0=nn.Conv2d(in_channels, channels, kernel_size=7, stride=2, padding=3, bias=False),
        norm0=nn.BatchNorm2d(channels),
        relu0=nn.ReLU(inplace=True),
        pool0=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )


def densenet121(**kwargs: Any) -> DenseNet:
    """Makes DenseNet-121 (Huang et al., table 1); keywords as `DenseNet` from ``bn_size`` on."""
    return DenseNet(32, (6, 12, 24, 16), 64, **kwargs)


def densenet161(**kwargs: Any) -> DenseNet:
    """Makes DenseNet-161 (k = 48, the authors' published model); keywords as `DenseNet` from ``bn_size`` on."""
    return DenseNet(48, (6, 12, 36, 24), 96, **kwargs)


def densenet169(**kwargs: Any) -> DenseNet:
    """Makes DenseNet-169 (Huang et al., table 1); keywords as `DenseNet` from ``bn_size`` on."""
    return DenseNet(32, (6, 12, 32, 32), 64, **kwargs)


def densenet201(**kwargs: Any) -> DenseNet:
    """Makes DenseNet-201 (Huang et al., table 1); keywords as `DenseNet` from ``bn_size`` on."""
    return DenseNet(32, (6, 12, 48, 32), 64, **kwargs)


def densenet264(**kwargs: Any) -> DenseNet:
    """Makes DenseNet-264 (Huang et al., table 1); keywords as `DenseNet` from ``bn_size`` on."""
    return DenseNet(32, (6, 12, 64, 48), 64, **kwargs)


def densenet_bc(depth: int = 100, growth_rate: int = 12, **kwargs: Any) -> DenseNet:
    """Makes DenseNet-BC for 32x32 images: three blocks of ``(depth - 4) / 6`` layers, 2 k first features, ten classes.

    Source: Huang et al. (CVPR 2017), section 4. ``depth`` counts the convolutions and the classifier: 100 has 16 layers
    a block. Keywords as `DenseNet`; ``small_inputs=True`` and ``num_classes=10`` unless given.

    Raises ValueError when ``depth`` is not 6 n + 4 with n of at least 1, or for what `DenseNet` refuses.
    """
    checks.bc_depth("depth", depth)
    checks.integer("growth_rate", growth_rate, 1)
    defaults = {"small_inputs": True, "num_classes": 10, "num_init_features": 2 * growth_rate}
    return DenseNet(growth_rate, ((depth - 4) // 6,) * 3, **{**defaults, **kwargs})
