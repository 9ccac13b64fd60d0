"""Dense layer, dense block and transition for one's own networks, with the child names that torchvision gives them.

The classes below are in the usual formulation, which is what TorchScript, export and FX see. Their constructors take
the way that ``fuse`` takes with other people's modules (``units.entry``): the instances run over one buffer per block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Union

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.state_dict import adapt_state_dict
from densenet_ext.units.around import Transition as FusedTransition
from densenet_ext.units.block import Block, Drop, Parts
from densenet_ext.units.built import built
from densenet_ext.units.entry import Unit, enter
from densenet_ext.units.single import SingleLayer

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}

# Settings that may change without another meaning of forward: rates and levels are read at every call.
FREE = ("drop_rate", "save", "_save", "returns")
_BOTTLENECK = Parts(("norm1", "norm2"), ("conv1", "conv2"), ("relu1", "relu2"))
_BASIC = Parts(("norm1",), ("conv1",), ("relu1",))


def enter_as_usual(module: Any, cls: type[nn.Module]) -> None:
    """Has a module of densenet_ext's ``cls`` run as its unit, unless a subclass gave it another ``forward``."""
    if type(module).forward is cls.forward:
        enter(module, module.unit())


def _block_of(module: nn.Module, layers: Sequence[str]) -> Block:
    """Returns the unit of ``module`` whose layers have these names ("" is itself)."""
    first = module.get_submodule(layers[0])
    parts = _BASIC if isinstance(first, BasicDenseLayer) else _BOTTLENECK
    children = (*parts.norms, *parts.activations, *parts.convs)
    own = list(dict.fromkeys(("", *layers)))
    prefixes = [f"{name}." if name else "" for name in layers]
    names = [name for name in own if name] + [prefix + child for prefix in prefixes for child in children]
    drops = (Drop("", "drop_rate"),)
    return Block(tuple(layers), parts, built(module, names, own, FREE), drops, returns=None)


class DenseLayer(nn.Module):
    """BN, ReLU, 1x1 convolution to ``bn_size * growth_rate`` features, BN, ReLU, 3x3 convolution to ``growth_rate``.

    Source: Huang et al., "Densely Connected Convolutional Networks" (CVPR 2017), section 3, "Bottleneck layers".

    Args:
        num_input_features: channels of all earlier features together.
        growth_rate: k, the number of new features.
        bn_size: bottleneck features per new feature.
        drop_rate: probability of dropping a value of the new features.
        memory_efficient: True is ``save="features"``.
        dims: spatial dimensions, 1 to 3.
        save: what is kept for the backward pass: "bottlenecks" (the features and the 1x1 convolution's output) or
            "features" (the features only; the 1x1 convolution runs again).

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(
        self,
        num_input_features: int,
        growth_rate: int,
        bn_size: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        dims: int = 2,
        save: str | None = None,
    ) -> None:
        super().__init__()
        self.num_input_features = checks.integer("num_input_features", num_input_features, 1)
        self.growth_rate = checks.integer("growth_rate", growth_rate, 1)
        self.drop_rate = checks.probability("drop_rate", drop_rate)
        self.dims = checks.integer("dims", dims, 1, 3)
        self.save = checks.save_level(save, memory_efficient)
        width = checks.integer("bn_size", bn_size, 1) * growth_rate
        self.norm1 = _NORM[dims](num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = _CONV[dims](num_input_features, width, kernel_size=1, stride=1, bias=False)
        self.norm2 = _NORM[dims](width)
        self.relu2 = nn.ReLU(inplace=True)
        self.conv2 = _CONV[dims](width, growth_rate, kernel_size=3, stride=1, padding=1, bias=False)
        self.register_load_state_dict_pre_hook(adapt_state_dict)
        enter_as_usual(self, DenseLayer)

    def unit(self) -> Unit:
        """Returns what the layer runs as when it is called by itself."""
        return SingleLayer(_block_of(self, ("",)))

    def forward(self, features: Union[Tensor, list[Tensor]]) -> Tensor:  # noqa: UP007 (TorchScript's spelling)
        """Returns the new features [N, growth_rate, *spatial] of one or several feature maps [N, C_i, *spatial].

        What does not fit raises what eager's operations raise, in words that name the argument.
        """
        if isinstance(features, Tensor):
            x = features
        else:
            x = torch.cat(features, 1)
        new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class BasicDenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution to ``growth_rate``: the layer of a `DenseBlock` with ``bn_size=None``.

    Source: Huang et al. (CVPR 2017), section 3, "Composite function". Arguments as in `DenseLayer`.

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(self, num_input_features: int, growth_rate: int, drop_rate: float, *, dims: int = 2) -> None:
        super().__init__()
        self.num_input_features = checks.integer("num_input_features", num_input_features, 1)
        self.growth_rate = checks.integer("growth_rate", growth_rate, 1)
        self.drop_rate = checks.probability("drop_rate", drop_rate)
        self.dims = checks.integer("dims", dims, 1, 3)
        self.norm1 = _NORM[dims](num_input_features)
        self.relu1 = nn.ReLU(inplace=True)
        self.conv1 = _CONV[dims](num_input_features, growth_rate, kernel_size=3, stride=1, padding=1, bias=False)

    def forward(self, features: Union[Tensor, list[Tensor]]) -> Tensor:  # noqa: UP007 (TorchScript's spelling)
        """Returns the new features [N, growth_rate, *spatial] of one or several feature maps; its block is fused."""
        if isinstance(features, Tensor):
            x = features
        else:
            x = torch.cat(features, 1)
        new = self.conv1(self.relu1(self.norm1(x)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class DenseBlock(nn.ModuleDict):
    """``num_layers`` dense layers ``denselayer1``, ``denselayer2``, ...: each reads the features of all before it.

    Source: Huang et al. (CVPR 2017), section 3, equation 2; shared storage: Pleiss et al., arXiv 1707.06990.

    Args:
        num_layers: layers in the block.
        num_input_features, growth_rate, drop_rate, memory_efficient, dims: as in `DenseLayer`.
        bn_size: bottleneck features per new feature; None for layers without a bottleneck: BN, ReLU, 3x3 convolution.
        save: what is kept for the backward pass: "bottlenecks" (default: the block's output and every 1x1 convolution's
            output) or "features" (the block's output only). It wins over ``memory_efficient``. Without a bottleneck
            either keeps the block's output only.
        returns: "all" gives [N, num_input_features + num_layers * growth_rate, *spatial], "new" only what was added.

    Raises TypeError or ValueError that names the argument.
    """

    __jit_unused_properties__ = ("save",)  # TorchScript would compile it

    def __init__(
        self,
        num_layers: int,
        num_input_features: int,
        bn_size: int | None,
        growth_rate: int,
        drop_rate: float,
        memory_efficient: bool = False,
        *,
        dims: int = 2,
        save: str | None = None,
        returns: Literal["all", "new"] = "all",
    ) -> None:
        super().__init__()
        checks.integer("num_layers", num_layers, 1)
        self.num_input_features = checks.integer("num_input_features", num_input_features, 1)
        checks.integer("growth_rate", growth_rate, 1)
        self.dims = checks.integer("dims", dims, 1, 3)
        self.returns = checks.choice("returns", returns, ("all", "new"))
        level = checks.save_level(save, memory_efficient)
        for i in range(num_layers):
            channels = num_input_features + i * growth_rate
            if bn_size is None:
                layer: nn.Module = BasicDenseLayer(channels, growth_rate, drop_rate, dims=dims)
            else:
                layer = DenseLayer(channels, growth_rate, bn_size, drop_rate, dims=dims, save=level)
            self.add_module(f"denselayer{i + 1}", layer)
        self.save = level
        self.register_load_state_dict_pre_hook(adapt_state_dict)
        enter_as_usual(self, DenseBlock)

    @property
    def save(self) -> str:
        """The level of saving, "bottlenecks" or "features"; setting it sets that of every layer."""
        return self._save

    @save.setter
    def save(self, level: str) -> None:
        self._save = checks.choice("save", level, checks.LEVELS)
        for layer in self.values():
            if isinstance(layer, DenseLayer):
                layer.save = level

    def unit(self) -> Unit:
        """Returns what the block runs as."""
        return _block_of(self, tuple(self))

    def forward(self, init_features: Tensor) -> Tensor:
        """Returns all features, or the new ones, of ``init_features`` [N, num_input_features, *spatial].

        What does not fit raises what eager's operations raise, in words that name the argument.
        """
        features = [init_features]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features if self.returns == "all" else features[1:], 1)


class Transition(nn.Sequential):
    """BN, ReLU, 1x1 convolution, average pooling of window and stride 2: children norm, relu, conv, pool.

    Source: Huang et al. (CVPR 2017), section 3, "Pooling layers". Pooling is linear and acts per channel, so the fused
    form pools before the convolution.

    Raises TypeError or ValueError that names the argument.
    """

    def __init__(self, num_input_features: int, num_output_features: int, *, dims: int = 2) -> None:
        super().__init__()
        self.num_input_features = checks.integer("num_input_features", num_input_features, 1)
        checks.integer("num_output_features", num_output_features, 1)
        self.dims = checks.integer("dims", dims, 1, 3)
        self.norm = _NORM[dims](num_input_features)
        self.relu = nn.ReLU(inplace=True)
        self.conv = _CONV[dims](num_input_features, num_output_features, kernel_size=1, stride=1, bias=False)
        self.pool = _AVG_POOL[dims](kernel_size=2, stride=2)
        enter_as_usual(self, Transition)

    def unit(self) -> Unit:
        """Returns what the transition runs as."""
        names = ("norm", "relu", "conv", "pool")
        return FusedTransition("norm", "conv", ("relu",), (), ("pool",), built(self, names, ("",)))
