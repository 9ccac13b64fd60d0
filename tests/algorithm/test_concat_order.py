"""The dense block that concatenates as [new, x], against the usual formulation: values, gradients, buffers."""

from __future__ import annotations

import pytest
import torch

from densenet_ext import reference
from densenet_ext.algorithm import block as algorithm
from densenet_ext.algorithm.columns import layer_columns
from tests.support.covering import BACKENDS, pairs
from tests.support.helpers import (
    F64,
    assert_as_good,
    assert_equal,
    buffers,
    clone,
    dense_block,
    gradients,
    kept_for_backward,
    make_input,
    make_layers,
    norms_of,
    parameters,
)

LEVELS = ["bottlenecks", "features"]
MODES = {"train": True, "frozen": False, "mixed": [True, False, False, True, True, False]}


def test_columns() -> None:
    behind = layer_columns(5, (2, 3), new_first=False)
    assert behind == [(slice(0, 5), slice(5, 7)), (slice(0, 7), slice(7, 10))]
    front = layer_columns(5, (2, 3), new_first=True)
    assert front == [(slice(5, 10), slice(3, 5)), (slice(3, 10), slice(0, 3))]


@pytest.mark.parametrize(
    ("save", "mode", "channels_last", "backend"),
    pairs(LEVELS, MODES, [True, False], BACKENDS),
    indirect=["backend"],
    ids=str,
)
def test_new_features_in_front(save: str, mode: str, channels_last: bool, backend: str) -> None:
    for count, k in ((3, 3), (1, 4), (6, 1)):
        modes = MODES[mode] if count == 3 else True
        layers, x = make_layers(5, k, 6, count, batch=modes), make_input(2, 5, 5, 4)
        others = clone(layers)
        out, expected = dense_block(x, layers, save, True), reference.dense_block(x, others, new_first=True)
        assert_equal([out, *buffers(norms_of(layers))], [expected, *buffers(norms_of(others))])
        grad = torch.randn(2, 5 + count * k, 5, 4, dtype=F64)
        if channels_last:
            grad = grad.to(memory_format=torch.channels_last)
        inputs = [x, *parameters(layers)]
        wanted = gradients(expected, [x, *parameters(others)], grad)
        assert_equal(gradients(out, inputs, grad, retain_graph=True), wanted)
        for i in (0, 3, len(inputs) - 1):
            assert_equal(gradients(out, [inputs[i]], grad, retain_graph=True), [wanted[i]])


@pytest.mark.parametrize("save", LEVELS)
def test_double_backward_with_new_features_in_front(save: str) -> None:
    """Gradients that are differentiated again start from the block's input, which it does not keep."""
    layers, x = make_layers(), make_input(2, 5, 4, 3)
    inputs, grad = [x, *parameters(layers)], torch.randn(2, 14, 4, 3, dtype=F64)
    results = []
    for block, options in ((dense_block, {}), (reference.dense_block, {"update": False})):
        (dx,) = gradients(block(x, layers, save, True, **options), [x], grad, create_graph=True)
        results.append([dx, *gradients(dx.square(), inputs)])
    assert_equal(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_new_features_in_front_in_low_precision(dtype: torch.dtype, backend: str) -> None:
    """Columns then start at odd offsets."""
    layers, x = make_layers(17, 7, 32, dtype=dtype), make_input(4, 17, 7, 7, dtype=dtype)
    results, grad = [], torch.randn(4, 38, 7, 7).to(dtype)
    for block, to in ((dense_block, dtype), (reference.dense_block, dtype), (reference.dense_block, F64)):
        mine, leaf = clone(layers, to), clone(x, to)
        out = block(leaf, mine, new_first=True)
        results.append(([out], gradients(out, [leaf, *parameters(mine)], grad.to(to))))
    outs, grads = zip(*results, strict=True)
    # the bounds of the other order
    assert_as_good(*outs, floor=16.0)
    assert_as_good(*grads, factor=3.0, floor=16.0)


@pytest.mark.parametrize("save", LEVELS)
def test_statistics_and_memory_are_those_of_the_other_order(save: str, backend: str) -> None:
    layers, x = make_layers(), make_input(2, 5, 4, 3)
    kept = []
    for new_first in (False, True):
        with kept_for_backward([x, *parameters(layers), *buffers(norms_of(layers))]) as found:
            out, known = algorithm.dense_block(x, layers, save, new_first)
        kept.append(found.bytes)
    assert kept[0] == kept[1]
    assert known is not None
    var, mean = torch.var_mean(out.detach(), (0, 2, 3), correction=0)
    assert_equal(known, [mean, var])
