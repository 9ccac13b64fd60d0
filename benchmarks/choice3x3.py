"""Whose 3x3 convolution is faster on a GPU, ours or cuDNN's, with all that stands around it in a dense layer: what
csrc/cuda/conv3x3_choice.cu's table is filled from.

Forward both make the new features of z: BatchNorm, ReLU, the convolution, into the buffer's columns, statistics.
Backward, from the gradient of these features and of their statistics: the gradient of relu(bn(z)), BatchNorm's two sums
and the weight's gradient. Theirs are the calls of csrc/step.h around PyTorch's convolution.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.operators import EPS, Block, blocks_of
from benchmarks.peers import Network
from benchmarks.stopwatch import Precision, Stopwatch
from densenet_ext.kernels import acc_dtype

DIVISORS = (1, 8)  # of a network's batch
ALLOWED = {"bfloat16": 1e-2, "float16": 4e-3, "float32, TF32": 4e-3}
"""By precision, the most by which ours may differ from theirs where the table is to choose it."""
_dropout = {"drop_rate": 0.0, "seed": None, "layer": 0, "drop_rows": 1}


class Layer(NamedTuple):
    """One layer's tensors: rows [M, ...] in the dtype of feature maps, the rest in that of sums."""

    block: Block
    tf32: bool
    z: Tensor  # [M, b]
    norm: dict[str, Any]
    weight: Tensor  # [k, b, 3, 3]
    buffer: Tensor  # [M, C]; the new features are the k columns from block.channels on
    grad: Tensor  # [M, C]
    mean: Tensor  # [k], as the next ones
    var: Tensor
    grad_mean: Tensor
    grad_var: Tensor

    @property
    def new(self) -> slice:
        return slice(self.block.channels, self.block.channels + self.weight.shape[0])


def layer_of(block: Block, k: int, dtype: torch.dtype, device: torch.device, tf32: bool) -> Layer:
    """Random tensors for the first layer of a block with growth rate ``k`` and 4 k bottleneck features."""
    b, M, acc, C = 4 * k, block.pixels, acc_dtype(dtype), block.channels + block.layers * k

    def vector(*size: int) -> Tensor:
        return torch.randn(size, dtype=acc, device=device)

    def rows(columns: int) -> Tensor:
        return torch.randn(M, columns, dtype=dtype, device=device)

    norm = {"mean": vector(b), "var": vector(b).abs() + 0.5, "weight": vector(b), "bias": vector(b), "eps": EPS}
    weight = vector(k, b, 3, 3) / (3 * b**0.5)
    return Layer(block, tf32, rows(b), norm, weight, rows(C), rows(C), *(vector(k) for _ in range(4)))


def ours(layer: Layer) -> dict[str, Tensor]:
    """Both passes by our kernels; returns the gradients."""
    ops, size = torch.ops.densenet_ext, _size(layer)
    given = {"x": layer.z, "size": size, **layer.norm, "conv_weight": layer.weight}
    new = {"out": layer.buffer[:, layer.new], "out_mean": layer.mean, "out_var": layer.var}
    ops.bn_relu_conv3x3(**given, conv_bias=None, **_dropout, **new, tf32=layer.tf32)
    results = {"grad_x": torch.empty_like(layer.z), "grad_conv_weight": torch.empty_like(layer.weight)}
    results |= {name: torch.empty_like(layer.norm["mean"]) for name in ("grad_weight", "grad_bias")}
    ops.bn_relu_conv3x3_backward(
        **given,
        grad=layer.grad[:, layer.new],
        features=layer.buffer[:, layer.new],
        features_mean=layer.mean,
        features_grad_mean=layer.grad_mean,
        features_grad_var=layer.grad_var,
        **_dropout,
        scaled=False,
        grad_in=None,
        accumulate=False,
        **results,
        grad_conv_bias=None,
        grad_mean=None,
        grad_var=None,
        tf32=layer.tf32,
    )
    return results


def theirs(layer: Layer) -> Callable[[], dict[str, Tensor]]:
    """The same around PyTorch's convolution, whose weight is copied once for all calls, as a block copies it for all
    layers."""
    ops, new = torch.ops.densenet_ext, layer.new
    weight = layer.weight.to(layer.z.dtype).contiguous(memory_format=torch.channels_last)
    a, g = torch.empty_like(layer.z), torch.empty_like(layer.buffer[:, new])

    def image(rows: Tensor) -> Tensor:
        batch, _, height, width = _size(layer)
        return rows.view(batch, height, width, -1).permute(0, 3, 1, 2)

    def gradient(which: int) -> Tensor:
        mask, ones = [which == 0, which == 1, False], [1, 1]
        return torch.ops.aten.convolution_backward(
            image(g), image(a), weight, None, ones, ones, ones, False, [0, 0], 1, mask
        )[which]

    def rows_of(image: Tensor) -> Tensor:
        return image.permute(0, 2, 3, 1).reshape(layer.z.shape[0], -1)

    def call() -> dict[str, Tensor]:
        ops.bn_relu(layer.z, **layer.norm, out=a)
        y = rows_of(torch.conv2d(image(a), weight, padding=1))
        ops.append_features(y, layer.buffer[:, new], layer.mean, layer.var, 0.0, None, 0)
        share = (layer.mean, layer.grad_mean, layer.grad_var)
        ops.feature_grad(layer.grad[:, new], layer.buffer[:, new], *share, 0.0, None, 0, g)
        da = rows_of(gradient(0))
        results = {name: torch.empty_like(layer.norm["mean"]) for name in ("grad_weight", "grad_bias")}
        ops.bn_relu_backward_reduce(da, layer.z, **layer.norm, **results, out=a)
        return {"grad_x": da, "grad_conv_weight": gradient(1), **results}

    return call


def difference(layer: Layer, of_theirs: Callable[[], dict[str, Tensor]]) -> float:
    """Calls both; returns the most by which a result of theirs and ours differ, as lengths of vectors."""
    found = []
    for call in (lambda: ours(layer), of_theirs):
        for tensor in (layer.buffer[:, layer.new], layer.mean, layer.var):
            tensor.fill_(float("nan"))
        given = [layer.mean, layer.var]
        results = call()
        values = [layer.buffer[:, layer.new], *given, *(results[name] for name in sorted(results))]
        found.append([value.double().flatten() for value in values])
    # NaN where one is
    return torch.stack([(a - b).norm() / b.norm().clamp_min(1e-30) for a, b in zip(*found, strict=True)]).max().item()


def _size(layer: Layer) -> list[int]:
    return [layer.block.batch, 1, layer.block.image, layer.block.image]


def run(
    networks: Sequence[Network], precisions: Sequence[Precision], stopwatch: Stopwatch, seconds: float
) -> list[dict[str, Any]]:
    """A row for each block, batch and precision in which tensor cores multiply, for at most about ``seconds``."""
    end = time.monotonic() + seconds
    rows: list[dict[str, Any]] = []
    device, capability = stopwatch.device, 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        capability = 10 * major + minor
    for network in networks:
        for precision in precisions:
            if precision.dtype == torch.float32 and not precision.tf32:
                continue
            for divisor in DIVISORS:
                for block in blocks_of(network._replace(batch=max(1, network.batch // divisor))):
                    if time.monotonic() > end:
                        return rows
                    with torch.backends.cudnn.flags(enabled=True, allow_tf32=precision.tf32):
                        rows.append(_measured(network, block, precision, stopwatch) | {"capability": capability})
    return rows


def _measured(network: Network, block: Block, precision: Precision, stopwatch: Stopwatch) -> dict[str, Any]:
    layer = layer_of(block, network.growth_rate, precision.dtype, stopwatch.device, precision.tf32)
    of_theirs = theirs(layer)
    return {
        "network": network.name,
        "precision": precision.name,
        "bytes": layer.z.element_size(),
        "tf32": precision.tf32,
        "C": layer.z.shape[1],
        "N": layer.weight.shape[0],
        "width": block.image,
        "rows": block.pixels,
        "difference": difference(layer, of_theirs),
        "ours": stopwatch.median(lambda: ours(layer)),
        "theirs": stopwatch.median(of_theirs),
    }


def table_rows(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """The rows of conv3x3_choice.cu's table: for each shape from how many pixels on ours was faster throughout, and
    right. 16-bit types share their rows: of two measurements the worse of ours decides."""
    shapes: dict[tuple[Any, ...], list[tuple[int, bool]]] = defaultdict(list)  # pixels, and whether ours is better
    for row in found:
        shape = tuple(row[name] for name in ("capability", "bytes", "tf32", "C", "N", "width"))
        better = row["ours"] < row["theirs"] and row["difference"] <= ALLOWED[row["precision"]]
        shapes[shape].append((row["rows"], better))
    lines = []
    for (capability, size, tf32, *rest), measured in sorted(shapes.items()):
        least = None
        for rows in sorted({rows for rows, _ in measured}, reverse=True):
            if not all(better for pixels, better in measured if pixels == rows):
                break
            least = rows
        if least is not None:
            text = ", ".join(map(str, (capability, size, str(tf32).lower(), *rest, least)))
            lines.append(f"{{{text}}},")
    return lines
