"""Bytes: what a unit keeps for its backward pass, exactly, and what it needs while it runs."""

from __future__ import annotations

from math import prod

import pytest
import torch

from densenet_ext import reference
from densenet_ext.algorithm.concat import bottleneck, cat_bn_relu
from densenet_ext.algorithm.head import head
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.transition import transition
from densenet_ext.algorithm.values import Layer
from tests.support.helpers import (
    SLACK,
    allocations,
    buffers,
    clone,
    dense_block,
    kept_for_backward,
    make_conv,
    make_input,
    make_layers,
    make_norm,
    norms_of,
    parameters,
)

SIZE = (4, 16, 8, 8)
M = 4 * 8 * 8
F32 = torch.float32


def block(dtype: torch.dtype = F32, count: int = 6, **options) -> tuple[torch.Tensor, list[Layer]]:
    x = make_input(*SIZE, dtype=dtype).contiguous(memory_format=torch.channels_last).detach().requires_grad_()
    return x, make_layers(16, 8, 32, count, dtype=dtype, **options)


def expected_bytes(layers: list[Layer], save: str, dtype: torch.dtype = F32, drops: bool = False) -> int:
    """The design's sum: the buffer, every z, mean and variance of every column of either, the seed; and what frozen
    norms normalised with."""
    columns = 16 + sum(layer.conv2.shape[0] for layer in layers)
    widths = sum(layer.conv1.shape[0] for layer in layers)
    acc = 8 if dtype == torch.float64 else 4
    kept = M * columns + (M * widths if save == "bottlenecks" else 0)
    small = acc * 2 * (columns * any(layer.norm1.batch_stats for layer in layers))
    small += acc * 2 * (widths * any(layer.norm2.batch_stats for layer in layers))
    frozen = [t for norm in norms_of(layers) if not norm.batch_stats for t in (norm.running_mean, norm.running_var)]
    return kept * dtype.itemsize + small + sum(t.nbytes for t in frozen) + 8 * drops


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_the_block_keeps_what_the_design_says(save: str, dtype: torch.dtype, backend: str) -> None:
    for options in ({}, {"batch": False}, {"drop_rate": 0.2}):
        x, layers = block(dtype, **options)
        existing = [x, *parameters(layers), *buffers(norms_of(layers))]
        with kept_for_backward(existing) as kept:
            out = dense_block(x, layers, save)
        assert kept.bytes == expected_bytes(layers, save, dtype, "drop_rate" in options)
        del out


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_nothing_else_stays_allocated(save: str, backend: str) -> None:
    x, layers = block()
    dense_block(x, layers, save)
    stays, _ = allocations(lambda: dense_block(x, layers, save))
    # the allocator may round sizes up; beyond that there is nothing but what is kept
    assert 0 <= stays - expected_bytes(layers, save) <= SLACK


def test_a_fraction_of_eagers() -> None:
    """The usual formulation keeps the square of the depth, this its first power."""
    x, layers = block(count=12)
    existing = [x, *parameters(layers), *buffers(norms_of(layers))]
    with kept_for_backward(existing) as usual:
        out = reference.dense_block(x, clone(layers))
    del out
    with kept_for_backward(existing) as bottlenecks:
        out = dense_block(x, layers)
    with kept_for_backward(existing) as features:
        other = dense_block(x, layers, "features")
    del out, other
    assert bottlenecks.bytes * 4 < usual.bytes and features.bytes * 12 < usual.bytes


def test_nothing_is_kept_when_nobody_asks(backend: str) -> None:
    x, layers = block()
    frozen = clone(layers)
    for t in parameters(frozen):
        t.requires_grad_(False)
    with kept_for_backward() as kept:
        with torch.no_grad():
            out = dense_block(x, layers)
        other = dense_block(x.detach(), frozen)
    assert kept.count == 0 and out.grad_fn is None and other.grad_fn is None


@pytest.mark.parametrize("batch", [True, False])
def test_inference_needs_the_buffer_and_one_scratch(batch: bool, backend: str) -> None:
    peaks = []
    for count in (4, 8):
        x, layers = block(count=count, batch=batch, update=False)
        with torch.no_grad():
            dense_block(x, layers)
            stays, peak = allocations(lambda x=x, layers=layers: dense_block(x, layers))
        columns = 16 + 8 * count
        assert stays <= 4 * (M * columns) + 4 * 2 * (columns + 32 * count) + SLACK
        peaks.append(peak - stays)
    # what comes on top of the result does not grow with the depth, but for plain PyTorch's temporaries [M, C]
    growth = 4 * M * 8 * 4 * 3 if backend == "plain" else 4 * M * 8
    assert peaks[1] - peaks[0] <= growth
    if backend == "compiled":
        assert peaks[0] <= 4 * M * (32 + 4 * 8) + 64 * 1024


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_backward_needs_one_gradient_buffer(save: str, backend: str) -> None:
    if backend == "plain":
        pytest.skip("plain PyTorch has temporaries of its own")
    x, layers = block(count=12)
    grad = torch.randn(4, 16 + 96, 8, 8).contiguous(memory_format=torch.channels_last)
    inputs = [x, *parameters(layers)]

    def step() -> list[torch.Tensor]:
        return list(torch.autograd.grad(dense_block(x, layers, save), inputs, grad))

    step()
    _, peak = allocations(step)
    parameter_bytes = sum(4 * t.numel() for t in parameters(layers))
    # G, and scratch: activations, their gradient, z again, the new features' gradient, the input's gradient
    scratch = 4 * M * (104 + 32 * (4 if save == "features" else 3) + 4 * 8 + 16)
    assert peak <= expected_bytes(layers, save) + scratch + 2 * parameter_bytes + 64 * 1024


def test_the_other_units_keep_their_input_only(backend: str) -> None:
    norm, weight = make_norm(16, F32), make_conv(8, 16, 2, 1, F32)
    x = block()[0]
    small = 2 * 16 * 4
    existing = [x, norm.weight, norm.bias, weight, norm.running_mean, norm.running_var]
    units = {
        "transition": (lambda: transition(x, norm, weight), small),
        "stem": (lambda: stem(x, norm), small + prod((4, 16, 4, 4))),  # and one byte per result
        "head": (lambda: head(x, norm), small),
        "cat_bn_relu": (lambda: cat_bn_relu([x], norm), small),
        "bottleneck": (lambda: bottleneck([x], weight, norm), small),
    }
    for name, (run, expected) in units.items():
        with kept_for_backward(existing) as kept:
            out = run()
        assert kept.bytes == expected, name
        del out
        with torch.no_grad(), kept_for_backward() as kept:
            run()
        assert kept.count == 0, name


def test_gathered_storage_is_freed_after_the_call(backend: str) -> None:
    norm, weight = make_norm(32, F32), make_conv(8, 32, 2, 1, F32)
    features = [block()[0], block()[0]]
    bottleneck(features, weight, norm)
    stays, peak = allocations(lambda: bottleneck(features, weight, norm))
    assert stays <= 4 * M * 8 + 2 * 4 * 32 + SLACK
    assert peak >= 4 * M * 32  # it was there
