"""Which blocks have a kernel of ours for their 3x3 convolutions."""

from __future__ import annotations

import pytest
import torch

from densenet_ext import kernels
from densenet_ext.algorithm.whole import has_conv3x3, has_kernel


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="no compiled part")
def test_kernels_for_convolutions_of_three() -> None:
    x = torch.ones(2, 4, 5, 5, device="cpu")
    assert has_conv3x3(x) and not has_conv3x3(x.to("meta"))
    assert has_kernel(x, [torch.ones(4, 4, 3, 3), torch.ones(4, 4, 3)])
    assert not has_kernel(x, [torch.ones(4, 4, 3, 3), torch.ones(4, 4, 5, 5)])
