"""What the tests share: units with parameters, comparison with the reference, bytes kept and bytes in use.

A result in low precision is judged against float64 *relative to eager's own error*: the fused form may be at most a
small factor worse, with a rounding floor for where eager happens to be exact. Gradients are also judged as vectors,
since a sign error or a missing row hides in elementwise tolerances.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

from densenet_ext.algorithm import basic_block as basic
from densenet_ext.algorithm import block
from densenet_ext.algorithm.values import BasicLayer, Layer, Norm

F64 = torch.float64
DEVICE = torch.get_default_device()  # of the run: conftest.py
SPATIAL = {1: (7,), 2: (5, 4), 3: (3, 4, 2)}


@contextmanager
def no_warnings() -> Iterator[None]:
    """Every warning is an error, but for what PyTorch says of its own operators when asked to be deterministic."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "(?s).*does not have a deterministic implementation")
        yield


def generator(seed: int) -> torch.Generator:
    """A seeded generator of the device on which the tests run."""
    return torch.Generator(DEVICE).manual_seed(seed)


# ---- units -----------------------------------------------------------------------------------------------------------


def make_norm(
    C: int,
    dtype: torch.dtype = F64,
    *,
    batch: bool = True,
    update: bool | None = None,
    affine: bool = True,
    tracked: bool = True,
    momentum: float | None = 0.1,
) -> Norm:
    """A norm with random parameters (leaves) and running statistics."""
    weight = (torch.rand(C, dtype=F64) + 0.5).to(dtype).requires_grad_() if affine else None
    bias = torch.randn(C, dtype=F64).to(dtype).requires_grad_() if affine else None
    mean = torch.randn(C, dtype=F64).to(dtype) if tracked else None
    var = (torch.rand(C, dtype=F64) + 0.5).to(dtype) if tracked else None
    count = torch.tensor(0) if tracked else None
    return Norm(
        weight, bias, mean, var, count, batch, (batch and tracked) if update is None else update, momentum, 1e-5
    )


def make_conv(out: int, C: int, dims: int, size: int, dtype: torch.dtype = F64) -> Tensor:
    """A convolution weight (leaf) that keeps the scale of its input."""
    weight = torch.randn(out, C, *[size] * dims, dtype=F64) / (C * size**dims) ** 0.5
    return weight.to(dtype).requires_grad_()


def make_layers(
    C0: int = 5,
    k: int = 3,
    b: int = 6,
    count: int = 3,
    dims: int = 2,
    dtype: torch.dtype = F64,
    *,
    batch: bool | Sequence[bool] = True,
    drop_rate: float = 0.0,
    **norm: Any,
) -> list[Layer]:
    """Dense layers; ``batch``: for all norms, or one after the other in the order norm1, norm2 of each layer."""
    modes = [batch] * (2 * count) if isinstance(batch, bool) else list(batch)
    return [
        Layer(
            make_norm(C0 + i * k, dtype, batch=modes[2 * i], **norm),
            make_conv(b, C0 + i * k, dims, 1, dtype),
            make_norm(b, dtype, batch=modes[2 * i + 1], **norm),
            make_conv(k, b, dims, 3, dtype),
            drop_rate,
        )
        for i in range(count)
    ]


def dense_block(*args: Any, **kwargs: Any) -> Tensor:
    """The features alone of ``algorithm.block.dense_block``, as its reference returns them."""
    return block.dense_block(*args, **kwargs)[0]


def basic_block(*args: Any, **kwargs: Any) -> Tensor:
    """The features alone of ``algorithm.basic_block.basic_block``, as its reference returns them."""
    return basic.basic_block(*args, **kwargs)[0]


def make_input(*size: int, dtype: torch.dtype = F64, grad: bool = True) -> Tensor:
    """A leaf of ``size`` [N, C, *spatial]."""
    return torch.randn(*size, dtype=F64).to(dtype).requires_grad_(grad)


def norms_of(layers: Iterable[Layer]) -> list[Norm]:
    return [norm for layer in layers for norm in (layer.norm1, layer.norm2)]


def parameters(layers: Iterable[Layer]) -> list[Tensor]:
    """Every parameter, layer by layer."""
    found = []
    for layer in layers:
        first, second = (layer.conv1, layer.conv1_bias), (layer.conv2, layer.conv2_bias)
        for t in (*layer.norm1[:2], *first, *layer.norm2[:2], *second):
            if t is not None:
                found.append(t)
    return found


def buffers(norms: Iterable[Norm]) -> list[Tensor]:
    """Every running statistic and counter."""
    return [t for norm in norms for t in norm[2:5] if t is not None]


def clone(value: Any, dtype: torch.dtype | None = None) -> Any:
    """A copy of tensors, norms, layers and lists of them, each tensor a leaf of its own; floats in ``dtype``."""
    if isinstance(value, Tensor):
        copy = value.detach().clone()
        if dtype is not None and copy.is_floating_point():
            copy = copy.to(dtype)
        return copy.requires_grad_(value.requires_grad)
    if isinstance(value, (Norm, Layer, BasicLayer)):
        return type(value)(*(clone(x, dtype) for x in value))
    if isinstance(value, (list, tuple)):
        return type(value)(clone(x, dtype) for x in value)
    return value


# ---- comparison ------------------------------------------------------------------------------------------------------


def error(got: Tensor, expected: Tensor) -> float:
    """The largest difference relative to the largest value expected; infinite where NaN stands on one side only."""
    if got.numel() == 0:
        return 0.0 if got.shape == expected.shape else float("inf")
    got, expected = got.detach().to(F64), expected.detach().to(F64)
    if not torch.equal(got.isnan(), expected.isnan()) or not torch.equal(got.isinf(), expected.isinf()):
        return float("inf")
    usable = expected.isfinite()
    if not usable.any():
        return 0.0
    scale = expected[usable].abs().max().clamp_min(1e-30)
    return ((got - expected)[usable].abs().max() / scale).item()


def assert_equal(got: Sequence[Tensor | None], expected: Sequence[Tensor | None], tolerance: float = 1e-10) -> None:
    """Float64: the same shapes and the same values but for the order of sums."""
    assert len(got) == len(expected)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert (a is None) == (b is None), f"tensor {i}: {a} against {b}"
        if a is not None and b is not None:
            assert a.shape == b.shape, f"tensor {i}: shape {tuple(a.shape)} against {tuple(b.shape)}"
            assert error(a, b) <= tolerance, f"tensor {i} {tuple(a.shape)}: error {error(a, b):.2e}"


def vector_error(got: Tensor, expected: Tensor) -> float:
    """The length of the difference relative to the length of what was expected."""
    got, expected = got.detach().to(F64), expected.detach().to(F64)
    return ((got - expected).norm() / expected.norm().clamp_min(1e-30)).item()


def assert_as_good(
    got: Sequence[Tensor],
    eager: Sequence[Tensor],
    exact: Sequence[Tensor],
    factor: float = 2.0,
    floor: float = 4.0,
    least: float = 0.0,
    measure: Callable[[Tensor, Tensor], float] = error,
) -> None:
    """``got`` is as near to ``exact`` (float64) as ``eager`` is: ``factor`` times, or ``floor`` roundings of its
    dtype, or an error of ``least``."""
    for i, (a, e, x) in enumerate(zip(got, eager, exact, strict=True)):
        assert a.dtype == e.dtype and a.shape == e.shape, f"tensor {i}: {a.dtype} {a.shape} against {e.dtype} {e.shape}"
        allowed = max(factor * measure(e, x), floor * torch.finfo(a.dtype).eps, least)
        found = measure(a, x)
        assert found <= allowed, f"tensor {i} {tuple(a.shape)}: error {found:.2e}, allowed {allowed:.2e}"


def assert_same_direction(got: Sequence[Tensor], exact: Sequence[Tensor], cosine: float) -> None:
    """Gradients as vectors: nearly parallel, of the same length, and no row missing."""
    for i, (a, x) in enumerate(zip(got, exact, strict=True)):
        a, x = a.detach().to(F64).flatten(), x.detach().to(F64).flatten()
        if x.norm() == 0:
            continue
        found = (a @ x / (a.norm() * x.norm()).clamp_min(1e-300)).item()
        assert found >= cosine, f"gradient {i}: cosine {found:.6f} below {cosine}"
        ratio = (a.norm() / x.norm()).item()
        assert abs(ratio - 1) <= 3 * (1 - cosine) ** 0.5, f"gradient {i}: {ratio:.4f} times as long as it should be"
        missing = ((a == 0) & (x.abs() > 1e-2 * x.abs().max())).sum().item()
        assert missing == 0, f"gradient {i}: {missing} of {x.numel()} values are missing"


def gradients(out: Tensor, inputs: Sequence[Tensor], grad: Tensor | None = None, **kwargs: Any) -> list[Tensor]:
    """``torch.autograd.grad`` with ones unless a gradient is given."""
    return list(torch.autograd.grad(out, inputs, torch.ones_like(out) if grad is None else grad, **kwargs))


# ---- memory ----------------------------------------------------------------------------------------------------------


class Kept:
    """What autograd saved: the distinct storages, without those of tensors that live anyway."""

    def __init__(self, existing: Iterable[Tensor]) -> None:
        self._existing = {t.untyped_storage().data_ptr() for t in existing}
        self.storages: dict[int, int] = {}
        self.count = 0

    def add(self, x: Tensor) -> Tensor:
        self.count += 1
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._existing:
            self.storages[storage.data_ptr()] = storage.nbytes()
        return x

    @property
    def bytes(self) -> int:
        return sum(self.storages.values())


@contextmanager
def kept_for_backward(existing: Iterable[Tensor] = ()) -> Iterator[Kept]:
    """Counts what the code inside saves for backward; ``existing`` (inputs, parameters, buffers) is not counted."""
    kept = Kept(existing)
    with saved_tensors_hooks(kept.add, lambda x: x):
        yield kept


def gradcheck(function: Callable[..., Tensor], inputs: Sequence[Tensor], backend: str) -> bool:
    """Compares first derivatives with differences: every entry; in the slow emulator along one random direction."""
    return torch.autograd.gradcheck(function, inputs, fast_mode=backend == "emulated")


# Bytes by which the allocator may round up what a few tensors need; on a GPU each takes multiples of 512.
SLACK = 1024 if DEVICE.type == "cpu" else 4096


def allocations(run: Callable[[], Any]) -> tuple[int, int]:
    """(bytes that stay after ``run`` while its result lives, peak above the start), as the allocator counts them."""
    if DEVICE.type == "cuda":
        start = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = run()
        return torch.cuda.memory_allocated() - start, torch.cuda.max_memory_allocated() - start
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        result = run()
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del result
    return now, peak
