"""Tensors without data, as ``FakeTensorMode`` has them, in a fraction of its time for what networks do most.

``FakeTensorMode`` either looks an operation up by everything that it is given, in 0.1 ms, or runs PyTorch's Python for
its shapes, in up to 9 ms. A training step of a DenseNet-121 has thousands of operations. The rules here give the same
tensors; an operation without a rule, or with an argument that its rule does not know, goes to ``FakeTensorMode``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, in_kernel_invocation_manager
from torch.utils._pytree import tree_leaves


class ShapesMode(FakeTensorMode):
    """``FakeTensorMode`` with rules for frequent operations. `telling` of results counts what they allocate."""

    def __init__(self) -> None:
        super().__init__(allow_non_fake_inputs=True)  # what a user's forward makes of its own has data
        self._tell: Callable[[Tensor], None] | None = None

    @contextmanager
    def telling(self, tell: Callable[[Tensor], None]) -> Iterator[None]:
        """Calls ``tell``, inside its ``with``, with every tensor that an operation gives, new or a view.

        A second mode above this one would see them too, but the way through each takes as long as a rule.
        """
        before, self._tell = self._tell, tell
        try:
            yield
        finally:
            self._tell = before

    def empty(self, sizes: Sequence[int], strides: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Returns a tensor of this mode."""
        return FakeTensor(self, torch.empty_strided(sizes, strides, dtype=dtype, device="meta"), device)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE:  # autograd asks whatever it meets
            return args[0].fake_device
        tell, self._tell = self._tell, None  # operations that an operation consists of are nobody's
        try:
            rule = _RULES.get(func)
            result = None if rule is None else rule(self, func, *args, **(kwargs or {}))
            if result is None:
                result = super().__torch_dispatch__(func, types, args, kwargs or {})
        finally:
            self._tell = tell
        if tell is not None:
            # most results are a tensor: no tree
            for value in (result,) if isinstance(result, Tensor) else tree_leaves(result):
                if isinstance(value, Tensor):
                    tell(value)
        return result

    def knows(self, *tensors: Any) -> bool:
        """Returns whether all are plain tensors of this mode, on one device."""
        own = all(type(x) is FakeTensor and x.fake_mode is self and x.constant is None for x in tensors)
        return own and len({x.fake_device for x in tensors}) == 1

    def like(self, x: Tensor) -> Tensor:
        """Returns a tensor like x, of this mode."""
        return self.empty(x.shape, x.stride(), x.dtype, x.fake_device)  # type: ignore[attr-defined]


# ---- rules: what an operation gives, or None where they do not tell -------------------------------------------------


def _on_device_of_first(mode: ShapesMode, func: Any, x: Any, *args: Any, device: Any = None, **kwargs: Any) -> Any:
    """An operation that takes no other tensor, and whose shape is found in C++."""
    if device is not None or not mode.knows(x):
        return None
    with in_kernel_invocation_manager(mode):
        result = func(x, *args, **kwargs)
    return FakeTensor(mode, result, x.fake_device)


def _elementwise(mode: ShapesMode, func: Any, x: Any, y: Any, *numbers: Any, **kwargs: Any) -> Any:
    return mode.like(x) if mode.knows(x, y) and _are_alike(x, y) else None


def _in_place(mode: ShapesMode, func: Any, x: Any) -> Any:
    return x if mode.knows(x) else None


def _batch_norm(
    mode: ShapesMode, func: Any, x: Any, weight: Any, bias: Any, mean: Any, var: Any, training: bool, *numbers: float
) -> Any:
    if not _is_norm_of(mode, x, weight, bias, mean, var):
        return None
    count = x.shape[1] if training else 0
    return mode.like(x), *(mode.empty((count,), (1,), x.dtype, x.fake_device) for _ in range(2))


def _batch_norm_backward(mode: ShapesMode, func: Any, grad: Any, x: Any, weight: Any, *stats_and_numbers: Any) -> Any:
    *stats, training, eps, asked = stats_and_numbers
    if not asked[0] or not _is_norm_of(mode, x, weight, *stats) or not mode.knows(x, grad) or not _are_alike(x, grad):
        return None
    dtype = x.dtype if weight is None else weight.dtype
    sums = (mode.empty((x.shape[1],), (1,), dtype, x.fake_device) if needed else None for needed in asked[1:])
    return mode.like(x), *sums


def _is_norm_of(mode: ShapesMode, x: Any, *vectors: Any) -> bool:
    """Returns whether x, with these vectors of its channels, is what a processor's batch_norm takes."""
    given = [vector for vector in vectors if vector is not None]
    if not mode.knows(x, *given) or x.fake_device.type != "cpu" or not _is_dense(x) or x.numel() == 0:
        return False
    dtypes = (x.dtype, torch.float32) if x.element_size() == 2 else (x.dtype,)
    return all(vector.dtype in dtypes for vector in given)


def _are_alike(x: Tensor, y: Tensor) -> bool:
    return x.dtype == y.dtype and x.shape == y.shape and x.stride() == y.stride() and _is_dense(x)


def _is_dense(x: Tensor) -> bool:
    layout = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return x.is_contiguous() or (layout is not None and x.is_contiguous(memory_format=layout))


_aten: Any = torch.ops.aten
_DEVICE: Any = torch.ops.prim.device.default
_RULES: dict[Any, Callable[..., Any]] = {
    _aten.detach.default: _on_device_of_first,
    _aten.slice.Tensor: _on_device_of_first,
    _aten.as_strided.default: _on_device_of_first,
    _aten.new_empty.default: _on_device_of_first,
    _aten.add.Tensor: _elementwise,
    _aten.threshold_backward.default: _elementwise,
    _aten.relu_.default: _in_place,
    _aten.native_batch_norm.default: _batch_norm,
    _aten.native_batch_norm_backward.default: _batch_norm_backward,
}
