"""Norms, dtypes, gradients and dropout as the kernels take them; running statistics."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from densenet_ext.algorithm.conversions import (
    as_pooled,
    cast,
    frozen_norm,
    grad_like,
    is_empty,
    is_lowered,
    norm_tensors,
    norm_values,
    result_dtype,
)
from densenet_ext.algorithm.dropout import Dropout, dropout_at, new_seed
from densenet_ext.algorithm.folding import scales_shifts
from densenet_ext.algorithm.norm import check_count, update_running_stats
from densenet_ext.algorithm.sync import group_of, shared_group
from densenet_ext.units.parts import norm_of
from tests.support.helpers import DEVICE, F64, make_norm


def test_a_norm_as_four_tensors_and_back() -> None:
    norm = make_norm(4, batch=False)
    tensors = norm_tensors(norm)
    assert tensors == norm[:4] and norm_tensors(make_norm(4, batch=True))[2:] == (None, None)
    again = frozen_norm(tensors, False, norm.eps)
    assert again[:4] == tensors and not again.update and not again.batch_stats and again.eps == norm.eps


def test_a_norms_arguments_to_kernels() -> None:
    mean, var = torch.ones(4), torch.ones(4)
    frozen, batch = make_norm(4, torch.bfloat16, batch=False), make_norm(4, torch.bfloat16, batch=True)
    values = norm_values(norm_tensors(frozen), mean, var, False, 0.5, torch.float32)
    assert frozen.running_mean is not None and torch.equal(values[0], frozen.running_mean.float())
    assert all(value.dtype == torch.float32 for value in values[:4] if value is not None) and values[4] == 0.5
    values = norm_values(norm_tensors(batch), mean, var, True, 0.5, torch.float32)
    assert values[0] is mean and values[1] is var


def test_cast_copies_only_where_it_must() -> None:
    x = torch.randn(3, 4)
    assert cast(x, torch.float32) is x and cast(x, F64).dtype == F64 and cast(x.t(), torch.float32).is_contiguous()


def test_gradients_have_the_form_of_their_parameters() -> None:
    weight = torch.randn(4, 3, 1, 1, dtype=torch.bfloat16).contiguous(memory_format=torch.channels_last)
    grad = grad_like(torch.ones(4, 3), weight)
    assert grad is not None and grad.dtype == weight.dtype and grad.stride() == weight.stride()
    same = torch.ones(3)
    assert grad_like(same, torch.randn(3)) is same and grad_like(same, torch.randn(3), False) is None
    assert grad_like(None, weight) is None


def test_dtypes_under_autocast() -> None:
    x = torch.ones(2, 3, 4, 4)
    assert result_dtype(x) == torch.float32 and as_pooled(x) is x
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        assert result_dtype(x) == torch.bfloat16 and result_dtype(x.double()) == F64
        expected = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
        assert as_pooled(x.bfloat16()).dtype == expected


def test_nothing_to_compute() -> None:
    assert is_empty(torch.ones(0, 3, 4)) and is_empty(torch.ones(2, 0, 4)) and not is_empty(torch.ones(1, 1, 1))


def test_one_seed_for_all_dropouts_of_a_call() -> None:
    assert new_seed((0.0, 0.0), DEVICE) is None
    torch.manual_seed(3)
    seed = new_seed((0.0, 0.5), DEVICE)
    torch.manual_seed(3)
    assert seed is not None and seed.dtype == torch.int64 and torch.equal(seed, new_seed((0.5,), DEVICE))  # type: ignore[arg-type]
    assert dropout_at(0.5, False, None, 0) is None and dropout_at(0.0, False, seed, 0) is None
    dropout = dropout_at(0.5, True, seed, 2)
    assert dropout == Dropout(0.5, True, seed, 2)
    factors = dropout.factors((64, 9, 4, 4), 8, F64)
    assert factors.shape == (64, 8, 1, 1) and set(factors.unique().tolist()) == {0.0, 2.0}


def test_scales_and_shifts() -> None:
    x = torch.randn(5, 4, dtype=F64)
    values = []
    for affine in (True, False):
        weight, bias = (torch.randn(4, dtype=F64), torch.randn(4, dtype=F64)) if affine else (None, None)
        values.append((torch.randn(4, dtype=F64), torch.rand(4, dtype=F64) + 0.5, weight, bias, 1e-3))
    for (mean, var, weight, bias, eps), s, t in zip(values, *scales_shifts(values), strict=True):
        expected = nn.functional.batch_norm(x, mean, var, weight, bias, eps=eps)
        torch.testing.assert_close(x * s + t, expected)
    assert scales_shifts([]) == ([], [])


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_those_of_batch_norm(momentum: float | None) -> None:
    module, twin = (nn.BatchNorm1d(4, momentum=momentum, dtype=F64) for _ in range(2))
    for _ in range(3):
        x = torch.randn(7, 4, dtype=F64)
        twin(x)
        version = module.running_mean._version  # type: ignore[union-attr]
        update_running_stats([norm_of(module)], [x.mean(0)], [x.var(0, unbiased=False)], [7])
        assert module.running_mean._version == version  # type: ignore[union-attr]
    for got, expected in zip(module.buffers(), twin.buffers(), strict=True):
        torch.testing.assert_close(got, expected)


def test_one_value_per_channel_is_pytorchs_own_error() -> None:
    with pytest.raises(ValueError, match=r"Expected more than 1 value per channel when training, got input size"):
        check_count(make_norm(3), (1, 3, 1, 1))
    check_count(make_norm(3), (2, 3, 1, 1))
    check_count(make_norm(3, batch=False), (1, 3, 1, 1))


def test_one_process_shares_nothing() -> None:
    assert group_of(nn.SyncBatchNorm(3)) == "" and group_of(nn.BatchNorm2d(3)) == ""
    assert shared_group(("a", "b", "a"), (True, False, True)) == "a"
    assert shared_group(("a", "b"), (True, True)) is None and shared_group((), ()) == ""


def test_what_autocast_lowers_of_float32_features() -> None:
    x = torch.zeros(1, 2, 3, 3, device="cpu")
    assert not is_lowered(x, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_lowered(x, torch.float32) and not is_lowered(x.bfloat16(), torch.bfloat16)
        assert not is_lowered(x.double(), torch.float64)
    with torch.autocast("cpu", torch.float16):
        assert not is_lowered(x, torch.float32)
