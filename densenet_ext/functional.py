"""Concatenation, BatchNorm and ReLU in one operation, and the same with a 1x1 convolution: differentiable functions."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from densenet_ext import checks, reference
from densenet_ext.algorithm import concat
from densenet_ext.algorithm.layout import concatenation_format, convolution_format
from densenet_ext.algorithm.values import Norm
from densenet_ext.units import captures

__all__ = ["bottleneck", "cat_bn_relu"]


def cat_bn_relu(
    features: Tensor | Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Computes ``relu(batch_norm(cat(features, 1), ...))`` in one pass, and keeps the features only.

    Args:
        features: a tensor, or a sequence of tensors [N, C_i, *spatial] with 1 to 3 spatial dimensions; C = sum C_i.
            float32, float64, bfloat16 or float16, in any memory format.
        running_mean, running_var: [C]. In training they move (None: nothing moves); else they normalise.
        weight, bias: [C] or None.
        training: normalise with the batch's own statistics.
        momentum: how far the running statistics move.
        eps: added to the variance.

    Returns [N, C, *spatial] in the dtype and the memory format that ``torch.cat`` gives: channels_last when all
    features are, which costs one copy less. Computed in float32, or float64.

    Raises TypeError or ValueError that name the argument, what was expected and what came; PyTorch's own ValueError for
    one value per channel in training.

    Source: Pleiss et al., "Memory-Efficient Implementation of DenseNets", arXiv 1707.06990, section 3.
    """
    maps = _checked_features(features)
    norm = _checked_norm(maps, running_mean, running_var, weight, bias, training, momentum, eps)
    if captures.reason(*maps) is not None:
        return reference.cat_bn_relu(maps, norm)
    return concat.cat_bn_relu(maps, norm).contiguous(memory_format=concatenation_format(maps))


def bottleneck(
    features: Tensor | Sequence[Tensor],
    conv_weight: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor:
    """Computes ``conv1x1(relu(batch_norm(cat(features, 1), ...)), conv_weight)``; what is normalised is never stored.

    Features that lie side by side in one buffer (slices of one channels_last tensor) are read in place; others are
    gathered, for the time of the call, and again in the backward pass, which recomputes BatchNorm and ReLU.

    Args:
        conv_weight: [b, C, 1, ...] with as many ones as there are spatial dimensions.
        features, running_mean, running_var, weight, bias, training, momentum, eps: as in `cat_bn_relu`.

    Returns [N, b, *spatial] in the memory format of PyTorch's own convolution: channels_last when all features or the
    weight are. Raises TypeError or ValueError as `cat_bn_relu` does.
    """
    maps = _checked_features(features)
    norm = _checked_norm(maps, running_mean, running_var, weight, bias, training, momentum, eps)
    _checked_tensor("conv_weight", conv_weight, maps[0])
    channels, ones = sum(x.shape[1] for x in maps), [1] * (maps[0].dim() - 2)
    if list(conv_weight.shape[1:]) != [channels, *ones]:
        expected = ", ".join(map(str, ["b", channels, *ones]))
        raise ValueError(f"conv_weight: expected shape [{expected}], got {list(conv_weight.shape)}")
    dtype = concat.promoted(maps)
    if conv_weight.dtype != dtype and not checks.autocast_enabled(maps[0].device.type):
        raise TypeError(f"conv_weight: expected {dtype}, the dtype of the features, got {conv_weight.dtype}")
    if captures.reason(*maps) is not None:
        return reference.bottleneck(maps, conv_weight, norm)
    layout = convolution_format(concatenation_format(maps), conv_weight)
    return concat.bottleneck(maps, conv_weight, norm).contiguous(memory_format=layout)


def _checked_features(features: Tensor | Sequence[Tensor]) -> list[Tensor]:
    maps = [features] if isinstance(features, Tensor) else list(features)
    if not maps:
        raise ValueError("features: expected at least one tensor, got an empty sequence")
    for i, x in enumerate(maps):
        name = "features" if isinstance(features, Tensor) else f"features[{i}]"
        _checked_tensor(name, x, maps[0])
        if not 3 <= x.dim() <= 5:
            raise ValueError(f"{name}: expected [N, C, *spatial] with 1 to 3 spatial dimensions, got {list(x.shape)}")
        if x.shape[:1] + x.shape[2:] != maps[0].shape[:1] + maps[0].shape[2:]:
            expected = ", ".join(map(str, [maps[0].shape[0], "C", *maps[0].shape[2:]]))
            raise ValueError(f"{name}: expected [{expected}], as features[0] is, got {list(x.shape)}")
    return maps


def _checked_tensor(name: str, x: Tensor, like: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.dtype.is_floating_point:
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, that of the features, got {x.device}")


def _checked_norm(
    maps: Sequence[Tensor],
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> Norm:
    channels = sum(x.shape[1] for x in maps)
    named = {"running_mean": running_mean, "running_var": running_var, "weight": weight, "bias": bias}
    for name, x in named.items():
        if x is None:
            continue
        _checked_tensor(name, x, maps[0])
        if list(x.shape) != [channels]:
            raise ValueError(
                f"{name}: expected shape [{channels}], one per channel of the features, got {list(x.shape)}"
            )
    for name in ("running_mean", "running_var"):
        if named[name] is None and not training:
            raise ValueError(f"{name}: expected a tensor of shape [{channels}] when training=False, got None")
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean, running_var: expected both or neither, got one of them")
    for name, value in (("momentum", momentum), ("eps", eps)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
    if not eps > 0:
        raise ValueError(f"eps: expected a number above 0, got {eps}")
    update = training and running_mean is not None
    return Norm(
        weight,
        bias,
        running_mean,
        running_var,
        None,
        bool(training),
        update,
        float(momentum),
        float(eps),
    )
