"""Which blocks have a kernel of ours for their 3x3 convolutions."""

from __future__ import annotations

import pytest
import torch

from densenet_ext import kernels
from densenet_ext.algorithm.whole import copied, has_conv3x3, has_kernel, new_gradient


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="no compiled part")
def test_kernels_for_convolutions_of_three() -> None:
    x = torch.ones(2, 4, 5, 5, device="cpu")
    assert has_conv3x3(x) and not has_conv3x3(x.to("meta"))
    assert has_kernel(x, [torch.ones(4, 4, 3, 3), torch.ones(4, 4, 3)])
    assert not has_kernel(x, [torch.ones(4, 4, 3, 3), torch.ones(4, 4, 5, 5)])


def test_a_parameters_gradient_has_its_layout() -> None:
    assert new_gradient(None, torch.float32) is None
    weight = torch.ones(4, 3, 3, 3, dtype=torch.bfloat16)
    last = weight.contiguous(memory_format=torch.channels_last)
    for x, stride in ((weight, weight.stride()), (last, last.stride()), (weight.transpose(0, 1), (36, 9, 3, 1))):
        grad = new_gradient(x, torch.float32)
        assert grad is not None
        assert grad.shape == x.shape and grad.dtype == torch.float32 and grad.stride() == stride


def test_weights_that_are_copied_are_those_of_pytorchs_own_convolutions() -> None:
    of_three, of_five = torch.ones(4, 4, 3, 3), torch.ones(2, 4, 5, 5)
    x = torch.ones(2, 4, 5, 5, device="cpu")
    compiled = kernels.backend("cpu") == "compiled"
    assert copied(x, [of_three, of_five]) == of_five.numel() + (0 if compiled else of_three.numel())
    assert copied(x.to("meta"), [of_three]) == of_three.numel()
