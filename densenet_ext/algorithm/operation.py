"""A fused operation: three plain functions over tensors, and how autograd and the compiler call them.

An operation is ``forward``, ``backward`` and the usual formulation, ``reference``. Eager mode calls them from one
autograd Function, and without gradients ``forward`` as it is. ``register`` makes ``densenet_ext::<name>_forward`` and
``densenet_ext::<name>_backward`` of the same functions, which is how ``torch.compile`` sees them: opaque, with shapes
and gradients. Both are functional: the running statistics move outside, by operations that the compiler traces, so they
move once however often the graph is replayed or partitioned.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from densenet_ext.algorithm.conversions import without_autocast
from densenet_ext.algorithm.layout import new_features
from densenet_ext.algorithm.values import Tensors
from densenet_ext.checks import autocast_enabled


class Config(NamedTuple):
    """The part of an operation's call that is no tensor; all of it can stand in a schema."""

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
    drop_channels: tuple[bool, ...] = ()  # per layer: whole channels are dropped
    inner_drop_rates: tuple[float, ...] = ()  # per layer, of the bottleneck features
    inner_drop_channels: tuple[bool, ...] = ()
    lowered: bool = False  # autocast would multiply these float32 features as bfloat16


_SCHEMA_TYPES: dict[Any, str] = {
    bool: "bool",
    int: "int",
    str: "str",
    torch.dtype: "ScalarType",
    tuple[bool, ...]: "bool[]",
    tuple[float, ...]: "float[]",
    tuple[int, ...]: "int[]",
    tuple[str, ...]: "str[]",
}
_CONFIG = ", ".join(f"{_SCHEMA_TYPES[kind]} {name}" for name, kind in get_type_hints(Config).items())


def check_data(tensors: Tensors) -> None:
    """Raises ValueError where features with data meet parameters without."""
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


class Operation(NamedTuple):
    """The functions of a fused unit. ``tensors`` are its feature maps, its parameters, then ``values``.

    ``allocate(config, tensors)``: the results, uninitialised: the output, then what the backward pass needs and the
    statistics. ``forward(config, tensors)`` fills them. ``backward(config, grad, tensors, results, needs)``: one
    gradient or None per tensor. ``restore``: the unit keeps its output instead of its input, and gets the input back
    from it. ``norms(config)``: where the four ``norm_tensors`` of each norm start. ``values``: so many of the last
    tensors are read by the forward pass only, and have no gradient. ``check(tensors)`` raises for tensors that no call
    takes.
    """

    name: str
    allocate: Callable[[Config, Tensors], list[Tensor]]
    forward: Callable[[Config, Tensors], list[Tensor]]
    backward: Callable[[Config, Tensor, Tensors, Tensors, Sequence[bool]], list[Tensor | None]]
    reference: Callable[[Config, Tensors], Tensor]
    norms: Callable[[Config], Sequence[int]]
    restore: Callable[[Config, Tensors, Tensor], Tensor] | None = None
    values: int = 0
    check: Callable[[Tensors], None] = check_data


def _running_stats(operation: Operation, config: Config) -> list[int]:
    """Where the running statistics of the frozen norms are among the tensors."""
    if all(config.batch_stats):
        return []
    starts = zip(operation.norms(config), config.batch_stats, strict=True)
    return [i for start, batch in starts if not batch for i in (start + 2, start + 3)]


def _frozen_stats(operation: Operation, config: Config, tensors: Tensors) -> Tensor | None:
    """A copy of the running statistics of all frozen norms, one after the other, where a backward pass may follow.

    It gives the gradient of what the forward pass computed, wherever the running statistics have moved since.
    """
    running = [] if config.save == "nothing" else [tensors[i] for i in _running_stats(operation, config)]
    return torch.cat(running) if running else None  # type: ignore[arg-type]


class Present:
    """Which tensors of a call are there, so that autograd, which looks at each of them, is given no others.

    given: whether each is. plain: none but the first is a wrapper of ``torch.func``, as who made this has seen.
    """

    def __init__(self, given: Sequence[bool], plain: bool = False) -> None:
        places = [i for i, there in enumerate(given) if there]
        at = iter(range(len(places)))
        # two more, since there is no tuple of one index alone
        self._places = itemgetter(*places, 0, 0)
        self._values = itemgetter(*(next(at) if there else len(places) for there in given), 0, 0)
        self.plain = plain

    def of(self, values: Sequence[Any]) -> tuple[Any, ...]:
        """Returns the values of those tensors that are there, of one for each tensor."""
        return self._places(values)[:-2]

    def among_all(self, values: Sequence[Any], absent: Any) -> tuple[Any, ...]:
        """Returns a value for each tensor: of ``values`` where it is there, else ``absent``."""
        return self._values((*values, absent))[:-2]


@lru_cache(maxsize=256)
def _present(given: tuple[bool, ...]) -> Present:
    return Present(given)


class _Saved(NamedTuple):
    """How the tensors that are saved for the backward pass are to be read."""

    tensors: int  # so many are the operation's tensors; its results follow them
    stats: list[int]  # where the running statistics of frozen norms were among them
    sizes: list[int]  # of each of these


def _save(
    ctx: Any, operation: Operation, config: Config, tensors: Tensors, results: Tensors, frozen: Tensor | None
) -> None:
    """Saves what the backward pass reads of ``tensors`` and ``results``, and the ``_frozen_stats``."""
    stats = [] if config.save == "nothing" else _running_stats(operation, config)
    ctx.saved = _Saved(len(tensors), stats, [tensors[i].shape[0] for i in stats])  # type: ignore[union-attr]
    kept = [*tensors, *results, frozen]
    for i in (*stats, *range(len(tensors) - operation.values, len(tensors))):
        kept[i] = None
    kept[len(tensors) if operation.restore is None else 0] = None  # the output, or the features
    ctx.save_for_backward(*kept)


def _load(ctx: Any) -> tuple[Tensors, Tensors]:
    """The operation's tensors, with the running statistics that the forward pass used, and its results."""
    count, stats, sizes = ctx.saved
    saved = ctx.saved_tensors
    tensors, results, frozen = saved[:count], saved[count:-1], saved[-1]
    if stats:
        assert frozen is not None
        tensors = list(tensors)
        for i, values in zip(stats, frozen.split(sizes), strict=True):
            tensors[i] = values
    return tensors, results


OPERATIONS: dict[str, Operation] = {}
"""Every operation by name."""
_CUSTOM_OPS: dict[str, Any] = {}


def kept_level(save: str) -> str:
    """Returns ``save``, what is kept for a backward pass, where there can be one; else "nothing"."""
    return save if torch.is_grad_enabled() else "nothing"


def _is_recorded(tensors: Tensors) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


def run(
    operation: Operation,
    config: Config,
    tensors: Tensors,
    then: Callable[[Sequence[Tensor]], object],
    present: Present | None = None,
) -> Tensor:
    """The operation's output, differentiable in ``tensors``; ``present``: which are there, from who has seen before.

    ``then`` is called with all results, which are values then, to move running statistics: before autograd saves
    anything, because a recomputation by ``torch.utils.checkpoint`` breaks off as soon as it has saved enough, and
    eager's norms have moved by then.
    """
    operation.check(tensors)
    if config.save != "nothing" and not _is_recorded(tensors):
        config = config._replace(save="nothing")
    if torch.compiler.is_compiling():
        given = [x is not None for x in tensors]
        results = _CUSTOM_OPS[operation.name]([x for x in tensors if x is not None], given, *config)
        then([results[0], *(value.detach() for value in results[1:-1])])
        return results[0]
    if config.save == "nothing":
        assert tensors[0] is not None
        with without_autocast(tensors[0].device.type):
            results = operation.forward(config, tensors)
        then(results)
        return results[0]
    if present is None:
        present = _present(tuple([x is not None for x in tensors]))
    out: Tensor = _Fused.apply(_Call(operation, config, tensors, then, present), *present.of(tensors))
    return out


# ---- autograd --------------------------------------------------------------------------------------------------------


class _Call(NamedTuple):
    """What a call is but for its tensors as autograd takes them."""

    operation: Operation
    config: Config
    tensors: Tensors
    then: Callable[[Sequence[Tensor]], object]
    present: Present


class _Fused(torch.autograd.Function):
    @classmethod
    def apply(cls, call: _Call, *present: Tensor) -> Any:
        if not call.present.plain or torch._C._are_functorch_transforms_active():
            return super().apply(call, *present)
        # Function.apply looks at every argument, in Python, for a wrapper that torch.func has left over
        x = torch._C._functorch.unwrap_if_dead(present[0])
        if x is not present[0]:
            call = call._replace(tensors=[x, *call.tensors[1:]])
        return super(torch.autograd.Function, cls).apply(call, x, *present[1:])  # type: ignore[misc]

    @staticmethod
    def forward(ctx: Any, call: _Call, *present: Tensor) -> Tensor:
        operation, config, tensors, then, there = call
        if not there.plain:  # else `present` are the same tensors
            tensors = there.among_all(present, None)
        kind = present[0].device.type
        with without_autocast(kind):
            results, frozen = operation.forward(config, tensors), _frozen_stats(operation, config, tensors)
        then(results)
        ctx.operation, ctx.config, ctx.present = operation, config, there
        enabled = autocast_enabled(kind)
        ctx.autocast = (kind, torch.get_autocast_dtype(kind) if enabled else None, enabled)
        ctx.input_requires_grad = present[0].requires_grad
        _save(ctx, operation, config, tensors, results, frozen)
        ctx.set_materialize_grads(False)
        return results[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        operation, config = ctx.operation, ctx.config
        needed = ctx.needs_input_grad[1:]
        if grad is None:
            return (None,) * (1 + len(needed))
        needs = ctx.present.among_all(needed, False)
        tensors, results = _load(ctx)
        if torch.is_grad_enabled() or _is_batched(grad):
            if operation.restore is not None:
                assert results[0] is not None
                x = operation.restore(config, tensors, results[0])
                tensors = [x if ctx.input_requires_grad else x.detach(), *tensors[1:]]
            grads = _reference_backward(operation, config, grad, tensors, needs, ctx.autocast)
        else:
            with without_autocast(grad.device.type):
                grads = operation.backward(config, grad, tensors, results, needs)
        return None, *ctx.present.of(grads)


def _is_batched(grad: Tensor) -> bool:
    """Returns whether ``grad`` is several: is_grads_batched, jacobian(vectorize=True), torch.func.vmap."""
    return torch._C._functorch.is_legacy_batchedtensor(grad) or torch._C._functorch.is_batchedtensor(grad)


def _reference_backward(
    operation: Operation,
    config: Config,
    grad: Tensor,
    tensors: Tensors,
    needs: Sequence[bool],
    autocast: tuple[str, torch.dtype | None, bool],
) -> list[Tensor | None]:
    """The gradients once more, through the usual formulation: as autograd can differentiate and batch them."""
    if any(config.groups):
        raise RuntimeError(
            f"create_graph=True or a batched gradient: the gradient of a {operation.name} whose SyncBatchNorm spans "
            "several processes cannot be differentiated again, and nn.SyncBatchNorm's cannot either; convert to "
            "BatchNorm, or densenet_ext.unfuse the model to see PyTorch's own answer"
        )
    kind, dtype, enabled = autocast
    again = torch.is_grad_enabled()
    with torch.autocast(kind, dtype=dtype) if enabled else without_autocast(kind), torch.enable_grad():
        # a view each, so that a parameter that occurs twice gets the gradient of each occurrence
        inputs = [x.view_as(x) if need and x is not None else x for x, need in zip(tensors, needs, strict=True)]
        wanted = [x for x, need in zip(inputs, needs, strict=True) if need and x is not None]
        out = operation.reference(config, inputs)
        grads = iter(torch.autograd.grad(out, wanted, grad.to(out.dtype), create_graph=again, allow_unused=True))
    return [next(grads) if need and x is not None else None for x, need in zip(inputs, needs, strict=True)]


# ---- the compiler ----------------------------------------------------------------------------------------------------


def register(operation: Operation) -> Operation:
    """``operation``, once the dispatcher has its two custom operations."""
    name = f"densenet_ext::{operation.name}"

    def forward(tensors: Sequence[Tensor], given: Sequence[bool], *config: Any) -> list[Tensor]:
        values, expanded = _config(config), _expand(tensors, given)
        return _distinct(operation.forward(values, expanded), _frozen_stats(operation, values, expanded))

    def fake_forward(tensors: Sequence[Tensor], given: Sequence[bool], *config: Any) -> list[Tensor]:
        values, expanded = _config(config), _expand(tensors, given)
        return _distinct(operation.allocate(values, expanded), _frozen_stats(operation, values, expanded))

    def backward(grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool], *config: Any) -> list[Tensor]:
        grads = operation.backward(_config(config), grad, tensors, results, needs)
        return [g for g in grads if g is not None]

    def fake_backward(
        grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool], *config: Any
    ) -> list[Tensor]:
        values = _config(config)
        count = values.features
        if operation.restore is not None:
            tensors = [operation.restore(values, tensors, results[0]), *tensors[1:]]  # type: ignore[arg-type]
        needed = [(i, x) for i, x in enumerate(tensors) if needs[i] and x is not None]
        return [new_features(x, x.shape) if i < count else torch.empty_like(x) for i, x in needed]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.given, *ctx.config = inputs
        _save(ctx, operation, _config(ctx.config), _expand(tensors, ctx.given), output[:-1], output[-1])
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        asked = ctx.needs_input_grad[0]
        result: list[Tensor | None] = [None] * len(asked)
        if grads[0] is not None:
            present = iter(asked)
            needs = [next(present) if there else False for there in ctx.given]
            computed = iter(call_backward(grads[0], *_load(ctx), needs, *ctx.config))
            result = [next(computed) if need else None for need in asked]
        # an empty list counts as a list of tensors, whose gradient is one too
        return result, None, *([] if value == [] else None for value in ctx.config)

    call_forward = torch.library.custom_op(
        f"{name}_forward", forward, mutates_args=(), schema=f"(Tensor[] tensors, bool[] given, {_CONFIG}) -> Tensor[]"
    )
    call_backward = torch.library.custom_op(
        f"{name}_backward",
        backward,
        mutates_args=(),
        schema=f"(Tensor grad, Tensor?[] tensors, Tensor?[] results, bool[] needs, {_CONFIG}) -> Tensor[]",
    )
    call_forward.register_fake(fake_forward)
    call_backward.register_fake(fake_backward)
    call_forward.register_autograd(autograd, setup_context=setup_context)
    _CUSTOM_OPS[operation.name] = getattr(torch.ops.densenet_ext, f"{operation.name}_forward").default
    OPERATIONS[operation.name] = operation
    return operation


def _distinct(results: list[Tensor], frozen: Tensor | None) -> list[Tensor]:
    """The results, each a tensor of its own: what a custom operation returns must not share memory, nor be None."""
    results = [*results, results[0].new_empty(0) if frozen is None else frozen]
    return [x.clone() if any(x is other for other in results[:i]) else x for i, x in enumerate(results)]


def _config(values: Sequence[Any]) -> Config:
    fields: list[Any] = [tuple(value) if isinstance(value, (list, tuple)) else value for value in values]
    return Config(*fields)


def _expand(tensors: Sequence[Tensor], given: Sequence[bool]) -> list[Tensor | None]:
    """The tensors with None where none was given: autograd for operations takes no lists with None in them."""
    present = iter(tensors)
    return [next(present) if there else None for there in given]
