"""A frozen norm2 folded into the 1x1 convolution before it: relu(norm2(x @ W^T)) = relu(x @ (s W)^T + t).

With s = gamma r and t = beta - m s. Those of all layers of a block are computed by a few operations over lists: six
small ones per layer would cost more than the layers themselves where batches are small.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NormValues = tuple[Tensor, Tensor, "Tensor | None", "Tensor | None", float]  # mean, var, weight, bias [b]; eps


def scales_shifts(norms: Sequence[NormValues]) -> tuple[list[Tensor], list[Tensor]]:
    """s and t of each norm in x s + t, [b] each."""
    if not norms:
        return [], []
    means, vars, weights, biases, eps = (list(column) for column in zip(*norms, strict=True))
    s = list(torch._foreach_rsqrt(torch._foreach_add(vars, eps)))
    affine = [i for i, weight in enumerate(weights) if weight is not None]
    if affine:
        torch._foreach_mul_([s[i] for i in affine], [weights[i] for i in affine])
    t = list(torch._foreach_neg(torch._foreach_mul(means, s)))
    shifted = [i for i, bias in enumerate(biases) if bias is not None]
    if shifted:
        torch._foreach_add_([t[i] for i in shifted], [biases[i] for i in shifted])
    return s, t
