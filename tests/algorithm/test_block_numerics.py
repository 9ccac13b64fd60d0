"""The dense block in low precision, under autocast, with large means, NaN and infinity, and its dropout."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from densenet_ext import reference
from tests.support.helpers import (
    DEVICE,
    F64,
    assert_as_good,
    assert_equal,
    assert_same_direction,
    buffers,
    clone,
    dense_block,
    gradients,
    make_input,
    make_layers,
    norms_of,
    parameters,
    vector_error,
)

LEVELS = ["bottlenecks", "features"]
MODES = {"train": True, "frozen": False}


@pytest.mark.parametrize("mode", ["train", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_good_as_eager(dtype: torch.dtype, mode: str, backend: str) -> None:
    layers, x = make_layers(16, 8, 32, dtype=dtype, batch=MODES[mode]), make_input(4, 16, 7, 7, dtype=dtype)
    exact_layers, exact_x = clone(layers, F64), clone(x, F64)
    grad = torch.randn(4, 40, 7, 7).to(dtype)
    results = []
    for block, y, ls in (
        (dense_block, x, layers),
        (reference.dense_block, x, clone(layers)),
        (reference.dense_block, exact_x, exact_layers),
    ):
        out = block(y, ls)
        inputs = [y, *parameters(ls)]
        results.append(([out, *buffers(norms_of(ls))], gradients(out, inputs, grad.to(y.dtype))))
    (got, got_grads), (eager, eager_grads), (exact, exact_grads) = results
    counters = [i for i, t in enumerate(got) if not t.is_floating_point()]
    assert all(torch.equal(got[i], exact[i]) for i in counters)
    values = [[t for t in found if t.is_floating_point()] for found in (got, eager, exact)]
    assert_as_good(*values, floor=16.0)
    assert_as_good(got_grads, eager_grads, exact_grads, factor=3.0, floor=16.0)
    assert_same_direction(
        got_grads, exact_grads, 1 - 100 * torch.finfo(dtype).eps ** (2 if dtype == torch.float32 else 1)
    )


@pytest.mark.parametrize("given", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("save", LEVELS)
def test_autocast(given: torch.dtype, save: str, backend: str) -> None:
    layers, x = make_layers(16, 8, 32, dtype=torch.float32), make_input(4, 16, 7, 7, dtype=given)
    results = []
    for block, y, ls, enabled in (
        (dense_block, x, layers, True),
        (reference.dense_block, x, clone(layers), True),
        (reference.dense_block, clone(x, F64), clone(layers, F64), False),
    ):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            out = block(y, ls, save)
        results.append([out, *gradients(out, [y, *parameters(ls)])])
    got, eager, exact = results
    assert got[0].dtype == given
    assert [t.dtype for t in got] == [t.dtype for t in eager]
    assert_as_good(got, eager, exact, measure=vector_error)


def test_autocast_double_backward() -> None:
    layers, x = make_layers(16, 8, 32, dtype=torch.float32), make_input(4, 16, 7, 7, dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        out = dense_block(x, layers)
    (dx,) = torch.autograd.grad(out.float().square().sum(), [x], create_graph=True)
    dx.square().sum().backward()
    assert x.grad.isfinite().all() and all(p.grad is not None for p in parameters(layers))


def test_large_mean_small_deviation(backend: str) -> None:
    """Mean 1e4 and deviation 1: E[x^2] - E[x]^2 would have no digit left in float32."""
    layers = make_layers(8, 4, 16, 2, dtype=torch.float32)
    x = (torch.randn(4, 8, 6, 6) + 1e4).requires_grad_()
    results = []
    for block, y, ls in (
        (dense_block, x, layers),
        (reference.dense_block, x, clone(layers)),
        (reference.dense_block, clone(x, F64), clone(layers, F64)),
    ):
        out = block(y, ls)
        results.append([out, *gradients(out, parameters(ls))])
    assert_as_good(*results, factor=3.0, floor=64.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("mode", ["train", "frozen"])
def test_nan_and_infinity_spread_as_eagers(bad: float, mode: str, backend: str) -> None:
    layers, x = make_layers(batch=MODES[mode], dtype=torch.float32), make_input(2, 5, 6, 6, dtype=torch.float32)
    # in the layout that both call the 3x3 convolution with: algorithms differ in how far they spread a NaN
    x = x.detach().contiguous(memory_format=torch.channels_last)
    x[1, 2, 3, 3] = bad
    x.requires_grad_()
    got, expected = dense_block(x, layers), reference.dense_block(x, layers, update=False)
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
    inputs = [x, *parameters(layers)]
    for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
        assert torch.equal(a.isfinite().all(), b.isfinite().all())


def test_dropout_has_the_distribution_of_torchs(backend: str) -> None:
    p = 0.3
    layers = make_layers(4, 8, 4, 2, dtype=torch.float32, drop_rate=p)
    x = make_input(8, 4, 16, 16, dtype=torch.float32, grad=False)
    without = dense_block(x, [layer._replace(drop_rate=0.0) for layer in layers])
    out = dense_block(x, layers)
    kept = out[:, 4:12] != 0  # the first layer's features do not depend on dropout
    assert abs(kept.float().mean().item() - (1 - p)) < 0.02
    assert_equal([out[:, 4:12][kept]], [without[:, 4:12][kept] / (1 - p)], 1e-5)
    # neighbours along every axis are independent: (1 - p)^2 of the pairs are kept
    for pair in (
        kept[:-1] & kept[1:],
        kept[:, :-1] & kept[:, 1:],
        kept[:, :, :-1] & kept[:, :, 1:],
        kept[..., :-1] & kept[..., 1:],
    ):
        assert abs(pair.float().mean().item() - (1 - p) ** 2) < 0.03
    second = out[:, 12:] != 0
    assert abs((kept & second).float().mean().item() - (1 - p) ** 2) < 0.03
    assert not torch.equal(dense_block(x, layers), out)
    torch.manual_seed(3)
    first = dense_block(x, layers)
    torch.manual_seed(3)
    assert torch.equal(dense_block(x, layers), first)


def test_dropping_everything(backend: str) -> None:
    layers, x = make_layers(drop_rate=1.0), make_input(2, 5, 4, 3)
    out = dense_block(x, layers)
    assert not out[:, 5:].any() and torch.equal(F.dropout(out[:, 5:], 1.0), out[:, 5:])
    assert_equal(gradients(out, [x]), [torch.ones_like(x)])


def test_volumes_in_float32_under_autocast(backend: str) -> None:
    """As behind their pooling, which autocast on the CPU does in float32."""
    layers, x = make_layers(16, 8, 32, dims=3, dtype=torch.float32), make_input(2, 16, 4, 4, 4, dtype=torch.float32)
    results = []
    for block, y, ls, enabled in (
        (dense_block, x, layers, True),
        (reference.dense_block, x, clone(layers), True),
        (reference.dense_block, clone(x, F64), clone(layers, F64), False),
    ):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            out = block(y, ls)
        results.append([out, *gradients(out, [y, *parameters(ls)])])
    assert results[0][0].dtype == torch.float32
    assert_as_good(*results, measure=vector_error)
