"""Dense layer, dense block and transition for one's own networks, with the child names that torchvision gives them.

A block runs over one buffer (``algorithm.block``). A module whose children were replaced, hooked or parametrised, and
every module while a graph is captured, runs its children one by one instead: the usual formulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from densenet_ext import checks
from densenet_ext.algorithm.basic_block import basic_block
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.dispatch import plain_reason
from densenet_ext.algorithm.layer import dense_layer
from densenet_ext.algorithm.norm import norm_of
from densenet_ext.algorithm.transition import transition
from densenet_ext.algorithm.values import BasicLayer, Layer
from densenet_ext.inspection import (
    hooks_on_all_modules,
    obstacle,
    other_avg_pool,
    other_conv,
    other_norm,
    other_relu,
)
from densenet_ext.state_dict import adapt_state_dict

_CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_AVG_POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}


def unfused_child(module: nn.Module, mismatches: Sequence[tuple[str, str | None]]) -> str | None:
    """Why ``module`` can't stand for these of its children: "norm1 has a forward hook", or None when it can.

    ``mismatches``: names of children, each with what makes it another operation than the fused one, or None.
    """
    children = module._modules
    for name, mismatch in mismatches:
        reason = mismatch or obstacle(cast(nn.Module, children[name]))
        if reason is not None:
            return f"{name} {reason}"
    return hooks_on_all_modules()


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

    def unfused_reason(self) -> str | None:
        """Why this layer runs its children one by one, or None when it is fused."""
        return unfused_child(
            self,
            (
                ("norm1", other_norm(self.norm1, self.dims)),
                ("relu1", other_relu(self.relu1)),
                ("conv1", other_conv(self.conv1, self.dims, 1)),
                ("norm2", other_norm(self.norm2, self.dims)),
                ("relu2", other_relu(self.relu2)),
                ("conv2", other_conv(self.conv2, self.dims, 3)),
            ),
        )

    def as_layer(self) -> Layer:
        """The layer as the algorithm takes it: two norms, two weights, and the drop rate that is in force now."""
        drop_rate = self.drop_rate if self.training else 0.0
        return Layer(norm_of(self.norm1), self.conv1.weight, norm_of(self.norm2), self.conv2.weight, drop_rate)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """The new features [N, growth_rate, *spatial] of a tensor, or of a sequence of tensors [N, C_i, *spatial].

        Raises TypeError or ValueError that names the argument for a wrong rank, channel count, dtype or device.
        """
        tensors = list(features) if isinstance(features, (list, tuple)) else [cast(Tensor, features)]
        if not tensors:
            raise ValueError("features: expected at least one tensor, got an empty sequence")
        for x in tensors:
            checks.tensor("features", x)
        if self.unfused_reason() is not None or plain_reason(*tensors) is not None:
            x = torch.cat(tensors, 1)
            new = self.conv2(self.relu2(self.norm2(self.conv1(self.relu1(self.norm1(x))))))
        else:
            self._check(tensors)
            new = dense_layer(tensors, self.as_layer(), self.save)
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new

    def _check(self, tensors: list[Tensor]) -> None:
        for i, x in enumerate(tensors):
            name = "features" if len(tensors) == 1 else f"features[{i}]"
            checks.feature_maps(name, x, None, self.dims, self.conv1.weight)
            if x.shape[:1] + x.shape[2:] != tensors[0].shape[:1] + tensors[0].shape[2:]:
                expected = ", ".join(["C", *map(str, tensors[0].shape[2:])])
                raise ValueError(
                    f"{name}: expected [{tensors[0].shape[0]}, {expected}] as features[0], got {list(x.shape)}"
                )
        channels = sum(x.shape[1] for x in tensors)
        if channels != self.num_input_features:
            raise ValueError(f"features: expected {self.num_input_features} channels in all, got {channels}")


class BasicDenseLayer(nn.Module):
    """BN, ReLU, 3x3 convolution to ``growth_rate``: the layer of a :class:`DenseBlock` with ``bn_size=None``.

    Source: Huang et al. (CVPR 2017), section 3, "Composite function". Arguments as in :class:`DenseLayer`.

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

    def unfused_reason(self) -> str | None:
        """Why a block runs this layer's children one by one, or None when it is fused."""
        return unfused_child(
            self,
            (
                ("norm1", other_norm(self.norm1, self.dims)),
                ("relu1", other_relu(self.relu1)),
                ("conv1", other_conv(self.conv1, self.dims, 3)),
            ),
        )

    def as_layer(self) -> BasicLayer:
        """The layer as the algorithm takes it: a norm, a weight, and the drop rate that is in force now."""
        return BasicLayer(norm_of(self.norm1), self.conv1.weight, self.drop_rate if self.training else 0.0)

    def forward(self, features: Tensor | Sequence[Tensor]) -> Tensor:
        """The new features [N, growth_rate, *spatial] of a tensor or a sequence of tensors; only its block is fused."""
        x = torch.cat(list(features), 1) if isinstance(features, (list, tuple)) else cast(Tensor, features)
        new = self.conv1(self.relu1(self.norm1(x)))
        return F.dropout(new, self.drop_rate, self.training) if self.drop_rate > 0 else new


class DenseBlock(nn.ModuleDict):
    """``num_layers`` dense layers ``denselayer1``, ``denselayer2``, ...: each reads the features of all before it.

    Source: Huang et al. (CVPR 2017), section 3, equation 2; shared storage: Pleiss et al., arXiv 1707.06990.

    Args:
        num_layers: layers in the block.
        num_input_features, growth_rate, drop_rate, memory_efficient, dims: as in :class:`DenseLayer`.
        bn_size: bottleneck features per new feature; None for layers without a bottleneck: BN, ReLU, 3x3 convolution.
        save: what is kept for the backward pass: "bottlenecks" (default: the block's output and every 1x1 convolution's
            output) or "features" (the block's output only). It wins over ``memory_efficient``. Without a bottleneck
            either keeps the block's output only.
        returns: "all" gives [N, num_input_features + num_layers * growth_rate, *spatial], "new" only what was added.

    Raises TypeError or ValueError that names the argument.
    """

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

    def unfused_reason(self) -> str | None:
        """Why this block runs its layers one by one, or None when it is fused."""
        kind = BasicDenseLayer if isinstance(next(iter(self.values()), None), BasicDenseLayer) else DenseLayer
        for name, layer in self.items():
            reason = obstacle(layer)
            if reason is not None:
                return f"{name} {reason}"
            if type(layer) is not kind:
                return f"{name} is a {type(layer).__name__}, not a {kind.__name__}"
            reason = layer.unfused_reason()
            if reason is not None:
                return f"{name}.{reason}"
        return None

    def forward(self, init_features: Tensor) -> Tensor:
        """All features, or the new ones, of ``init_features`` [N, num_input_features, *spatial].

        Raises TypeError or ValueError that names the argument for a wrong rank, channel count, dtype or device.
        """
        checks.tensor("init_features", init_features)
        if self.unfused_reason() is not None or plain_reason(init_features) is not None:
            features = [init_features]
            for layer in self.values():
                features.append(layer(features))
            return torch.cat(features if self.returns == "all" else features[1:], 1)
        weight = cast(DenseLayer, self["denselayer1"]).conv1.weight
        x = checks.feature_maps("init_features", init_features, self.num_input_features, self.dims, weight)
        if isinstance(self["denselayer1"], BasicDenseLayer):
            out, _ = basic_block(x, [cast(BasicDenseLayer, layer).as_layer() for layer in self.values()])
        else:
            out, _ = dense_block(x, [cast(DenseLayer, layer).as_layer() for layer in self.values()], save=self.save)
        return out if self.returns == "all" else out[:, self.num_input_features :]


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

    def unfused_reason(self) -> str | None:
        """Why this transition runs its children one by one, or None when it is fused."""
        children = list(self._modules)
        if children != ["norm", "relu", "conv", "pool"]:
            return f"its children are {', '.join(children)}, not norm, relu, conv, pool"
        return unfused_child(
            self,
            (
                ("norm", other_norm(self.norm, self.dims)),
                ("relu", other_relu(self.relu)),
                ("conv", other_conv(self.conv, self.dims, 1)),
                ("pool", other_avg_pool(self.pool, self.dims)),
            ),
        )

    def forward(self, input: Tensor) -> Tensor:
        """[N, num_output_features, *spatial // 2] of ``input`` [N, num_input_features, *spatial], spatial at least 2.

        Raises TypeError or ValueError that names the argument for a wrong rank, channel count, size, dtype or device.
        """
        checks.tensor("input", input)
        if self.unfused_reason() is not None or plain_reason(input) is not None:
            return super().forward(input)
        x = checks.feature_maps("input", input, self.num_input_features, self.dims, self.conv.weight)
        if min(x.shape[2:]) < 2:
            raise ValueError(f"input: expected at least 2 pixels along every dimension, got shape {list(x.shape)}")
        return transition(x, norm_of(self.norm), self.conv.weight, 2)
