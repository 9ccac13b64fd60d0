"""The reference is what PyTorch's own modules compute, running statistics included."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from densenet_ext import reference
from densenet_ext.units.parts import norm_of
from tests.support.helpers import F64, assert_equal, make_conv, make_input, make_layers, norms_of

NORMS = [
    {},
    {"momentum": None},
    {"momentum": 0.3},
    {"affine": False},
    {"track_running_stats": False},
    {"affine": False, "track_running_stats": False},
]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", NORMS, ids=str)
def test_batch_norm_is_the_modules(options: dict, training: bool) -> None:
    module = nn.BatchNorm2d(4, **options).double().train(training)
    other = copy.deepcopy(module)
    for _ in range(3):
        x = make_input(3, 4, 2, 5)
        assert_equal([reference.batch_norm(x, norm_of(module))], [other(x)], 1e-14)
        assert_equal(list(module.buffers()), list(other.buffers()), 1e-14)


def test_update_false_moves_nothing() -> None:
    layers = make_layers()
    before = [t.clone() for n in norms_of(layers) for t in n[2:5]]
    reference.dense_block(make_input(2, 5, 4, 3), layers, update=False)
    assert_equal([t for n in norms_of(layers) for t in n[2:5]], before, 0.0)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_units_are_sequences_of_modules(dims: int) -> None:
    spatial = (6, 4, 5)[:dims]
    bn = [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dims - 1](4).double()
    avg = [nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d][dims - 1](2)
    pool = [nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d][dims - 1](3, 2, 1)
    x, weight = make_input(2, 4, *spatial), make_conv(3, 4, dims, 1)
    y = bn(x).relu()
    norm = norm_of(bn)
    assert_equal([reference.transition(x, norm, weight)], [avg(reference.conv_same(y, weight))])
    assert_equal([reference.stem(x, norm)], [pool(y)])
    assert_equal([reference.head(x, norm)], [y.mean(tuple(range(2, 2 + dims)))])
    assert_equal([reference.cat_bn_relu([x[:, :1], x[:, 1:]], norm)], [y])
    assert_equal([reference.bottleneck([x], weight, norm)], [reference.conv_same(y, weight)])


def test_dropout_factors_replace_dropout() -> None:
    layers, x = make_layers(count=2, drop_rate=0.5), make_input(2, 5, 4, 3)
    factors = [torch.full((2, 3, 4, 3), 2.0, dtype=F64), None]
    out = reference.dense_block(x, layers, factors=factors)
    plain = reference.dense_block(x, [layer._replace(drop_rate=0.0) for layer in layers])
    assert_equal([out[:, :5], out[:, 5:8]], [x, 2 * plain[:, 5:8]])
