"""Faults for the emulated kernels that go over rows once, for the accesses that all share and for the copies of
weights, and the calls that see them."""

from __future__ import annotations

import torch

from . import compare
from .library import Library
from .mutation_cases import (
    FORWARD,
    backward_of_unmerged_sums,
    backward_unaligned,
    bn_relu,
    forward_odd,
    forward_of_unmerged_statistics,
    forward_unaligned,
    statistics,
)
from .mutation_list import Mutation


def bn_relu_with_sums(kernels: Library) -> None:
    """And in one slab, of which the second kernel is not launched."""
    for M in (9, 130):
        x, grad = compare.random_rows(M, 36, torch.bfloat16), compare.random_rows(M, 36, torch.bfloat16)
        results = {"grad_weight": torch.zeros(36), "grad_bias": torch.zeros(36), "out": torch.zeros_like(x)}
        compare.check(kernels, "bn_relu_backward_reduce", M, grad=grad, x=x, **compare.random_norm(x), **results)
        sums = {"mean": torch.zeros(36), "var": torch.zeros(36)}
        compare.check(kernels, "channel_stats", M, x=x, **sums)


def large_mean(kernels: Library) -> None:
    x = (torch.randn(40, 8, dtype=torch.float64) + 1e4).float()
    norm = {"mean": x.mean(0), "var": x.var(0), "weight": None, "bias": torch.randn(8), "eps": 1e-5}
    compare.check(kernels, "bn_relu", x=x, **norm, out=torch.zeros_like(x))


def infinite(kernels: Library) -> None:
    x, out = compare.random_rows(1400, 8, torch.float32), torch.zeros(1400, 8)
    norm = compare.random_norm(x)
    x[0, 0], x[700, 1], x[1399, 2] = float("inf"), float("inf"), float("-inf")
    compare.check(kernels, "channel_stats", 1400, x=x, mean=torch.zeros(8), var=torch.zeros(8))
    sums = {"grad_weight": torch.zeros(8), "grad_bias": torch.randn(8)}
    compare.check(kernels, "bn_relu_backward", grad=torch.randn(1400, 8), x=x, **norm, **sums, grad_x=out)


def weights(kernels: Library) -> None:
    source, stored = torch.randn(5, 7, 9), torch.zeros(5, 9, 7, dtype=torch.bfloat16).mT
    kernels.copy_taps([source] * 41, [stored.clone() for _ in range(40)] + [stored])
    assert torch.equal(stored, source.bfloat16())


MUTATIONS = [
    Mutation(
        "pieces: 16 bytes at an address of 8",
        "pieces.h",
        "(WHOLE || alignment >= (P::kBytes < 16 ? P::kBytes : 16))",
        "(WHOLE || alignment >= 8)",
        FORWARD,
    ),
    Mutation(
        "pieces: rows that are not whole taken for whole",
        "pieces.h",
        "return columns % E == 0 &&",
        "return columns >= E &&",
        (forward_unaligned, backward_unaligned, forward_odd),
    ),
    Mutation(
        "pieces: the last store goes over the edge",
        "pieces.h",
        "if (e < valid) store_one(p + e, piece.raw(e));",
        "store_one(p + e, piece.raw(e));",
        (forward_unaligned, backward_unaligned),
    ),
    Mutation(
        "rows: a block's threads read sums that are not there",
        "sums.h",
        "    sync_block();\n    if (patch.any && patch.y % (2",
        "    if (patch.any && patch.y % (2",
        (statistics, bn_relu),
    ),
    Mutation(
        "rows: a block's threads overwrite sums that are still read",
        "sums.h",
        "shared[(V + v) * kThreads + other]);\n    }\n    sync_block();\n",
        "shared[(V + v) * kThreads + other]);\n    }\n",
        (statistics, bn_relu),
    ),
    Mutation(
        "rows: a row beyond the slab",
        "rows.h",
        "rows += r * step < within;",
        "rows += r * step <= within;",
        (statistics,),
    ),
    Mutation(
        "statistics: the last slab counts as a whole one",
        "merge_slabs.h",
        "(i == last ? rest : whole) * delta * delta",
        "whole * delta * delta",
        (statistics,),
    ),
    Mutation(
        "rows: a thread's mean counts as the others'",
        "sums.h",
        "std::fma(a[v], of.own, mean * of.other)",
        "std::fma(a[v], of.other, mean * of.own)",
        (statistics,),
    ),
    Mutation(
        "rows: an infinite mean is subtracted from another",
        "sums.h",
        "std::fma(a[v], of.own, mean * of.other)",
        "std::fma(delta, of.other, a[v])",
        (infinite,),
    ),
    Mutation(
        "rows: the sums of one slab wait for a kernel that is not launched",
        "sums.h",
        "if (slabs > 1) return store_partials",
        "if (slabs > 0) return store_partials",
        (bn_relu_with_sums,),
    ),
    Mutation(
        "rows: a norm's mean is not subtracted first",
        "columns.h",
        "return std::fma(xc, scale[v], bias[v]);",
        "return std::fma(xc + mean[v], scale[v], std::fma(-mean[v], scale[v], bias[v]));",
        (large_mean,),
    ),
    Mutation(
        "rows: zero times an infinite feature",
        "columns.h",
        "return slope == A(0) ? A(0) : slope * x;",
        "return slope * x;",
        (infinite,),
    ),
    Mutation(
        "rows: what the convolution reads again is not rectified",
        "bn_relu.cu",
        "y[v] = relu(u);",
        "y[v] = u;",
        (bn_relu_with_sums,),
    ),
    Mutation(
        "statistics: the mean of one slab lacks the pivot",
        "statistics.cu",
        "A(double(pivot_of(element<T, V>(pivot, v))) + double(sums.a[v]))",
        "A(double(sums.a[v]))",
        (bn_relu_with_sums,),
    ),
    Mutation(
        "weights: channels and taps exchanged",
        "copy_taps.cu",
        "c = channels_last ? within : rest, t = channels_last ? rest : within",
        "c = channels_last ? rest : within, t = channels_last ? within : rest",
        (weights,),
    ),
    Mutation(
        "weights: the second launch begins again",
        "copy_taps.cu",
        "some.of[i] = copies[done + i];",
        "some.of[i] = copies[i];",
        (weights,),
    ),
    Mutation(
        "merging: constants of statistics that are not merged yet",
        "conv1x1_common.h",
        "if (i < p.C && !unmerged) p",
        "if (i < p.C) p",
        (forward_of_unmerged_statistics,),
    ),
    Mutation(
        "merging: constants of the columns beside",
        "conv1x1_common.h",
        "p.norm_of(p.moments_at + c, mean, var)",
        "p.norm_of(c, mean, var)",
        (forward_of_unmerged_statistics,),
    ),
    Mutation(
        "merging: one block too few",
        "merge_slabs.h",
        "(p.C + kFinishColumns - 1) / kFinishColumns : 0",
        "p.C / kFinishColumns : 0",
        (forward_of_unmerged_statistics,),
    ),
    Mutation(
        "merging: constants of sums that are not merged yet",
        "conv1x1_common.h",
        "if (i < p.N && !p.z_sums.any()) p",
        "if (i < p.N) p",
        (backward_of_unmerged_sums,),
    ),
    Mutation(
        "merging: a norm's two sums exchanged",
        "conv1x1_common.h",
        "p.z_norm_of(n, grad_weight, grad_bias);",
        "p.z_norm_of(n, grad_bias, grad_weight);",
        (backward_of_unmerged_sums,),
    ),
    Mutation(
        "merging: threads read a sum that is not there",
        "merge_slabs.h",
        "  shared[t] = value;\n  sync_block();\n",
        "  shared[t] = value;\n",
        (backward_of_unmerged_sums,),
    ),
    Mutation(
        "merging: the mean lacks the pivot",
        "merge_slabs.h",
        "A(double(load_one(p.pivots + c)) + mean)",
        "A(mean)",
        (statistics, forward_of_unmerged_statistics),
    ),
]
