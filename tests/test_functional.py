"""cat_bn_relu and bottleneck against the usual formulation, and what they say about wrong arguments."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from densenet_ext import kernels, reference
from densenet_ext.algorithm import concat, layout
from densenet_ext.algorithm.values import Norm
from densenet_ext.functional import bottleneck, cat_bn_relu
from tests.support.helpers import DEVICE, F64, SPATIAL, assert_equal, gradcheck, gradients, make_conv, make_input


def make(dims: int = 2, channels: tuple[int, ...] = (3, 1, 2)) -> tuple[list[Tensor], dict[str, Any], Tensor]:
    """Features, the arguments of a norm, and a convolution weight."""
    C = sum(channels)
    norm = {
        "running_mean": torch.randn(C, dtype=F64),
        "running_var": torch.rand(C, dtype=F64) + 0.5,
        "weight": (torch.rand(C, dtype=F64) + 0.5).requires_grad_(),
        "bias": torch.randn(C, dtype=F64).requires_grad_(),
    }
    return [make_input(2, c, *SPATIAL[dims]) for c in channels], norm, make_conv(4, C, dims, 1)


def usual(features: list[Tensor], norm: dict[str, Any], training: bool, momentum: float = 0.1) -> Norm:
    return Norm(
        norm["weight"],
        norm["bias"],
        norm["running_mean"].clone(),
        norm["running_var"].clone(),
        None,
        training,
        training,
        momentum,
        1e-5,
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_equal_the_usual_formulation(dims: int, training: bool, backend: str) -> None:
    features, norm, weight = make(dims)
    expected_norm = usual(features, norm, training, 0.3)
    expected = reference.cat_bn_relu(features, expected_norm)
    got = cat_bn_relu(features, **norm, training=training, momentum=0.3)
    assert_equal([got], [expected])
    assert_equal([norm["running_mean"], norm["running_var"]], [expected_norm.running_mean, expected_norm.running_var])
    grad, inputs = torch.randn_like(expected), [*features, norm["weight"], norm["bias"]]
    assert_equal(gradients(got, inputs, grad), gradients(expected, inputs, grad))

    expected = reference.bottleneck(features, weight, expected_norm)
    got = bottleneck(features, weight, **norm, training=training, momentum=0.3)
    assert_equal([got], [expected])
    assert_equal([norm["running_mean"], norm["running_var"]], [expected_norm.running_mean, expected_norm.running_var])
    grad, inputs = torch.randn_like(expected), [*inputs, weight]
    assert_equal(gradients(got, inputs, grad), gradients(expected, inputs, grad))


@pytest.mark.parametrize("training", [True, False])
def test_gradcheck(training: bool, backend: str) -> None:
    features, norm, weight = make(channels=(2, 1))
    fixed = {"running_mean": norm["running_mean"], "running_var": norm["running_var"], "training": training}
    fixed = {k: v.detach() if isinstance(v, Tensor) else v for k, v in fixed.items()}
    if training:
        fixed["running_mean"] = fixed["running_var"] = None

    def cat(a: Tensor, b: Tensor, w: Tensor, t: Tensor) -> Tensor:
        return cat_bn_relu([a, b], weight=w, bias=t, **fixed)

    def conv(a: Tensor, b: Tensor, w: Tensor, t: Tensor, W: Tensor) -> Tensor:
        return bottleneck([a, b], W, weight=w, bias=t, **fixed)

    inputs = [*features, norm["weight"], norm["bias"]]
    inputs = [t.detach()[..., :3, :2].clone().requires_grad_() if t.dim() == 4 else t for t in inputs]
    assert gradcheck(cat, inputs, backend) and torch.autograd.gradgradcheck(cat, inputs, fast_mode=True)
    inputs.append(weight)
    assert gradcheck(conv, inputs, backend) and torch.autograd.gradgradcheck(conv, inputs, fast_mode=True)


def test_a_single_tensor_and_no_affine(backend: str) -> None:
    x = make_input(2, 5, 4, 3)
    expected = torch.nn.functional.batch_norm(x, None, None, training=True).relu()
    assert_equal([cat_bn_relu(x, None, None, training=True)], [expected])
    assert_equal([cat_bn_relu((x,), None, None, training=True)], [expected])
    weight = make_conv(2, 5, 2, 1)
    assert_equal([bottleneck(x, weight, None, None, training=True)], [reference.conv_same(expected, weight)])


def test_neighbours_in_one_buffer_are_read_in_place(monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    buffer = torch.randn(2, 4, 3, 11, dtype=F64).permute(0, 3, 1, 2)
    features = [buffer[:, 1:4].detach().requires_grad_(), buffer[:, 4:5], buffer[:, 5:7].detach().requires_grad_()]
    together = layout.joined(features)
    assert together is not None and together.data_ptr() == features[0].data_ptr()
    assert torch.equal(together, buffer[:, 1:7])
    _, norm, weight = make()

    def refuse(*_: Any) -> None:
        raise AssertionError("features that are neighbours were copied")

    ops = kernels.select(buffer)
    monkeypatch.setattr(ops, "append_features", refuse)
    monkeypatch.setattr(ops, "cat_bn_relu", refuse)
    grads = []
    for f in (concat, reference):
        values = usual(features, norm, True)
        outs = [f.cat_bn_relu(features, values), f.bottleneck(features, weight, values)]
        grads.append([*outs, *gradients(outs[0].sum() + outs[1].sum(), [features[0], features[2], weight])])
    assert_equal(grads[0], grads[1])


def test_what_is_not_a_neighbour() -> None:
    buffer = torch.randn(2, 4, 3, 11).permute(0, 3, 1, 2)
    for features in (
        [buffer[:, 4:5], buffer[:, 1:4]],
        [buffer[:, 1:4], buffer[:, 5:7]],
        [buffer[:, 1:4], buffer[:, 4:7].clone()],
        [buffer[:1, 1:4], buffer[1:, 4:7]],
        [buffer.contiguous()[:, 1:4], buffer.contiguous()[:, 4:7]],
        [buffer[:, 8:11], buffer.permute(0, 2, 3, 1).flatten()[11:].as_strided((2, 1, 3, 3), (132, 1, 33, 11))],
    ):
        assert layout.joined(features) is None


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_a_bottleneck_with_a_bias(dims: int, training: bool, backend: str) -> None:
    features, values, weight = make(dims)
    norm, bias = usual(features, values, training), make_input(weight.shape[0])
    inputs = [*features, weight, bias]
    got = concat.bottleneck(features, weight, norm, conv_bias=bias)
    expected = reference.bottleneck(features, weight, norm, conv_bias=bias, update=False)
    grad = torch.randn_like(expected)
    assert_equal([got], [expected])
    assert_equal(gradients(got, inputs, grad, retain_graph=True), gradients(expected, inputs, grad, retain_graph=True))
    assert_equal(gradients(got, [bias], grad), gradients(expected, [bias], grad))


def strided(x: Tensor) -> list[int]:
    """Strides of the dimensions that have more than one entry: the others are arbitrary."""
    return [step for step, size in zip(x.stride(), x.shape, strict=True) if size > 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("size", [(2, 3, 7), (2, 3, 4, 5), (2, 3, 1, 1), (1, 1, 4, 5), (2, 3, 4, 2, 3)], ids=str)
def test_the_memory_format_is_eagers(size: tuple[int, ...], dtype: torch.dtype) -> None:
    """Of every mixture of contiguous, channels_last and other features and weights."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(len(size), torch.contiguous_format)
    x = make_input(*size, dtype=dtype, grad=False)
    maps = [x.contiguous(), x.contiguous(memory_format=last), x.transpose(0, -1).contiguous().transpose(0, -1)]
    maps.append(torch.cat([x, x], 1).contiguous(memory_format=last)[:, : size[1]])
    for features in ([a, b] for a in maps for b in maps):
        C = 2 * size[1]
        running = torch.zeros(C, dtype=dtype), torch.ones(C, dtype=dtype)
        together = torch.cat(features, 1)
        expected = torch.nn.functional.batch_norm(together, *running).relu()
        got = cat_bn_relu(features, *running)
        assert strided(got) == strided(expected), [t.stride() for t in features]
        for weight_format in (torch.contiguous_format, last):
            weight = make_conv(4, C, len(size) - 2, 1, dtype).detach().clone(memory_format=weight_format)
            out = bottleneck(features, weight, *running)
            assert strided(out) == strided(reference.conv_same(expected, weight)), [t.stride() for t in features]


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_running_statistics_of_infinity_are_eagers_in_plain_pytorch(bad: float) -> None:
    x = torch.randn(2, 2, 3, 3)
    x[0, 0, 0, 0] = bad
    module, running = torch.nn.BatchNorm2d(2), (torch.zeros(2), torch.ones(2))
    module(x)
    with kernels.force_plain():
        cat_bn_relu(x, *running, training=True)
    torch.testing.assert_close(running, (module.running_mean, module.running_var), equal_nan=True)


def test_mixed_dtypes_promote_as_cat(backend: str) -> None:
    features = [make_input(2, 3, 4, 3, dtype=torch.float32), make_input(2, 2, 4, 3, dtype=torch.bfloat16)]
    out = cat_bn_relu(features, None, None, training=True)
    expected = torch.nn.functional.batch_norm(torch.cat(features, 1), None, None, training=True).relu()
    assert out.dtype == torch.float32
    assert_equal([out], [expected], 1e-5)
    got = gradients(out, features, torch.randn_like(expected))
    assert [g.dtype for g in got] == [torch.float32, torch.bfloat16]


def test_empty_batch_and_one_value_per_channel() -> None:
    assert cat_bn_relu(make_input(0, 3, 2, 2), None, None, training=True).shape == (0, 3, 2, 2)
    assert bottleneck(make_input(0, 3, 2, 2), make_conv(4, 3, 2, 1), None, None, training=True).shape == (0, 4, 2, 2)
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        cat_bn_relu(make_input(1, 3, 1, 1), None, None, training=True)


def test_transforms_and_forward_mode_run_the_usual_formulation() -> None:
    features, norm, weight = make()
    fixed = {k: v.detach() for k, v in norm.items()}

    def total(x: Tensor) -> Tensor:
        return bottleneck([x, *features[1:]], weight, **fixed).square().sum()

    (expected,) = gradients(total(features[0]), [features[0]])
    assert_equal([torch.func.grad(total)(features[0].detach())], [expected])
    tangent = torch.randn_like(features[0])
    _, jvp = torch.func.jvp(total, (features[0].detach(),), (tangent,))
    assert_equal([jvp], [(expected * tangent).sum()])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(features[0].detach(), tangent)
        assert_equal([torch.autograd.forward_ad.unpack_dual(total(dual)).tangent], [(expected * tangent).sum()])
    others = [t.detach() for t in features[1:]]
    traced = torch.jit.trace(lambda x: cat_bn_relu([x, others[0], others[1]], **fixed), features[0].detach())
    assert_equal([traced(features[0])], [cat_bn_relu(features, **fixed)])


WRONG = {
    "nothing": (lambda f, n, w: ([], w, n), r"features: expected at least one tensor, got an empty sequence"),
    "not a tensor": (lambda f, n, w: ([f[0], 3], w, n), r"features\[1\]: expected a tensor, got int"),
    "flat": (lambda f, n, w: (f[0].flatten(1), w, n), r"features: expected \[N, C, \*spatial\] .* got \[2, 60\]"),
    "sizes": (
        lambda f, n, w: ([f[0], f[1][..., :1]], w, n),
        r"features\[1\]: expected \[2, C, 5, 4\].*got \[2, 1, 5, 1\]",
    ),
    "integers": (lambda f, n, w: (f[0].long(), w, n), r"features: expected a floating-point dtype, got torch.int64"),
    "device": (lambda f, n, w: ([f[0], f[1].to("meta")], w, n), rf"features\[1\]: expected device {DEVICE}.*got meta"),
    "weight": (lambda f, n, w: (f, w, {**n, "weight": n["weight"][1:]}), r"weight: expected shape \[6\].*got \[5\]"),
    "mean": (lambda f, n, w: (f, w, {**n, "running_mean": None}), r"running_mean: expected a tensor.*got None"),
    "eps": (lambda f, n, w: (f, w, {**n, "eps": -1.0}), r"eps: expected a number above 0, got -1.0"),
    "momentum": (lambda f, n, w: (f, w, {**n, "momentum": None}), r"momentum: expected a number, got None"),
    "conv": (lambda f, n, w: (f, w[:, 1:], n), r"conv_weight: expected shape \[b, 6, 1, 1\], got \[4, 5, 1, 1\]"),
}


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_argument_expectation_and_value(case: str) -> None:
    change, message = WRONG[case]
    features, weight, norm = change(*make())
    with pytest.raises((TypeError, ValueError), match=message):
        bottleneck(features, weight, **norm)
    if case != "conv":
        with pytest.raises((TypeError, ValueError), match=message):
            cat_bn_relu(features, **norm)
