"""Which blocks have a kernel of ours for their 3x3 convolutions."""

from __future__ import annotations

import pytest
import torch

from densenet_ext import kernels
from densenet_ext.algorithm.whole import are_of_three, copied, has_conv3x3, has_kernel


@pytest.mark.skipif(kernels.backend("cpu") != "compiled", reason="no compiled part")
def test_kernels_for_convolutions_of_three() -> None:
    x = torch.ones(2, 4, 5, 5, device="cpu")
    assert has_conv3x3(x) and not has_conv3x3(x.to("meta"))
    assert has_kernel(x, [torch.ones(4, 4, 3, 3), torch.ones(4, 4, 3)])
    assert not has_kernel(x, [torch.ones(4, 4, 3, 3), torch.ones(4, 4, 5, 5)])
    assert are_of_three([torch.ones(4, 4, 3)]) and not are_of_three([torch.ones(4, 4, 3, 1)])


def test_weights_that_are_copied_are_those_of_pytorchs_own_convolutions() -> None:
    of_three, of_five = torch.ones(4, 4, 3, 3), torch.ones(2, 4, 5, 5)
    x = torch.ones(2, 4, 5, 5, device="cpu")
    compiled = kernels.backend("cpu") == "compiled"
    assert copied(x, [of_three]) == (0 if compiled else of_three.numel())
    assert copied(x, [of_three, of_five]) == of_five.numel()
    assert copied(x.to("meta"), [of_three, of_three]) == of_three.numel()


def test_gradients_that_wait_are_bounded_by_the_scratch_and_a_mebibyte() -> None:
    x, weights = torch.ones(2, 4, 5, 5, device="meta"), [torch.ones(4, 4, 3, 3)] * 6
    one = 4 * 4 * 9
    assert copied(x, weights, 1) == 2 * one  # fewer elements than a weight: one waits
    assert copied(x, weights, 8) == one + 50 * 4
    assert copied(x, weights, 100) == 7 * one  # all wait
    many = [torch.ones(512, 512, 3, 3)] * 2
    assert copied(torch.ones(64, 4, 512, 512, device="meta"), many, 100) == 2 * 512 * 512 * 9
    assert copied(torch.ones(64, 4, 512, 512, device="meta"), weights * 10000, 100) == one + 2**18
