"""Tensors without data are those of PyTorch's ``FakeTensorMode``, whether a rule of ours makes them or not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from densenet_ext.memory.shapes import ShapesMode

ATEN: Any = torch.ops.aten
SHAPES = {"contiguous": (3, 5, 4, 2), "one channel": (3, 1, 4, 2), "volume": (2, 5, 3, 4, 2), "matrix": (3, 5)}
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def features(kind: str, dtype: torch.dtype) -> Tensor:
    if kind == "sliced":
        return torch.empty(3, 9, 4, 2, dtype=dtype)[:, 2:7]
    if kind == "permuted":
        return torch.empty(4, 5, 2, 3, dtype=dtype).permute(3, 1, 0, 2)
    if kind == "channels_last":
        return torch.empty(3, 5, 4, 2, dtype=dtype).contiguous(memory_format=torch.channels_last)
    return torch.empty(SHAPES[kind], dtype=dtype)


def norm(x: Tensor, training: bool, dtype: torch.dtype | None, running: bool = True) -> tuple[Any, ...]:
    vector = None if dtype is None else torch.empty(x.shape[1], dtype=dtype)
    stats = torch.empty(x.shape[1], dtype=x.dtype if dtype is None else dtype) if running else None
    return vector, vector, stats, stats, training, 0.1, 1e-5


def norm_backward(x: Tensor, training: bool, dtype: torch.dtype | None, asked: list[bool]) -> tuple[Any, ...]:
    weight, _, mean, var, *_ = norm(x, training, dtype)
    grad = torch.empty_like(x)
    _, *saved = ATEN.native_batch_norm(x, *norm(x, training, dtype))
    return ATEN.native_batch_norm_backward(grad, x, weight, mean, var, *saved, training, 1e-5, asked)


PLAIN: dict[str, Callable[[Tensor], Any]] = {
    "detach": lambda x: x.detach(),
    "slice": lambda x: x[:, 1:],
    "as_strided": lambda x: x.as_strided((2, 2), (3, 1), 1),
    "new_empty": lambda x: x.new_empty(3, 2),
    "new_empty of another dtype": lambda x: x.new_empty(7, dtype=torch.int64),
    "add": lambda x: x + torch.empty_like(x),
    "add a multiple": lambda x: torch.add(x, torch.empty_like(x), alpha=2),
    "relu_": lambda x: x.relu_(),
    "threshold_backward": lambda x: ATEN.threshold_backward(torch.empty_like(x), x, 0),
    "norm": lambda x: ATEN.native_batch_norm(x, *norm(x, True, x.dtype)),
    "norm in evaluation": lambda x: ATEN.native_batch_norm(x, *norm(x, False, x.dtype)),
    "norm without parameters": lambda x: ATEN.native_batch_norm(x, *norm(x, True, None, running=False)),
    "norm of float32": lambda x: ATEN.native_batch_norm(x, *norm(x, True, torch.float32)),
    "norm backward": lambda x: norm_backward(x, True, x.dtype, [True, True, True]),
    "norm backward in evaluation": lambda x: norm_backward(x, False, x.dtype, [True, True, True]),
    "norm backward, only the input": lambda x: norm_backward(x, True, x.dtype, [True, False, False]),
    "norm backward of float32": lambda x: norm_backward(x, True, torch.float32, [True, True, True]),
}
"""Operations for which there is a rule, by what they are."""

OTHERS: dict[str, Callable[[Tensor], Any]] = {
    "norm backward, only parameters": lambda x: norm_backward(x, True, x.dtype, [False, True, True]),
    "add a number": lambda x: x + 1,
    "add another dtype": lambda x: x + torch.empty(x.shape, dtype=torch.float16),
    "add another shape": lambda x: x + x[:1],
    "add another layout": lambda x: x + torch.empty_like(x).transpose(0, 1).contiguous().transpose(0, 1),
    "add in place": lambda x: x.add_(1),
    "add a constant": lambda x: x + torch.tensor([1.0, 2.0])[:1],
    "new_empty on another device": lambda x: x.new_empty(3, device="cuda"),
    "product": lambda x: x * x,
    "mean": lambda x: x.mean((0, 1)),
}
"""Operations that are left to ``FakeTensorMode``."""


def described(value: Any) -> Any:
    """The value with descriptions in the place of tensors."""

    def of(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        storage = x.untyped_storage().nbytes()
        return (type(x).__name__, x.dtype, x.device, tuple(x.shape), x.stride(), x.storage_offset(), storage)

    return tree_map(of, value)


@torch.no_grad()
def results(mode: FakeTensorMode, call: Callable[[Tensor], Any], kind: str, dtype: torch.dtype) -> Any:
    with mode:
        x = features(kind, dtype)
        value = call(x)
        first = value[0] if isinstance(value, tuple) else value
        shared = isinstance(first, Tensor) and first.untyped_storage() is x.untyped_storage()
        return described(value), shared, described(x), x._version


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", [*SHAPES, "channels_last", "sliced", "permuted"])
def test_every_result_is_that_of_pytorchs_own_mode(kind: str, dtype: torch.dtype) -> None:
    for name, call in {**PLAIN, **OTHERS}.items():
        if dtype == torch.float64 and "float32" in name:  # which no norm takes
            continue
        expected = results(FakeTensorMode(allow_non_fake_inputs=True), call, kind, dtype)
        assert results(ShapesMode(), call, kind, dtype) == expected, name


@pytest.mark.parametrize("name", PLAIN)
def test_plain_operations_have_a_rule(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def note(self: Any, func: Any, *args: Any) -> Any:
        asked.append(func.name())
        return own(self, func, *args)

    own = FakeTensorMode.dispatch
    monkeypatch.setattr(FakeTensorMode, "dispatch", note)
    dtype = torch.bfloat16 if "of float32" in name else torch.float32
    results(ShapesMode(), PLAIN[name], "channels_last", dtype)
    made = {"aten::empty.memory_format", "aten::empty_like", "aten::clone"}  # the arguments
    assert set(asked) <= made, asked


def test_autograd_runs_by_the_rules() -> None:
    found = []
    for mode in (FakeTensorMode(), ShapesMode()):
        with mode:
            conv, norm = torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4)
            x = torch.empty(2, 3, 8, 8, requires_grad=True)
            norm(conv(x)).relu_().sum().backward()
            found.append(described([x.grad, *(p.grad for p in (*conv.parameters(), *norm.parameters()))]))
    assert found[0] == found[1]


def test_what_operations_do_inside_is_not_told() -> None:
    told: list[Tensor] = []
    mode = ShapesMode()
    with mode:
        x = torch.empty(4, 5)
        with mode.telling(told.append):
            y = torch.nn.functional.gelu(x)  # PyTorch's Python, of several operations
            z = y[1:]
            parts = torch.split(x, 2)
        torch.empty(3)
    assert [tuple(each.shape) for each in told] == [(4, 5), (3, 5), (2, 5), (2, 5)]
    assert told[0] is y and told[1].untyped_storage() is z.untyped_storage() and len(parts) == 2
