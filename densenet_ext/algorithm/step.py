"""One dense layer over rows, in two halves each way: what a block and a single layer share.

First half      z   = dropout(relu(x s + t) @ W1^T + c1)     and z's statistics
Second half     new = conv3x3(relu(z s2 + t2), W2) + c2      (dropout and statistics of new: whoever stores it)

Backward, with g the gradient of new:

    second half     da, dW2, dc2 = sum g      from conv3x3
                    dy2 = da where z s2 + t2 > 0        dbeta2 = sum dy2      dgamma2 = r2 sum dy2 (z - m2)
    first half      dz = s2 (dy2 - dbeta2 / M - (z - m2) r2 dgamma2 / M), or s2 dy2 where norm2 is frozen
                    dc1 = sum dz,  dW1, dgamma1, dbeta1 and x's gradient from dz through dropout and the 1x1 convolution

dc1 needs no pass over dz, unless dropout stands between: with the batch's statistics it is 0, since a mean takes
away whatever c1 adds; where norm2 is frozen it is s2 dbeta2.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from densenet_ext import kernels
from densenet_ext.algorithm.conv import conv_same_backward
from densenet_ext.algorithm.conversions import cast, frozen_norm, grad_like, norm_tensors, norm_values
from densenet_ext.algorithm.dropout import Dropout
from densenet_ext.algorithm.folding import scales_shifts
from densenet_ext.algorithm.sync import merge_sums
from densenet_ext.algorithm.values import Layer, Tensors


class Parameters(NamedTuple):
    """One entry for each tensor of a layer, in an operation's order: tensors, gradients, or whether these are asked."""

    gamma1: Any = None  # [C]
    beta1: Any = None
    mean1: Any = None  # running statistics, where norm1 is frozen
    var1: Any = None
    conv1: Any = None  # [b, C, 1...]
    bias1: Any = None  # [b]
    gamma2: Any = None  # [b]
    beta2: Any = None
    mean2: Any = None
    var2: Any = None
    conv2: Any = None  # [k, b, 3...]
    bias2: Any = None  # [k]

    @property
    def norm1(self) -> Tensors:
        """The four tensors of norm1."""
        return self[0:4]

    @property
    def norm2(self) -> Tensors:
        """The four tensors of norm2."""
        return self[6:10]


COUNT = len(Parameters._fields)
NORMS = (Parameters._fields.index("gamma1"), Parameters._fields.index("gamma2"))
"""Where the tensors of the two norms start."""
CONV1, CONV2 = Parameters._fields.index("conv1"), Parameters._fields.index("conv2")


class Step(NamedTuple):
    """One layer of a call, in the form that kernels take. acc: the dtype of sums."""

    ops: Any
    size: Sequence[int]  # [N, any, *spatial]
    x: Tensor  # [M, C], what it reads
    norm1: Any  # mean, variance, weight, bias [C] in acc; eps
    W1: Tensor  # [b, C, 1...] in acc
    c1: Tensor | None  # [b] in acc
    norm2: Any  # as norm1, of z; the batch's own mean and variance are filled in with z
    W2: Tensor  # [k, b, 3...] in the features' dtype
    c2: Tensor | None  # [k] in the features' dtype
    batch: tuple[bool, ...]  # per norm: the batch's own statistics
    group: str  # over which norm2 takes its statistics; "" for this process alone
    inner: Dropout | None  # of z


def parameters_of(layer: Layer) -> Parameters:
    """The tensors of ``layer``."""
    first, second = norm_tensors(layer.norm1), norm_tensors(layer.norm2)
    return Parameters(*first, layer.conv1, layer.conv1_bias, *second, layer.conv2, layer.conv2_bias)


def layer_of(parameters: Parameters, batch: tuple[bool, ...], eps: tuple[float, ...]) -> Layer:
    """The layer of these tensors once more, with running statistics that do not move and without dropout."""
    norm1, norm2 = frozen_norm(parameters.norm1, batch[0], eps[0]), frozen_norm(parameters.norm2, batch[1], eps[1])
    return Layer(norm1, parameters.conv1, norm2, parameters.conv2, 0.0, parameters.bias1, parameters.bias2)


def make_step(
    x: Tensor,
    size: Sequence[int],
    parameters: Parameters,
    stats: Sequence[Tensor],
    batch: tuple[bool, ...],
    eps: tuple[float, ...],
    group: str,
    inner: Dropout | None,
) -> Step:
    """The step of rows x; stats: mean and variance of x [C] and of z [b], of which those of frozen norms are not
    read."""
    acc = kernels.acc_dtype(x.dtype)
    mean, var, z_mean, z_var = stats
    bias1, bias2 = parameters.bias1, parameters.bias2
    return Step(
        kernels.select(x),
        size,
        x,
        norm_values(parameters.norm1, mean, var, batch[0], eps[0], acc),
        cast(parameters.conv1, acc),
        None if bias1 is None else cast(bias1, acc),
        norm_values(parameters.norm2, z_mean, z_var, batch[1], eps[1], acc),
        parameters.conv2.to(x.dtype),
        None if bias2 is None else bias2.to(x.dtype),
        batch,
        group,
        inner,
    )


# ---- forward ---------------------------------------------------------------------------------------------------------


def first_half(step: Step, z: Tensor, stats: tuple[Tensor | None, Tensor | None] = (None, None)) -> None:
    """Writes z [M, b], and its mean and variance [b] into ``stats`` where these are given."""
    out, out_stats = (z, stats) if step.inner is None else (z.new_empty(z.shape), (None, None))
    step.ops.bn_relu_conv1x1(step.x, *step.norm1, step.W1, step.c1, False, out, *out_stats)
    if step.inner is not None:
        step.inner.forward(step.ops, out, step.size, z, stats)


def first_half_folded(step: Step, s2: Tensor, t2: Tensor, a: Tensor) -> None:
    """Writes a [M, b] = relu(z s2 + t2) without z; s2 and t2 [b] as of :func:`folded`."""
    step.ops.bn_relu_conv1x1(step.x, *step.norm1, folded_weight(step.W1, s2), t2, True, a, None, None)


def folded_weight(W1: Tensor, s2: Tensor) -> Tensor:
    """W1 [b, C, 1...] with a frozen norm2's scale s2 [b] in it."""
    return W1 * s2.view(-1, *[1] * (W1.dim() - 1))


def folded(layers: Sequence[tuple[Parameters, float]], acc: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """s2 and t2 + s2 c1 [b] of the frozen norm2 of each layer, given with the norm's eps."""
    norms = []
    none = torch.empty(0)  # in the place of a batch's statistics, which frozen norms do not have
    for parameters, eps in layers:
        mean, *others = norm_values(parameters.norm2, none, none, False, eps, acc)
        norms.append((mean if parameters.bias1 is None else mean - cast(parameters.bias1, acc), *others))
    return list(zip(*scales_shifts(norms), strict=True))  # type: ignore[arg-type]


# ---- backward --------------------------------------------------------------------------------------------------------


def second_half_backward(
    step: Step, g: Tensor, z: Tensor, a: Tensor, asked: Parameters, beneath: bool
) -> tuple[Tensor | None, Parameters]:
    """The gradient da [M, b] of relu(bn2(z)), None unless asked for ``beneath``, and those of norm2 and conv2.

    g [M, k]: the gradient of the new features. ``a`` [M, b] is scratch.
    """
    found = Parameters(bias2=g.sum(0, dtype=step.norm2[0].dtype) if asked.bias2 else None)
    da, _ = conv_same_backward(g, a, step.size, step.W2, (True, False)) if beneath else (None, None)
    if da is not None and (step.batch[1] or asked.gamma2 or asked.beta2 or asked.bias1):
        # relu(bn2(z)), which dW2 needs, and the two sums, which need da: z is read once for both
        dgamma2, dbeta2 = _new_pair(step.norm2[0], z.shape[1])
        step.ops.bn_relu_backward_reduce(da, z, *step.norm2, dgamma2, dbeta2, a if asked.conv2 else None)
        found = found._replace(gamma2=dgamma2, beta2=dbeta2)
    elif asked.conv2:
        step.ops.bn_relu(z, *step.norm2, a)
    if asked.conv2:
        found = found._replace(conv2=conv_same_backward(g, a, step.size, step.W2, (False, True))[1])
    return da, found


def first_half_backward(
    step: Step,
    da: Tensor,
    z: Tensor,
    a: Tensor,
    found: Parameters,
    count: Tensor | None,
    asked: Parameters,
    grad_in: Tensor | None,
    grad_x: Tensor,
    accumulate: bool,
    stats_grads: tuple[Tensor | None, Tensor | None],
) -> Parameters:
    """The gradients of norm1 and conv1; x's is written: grad_x [M, C] = s dy + (grad_in, or itself to accumulate).

    da, found: of the second half; da is overwritten, ``a`` [M, b] is scratch. count [1]: z's rows in all processes.
    stats_grads: collect the gradients of x's mean and variance [C].
    """
    ops, M, (batch1, batch2) = step.ops, z.shape[0], step.batch
    sums: Any = (found.gamma2, found.beta2) if batch2 else (None, None)
    if batch2 and step.group:
        assert count is not None
        sums = merge_sums(torch.stack(sums), M, count, step.group)
    dc1 = None
    if step.inner is None:
        if asked.bias1:
            dc1 = _bias_gradient(step, z, found, sums)
        dz, norm2 = da, (z, *step.norm2, *sums)
    else:
        ops.bn_relu_backward(da, z, *step.norm2, *sums, da)
        nothing = step.norm2[0].new_zeros(z.shape[1])  # what z's statistics receive is in dz already
        step.inner.backward(ops, da, z, (nothing, nothing, nothing), step.size, a)
        dz, norm2 = a, (None, None, None, None, None, 0.0, None, None)
        dc1 = dz.sum(0, dtype=nothing.dtype) if asked.bias1 else None
    dW1 = torch.empty_like(step.W1) if asked.conv1 else None
    dgamma1, dbeta1 = _new_pair(step.norm1[0], step.x.shape[1])
    collect = stats_grads if batch1 else (None, None)
    ops.bn_relu_conv1x1_backward(
        step.x, *step.norm1, step.W1, dz, *norm2, grad_in, accumulate, grad_x, dW1, dgamma1, dbeta1, *collect
    )
    return Parameters(gamma1=dgamma1, beta1=dbeta1, conv1=dW1, bias1=dc1)


def _new_pair(like: Tensor, count: int) -> tuple[Tensor, Tensor]:
    # no halves of one tensor: results of a custom operation may not share memory
    return like.new_empty(count), like.new_empty(count)


def _bias_gradient(step: Step, z: Tensor, found: Parameters, sums: Any) -> Tensor:
    """dc1 = sum dz [b], by the sums over this process's rows; ``sums`` are those of all, in its share."""
    mean, var, gamma, _, eps = step.norm2
    if step.batch[1] and not step.group:
        return found.beta2 * 0  # not zeros: NaN stays
    r = (var + eps).rsqrt()
    s = r if gamma is None else gamma * r
    if not step.batch[1]:
        return s * found.beta2
    dgamma2, dbeta2 = sums
    own_mean = z.sum(0, dtype=mean.dtype) / max(z.shape[0], 1)
    return s * (found.beta2 - dbeta2 - r * dgamma2 * (own_mean - mean))


def put(grads: list[Tensor | None], start: int, found: Parameters, tensors: Parameters, asked: Parameters) -> None:
    """Puts what was found and is asked for where the layer's gradients start."""
    for i, (grad, x, need) in enumerate(zip(found, tensors, asked, strict=True), start):
        if grad is not None:
            grads[i] = grad_like(grad, x, need)
