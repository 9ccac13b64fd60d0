"""Winograd's products of the 3x3 convolution: as good as eager whatever the shape, and taken where they are faster."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from benchmarks import conv3x3
from densenet_ext import _extension
from tests.kernels.conv3x3_calls import FORWARD, SHAPES, calls, check_as_good_as_eager, winograd, written  # noqa: F401
from tests.kernels.test_kernels import each_level, level  # noqa: F401  a fixture
from tests.support.helpers import DEVICE, error
from tests.support.kernel_calls import Call, converted

pytestmark = pytest.mark.skipif(
    _extension.module is None or DEVICE.type != "cpu", reason="calls the compiled CPU operators"
)


@each_level
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("size", "dims", "C", "k"),
    [shape for shape in SHAPES if shape[1] > 1]
    + [([2, 1, 8, 6], 2, 33, 96), ([1, 1, 5, 260], 2, 128, 16), ([1, 3, 3, 4], 3, 200, 64)],
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


def test_the_use_has_three_names() -> None:
    assert _extension.module is not None
    with pytest.raises(ValueError, match="expected 'faster', 'always' or 'never', got 'sometimes'"):
        _extension.module.set_winograd("sometimes")
