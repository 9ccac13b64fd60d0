"""PyTorch's own modules as parts of a unit: what stands in the way of computing them without calling them.

A unit reads parameters and settings of the modules that it stands for. Whatever acts through a module's own call would
be lost without a sound: hooks, parametrisations, a replaced ``forward``, the code of a subclass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules import module as nn_module
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from densenet_ext.algorithm.sync import group_of
from densenet_ext.algorithm.values import Norm
from densenet_ext.units.reading import code_changed, names_in_code

_CONV: tuple[type[nn.Module], ...] = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM: tuple[type[nn.Module], ...] = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_AVG_POOL: tuple[type[nn.Module], ...] = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_MAX_POOL: tuple[type[nn.Module], ...] = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_GLOBAL_AVG_POOL: tuple[type[nn.Module], ...] = (nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d)
_POOLS = (_AVG_POOL, _MAX_POOL, _GLOBAL_AVG_POOL)
_CHANNEL_DROPOUT = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_KNOWN = frozenset(
    (
        *_CONV,
        *_NORM,
        nn.SyncBatchNorm,
        *_AVG_POOL,
        *_MAX_POOL,
        *_GLOBAL_AVG_POOL,
        nn.ReLU,
        nn.Flatten,
        nn.Dropout,
        *_CHANNEL_DROPOUT,
    )
)
_BASES = (_BatchNorm, _ConvNd, nn.ReLU, *_AVG_POOL, *_MAX_POOL, *_GLOBAL_AVG_POOL, nn.Flatten, nn.Dropout)


def obstacle(module: nn.Module) -> str | None:
    """Returns why ``module`` cannot be run without being called, as a phrase that follows its name; or None.

    The reasons: hooks of any kind, a parametrisation, a ``forward`` replaced on the instance, a subclass of a known
    class (lazy and quantised modules), a weight that is no plain tensor.
    """
    reason = hook_on(module)
    if reason is not None:
        return reason
    if has_other_forward(module):
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
        return "has a function that was replaced" if code_changed(kind) else _obstacle_inside(module)
    if isinstance(module, _BASES):
        return f"is a {kind_of(module)}, which has code of its own"
    return None


def has_other_forward(module: nn.Module) -> bool:
    """Returns whether a ``forward`` on the instance hides that of its class; a restored method of its own does not."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    own = getattr(forward, "__self__", None) is module
    return not own or getattr(forward, "__func__", None) is not type(module).forward


_FUNCTIONS = (FunctionType, MethodType, partial)


def hidden_function(module: nn.Module) -> str | None:
    """Returns the name of an attribute of the instance that hides a function of its class, or None.

    Such a function may be part of what ``forward`` computes; ``forward`` itself is `has_other_forward`'s matter.
    """
    cls = type(module)
    for name in own_attributes(module):
        if name != "forward" and isinstance(module.__dict__[name], _FUNCTIONS) and getattr(cls, name, None) is not None:
            return name
    return None


def own_attributes(module: nn.Module) -> list[str]:
    """Returns the names of the instance's attributes; in code that is compiled those that a function of it may see.

    The tracer of torch 2.11 looks single attributes up, and does not go through them.
    """
    if torch.compiler.is_compiling():
        return [name for name in _names_of(type(module)) if name in module.__dict__]
    return list(module.__dict__)


@torch.compiler.assume_constant_result
def _names_of(cls: type) -> tuple[str, ...]:
    """Returns the names of the class's attributes, and all that its code names."""
    coded = [kind for kind in cls.__mro__ if kind is not nn.Module and "forward" in vars(kind)]
    return tuple(sorted({*dir(cls), *(name for kind in coded for name in names_in_code(kind))}))


def activates(module: nn.Module) -> bool:
    """Returns whether ``module`` is a batch normalisation that runs its activation itself, as timm's are.

    That its ``forward`` does no more than that is tried out where it is first met (``fusing.trial``).
    """
    return type(module) not in _KNOWN and isinstance(module, _NORM) and bool(module._modules)


def _obstacle_inside(norm: nn.Module) -> str | None:
    active = 0
    for name, child in norm._modules.items():
        if child is None or (type(child) is nn.Identity and obstacle(child) is None):
            continue
        if child._modules or child._parameters:
            return f"is a {kind_of(norm)}, which has code of its own"
        reason = hook_on(child)
        if reason is None and other_relu(child) is not None:
            wanted = "a ReLU" if type(child).__module__ == nn.ReLU.__module__ else "a plain Identity"
            reason = f"is a {kind_of(child)}, not {wanted}"
        if reason is not None or has_other_forward(child):
            article = "an" if name[0] in "aeiou" else "a"
            return f"has {article} {name} that {reason or 'has a forward that was replaced on the instance'}"
        active += 1
    return None if active == 1 else f"has {active} activations"


def kind_of(module: nn.Module) -> str:
    """Returns the name of ``module``'s class, with where it is from when a known class has that name."""
    kind = type(module)
    if kind not in _KNOWN and any(kind.__name__ == known.__name__ for known in _KNOWN):
        return f"{kind.__module__}.{kind.__name__}"
    return kind.__name__


def hook_on(module: nn.Module) -> str | None:
    """Returns which kind of hook ``module`` has, as a phrase: "has a forward hook"; None when it has none."""
    reason = _kind_of_hook(module)
    if reason is not None and hasattr(type(module), "_get_fsdp_state"):
        return "is sharded on its own by fully_shard, which has to see its call"
    return reason


class Probe:
    """A hook that only wants to know that a module runs: units need not run unfused for it, and call it themselves.

    It sees no tensors.
    """

    def __init__(self, note: Callable[[], object]) -> None:
        self.note = note

    def __call__(self, *args: Any) -> None:
        self.note()


def _only_probes(hooks: dict[int, Any]) -> bool:
    return all(isinstance(hook, Probe) for hook in hooks.values())


def _kind_of_hook(module: nn.Module) -> str | None:
    if module._forward_hooks and not _only_probes(module._forward_hooks):
        return "has a forward hook"
    if module._forward_pre_hooks and not _only_probes(module._forward_pre_hooks):
        return "has a forward pre-hook"
    if module._backward_hooks:
        return "has a backward hook"
    if module._backward_pre_hooks:
        return "has a backward pre-hook"
    return None


def _gathered_by_call(module: nn.Module) -> bool:
    """Returns whether FSDP shards the module's parameters and has them whole again whenever the model is called."""
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
    """Returns why ``norm`` is not the batch normalisation that units of ``dims`` dimensions compute, or None."""
    expected = _NORM[dims - 1]
    if type(norm) in (expected, nn.SyncBatchNorm) or (isinstance(norm, expected) and activates(norm)):
        return None
    return f"is a {kind_of(norm)}, not a {expected.__name__}"


def other_relu(relu: nn.Module) -> str | None:
    """Returns why ``relu`` is not the activation that units compute, or None when it is, or is a norm that has it."""
    return None if type(relu) is nn.ReLU or activates(relu) else f"is a {kind_of(relu)}, not a ReLU"


def other_dropout(dropout: nn.Module, dims: int) -> str | None:
    """Returns why ``dropout`` drops neither single values nor whole channels of ``dims`` dimensions; or None."""
    if type(dropout) is nn.Dropout or type(dropout) is _CHANNEL_DROPOUT[dims - 1]:
        return None
    return f"is a {kind_of(dropout)}, not a Dropout"


def other_conv(conv: nn.Module, dims: int, kernel_size: int) -> str | None:
    """Returns why ``conv`` is not the convolution of stride 1 that fused units compute, or None when it is."""
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
    return None


def other_avg_pool(pool: nn.Module, dims: int) -> str | None:
    """Returns why ``pool`` is not the average pooling of window and stride 2 of a transition, or None when it is."""
    expected = _AVG_POOL[dims - 1]
    if type(pool) is not expected or not isinstance(pool, _AVG_POOL):
        return f"is a {kind_of(pool)}, not a {expected.__name__}"
    window, stride, padding = (each(value, dims) for value in (pool.kernel_size, pool.stride, pool.padding))
    if window != (2,) * dims or stride != window or padding != (0,) * dims:
        return f"has window {pool.kernel_size}, stride {pool.stride} and padding {pool.padding}, not 2, 2 and 0"
    if pool.ceil_mode or getattr(pool, "divisor_override", None) is not None:
        return "has ceil_mode or a divisor of its own"
    return None


def other_max_pool(pool: nn.Module, dims: int) -> str | None:
    """Returns why ``pool`` is not a max-pooling that the fused stem computes, or None when it is."""
    expected = _MAX_POOL[dims - 1]
    if type(pool) is not expected or not isinstance(pool, _MAX_POOL):
        return f"is a {kind_of(pool)}, not a {expected.__name__}"
    if each(pool.dilation, dims) != (1,) * dims or pool.ceil_mode or pool.return_indices:
        return "has dilation, ceil_mode or return_indices"
    return None


def other_global_average(pool: nn.Module, dims: int) -> str | None:
    """Returns why ``pool`` is not the average over all pixels that the fused head computes, or None when it is."""
    expected = _GLOBAL_AVG_POOL[dims - 1]
    if type(pool) is not expected:
        return f"is a {type(pool).__name__}, not a {expected.__name__}"
    size: Any = pool.output_size
    return None if each(size, dims) == (1,) * dims else f"has output size {size}, not 1"


def other_flatten(flatten: nn.Module) -> str | None:
    """Returns why ``flatten`` does not join all dimensions behind the first, or None when it does."""
    if not isinstance(flatten, nn.Flatten) or type(flatten) is not nn.Flatten:
        return f"is a {type(flatten).__name__}, not a Flatten"
    ends = flatten.start_dim, flatten.end_dim
    return None if ends == (1, -1) else f"flattens dimensions {ends[0]} to {ends[1]}, not 1 to -1"


def dimensions_of(conv: nn.Module) -> int | None:
    """Returns the spatial dimensions of a plain convolution, 1 to 3; None for any other module."""
    kind = type(conv)
    return _CONV.index(kind) + 1 if kind in _CONV else None


def pooled_dimensions(pool: nn.Module) -> int | None:
    """Returns the spatial dimensions of a plain pooling, 1 to 3; None for any other module.

    Around a pooling it tells them rather than the norm: a SyncBatchNorm takes any.
    """
    kind = type(pool)
    return next((kinds.index(kind) + 1 for kinds in _POOLS if kind in kinds), None)


def each(value: Any, dims: int) -> tuple[int, ...]:
    """Returns one number per dimension of a setting that may be one for all."""
    return value if isinstance(value, tuple) else (value,) * dims


def submodule(module: nn.Module, name: str) -> nn.Module | None:
    """Returns the child of this dotted name ("" is the module itself), or None where there is none."""
    found: nn.Module | None = module
    for child in name.split(".") if name else ():
        found = None if found is None else found._modules.get(child)
    return found


def parameter(module: nn.Module, name: str) -> Any:
    """Returns a parameter or buffer of ``module``, or None, in a fraction of the time that ``getattr`` takes."""
    values = module.__dict__
    for holder in (values["_parameters"], values["_buffers"]):
        if name in holder:
            return holder[name]
    return getattr(module, name)  # replicas and twins have plain tensors as attributes


def is_plain(weight: Any) -> bool:
    """Returns whether a weight is no subclass of tensors that gives operations another meaning."""
    return type(weight) in _TENSORS


_TENSORS = frozenset((Tensor, nn.Parameter, FakeTensor))


def is_usual(norm: Norm) -> bool:
    """Returns whether eager takes these tensors: plain ones, and both running statistics or none.

    Statistics of another dtype than the weights are taken too, as FSDP's mixed precision has them; eager refuses some.
    """
    weight, bias, mean, var = norm[:4]
    if (mean is None) != (var is None):
        return False
    return all(t is None or is_plain(t) for t in (weight, bias, mean, var))


def norm_of(module: nn.Module) -> Norm:
    """Returns the norm's values as they stand at this call: whose statistics it uses now, and what moves.

    The rules of ``nn.BatchNorm`` and ``nn.SyncBatchNorm``.
    """
    norm: Any = module
    mean, var = parameter(norm, "running_mean"), parameter(norm, "running_var")
    training = norm.training
    return Norm(
        parameter(norm, "weight"),
        parameter(norm, "bias"),
        mean,
        var,
        parameter(norm, "num_batches_tracked"),
        training or (mean is None and var is None),
        training and norm.track_running_stats,
        norm.momentum,
        norm.eps,
        group_of(module),
    )
