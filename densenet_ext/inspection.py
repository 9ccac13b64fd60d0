"""What stands in the way of running a module inside a fused unit, which never calls the module itself.

A fused unit reads parameters and settings of the modules that it stands for. Whatever acts through a module's own call
would be lost without a sound: hooks, parametrisations, a replaced ``forward``, the code of a subclass. These checks run
at every call, so the way without an obstacle is short; words are made only where there is one.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

_CONV: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVG_POOL: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_MAX_POOL: tuple[type[nn.Module], ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_GLOBAL_AVG_POOL: tuple[type[nn.Module], ...] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOLS = (_AVG_POOL, _MAX_POOL, _GLOBAL_AVG_POOL)
_CHANNEL_DROPOUT = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_KNOWN = frozenset(
    (*_CONV, *_NORM, nn.SyncBatchNorm, *_AVG_POOL, *_MAX_POOL, *_GLOBAL_AVG_POOL, nn.ReLU, nn.Flatten, nn.Dropout)
)
_BASES = (_BatchNorm, _ConvNd, nn.ReLU, *_AVG_POOL, *_MAX_POOL, *_GLOBAL_AVG_POOL, nn.Flatten, nn.Dropout)


def obstacle(module: nn.Module) -> str | None:
    """Why ``module`` cannot be run without being called, as a phrase that follows its name: "has a forward hook"; or
    None when it can.

    The reasons: hooks of any kind, a parametrisation, a ``forward`` replaced on the instance, a subclass of a known
    class (lazy and quantised modules), a weight that is no plain tensor.
    """
    reason = hook_on(module)
    if reason is not None:
        return reason
    if "forward" in module.__dict__:
        return "has a forward that was replaced on the instance"
    kind = type(module)
    if kind in _KNOWN:
        weight = module._parameters.get("weight")
        if weight is not None and hasattr(weight, "__tensor_flatten__") and not _gathered_by_call(module):
            return f"has a weight that is a {type(weight).__name__}"
        return None
    if "parametrizations" in module._modules:
        return "is parametrised"
    if activates(module):
        return _obstacle_inside(module)
    if isinstance(module, _BASES):
        return f"is a {kind_of(module)}, which has code of its own"
    return None


def activates(module: nn.Module) -> bool:
    """Whether ``module`` is timm's ``BatchNormAct2d``: batch normalisation, then its children ``drop`` and ``act``."""
    kind = type(module)
    return (
        kind.__name__ == "BatchNormAct2d" and kind.__module__.startswith("timm.") and isinstance(module, nn.BatchNorm2d)
    )


def _obstacle_inside(norm: nn.Module) -> str | None:
    drop, act = norm._modules.get("drop"), norm._modules.get("act")
    if len(norm._modules) != 2 or drop is None or act is None:
        return f"has the children {', '.join(norm._modules)}, not drop and act"
    reason = hook_on(drop)
    if reason is None and (type(drop) is not nn.Identity or "forward" in drop.__dict__):
        reason = f"is a {type(drop).__name__}, not a plain Identity"
    if reason is not None:
        return f"has a drop that {reason}"
    reason = obstacle(act) or other_relu(act)
    return None if reason is None else f"has an act that {reason}"


def kind_of(module: nn.Module) -> str:
    """The name of ``module``'s class, with where it is from when a known class has that name."""
    kind = type(module)
    if kind not in _KNOWN and any(kind.__name__ == known.__name__ for known in _KNOWN):
        return f"{kind.__module__}.{kind.__name__}"
    return kind.__name__


def hook_on(module: nn.Module) -> str | None:
    """Which kind of hook ``module`` has, as a phrase: "has a forward hook"; None when it has none."""
    reason = _kind_of_hook(module)
    if reason is not None and hasattr(type(module), "_get_fsdp_state"):
        return "is sharded on its own by fully_shard, which has to see its call"
    return reason


def _kind_of_hook(module: nn.Module) -> str | None:
    if module._forward_hooks:
        return "has a forward hook"
    if module._forward_pre_hooks:
        return "has a forward pre-hook"
    if module._backward_hooks:
        return "has a backward hook"
    if module._backward_pre_hooks:
        return "has a backward pre-hook"
    return None


def _gathered_by_call(module: nn.Module) -> bool:
    """Whether FSDP shards the module's parameters and has them whole again whenever the model is called."""
    return bool(module.__dict__.get("_is_fsdp_managed_module"))


def hooks_on_all_modules() -> str | None:
    """Says so when hooks are registered for every module (``register_module_forward_hook`` and kin); None otherwise."""
    if (
        nn_module._global_forward_hooks
        or nn_module._global_forward_pre_hooks
        or nn_module._global_backward_hooks
        or nn_module._global_backward_pre_hooks
    ):
        return "hooks are registered for all modules"
    return None


def other_norm(norm: nn.Module, dims: int) -> str | None:
    """Why ``norm`` is not the batch normalisation that fused units of ``dims`` spatial dimensions compute, or None."""
    expected = _NORM[dims - 1]
    if type(norm) in (expected, nn.SyncBatchNorm) or (dims == 2 and activates(norm)):
        return None
    return f"is a {kind_of(norm)}, not a {expected.__name__}"


def other_relu(relu: nn.Module) -> str | None:
    """Why ``relu`` is not the activation that fused units compute, or None when it is, or is a norm that has it."""
    return None if type(relu) is nn.ReLU or activates(relu) else f"is a {kind_of(relu)}, not a ReLU"


def other_dropout(dropout: nn.Module) -> str | None:
    """Why ``dropout`` drops otherwise than fused layers do, value by value; None when it does so, or drops nothing."""
    if type(dropout) is nn.Dropout:
        return None
    if not isinstance(dropout, _CHANNEL_DROPOUT):
        return f"is a {kind_of(dropout)}, not a Dropout"
    return f"is a {kind_of(dropout)}, which drops whole channels" if drop_rate_of(dropout) > 0 else None


def drop_rate_of(dropout: Any) -> float:
    """The probability with which a dropout module drops now: 0 when it is not training."""
    return float(dropout.p) if dropout.training else 0.0


def other_conv(conv: nn.Module, dims: int, kernel_size: int) -> str | None:
    """Why ``conv`` is not the bias-free convolution of stride 1 that fused units compute, or None when it is."""
    expected = _CONV[dims - 1]
    if type(conv) is not expected or not isinstance(conv, _ConvNd):
        return f"is a {kind_of(conv)}, not a {expected.__name__}"
    ones = (1,) * dims
    if conv.kernel_size != (kernel_size,) * dims:
        return f"has kernel size {conv.kernel_size}, not {kernel_size}"
    if conv.stride != ones or conv.dilation != ones:
        return f"has stride {conv.stride} and dilation {conv.dilation}, not 1"
    if conv.padding != (kernel_size // 2,) * dims and conv.padding != "same":
        return f"has padding {conv.padding}, not {kernel_size // 2}"
    if conv.padding_mode != "zeros" and kernel_size > 1:
        return f"pads with {conv.padding_mode}, not with zeros"
    if conv.groups != 1:
        return f"has {conv.groups} groups"
    return "has a bias" if conv.bias is not None else None


def other_avg_pool(pool: nn.Module, dims: int) -> str | None:
    """Why ``pool`` is not the average pooling of window and stride 2 of a transition, or None when it is."""
    expected = _AVG_POOL[dims - 1]
    if type(pool) is not expected or not isinstance(pool, _AVG_POOL):
        return f"is a {kind_of(pool)}, not a {expected.__name__}"
    window, stride, padding = (_each(value, dims) for value in (pool.kernel_size, pool.stride, pool.padding))
    if window != (2,) * dims or stride != window or padding != (0,) * dims:
        return f"has window {pool.kernel_size}, stride {pool.stride} and padding {pool.padding}, not 2, 2 and 0"
    if pool.ceil_mode or getattr(pool, "divisor_override", None) is not None:
        return "has ceil_mode or a divisor of its own"
    return None


def other_max_pool(pool: nn.Module, dims: int) -> str | None:
    """Why ``pool`` is not a max-pooling that the fused stem computes, or None when it is."""
    expected = _MAX_POOL[dims - 1]
    if type(pool) is not expected or not isinstance(pool, _MAX_POOL):
        return f"is a {kind_of(pool)}, not a {expected.__name__}"
    if _each(pool.dilation, dims) != (1,) * dims or pool.ceil_mode or pool.return_indices:
        return "has dilation, ceil_mode or return_indices"
    return None


def other_global_average(pool: nn.Module, dims: int) -> str | None:
    """Why ``pool`` is not the average over all pixels that the fused head computes, or None when it is."""
    expected = _GLOBAL_AVG_POOL[dims - 1]
    if type(pool) is not expected:
        return f"is a {type(pool).__name__}, not a {expected.__name__}"
    size: Any = pool.output_size
    return None if _each(size, dims) == (1,) * dims else f"has output size {size}, not 1"


def other_flatten(flatten: nn.Module) -> str | None:
    """Why ``flatten`` does not join all dimensions behind the first, or None when it does."""
    if not isinstance(flatten, nn.Flatten) or type(flatten) is not nn.Flatten:
        return f"is a {type(flatten).__name__}, not a Flatten"
    ends = flatten.start_dim, flatten.end_dim
    return None if ends == (1, -1) else f"flattens dimensions {ends[0]} to {ends[1]}, not 1 to -1"


def other_sequence(sequence: nn.Module, members: Iterable[nn.Module | None]) -> str | None:
    """Why ``sequence`` is not a Sequential of just these members in this order, or None when it is."""
    if not isinstance(sequence, nn.Sequential):
        return f"is a {type(sequence).__name__}, not a Sequential"
    children, members = list(sequence._modules.values()), list(members)
    if len(children) != len(members) or any(a is not b for a, b in zip(children, members, strict=True)):
        return f"has other children than expected: {', '.join(sequence._modules)}"
    return None


def dimensions_of(conv: nn.Module) -> int | None:
    """The spatial dimensions of a plain convolution, 1 to 3; None for any other module."""
    kind = type(conv)
    return _CONV.index(kind) + 1 if kind in _CONV else None


def pooled_dimensions(pool: nn.Module) -> int | None:
    """The spatial dimensions of a plain pooling, 1 to 3; None for any other module.

    Around a pooling it tells them rather than the norm: a SyncBatchNorm takes any.
    """
    kind = type(pool)
    return next((kinds.index(kind) + 1 for kinds in _POOLS if kind in kinds), None)


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * dims
