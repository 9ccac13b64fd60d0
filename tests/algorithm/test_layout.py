"""Feature maps as rows, the columns of a buffer, memory formats, and PyTorch's convolutions over rows."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from densenet_ext.algorithm.columns import layer_columns, within
from densenet_ext.algorithm.concat import checked_size, fill_feature_stats, promoted
from densenet_ext.algorithm.conv import conv_same, conv_same_backward, conv_same_features
from densenet_ext.algorithm.layout import (
    channels_last_stride,
    concatenation_format,
    convolution_format,
    from_rows,
    joined,
    new_features,
    pixels,
    row_pitch,
    suggest_memory_format,
    to_rows,
)
from densenet_ext.algorithm.single import rows_size, volume
from tests.support.helpers import F64, make_norm

SIZES = [(2, 3, 7), (2, 3, 4, 5), (2, 3, 2, 4, 5), (1, 1, 1, 1)]


@pytest.mark.parametrize("size", SIZES)
def test_rows_are_pixels(size: tuple[int, ...]) -> None:
    x = torch.randn(size)
    rows = to_rows(x)
    assert rows.shape == (pixels(size), size[1]) and torch.equal(rows, x.movedim(1, -1).reshape(-1, size[1]))
    assert torch.equal(from_rows(rows, size), x)
    inside = new_features(x, size)
    assert list(inside.stride()) == channels_last_stride(size) and row_pitch(inside) == size[1]
    assert to_rows(inside).data_ptr() == inside.data_ptr()  # a view
    assert rows_size(x) == [size[0], *[1] * (5 - len(size)), *size[2:]]


def test_slices_of_a_buffer_are_rows_with_a_pitch() -> None:
    buffer = new_features(torch.ones(1), (2, 10, 4, 5)).normal_()
    part = buffer[:, 3:7]
    assert row_pitch(part) == 10 and to_rows(part).data_ptr() == part.data_ptr()
    assert channels_last_stride(part.shape, 10) == list(part.stride())
    assert row_pitch(torch.ones(2, 3, 4, 5)) is None


def test_neighbours_in_a_buffer_are_joined_without_a_copy() -> None:
    buffer = new_features(torch.ones(1), (2, 10, 4, 5)).normal_()
    whole = joined([buffer[:, 1:4], buffer[:, 4:9]])
    assert whole is not None and whole.data_ptr() == buffer[:, 1:].data_ptr() and torch.equal(whole, buffer[:, 1:9])
    assert joined([buffer[:, 4:9], buffer[:, 1:4]]) is None and joined([buffer[:, 1:4], buffer[:, 5:9]]) is None
    assert joined([buffer[:, :3], torch.ones(2, 3, 4, 5)]) is None
    assert joined([buffer]) is buffer


def test_memory_formats_are_those_of_pytorch() -> None:
    plain, last = torch.ones(2, 3, 4, 5), torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    for features in ([plain, plain], [last, last], [plain, last]):
        expected = torch.channels_last if features[0] is features[1] is last else torch.contiguous_format
        assert concatenation_format(features) == expected
        assert torch.cat(features, 1).is_contiguous(memory_format=expected)
    assert [suggest_memory_format(x) for x in (plain, last)] == [torch.contiguous_format, torch.channels_last]
    for x in (torch.ones(2, 1, 4, 5), torch.ones(1, 3, 1, 1), plain.permute(0, 2, 3, 1), plain[:, :, 0]):
        assert suggest_memory_format(x) == torch._prims_common.suggest_memory_format(x)
    weight = torch.ones(4, 3, 1, 1)
    assert convolution_format(torch.channels_last, weight) == torch.channels_last
    assert convolution_format(torch.contiguous_format, torch.ones(4, 3, 3, 3)) == torch.contiguous_format
    volume_weight = torch.ones(4, 3, 1, 1, 1, dtype=F64)
    assert convolution_format(torch.channels_last_3d, volume_weight) == torch.contiguous_format


def test_columns_of_layers_in_either_order() -> None:
    behind, front = (layer_columns(5, (3, 2), new_first) for new_first in (False, True))
    assert [(c.read, c.new) for c in behind] == [(slice(0, 5), slice(5, 8)), (slice(0, 8), slice(8, 10))]
    assert [(c.read, c.new) for c in front] == [(slice(5, 10), slice(2, 5)), (slice(2, 10), slice(0, 2))]
    rows = torch.arange(8.0).expand(2, 8)
    assert within(rows, slice(5, 7), 3)[0].tolist() == [2.0, 3.0]


@pytest.mark.parametrize("size", SIZES)
def test_convolutions_over_rows(size: tuple[int, ...]) -> None:
    dims = len(size) - 2
    x = torch.randn(size, dtype=F64, requires_grad=True)
    weight = torch.randn(4, size[1], *[3] * dims, dtype=F64, requires_grad=True)
    bias = torch.randn(4, dtype=F64)
    expected = (F.conv1d, F.conv2d, F.conv3d)[dims - 1](x, weight, bias, padding=1)
    rows = to_rows(x.detach())
    torch.testing.assert_close(conv_same(rows, size, weight.detach(), bias), to_rows(expected.detach()))
    features = conv_same_features(rows, size, weight.detach(), bias)
    torch.testing.assert_close(features, expected.detach())
    assert features._base is None and row_pitch(features) == 4
    grad = torch.randn_like(expected)
    expected.backward(grad)
    assert x.grad is not None and weight.grad is not None
    dx, dw = conv_same_backward(to_rows(grad), rows, size, weight.detach(), (True, True))
    torch.testing.assert_close(dx, to_rows(x.grad))
    torch.testing.assert_close(dw, weight.grad)
    assert conv_same_backward(to_rows(grad), rows, size, weight.detach(), (False, False)) == (None, None)


def test_several_features_as_one() -> None:
    features = [torch.randn(2, 3, 4, 5), torch.randn(2, 2, 4, 5, dtype=F64)]
    assert promoted(features) == F64 and checked_size(features, make_norm(5)) == [2, 5, 4, 5]
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        checked_size([x[:1, :, :1, :1] for x in features], make_norm(5))
    mean, var = torch.empty(5, dtype=F64), torch.empty(5, dtype=F64)
    same = [x.double() for x in features]
    fill_feature_stats(same, mean, var)
    whole = to_rows(torch.cat(same, 1))
    torch.testing.assert_close(mean, whole.mean(0))
    torch.testing.assert_close(var, whole.var(0, unbiased=False))


def test_settings_of_a_pooling_as_three_numbers() -> None:
    assert volume(2, 3, 1) == (1, 3, 3) and volume(1, (4,), 0) == (0, 0, 4) and volume(3, (1, 2, 3), 1) == (1, 2, 3)


@pytest.mark.parametrize(
    "size", [(2, 3, 4, 5), (2, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (0, 3, 4, 5), (2, 3, 4, 5, 6)]
)
def test_the_suggested_layout_is_pytorchs(size: tuple[int, ...]) -> None:
    x = torch.zeros(size)
    last = torch.channels_last if len(size) == 4 else torch.channels_last_3d
    cases = [x, x.contiguous(memory_format=last), x.transpose(1, 2), x[:, :1], x[..., ::2], x[:1].expand_as(x)]
    for case in cases:
        assert suggest_memory_format(case) == torch._prims_common.suggest_memory_format(case)
