"""Winograd's products of the 3x3 convolution: as good as eager whatever the shape, and taken where they are faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks import conv3x3
from densenet_ext import _extension
from tests.kernels.conv3x3_calls import (  # noqa: F401  one is a fixture
    FORWARD,
    SHAPES,
    calls,
    check_as_good_as_eager,
    eager_forward,
    winograd,
    written,
)
from tests.kernels.test_kernels import each_level, level  # noqa: F401  a fixture
from tests.support.helpers import DEVICE, error
from tests.support.kernel_calls import Call, converted

pytestmark = pytest.mark.skipif(
    _extension.module is None or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)

# Of float32 with points in the lanes on AVX-512: blocks of one to three vectors of four columns, some of which lie in
# two vectors of 16; channels that fill whole vectors, fours of them or neither.
POINTS_IN_LANES = [
    ([2, 1, 5, 8], 2, 18, 4),
    ([1, 1, 9, 7], 2, 36, 8),
    ([3, 1, 6, 6], 2, 48, 12),
    ([1, 1, 5, 260], 2, 128, 12),
    ([1, 1, 10, 6], 2, 61, 20),
    ([2, 1, 7, 9], 2, 32, 24),
    ([1, 1, 8, 5], 2, 35, 40),
    ([1, 3, 4, 16], 3, 21, 12),
    ([1, 2, 5, 3], 3, 14, 28),
]


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "dims", "C", "k"),
    [shape for shape in SHAPES if shape[1] > 1]
    + [([2, 1, 8, 6], 2, 33, 96), ([1, 1, 5, 260], 2, 128, 16), ([1, 3, 3, 4], 3, 200, 64)]
    + POINTS_IN_LANES,
    ids=str,
)
def test_winograd_is_as_good_as_eager(
    size: list[int],
    dims: int,
    C: int,
    k: int,
    dtype: torch.dtype,
    level: str,  # noqa: F811
    winograd: Callable[[str], None],  # noqa: F811
) -> None:
    """Tiles beyond an image's edge, slices beyond a volume's, rows of tiles that are cut into bands,
    sums that take more memory than tasks keep."""
    winograd("always")
    check_as_good_as_eager(size, dims, C, k, dtype)


@pytest.mark.parametrize("spoilt", ["pixel", "weight"])
@pytest.mark.parametrize("number", ["nan", "inf"])
@pytest.mark.parametrize(("size", "dims", "C", "k"), [shape for shape in POINTS_IN_LANES if shape[0][3] < 20], ids=str)
def test_numbers_that_are_none_reach_what_they_reach_in_eager(
    size: list[int],
    dims: int,
    C: int,
    k: int,
    number: str,
    spoilt: str,
    level: str,  # noqa: F811
    winograd: Callable[[str], None],  # noqa: F811
) -> None:
    """A pixel's all columns of its neighbours, a weight's a single column."""
    winograd("always")
    args, _ = calls(size, dims, C, k)
    args |= {"drop_rate": 0.0, "weight": args["weight"].abs()}  # infinity stays infinity
    if spoilt == "pixel":
        args["x"][len(args["x"]) // 2, C // 2] = float(number)
    else:
        args["conv_weight"][k - 1, C // 2].view(-1)[3**dims // 2] = float(number)  # the middle: padding stays out of it
    ours, eagers = (converted(Call(args, FORWARD[:1]), torch.float32) for _ in "12")
    found, expected = written("bn_relu_conv3x3", ours, FORWARD[:1])[0], eager_forward(eagers)[0]
    assert 0 < expected.isfinite().sum() < expected.numel()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4, equal_nan=True)


NETWORKS = [shape for shape in conv3x3.shapes() if shape.image[0] > 4]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", NETWORKS, ids=lambda shape: f"{shape.where}-{shape.image[0]}")
def test_winograd_where_networks_are_large(
    shape: conv3x3.Shape,
    dtype: torch.dtype,
    winograd: Callable[[str], None],  # noqa: F811
) -> None:
    """The estimate takes it where there are many tiles, and its outputs have no larger errors than direct sums."""
    layer = conv3x3.Layer(shape._replace(batch=min(shape.batch, 16)), dtype)
    outputs = {}
    for use in ("faster", "always", "never"):
        winograd(use)
        layer.ours()
        outputs[use] = layer.out.clone()
    if dtype == torch.float32 or shape.image[0] > 16:
        assert torch.equal(outputs["faster"], outputs["always"])
    y = (layer.x.double() * (1 + 1e-5) ** -0.5).relu().view(layer.size[0], *shape.image, shape.C).movedim(-1, 1)
    conv = F.conv2d if len(shape.image) == 2 else F.conv3d
    exact = conv(y, layer.weight.double(), padding=1).movedim(1, -1).reshape(-1, shape.k)
    assert error(outputs["always"], exact) <= error(outputs["never"], exact)


def test_direct_sums_where_there_are_few_tiles(winograd: Callable[[str], None]) -> None:  # noqa: F811
    args, _ = calls([1, 1, 4, 4], 2, 64, 32)
    results = {}
    for use in ("faster", "always", "never"):
        winograd(use)
        results[use] = written("bn_relu_conv3x3", converted(Call(args, FORWARD), torch.float32), FORWARD)[0].clone()
    assert torch.equal(results["faster"], results["never"])
    assert not torch.equal(results["always"], results["never"])


@pytest.mark.parametrize("k", [4, 8, 12])
def test_few_columns_are_taken_where_there_are_tiles(
    k: int,
    level: str,  # noqa: F811
    winograd: Callable[[str], None],  # noqa: F811
) -> None:
    """With points in the lanes they are ahead of direct sums, whose pixels cost more than their products."""
    if not level.startswith("avx512"):
        pytest.skip("a level without points in the lanes")
    args, _ = calls([4, 1, 16, 16], 2, 4 * k, k)
    results = {}
    for use in ("faster", "always", "never"):
        winograd(use)
        results[use] = written("bn_relu_conv3x3", converted(Call(args, FORWARD), torch.float32), FORWARD)[0].clone()
    assert torch.equal(results["faster"], results["always"])
    assert not torch.equal(results["always"], results["never"])


def test_the_use_has_three_names() -> None:
    assert _extension.module is not None
    with pytest.raises(ValueError, match="expected 'faster', 'always' or 'never', got 'sometimes'"):
        _extension.module.set_winograd("sometimes")
