"""What holds for every fused unit alike: gradients of frozen norms, batched gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from densenet_ext import reference
from densenet_ext.algorithm import concat, head, stem, transition
from densenet_ext.algorithm.layer import dense_layer
from densenet_ext.algorithm.values import BasicLayer, Layer, Norm
from tests.support.helpers import (
    F64,
    assert_equal,
    basic_block,
    dense_block,
    generator,
    gradients,
    make_conv,
    make_input,
    make_layers,
    make_norm,
)


class Unit(NamedTuple):
    """A unit, in both forms, and what else it takes besides feature maps."""

    fused: Callable[..., Tensor]  # of feature maps and arguments
    usual: Callable[..., Tensor]  # the same, in the usual formulation; moves nothing
    arguments: Callable[[bool], Any]  # norms and weights; with norms that use the batch's statistics, or frozen ones
    channels: tuple[int, ...] = (5,)  # of its feature maps


def _layer(features: list[Tensor], layer: Layer) -> Tensor:
    z = reference.bottleneck(features, layer.conv1, layer.norm1, update=False)
    return reference.conv_same(reference.cat_bn_relu([z], layer.norm2, update=False), layer.conv2)


def _basic_layers(batch: bool) -> list[BasicLayer]:
    return [BasicLayer(make_norm(c, batch=batch), make_conv(3, c, 2, 3), 0.0) for c in (5, 8)]


UNITS = {
    "block": Unit(
        lambda x, layers: dense_block(*x, layers),
        lambda x, layers: reference.dense_block(*x, layers, update=False),
        lambda batch: make_layers(batch=batch),
    ),
    "block at features": Unit(
        lambda x, layers: dense_block(*x, layers, "features"),
        lambda x, layers: reference.dense_block(*x, layers, update=False),
        lambda batch: make_layers(batch=[batch, True, True, batch, batch, True]),
    ),
    "basic block": Unit(
        lambda x, layers: basic_block(*x, layers),
        lambda x, layers: reference.basic_block(*x, layers, update=False),
        _basic_layers,
    ),
    "layer": Unit(dense_layer, _layer, lambda batch: make_layers(count=1, batch=batch)[0], (3, 2)),
    "transition": Unit(
        lambda x, args: transition.transition(*x, *args),
        lambda x, args: reference.transition(*x, *args, update=False),
        lambda batch: [make_norm(5, batch=batch), make_conv(4, 5, 2, 1)],
    ),
    "stem": Unit(
        lambda x, norm: stem.stem(*x, norm),
        lambda x, norm: reference.stem(*x, norm, update=False),
        lambda batch: make_norm(5, batch=batch),
    ),
    "head": Unit(
        lambda x, norm: head.head(*x, norm),
        lambda x, norm: reference.head(*x, norm, update=False),
        lambda batch: make_norm(5, batch=batch),
    ),
    "cat_bn_relu": Unit(
        concat.cat_bn_relu,
        lambda x, norm: reference.cat_bn_relu(x, norm, update=False),
        lambda batch: make_norm(5, batch=batch),
        (3, 2),
    ),
    "bottleneck": Unit(
        lambda x, args: concat.bottleneck(x, args[1], args[0]),
        lambda x, args: reference.bottleneck(x, args[1], args[0], update=False),
        lambda batch: [make_norm(5, batch=batch), make_conv(4, 5, 2, 1)],
        (3, 2),
    ),
}


@pytest.fixture(params=UNITS)
def unit(request: pytest.FixtureRequest) -> Unit:
    return UNITS[request.param]


def tensors(value: Any) -> list[Tensor]:
    """Every tensor in a norm, a layer or a list of them."""
    if isinstance(value, Tensor):
        return [value]
    return [t for part in value for t in tensors(part)] if isinstance(value, (list, tuple)) else []


def leaves(*values: Any) -> list[Tensor]:
    """Those that have a gradient."""
    return [t for value in values for t in tensors(value) if t.requires_grad]


def norms(value: Any) -> list[Norm]:
    """Every norm in a layer or a list of them."""
    if isinstance(value, Norm):
        return [value]
    return [norm for part in value for norm in norms(part)] if isinstance(value, (list, tuple)) else []


def features(unit: Unit) -> list[Tensor]:
    return [make_input(2, c, 6, 4) for c in unit.channels]


# ---- changes in place ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [True, False])
def test_changing_what_is_saved_is_autograds_error(unit: Unit, batch: bool) -> None:
    """The input, or the result of a block, which keeps that instead; and a parameter, for every unit."""
    args = unit.arguments(batch)
    for change_features in (True, False):
        x = [t * 1 for t in features(unit)]
        out = unit.fused(x, args)
        keeps_output = unit.fused in [UNITS[name].fused for name in ("block", "block at features", "basic block")]
        with torch.no_grad():
            if change_features:
                (out if keeps_output else x[0]).mul_(2)
            else:
                norms(args)[0].weight.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            out.sum().backward()


# ---- frozen norms ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("again", [False, True], ids=["once", "differentiated again"])
def test_the_gradient_is_of_what_was_computed(unit: Unit, again: bool, backend: str) -> None:
    """Whatever has happened to the running statistics of frozen norms by then."""
    x, args = features(unit), unit.arguments(False)
    inputs = leaves(x, args)
    expected = unit.usual(x, clone_of_statistics(args))
    got = unit.fused(x, args)
    for norm in norms(args):
        if not norm.batch_stats:
            norm.running_mean.add_(1)
            norm.running_var.data.mul_(3)
    grad = torch.randn_like(expected)
    results = []
    for out in (got, expected):
        found = gradients(out, inputs, grad, create_graph=again)
        results.append([*found, *gradients(found[0].square().sum(), inputs)] if again else found)
    assert_equal(*results)


def clone_of_statistics(value: Any) -> Any:
    """The same leaves with running statistics of their own."""
    if isinstance(value, Tensor):
        return value if value.requires_grad else value.clone()
    if isinstance(value, (Norm, Layer, BasicLayer)):
        return type(value)(*(clone_of_statistics(part) for part in value))
    return [clone_of_statistics(part) for part in value] if isinstance(value, list) else value


def test_evaluation_then_training_before_one_backward_pass(unit: Unit, backend: str) -> None:
    x, args = features(unit), unit.arguments(False)
    inputs = leaves(x, args)
    expected = unit.usual(x, clone_of_statistics(args)).square().sum()
    moving = in_training(args)
    expected = expected + unit.usual(x, in_training(clone_of_statistics(args))).square().sum()
    got = unit.fused(x, args).square().sum() + unit.fused(x, moving).square().sum()
    assert_equal(gradients(got, inputs), gradients(expected, inputs))


def in_training(value: Any) -> Any:
    """The same norms with the batch's statistics, and running ones that move."""
    if isinstance(value, Norm):
        return value._replace(batch_stats=True, update=True)
    if isinstance(value, (Layer, BasicLayer)):
        return type(value)(*(in_training(part) for part in value))
    return [in_training(part) for part in value] if isinstance(value, list) else value


# ---- batched gradients -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [True, False])
def test_batched_gradients_are_eagers(unit: Unit, batch: bool) -> None:
    x, args = features(unit), unit.arguments(batch)
    inputs, results = leaves(x, args), []
    for form in (unit.fused, unit.usual):
        out = form(x, clone_of_statistics(args))
        grads = torch.randn(3, *out.shape, dtype=F64, generator=generator(1))
        found = gradients(out, inputs, grads, is_grads_batched=True, retain_graph=True)
        mapped = torch.func.vmap(lambda g, out=out: torch.autograd.grad(out, inputs, g, retain_graph=True))(grads)
        again = gradients(out, inputs[:1], grads, is_grads_batched=True, create_graph=True)
        results.append([*found, *mapped, *gradients(again[0].square().sum(), inputs[:1])])
    assert_equal(*results)


def test_batched_gradients_with_dropout_are_those_one_by_one() -> None:
    layers = [
        layer._replace(drop_rate=0.3, drop_channels=True, inner_drop_rate=0.4, conv1_bias=make_input(6))
        for layer in make_layers()
    ]
    x = make_input(2, 5, 6, 4)
    inputs, out = leaves(x, layers), dense_block(x, layers)
    grads = torch.randn(3, *out.shape, dtype=F64)
    batched = gradients(out, inputs, grads, is_grads_batched=True, retain_graph=True)
    single = [gradients(out, inputs, grad, retain_graph=True) for grad in grads]
    for found, expected in zip(batched, map(torch.stack, zip(*single, strict=True)), strict=True):
        assert torch.allclose(found, expected, atol=1e-11)


def test_a_vectorised_jacobian_is_eagers(unit: Unit) -> None:
    first, *others = features(unit)
    args = unit.arguments(False)
    rows = []
    for form in (unit.fused, unit.usual):

        def run(x: Tensor, form: Callable[..., Tensor] = form) -> Tensor:
            return form([x, *others], args)[..., :2]

        rows.append([torch.autograd.functional.jacobian(run, first, vectorize=True)])
    assert_equal(*rows)
