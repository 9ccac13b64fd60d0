"""The fused units as custom operations, which is how ``torch.compile`` sees them: opaque, with shapes and gradients.

Each unit gives ``densenet_ext::<unit>_forward`` and ``densenet_ext::<unit>_backward``, registered from the unit's own
plain functions. Both are functional: the running statistics move outside, by operations that the compiler traces, so
they move once however often the graph is replayed or partitioned.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_ext.algorithm.basic_block import BASIC_BLOCK
from densenet_ext.algorithm.block import BLOCK
from densenet_ext.algorithm.concat import BOTTLENECK, CAT_BN_RELU
from densenet_ext.algorithm.head import HEAD
from densenet_ext.algorithm.layer import LAYER
from densenet_ext.algorithm.layout import new_features
from densenet_ext.algorithm.stem import STEM
from densenet_ext.algorithm.transition import TRANSITION
from densenet_ext.algorithm.unit import Config, Tensors, Unit

# Config's fields, in its order; what an eager call may look up beside a tensor is left out.
_CONFIG = (
    "bool[] batch_stats, float[] eps, ScalarType dtype, int features, float[] drop_rates, "
    "int[] window, int[] stride, int[] padding, str save, str[] groups, bool new_first"
)
_FIELDS = 11


def _config(values: Sequence[Any]) -> Config:
    fields: list[Any] = [tuple(value) if isinstance(value, (list, tuple)) else value for value in values]
    return Config(*fields)


def _expand(tensors: Sequence[Tensor], given: Sequence[bool]) -> list[Tensor | None]:
    """The tensors with None where none was given: autograd for operations takes no lists with None in them."""
    present = iter(tensors)
    return [next(present) if there else None for there in given]


def _register(unit: Unit) -> Any:
    name = f"densenet_ext::{unit.name}"

    def forward(tensors: Sequence[Tensor], given: Sequence[bool], *config: Any) -> list[Tensor]:
        return unit.forward(_config(config), _expand(tensors, given))

    def fake_forward(tensors: Sequence[Tensor], given: Sequence[bool], *config: Any) -> list[Tensor]:
        return unit.allocate(_config(config), _expand(tensors, given))

    def backward(grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool], *config: Any) -> list[Tensor]:
        grads = unit.backward(_config(config), grad, tensors, results, needs)
        return [g for g in grads if g is not None]

    def fake_backward(
        grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool], *config: Any
    ) -> list[Tensor]:
        values = _config(config)
        count = values.features
        if unit.restore is not None:
            tensors = [unit.restore(values, tensors, results[0]), *tensors[1:]]  # type: ignore[arg-type]
        needed = [(i, x) for i, x in enumerate(tensors) if needs[i] and x is not None]
        return [new_features(x, x.shape) if i < count else torch.empty_like(x) for i, x in needed]

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
        tensors, ctx.given, *ctx.config = inputs
        expanded = _expand(tensors, ctx.given)
        if unit.restore is None:
            ctx.save_for_backward(*expanded, None, *output[1:])
        else:
            ctx.save_for_backward(None, *expanded[1:], *output)
        ctx.set_materialize_grads(False)

    def autograd(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
        count, saved, asked = len(ctx.given), ctx.saved_tensors, ctx.needs_input_grad[0]
        result: list[Tensor | None] = [None] * len(asked)
        if grads[0] is not None:
            present = iter(asked)
            needs = [next(present) if there else False for there in ctx.given]
            computed = iter(call_backward(grads[0], list(saved[:count]), list(saved[count:]), needs, *ctx.config))
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
    return getattr(torch.ops.densenet_ext, f"{unit.name}_forward").default


_ALL = (BLOCK, BASIC_BLOCK, LAYER, TRANSITION, STEM, HEAD, CAT_BN_RELU, BOTTLENECK)
UNITS: dict[str, Unit] = {unit.name: unit for unit in _ALL}
_FORWARD: dict[str, Any] = {name: _register(unit) for name, unit in UNITS.items()}


def call(name: str, config: Config, tensors: Tensors) -> list[Tensor]:
    """The unit's results by its custom operation; all but the first are values, without gradient."""
    given = [x is not None for x in tensors]
    out, *values = _FORWARD[name]([x for x in tensors if x is not None], given, *config[:_FIELDS])
    return [out, *(value.detach() for value in values)]
