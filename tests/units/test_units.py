"""Transition, stem and head against the usual formulation: values, every gradient, every buffer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from densenet_ext import kernels, reference
from densenet_ext.algorithm import block, head, stem, transition
from densenet_ext.algorithm.values import Norm
from tests.support.helpers import (
    F64,
    assert_as_good,
    assert_equal,
    assert_same_direction,
    buffers,
    clone,
    dense_block,
    gradcheck,
    gradients,
    make_conv,
    make_input,
    make_layers,
    make_norm,
)

UNITS: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor]]] = {
    "transition": (transition.transition, reference.transition),
    "stem": (stem.stem, reference.stem),
    "head": (head.head, reference.head),
}
SPATIAL = {1: (9,), 2: (7, 6), 3: (5, 4, 6)}


def arguments(unit: str, C: int = 5, dims: int = 2, dtype: torch.dtype = F64, **norm: Any) -> tuple[Any, ...]:
    """All but x: the norm, and the transition's weight."""
    values = make_norm(C, dtype, **norm)
    return (values, make_conv(4, C, dims, 1, dtype)) if unit == "transition" else (values,)


def leaves(args: tuple[Any, ...]) -> list[Tensor]:
    norm: Norm = args[0]
    return [t for t in (norm.weight, norm.bias, *args[1:]) if isinstance(t, Tensor)]


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equals_reference(unit: str, dims: int, batch: bool, backend: str) -> None:
    fused, usual = UNITS[unit]
    args, x = arguments(unit, dims=dims, batch=batch), make_input(2, 5, *SPATIAL[dims])
    others = clone(args)
    for _ in range(3 if dims == 2 else 1):
        got, expected = fused(x, *args), usual(x, *others)
        assert_equal([got], [expected])
        grad = torch.randn_like(expected)
        assert_equal(gradients(got, [x, *leaves(args)], grad), gradients(expected, [x, *leaves(others)], grad))
        assert_equal(buffers([args[0]]), buffers([others[0]]))


@pytest.mark.parametrize("batch", [True, False])
def test_gradcheck(unit: str, batch: bool, backend: str) -> None:
    args, x = arguments(unit, C=3, batch=batch), make_input(2, 3, 5, 4)
    inputs = [x, *leaves(args)]
    assert gradcheck(lambda *_: UNITS[unit][0](x, *args), inputs, backend)
    assert torch.autograd.gradgradcheck(lambda *_: UNITS[unit][0](x, *args), inputs, fast_mode=True)


@pytest.mark.parametrize("options", [{"affine": False}, {"momentum": None}, {"tracked": False}], ids=str)
def test_kinds_of_norms(unit: str, options: dict) -> None:
    args, x = arguments(unit, **options), make_input(2, 5, 6, 4)
    others = clone(args)
    for _ in range(3):
        assert_equal([UNITS[unit][0](x, *args)], [UNITS[unit][1](x, *others)])
    assert_equal(buffers([args[0]]), buffers([others[0]]))


@pytest.mark.parametrize("size", [(1, 1, 2, 2), (3, 7, 2, 3), (2, 13, 11, 5), (1, 5, 3, 2), (2, 33, 4, 4)], ids=str)
def test_odd_shapes(unit: str, size: tuple[int, ...], backend: str) -> None:
    args, x = arguments(unit, size[1]), make_input(*size)
    got, expected = UNITS[unit][0](x, *args), UNITS[unit][1](x, *args, update=False)
    assert_equal([got], [expected])
    inputs = [x, *leaves(args)]
    assert_equal(gradients(got, inputs), gradients(expected, inputs))


def test_any_layout(unit: str, backend: str) -> None:
    args = arguments(unit)
    wide = torch.randn(2, 6, 4, 11, dtype=F64)
    inputs = {
        "contiguous": torch.randn(2, 5, 6, 4, dtype=F64),
        "channel slice": wide.permute(0, 3, 1, 2)[:, 3:8],
        "permuted": torch.randn(4, 6, 5, 2, dtype=F64).permute(3, 2, 1, 0),
        "expanded": torch.randn(1, 5, 6, 1, dtype=F64).expand(2, 5, 6, 4),
    }
    for x in inputs.values():
        x = x.requires_grad_()
        got, expected = UNITS[unit][0](x, *args), UNITS[unit][1](x, *args, update=False)
        assert_equal([got], [expected])
        grad = torch.randn_like(expected.contiguous())
        for g in (grad, torch.ones((), dtype=F64).expand_as(got)):
            wanted = [x, *leaves(args)]
            assert_equal(
                gradients(got, wanted, g, retain_graph=True), gradients(expected, wanted, g, retain_graph=True)
            )


def test_only_what_is_asked_for(unit: str, backend: str) -> None:
    for batch in (True, False):
        args, x = arguments(unit, batch=batch), make_input(2, 5, 6, 4)
        everything = [x, *leaves(args)]
        expected = gradients(UNITS[unit][1](x, *args, update=False), everything)
        for i, t in enumerate(everything):
            for other in everything:
                other.requires_grad_(other is t)
            assert_equal(gradients(UNITS[unit][0](x, *args), [t]), [expected[i]])


def test_empty_batch_and_one_value_per_channel(unit: str) -> None:
    args = arguments(unit)
    assert_equal([UNITS[unit][0](make_input(0, 5, 4, 4), *args)], [UNITS[unit][1](make_input(0, 5, 4, 4), *args)])
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        UNITS[unit][0](make_input(1, 5, 1, 1), *args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_is_as_good_as_eager(unit: str, dtype: torch.dtype, backend: str) -> None:
    args, x = arguments(unit, 16, dtype=dtype), make_input(4, 16, 8, 8, dtype=dtype)
    results = []
    for f, y, mine in (
        (UNITS[unit][0], x, args),
        (UNITS[unit][1], x, clone(args)),
        (UNITS[unit][1], clone(x, F64), clone(args, F64)),
    ):
        out = f(y, *mine)
        weight = torch.linspace(-1, 1, out.numel(), dtype=F64).view(out.shape).to(dtype).to(y.dtype)
        results.append([out, *gradients(out, [y, *leaves(mine)], weight)])
    got, eager, exact = results
    if unit == "stem" and dtype == torch.bfloat16:
        # eager rounds before it compares: where two values round to one it may pick another than float64 does
        assert_as_good(got[:1], eager[:1], exact[:1])
        assert_same_direction(got[1:], exact[1:], 0.98)
        return
    assert_as_good(got, eager, exact, factor=3.0, floor=16.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_spread_as_eagers(unit: str, bad: float, backend: str) -> None:
    for batch in (True, False):
        args, x = arguments(unit, batch=batch), make_input(2, 5, 6, 6)
        with torch.no_grad():
            x[1, 2, 3, 3] = bad
        got, expected = UNITS[unit][0](x, *args), UNITS[unit][1](x, *args, update=False)
        assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(got.isinf(), expected.isinf())
        inputs = [x, *leaves(args)]
        for a, b in zip(gradients(got, inputs), gradients(expected, inputs), strict=True):
            assert torch.equal(a.isnan(), b.isnan())


def test_ties_of_the_maximum_go_where_pytorch_sends_them(backend: str) -> None:
    norm = make_norm(3, batch=False)
    x = torch.randint(-2, 3, (2, 3, 9, 8)).to(F64).requires_grad_()
    with torch.no_grad():
        x[0, 0, 2:5, 3:5] = float("nan")
    for geometry in ((3, 2, 1), (2, 2, 0), (3, 1, 1), ((3, 2), (2, 1), (1, 0))):
        got, expected = stem.stem(x, norm, *geometry), reference.stem(x, norm, *geometry)
        assert_equal([got], [expected])
        grad = torch.randn_like(expected)
        assert_equal(gradients(got, [x], grad), gradients(expected, [x], grad))


def test_a_window_that_one_byte_cannot_index() -> None:
    norm, x = make_norm(2), make_input(1, 2, 40, 40)
    assert_equal([stem.stem(x, norm, 20, 20, 0)], [reference.stem(x, norm, 20, 20, 0)])


@pytest.mark.parametrize("window", [2, 3, (2, 1)])
def test_windows_of_the_transition(window: int | tuple[int, ...], backend: str) -> None:
    norm, weight = arguments("transition")
    x = make_input(2, 5, 7, 8)
    got, expected = transition.transition(x, norm, weight, window), reference.transition(x, norm, weight, window)
    assert_equal([got], [expected])
    assert_equal(gradients(got, [x, weight]), gradients(expected, [x, weight]))


def test_results_may_be_changed_in_place(unit: str) -> None:
    args, x = arguments(unit), make_input(2, 5, 6, 4)
    out, expected = UNITS[unit][0](x, *args), UNITS[unit][1](x, *args, update=False)
    assert_equal(gradients(out.relu_(), [x, *leaves(args)]), gradients(expected.relu(), [x, *leaves(args)]))


@pytest.mark.parametrize("batch", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_convolution_with_a_bias(dims: int, batch: bool, backend: str) -> None:
    (norm, weight), bias = arguments("transition", dims=dims, batch=batch), make_input(4)
    x = make_input(2, 5, *SPATIAL[dims])
    inputs = [x, *leaves((norm, weight)), bias]
    got = transition.transition(x, norm, weight, conv_bias=bias)
    expected = reference.transition(x, norm, weight, conv_bias=bias, update=False)
    assert_equal([got], [expected])
    grad = torch.randn_like(expected)
    assert_equal(gradients(got, inputs, grad, retain_graph=True), gradients(expected, inputs, grad, retain_graph=True))
    assert_equal(gradients(got, [bias], grad), gradients(expected, [bias], grad))
    if dims == 2:
        run = lambda *_: transition.transition(x, norm, weight, conv_bias=bias)  # noqa: E731
        assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_without_a_new_version(unit: str, momentum: float | None) -> None:
    """As nn.BatchNorm's: the same norm may also run by itself before one backward pass."""
    args, x = arguments(unit, momentum=momentum), make_input(2, 5, 6, 4)
    module = nn.BatchNorm2d(5, momentum=momentum).to(F64)
    before, expected = [t._version for t in buffers([args[0]])], [t._version for t in module.buffers()]
    module(x), UNITS[unit][0](x, *args)
    moved = [now._version - then for now, then in zip(buffers([args[0]]), before, strict=True)]
    assert moved == [now._version - then for now, then in zip(module.buffers(), expected, strict=True)] == [0, 0, 1]
    others = clone(args)
    results = []
    for fused, values in ((UNITS[unit][0], args), (UNITS[unit][1], others)):
        alone = reference.batch_norm(x, values[0])
        out = fused(x, *values)
        results.append([*gradients(alone.pow(3).sum() + out.pow(2).sum(), [x, *leaves(values)]), *buffers(values[:1])])
    assert_equal(*results)


@pytest.mark.parametrize("unit", ["transition", "head"])
def test_statistics_that_are_given_are_used(unit: str, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """The same values, gradients and buffers, and no pass over x to take them; a frozen norm does not look at them."""
    x, stats = block.dense_block(make_input(2, 3, 6, 4), make_layers(3, 2, 4, 1))
    x = x.detach().requires_grad_()
    assert stats is not None
    assert_equal(stats, [x.mean((0, 2, 3)), x.var((0, 2, 3), correction=0)])
    for batch in (True, False):
        args = arguments(unit, batch=batch)
        others = clone(args)
        expected = UNITS[unit][0](x, *others)
        with monkeypatch.context() as patch:
            patch.setattr(kernels.select(x), "channel_stats", None)
            got = UNITS[unit][0](x, *args, stats=stats)
        assert_equal([got, *buffers([args[0]])], [expected, *buffers([others[0]])])
        grad = torch.randn_like(expected)
        assert_equal(gradients(got, [x, *leaves(args)], grad), gradients(expected, [x, *leaves(others)], grad))


def test_statistics_do_not_outlive_what_they_are_of() -> None:
    """A change that counts no version (through ``.data``, numpy or DLPack) is seen by the next unit."""
    x = dense_block(make_input(2, 3, 6, 4), make_layers(3, 2, 4, 1))
    args = arguments("head")
    head.head(x, *args)
    x.data.mul_(3)
    assert_equal([head.head(x, *args)], [reference.head(x, *args, update=False)])


def test_units_after_one_another(backend: str) -> None:
    """Stem, block, transition, block, head: the statistics that travel are those that would be taken."""
    first, second = make_layers(4, 2, 6, 2), make_layers(4, 2, 6, 2)
    stem_norm, norm, weight, last = make_norm(4), make_norm(8), make_conv(4, 8, 2, 1), make_norm(8)
    x = make_input(2, 4, 9, 9)
    results = []
    for module in ("fused", "usual"):
        features = dense_block if module == "fused" else reference.dense_block
        pick = {name: pair[module == "usual"] for name, pair in UNITS.items()}
        args = clone([stem_norm, first, norm, weight, second, last])
        y = features(pick["stem"](x, args[0]), args[1])
        y.retain_grad()
        out = pick["head"](features(pick["transition"](y, args[2], args[3]), args[4]), args[5])
        grads = gradients(out.square(), [x, y, args[3], args[1][0].conv1, args[5].weight])
        results.append([out, *grads, *buffers([args[0], args[2], args[5], args[4][1].norm1])])
    assert_equal(results[0], results[1])
