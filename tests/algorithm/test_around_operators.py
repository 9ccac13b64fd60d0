"""Transition, stem and head as one operation each way, against their steps one by one, and their refusals."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm import whole
from densenet_ext.algorithm.head import head
from densenet_ext.algorithm.operation import Config
from densenet_ext.algorithm.single import Inputs, NormCall, inputs_of, needs_sums, norm_again, norm_call
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.transition import transition
from densenet_ext.algorithm.values import Stats
from tests.support.helpers import make_conv, make_input, make_norm

SPATIAL = {1: (9,), 2: (6, 5), 3: (4, 5, 3)}
NORMS: dict[str, dict[str, Any]] = {
    "the batch's": {},
    "frozen": {"batch": False},
    "no affine": {"affine": False},
}


def unit_of(kind: str, dims: int, norm: Any, given: bool) -> tuple[Callable[[Tensor], Tensor], list[Tensor]]:
    """A function of x, and its parameters."""
    weights = [t for t in norm[:2] if t is not None]
    if kind == "stem":
        return (lambda x: stem(x, norm, 3, 2, 1)), weights

    def stats(x: Tensor) -> Stats | None:
        over = [i for i in range(x.dim()) if i != 1]
        return Stats(x.detach().mean(over), x.detach().var(over, correction=0)) if given else None

    if kind == "head":
        return (lambda x: head(x, norm, stats=stats(x))), weights
    W, c = make_conv(4, 5, dims, 1), torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = None if given else c
    return (lambda x: transition(x, norm, W, 2, conv_bias=bias, stats=stats(x))), [*weights, W, *([] if given else [c])]


def outcome(unit: Callable[[Tensor], Tensor], x: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """Output, every gradient, and the output without gradients."""
    out = unit(x)
    grad = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).reshape(out.shape)
    found = torch.autograd.grad(out, inputs, grad)
    with torch.no_grad():
        return [out, *found, unit(x)]


@pytest.fixture
def by_steps(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], Any]:
    """Runs a function with the units' operations left out."""

    def run(function: Callable[[], Any]) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(whole, "operation", lambda *_: None)
            return function()

    return run


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("options", NORMS)
@pytest.mark.parametrize(("kind", "given"), [("transition", False), ("transition", True), ("stem", False), ("head", 1)])
@pytest.mark.parametrize("backend", ["compiled", "emulated"], indirect=True)
def test_a_unit_is_its_steps(kind: str, given: bool, options: str, dims: int, backend: str, by_steps: Any) -> None:
    norm = make_norm(5, **NORMS[options])._replace(update=False)
    unit, parameters = unit_of(kind, dims, norm, bool(given))
    x = make_input(3, 5, *SPATIAL[dims])
    for inputs in ([x, *parameters], parameters[:1], [x], parameters[-1:]):
        if not inputs:
            continue
        run = lambda: outcome(unit, x, inputs)  # noqa: B023, E731
        for got, expected in zip(run(), by_steps(run), strict=True):
            assert got.shape == expected.shape and got.stride() == expected.stride()
            assert (got - expected).abs().max() <= 1e-12 * (1 + expected.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["compiled", "emulated"], indirect=True)
def test_a_transition_in_every_dtype(dtype: torch.dtype, backend: str) -> None:
    """Many rows and columns that are no whole vectors, against float64."""
    x = make_input(2, 37, 18, 18)
    norm, W = make_norm(37), make_conv(50, 37, 2, 1)
    low = [t.detach().to(dtype) for t in (x, W)]
    values = [t.double().requires_grad_() for t in low]
    low = [t.requires_grad_() for t in low]
    norm32 = norm._replace(**{name: getattr(norm, name).detach().float() for name in norm._fields[:4]})
    norm64 = norm._replace(**{name: getattr(norm32, name).double() for name in norm._fields[:4]})
    expected = transition(values[0], norm64._replace(update=False), values[1])
    got = transition(low[0], norm32._replace(update=False), low[1])
    assert got.dtype == dtype
    eps = torch.finfo(dtype).eps
    grad = torch.randn(expected.shape, dtype=dtype)
    pairs = [(got, expected)]
    pairs += zip(torch.autograd.grad(got, low, grad), torch.autograd.grad(expected, values, grad.double()), strict=True)
    for a, b in pairs:
        assert (a.double() - b).abs().max() <= 20 * eps * (1 + b.abs().max())


def test_the_norm_of_a_call() -> None:
    """Whose statistics an operation takes, and those that its backward pass reads again."""
    x, norm = make_input(2, 5, 4), make_norm(5, batch=False)
    mean, var = torch.zeros(5), torch.ones(5)
    frozen = Config((False,), (1e-5,), torch.float32)
    own = inputs_of(x, norm)
    assert norm_call(frozen, own, mean, var) == NormCall(
        norm.running_mean, norm.running_var, None, None, norm.weight, norm.bias, 1e-5
    )
    assert norm_again(frozen, own, mean, var)[0] is norm.running_mean
    batch = Config((True,), (1e-5,), torch.float32)
    taken = norm_call(batch, inputs_of(x, make_norm(5)), mean, var)
    assert taken.mean is None and taken.taken_mean is mean
    given = norm_call(batch, inputs_of(x, make_norm(5), Stats(torch.full((5,), 2.0), torch.full((5,), 3.0))), mean, var)
    assert given.mean is mean and given.taken_mean is None
    assert mean.tolist() == [2.0] * 5 and var.tolist() == [3.0] * 5
    assert norm_again(batch, own, mean, var)[0] is mean


def test_sums_are_taken_for_who_reads_them() -> None:
    batch, frozen = (Config((stats,), (1e-5,), torch.float32) for stats in (True, False))
    assert needs_sums(batch, Inputs(x=True)) and not needs_sums(frozen, Inputs(x=True))
    for config in (batch, frozen):
        assert needs_sums(config, Inputs(gamma=True)) and needs_sums(config, Inputs(beta=True))
        assert not needs_sums(config, Inputs(conv=True))


# ---- refusals --------------------------------------------------------------------------------------------------------


def call(**changed: Any) -> None:
    """A transition of 2 to 3 features, 4 pixels to one, with some of its arguments changed."""
    own = {
        "x": torch.zeros(4, 2),
        "size": [1, 1, 2, 2],
        "window": [1, 2, 2],
        "mean": None,
        "var": None,
        "taken_mean": torch.zeros(2),
        "taken_var": torch.zeros(2),
        "weight": torch.ones(2),
        "bias": torch.ones(2),
        "eps": 1e-5,
        "conv": torch.ones(3, 2, 1, 1),
        "conv_bias": None,
        "pooled": torch.zeros(1, 2),
        "out": torch.zeros(1, 3),
    }
    torch.ops.densenet_ext.whole_transition(**{**own, **changed})


def call_backward(**changed: Any) -> None:
    """Its backward pass."""
    own = {
        "grad": torch.zeros(1, 3),
        "x": torch.zeros(4, 2),
        "size": [1, 1, 2, 2],
        "window": [1, 2, 2],
        "mean": torch.zeros(2),
        "var": torch.ones(2),
        "weight": None,
        "bias": None,
        "eps": 1e-5,
        "batch": True,
        "sums": True,
        "conv": torch.ones(3, 2, 1, 1),
        "pooled": torch.zeros(1, 2),
        "grad_weight": torch.zeros(2),
        "grad_bias": torch.zeros(2),
        "grad_x": torch.zeros(4, 2),
        "grad_conv": torch.zeros(3, 2, 1, 1),
        "grad_conv_bias": torch.zeros(3),
    }
    torch.ops.densenet_ext.whole_transition_backward(**{**own, **changed})


def call_stem(**changed: Any) -> None:
    """A stem of 2 features, 4 pixels to one."""
    own = {
        "x": torch.zeros(4, 2),
        "size": [1, 1, 2, 2],
        "window": [1, 3, 3],
        "stride": [1, 2, 2],
        "padding": [0, 1, 1],
        "mean": None,
        "var": None,
        "taken_mean": torch.zeros(2),
        "taken_var": torch.zeros(2),
        "weight": None,
        "bias": None,
        "eps": 1e-5,
        "out": torch.zeros(1, 2),
        "index": torch.zeros(1, 2, dtype=torch.uint8),
    }
    torch.ops.densenet_ext.whole_stem(**{**own, **changed})


def call_stem_backward(**changed: Any) -> None:
    """Its backward pass."""
    own = {
        "grad": torch.zeros(1, 2),
        "index": torch.zeros(1, 2, dtype=torch.uint8),
        "x": torch.zeros(4, 2),
        "size": [1, 1, 2, 2],
        "window": [1, 3, 3],
        "stride": [1, 2, 2],
        "padding": [0, 1, 1],
        "mean": torch.zeros(2),
        "var": torch.ones(2),
        "weight": None,
        "bias": None,
        "eps": 1e-5,
        "batch": True,
        "sums": True,
        "grad_weight": torch.zeros(2),
        "grad_bias": torch.zeros(2),
        "grad_x": torch.zeros(4, 2),
    }
    torch.ops.densenet_ext.whole_stem_backward(**{**own, **changed})


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")
@pytest.mark.parametrize(
    ("run", "argument", "value", "words"),
    [
        (call, "x", torch.zeros(4, 3), "taken_mean: expected 3 contiguous elements"),
        (call, "x", torch.zeros(5, 2), "x: expected shape"),
        (call, "x", torch.zeros(4, 2, dtype=torch.float64), "taken_mean: expected dtype"),
        (call, "size", [1, 2, 2], "size: expected 4 numbers"),
        (call, "window", [1, 3, 2], "window: expected at most 2"),
        (call, "mean", torch.zeros(2), "mean and var: expected both or neither"),
        (call, "taken_var", None, "taken_mean and taken_var: expected both or neither"),
        (call, "eps", float("nan"), "eps: expected a finite number"),
        (call, "weight", torch.ones(3), "weight: expected 2 contiguous elements"),
        (call, "conv", torch.ones(3), "conv: expected shape"),
        (call, "conv", torch.ones(3, 4, 1, 1), "conv: expected contiguous shape"),
        (call, "conv", None, "out: expected a tensor where there is a convolution, got one"),
        (call, "out", None, "out: expected a tensor where there is a convolution, got None"),
        (call, "out", torch.zeros(2, 3), "out: expected shape"),
        (call, "pooled", torch.zeros(1, 3), "pooled: expected shape"),
        (call, "conv_bias", torch.zeros(2), "conv_bias: expected 3 contiguous elements"),
        (call_backward, "grad", torch.zeros(1, 2), "grad: expected shape"),
        (call_backward, "sums", False, "sums: expected True"),
        (call_backward, "pooled", None, "pooled: expected a tensor where there is a convolution, got None"),
        (call_backward, "grad_conv", torch.zeros(2, 2, 1, 1), "grad_conv: expected contiguous shape"),
        (call_backward, "grad_conv_bias", torch.zeros(2), "grad_conv_bias: expected 3 contiguous"),
        (call_backward, "grad_x", torch.zeros(4, 3), "grad_x: expected shape"),
        (call_backward, "grad_weight", torch.zeros(3), "grad_weight: expected 2 contiguous"),
        (call_stem, "index", torch.zeros(1, 2), "index: expected dtype"),
        (call_stem, "window", [1, 17, 17], "window: expected at most"),
        (call_stem, "out", torch.zeros(1, 3), "out: expected shape"),
        (call_stem_backward, "grad", torch.zeros(2, 2), "grad: expected shape"),
        (call_stem_backward, "index", torch.zeros(1, 2), "index: expected dtype"),
        (call_stem_backward, "grad_bias", torch.zeros(1), "grad_bias: expected 2 contiguous"),
    ],
)
def test_absurd_arguments_are_named(run: Callable[..., None], argument: str, value: Any, words: str) -> None:
    run()
    with pytest.raises(RuntimeError, match=f"densenet_ext: {words}"):
        run(**{argument: value})


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="nothing is compiled")
def test_results_may_not_lie_on_what_is_read() -> None:
    x = torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match="densenet_ext"):
        call(x=x, pooled=x[:1])
    with pytest.raises(RuntimeError, match="densenet_ext"):
        call_backward(x=x, grad_x=x)
