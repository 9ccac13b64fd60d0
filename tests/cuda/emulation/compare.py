"""Runs an operator on the emulated GPU and on the CPU backend, and holds the results against each other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from densenet_ext import kernels

from . import params
from .library import Library

SENTINEL = -77.0  # what an output's memory holds before, and beside the output also afterwards


def acc_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def sliced(rows: Tensor, offset: int = 0, behind: int = 0) -> Tensor:
    """The same rows as columns [offset, offset + C) of a wider buffer."""
    M, C = rows.shape
    if rows.dtype == torch.uint8:
        buffer = torch.full((M, offset + C + behind), 255, dtype=rows.dtype)
    else:
        buffer = torch.full((M, offset + C + behind), SENTINEL, dtype=rows.dtype)
    view = buffer[:, offset : offset + C]
    view.copy_(rows)
    return view


def random_rows(M: int, C: int, dtype: torch.dtype, offset: int = 0, behind: int = 0) -> Tensor:
    return sliced((torch.randn(M, C, dtype=torch.float64) * 1.5 + 0.5).to(dtype), offset, behind)


def random_norm(rows: Tensor, affine: bool = True) -> dict[str, object]:
    """A BatchNorm with about the rows' own statistics: not exactly, as x * scale + shift would cancel to nothing for
    a single row."""
    dtype, C = acc_dtype(rows.dtype), rows.shape[1]
    exact = rows.double() if rows.shape[0] > 0 else torch.zeros(1, C, dtype=torch.float64)
    return {
        "mean": (exact.mean(0) - 0.3).to(dtype),
        "var": (exact.var(0, unbiased=False) + 0.2).to(dtype),
        "weight": torch.randn(C).to(dtype) if affine else None,
        "bias": torch.randn(C).to(dtype) if affine else None,
        "eps": 1e-5,
    }


def exact_rows(M: int, C: int, dtype: torch.dtype, offset: int = 0, behind: int = 0) -> Tensor:
    """Small whole numbers, which ``exact_norm`` changes without any rounding: maxima are then the same by every
    backend, and ties are frequent."""
    return sliced(torch.randint(-4, 5, (M, C)).to(dtype), offset, behind)


def exact_norm(rows: Tensor) -> dict[str, object]:
    dtype, C = acc_dtype(rows.dtype), rows.shape[1]
    return {
        "mean": torch.randint(-2, 3, (C,)).to(dtype),
        "var": torch.ones(C, dtype=dtype),
        "weight": torch.tensor([1.0, -1.0, 0.5, 2.0]).repeat(C // 4 + 1)[:C].to(dtype),
        "bias": torch.randint(-2, 3, (C,)).to(dtype),
        "eps": 0.0,
    }


def _copy(value: object) -> object:
    """A copy with the same strides and the same memory around it."""
    if not isinstance(value, Tensor):
        return value
    storage = value.untyped_storage().clone()
    return torch.empty(0, dtype=value.dtype).set_(storage, value.storage_offset(), value.shape, value.stride())


def _whole(value: Tensor) -> Tensor:
    """All the memory that a tensor is a part of, as bytes."""
    return torch.empty(0, dtype=torch.uint8).set_(value.untyped_storage(), 0, (value.untyped_storage().nbytes(),))


def _around(value: Tensor) -> Tensor:
    """The bytes of a tensor's memory that are not the tensor."""
    copy = _copy(value)
    assert isinstance(copy, Tensor)
    copy.view(torch.uint8 if copy.element_size() == 1 else copy.dtype).zero_()
    return _whole(copy)


def assert_close(got: Tensor, expected: Tensor, terms: int, name: str) -> None:
    """Within the rounding of the storage type, and of a sum of so many terms in the acc type.

    NaNs must stand in the same places, infinities be the same.
    """
    if got.dtype == torch.uint8:
        assert torch.equal(got, expected), name
        return
    a, b = got.double(), expected.double()
    assert torch.equal(a.isnan(), b.isnan()), f"{name}: NaN in other places"
    finite = b.isfinite()
    assert torch.equal(a[~finite].nan_to_num(0.0), b[~finite].nan_to_num(0.0)), f"{name}: infinity in other places"
    if not bool(finite.any()):
        return
    scale = b[finite].abs().max().item() + 1e-30
    own, acc = torch.finfo(got.dtype).eps, torch.finfo(acc_dtype(got.dtype)).eps
    bound = own * b[finite].abs() + 8 * acc * terms**0.5 * scale
    worst = ((a[finite] - b[finite]).abs() / bound).max().item()
    assert worst <= 1.0, f"{name}: {worst:.2f} times the bound"


def check(library: Library, operator: str, terms: int = 1, orders: Sequence[int] = (0,), **arguments: object) -> dict:
    """Compares all that the operator writes with the CPU's; arguments in the order of its schema.

    Memory beside the results must keep its bytes, and each order of the threads give the same bits. Returns the
    emulated arguments.
    """
    first = next(v for v in arguments.values() if isinstance(v, Tensor) and v.is_floating_point())
    on_cpu = {name: _copy(value) for name, value in arguments.items()}
    getattr(kernels.select(first), operator)(*(v for name, v in on_cpu.items() if name != "tf32"))
    written = [name for name in params.OPERATORS[operator][1].split() if isinstance(arguments.get(name), Tensor)]

    runs = []
    for order in orders:
        emulated = {name: _copy(value) for name, value in arguments.items()}
        library.set_order(order)
        library(operator, **emulated)
        runs.append(emulated)
    library.set_order(0)
    for name in written:
        got, expected = runs[0][name], on_cpu[name]
        assert isinstance(got, Tensor) and isinstance(expected, Tensor)
        assert_close(got, expected, terms, f"{operator}: {name}")
        for other in runs[1:]:
            assert torch.equal(_whole(got), _whole(other[name])), f"{operator}: {name} depends on the threads' order"
    for name in written:
        before, after = _around(arguments[name]), _around(runs[0][name])
        assert torch.equal(before, after), f"{operator}: wrote beside {name}"
    return runs[0]
