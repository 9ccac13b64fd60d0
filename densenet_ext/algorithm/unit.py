"""What every fused unit (block, transition, stem, head, concatenation) shares: how autograd and the compiler call it.

A unit is three plain functions over a list of tensors: ``forward``, ``backward`` and the usual formulation,
``reference``. Eager mode calls them from one autograd Function, ``torch.compile`` from custom ops (``graph_ops``), and
without gradients ``forward`` is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext.algorithm.layout import pixels
from densenet_ext.algorithm.norm import Norm
from densenet_ext.checks import autocast_enabled

Tensors = Sequence[Tensor | None]


class Config(NamedTuple):
    """What of a unit's call is not a tensor; all of it can stand in an operation's schema."""

    batch_stats: tuple[bool, ...]  # per norm: the batch's own statistics, else the running ones
    eps: tuple[float, ...]  # per norm
    dtype: torch.dtype  # of the result
    features: int = 1  # the first tensors are this many feature maps, the others parameters
    drop_rates: tuple[float, ...] = ()  # per layer
    window: tuple[int, ...] = ()  # of the pooling: [wd, wh, ww], ones in front for 1-D and 2-D
    stride: tuple[int, ...] = ()
    padding: tuple[int, ...] = ()
    save: str = "features"  # what is kept for the backward pass: "bottlenecks", "features" or "nothing"
    groups: tuple[str, ...] = ()  # per norm: the process group that its statistics are taken over, "" for none
    new_first: bool = False  # a dense layer's new features come before those that it reads
    cached: bool = False  # statistics noted beside a tensor may be used: not in compiled code, which reuses memory


class Unit(NamedTuple):
    """The functions of a fused unit. ``tensors`` are its feature maps, then its parameters.

    ``allocate(config, tensors)``: the results, uninitialised: the output, then what the backward pass needs and the
    statistics. ``forward(config, tensors)`` fills them. ``backward(config, grad, tensors, results, needs)``: one
    gradient or None per tensor. ``restore``: the unit keeps its output instead of its input, and gets the input back
    from it.
    """

    name: str
    allocate: Callable[[Config, Tensors], list[Tensor]]
    forward: Callable[[Config, Tensors], list[Tensor]]
    backward: Callable[[Config, Tensor, Tensors, Tensors, Sequence[bool]], list[Tensor | None]]
    reference: Callable[[Config, Tensors], Tensor]
    restore: Callable[[Config, Tensors, Tensor], Tensor] | None = None


def norm_tensors(norm: Norm) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Weight, bias, and the running statistics if it normalises with them."""
    if norm.batch_stats:
        return norm.weight, norm.bias, None, None
    return norm.weight, norm.bias, norm.running_mean, norm.running_var


def frozen_norm(tensors: Tensors, batch_stats: bool, eps: float) -> Norm:
    """The norm of four ``norm_tensors`` once more, with running statistics that do not move."""
    weight, bias, mean, var = tensors
    return Norm(weight, bias, mean, var, None, batch_stats, False, 0.0, eps)


def cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x contiguous in ``dtype``; x itself when it is so."""
    if x.dtype != dtype:
        x = x.to(dtype)
    return x if x.is_contiguous() else x.contiguous()


def norm_values(
    tensors: Tensors, mean: Tensor, var: Tensor, batch_stats: bool, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
    """The five arguments of a norm as the kernels take them; mean and var are the batch's."""
    weight, bias, running_mean, running_var = tensors
    if not batch_stats:
        assert running_mean is not None and running_var is not None
        mean, var = cast(running_mean, dtype), cast(running_var, dtype)
    return (
        mean,
        var,
        None if weight is None else cast(weight, dtype),
        None if bias is None else cast(bias, dtype),
        eps,
    )


def grad_like(grad: Tensor | None, x: Tensor | None, needed: bool = True) -> Tensor | None:
    """A parameter's gradient in its shape, dtype and layout (which autograd and DDP want, and else copy to)."""
    if grad is None or x is None or not needed:
        return None
    if grad.dtype == x.dtype and grad.shape == x.shape and grad.stride() == x.stride():
        return grad
    return torch.empty_like(x).copy_(grad.view(x.shape))


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of a convolution's result on x: autocast's when it is on."""
    kind = x.device.type
    if x.dtype != torch.float64 and autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return x.dtype


def as_pooled(out: Tensor) -> Tensor:
    """A pooling's result in the dtype that PyTorch gives it: autocast on the CPU pools volumes in float32."""
    kind = out.device.type
    if out.dtype != torch.float64 and kind == "cpu" and autocast_enabled(kind):
        return out.float()
    return out


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    # the units choose their dtypes themselves; entering the context costs, so only when there is something to leave
    if autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return nullcontext()


def run(unit: Unit, config: Config, tensors: Tensors, then: Callable[[Sequence[Tensor]], object]) -> Sequence[Tensor]:
    """The unit's results; the first is its output, differentiable in ``tensors``, the others are values.

    ``then`` is called with them, to move running statistics: before autograd saves anything, because a recomputation
    by ``torch.utils.checkpoint`` breaks off as soon as it has saved enough, and eager's norms have moved by then.
    """
    _check_data(tensors)
    if not torch.is_grad_enabled() or not any(x is not None and x.requires_grad for x in tensors):
        config = config._replace(save="nothing")
    if torch.compiler.is_compiling():
        from densenet_ext.algorithm.graph_ops import call

        results = call(unit.name, config, tensors)
        then(results)
        return results
    if config.save == "nothing":
        assert tensors[0] is not None
        with _without_autocast(tensors[0].device.type):
            results = unit.forward(config, tensors)
        then(results)
        return results
    return _Fused.apply(unit, config, then, *tensors)


def _check_data(tensors: Tensors) -> None:
    # A compiled operation with one argument on the meta device does nothing, without a word; other devices it refuses.
    assert tensors[0] is not None
    if tensors[0].is_meta:
        return
    for x in tensors:
        if x is not None and x.is_meta:
            device = tensors[0].device
            raise ValueError(
                f"expected all parameters on {device}, as the features, got one of {list(x.shape)} on meta"
            )


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unit: Unit, config: Config, then: Callable[[Sequence[Tensor]], object], *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        kind = tensors[0].device.type  # type: ignore[union-attr]
        with _without_autocast(kind):
            results = tuple(unit.forward(config, tensors))
        then(results)
        ctx.unit, ctx.config, ctx.count = unit, config, len(tensors)
        enabled = autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)
        if unit.restore is None:
            ctx.save_for_backward(*tensors, None, *results[1:])
        else:
            ctx.input_requires_grad = tensors[0].requires_grad  # type: ignore[union-attr]
            ctx.save_for_backward(None, *tensors[1:], *results)
        ctx.mark_non_differentiable(*results[1:])
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        unit, config, count = ctx.unit, ctx.config, ctx.count
        needs = ctx.needs_input_grad[3:]
        if grad is None:
            return (None,) * (3 + count)
        saved = ctx.saved_tensors
        tensors, results = saved[:count], saved[count:]
        if torch.is_grad_enabled():
            if unit.restore is not None:
                x = unit.restore(config, tensors, results[0])
                tensors = (x if ctx.input_requires_grad else x.detach(), *tensors[1:])
            return (None, None, None, *_differentiable_backward(unit, config, grad, tensors, needs, ctx.autocast))
        with _without_autocast(grad.device.type):
            return (None, None, None, *unit.backward(config, grad, tensors, results, needs))


def _differentiable_backward(
    unit: Unit,
    config: Config,
    grad: Tensor,
    tensors: Tensors,
    needs: Sequence[bool],
    autocast: tuple[str, torch.dtype | None, bool],
) -> list[Tensor | None]:
    """The gradients once more, through the usual formulation, so that autograd can differentiate them."""
    if any(config.groups):
        raise RuntimeError(
            f"create_graph=True: the gradient of a {unit.name} whose SyncBatchNorm spans several processes cannot be "
            "differentiated again, and nn.SyncBatchNorm's cannot either; convert to BatchNorm, or densenet_ext.unfuse "
            "the model to see PyTorch's own answer"
        )
    kind, dtype, enabled = autocast
    with torch.autocast(kind, dtype=dtype) if enabled else _without_autocast(kind):
        # a view each, so that a parameter that occurs twice gets the gradient of each occurrence
        inputs = [x.view_as(x) if need and x is not None else x for x, need in zip(tensors, needs, strict=True)]
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
        out = unit.reference(config, inputs)
        grads = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=True, allow_unused=True))
    return [next(grads) if need and x is not None else None for x, need in zip(inputs, needs, strict=True)]


def is_empty(x: Tensor) -> bool:
    """Whether x [N, C, *spatial] has no pixel: then the usual formulation runs, which does what PyTorch does."""
    return pixels(x.shape) == 0 or x.shape[1] == 0
