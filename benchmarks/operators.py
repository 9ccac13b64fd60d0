"""The operators at the shapes at which a network calls them, and what each call has to move and to multiply.

A case holds no tensor before its arguments are made: those of all cases together would fill any GPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.peers import Network
from densenet_ext.kernels import CPU_OPS, acc_dtype

EPS = 1e-5
Arguments = dict[str, Any]
_NO_DROPOUT: Arguments = {"drop_rate": 0.0, "seed": None, "layer": 0, "drop_rows": 1}


class Case(NamedTuple):
    """One call of an operator."""

    operator: str
    where: str  # in the network: "block 2, layer 12"
    rows: int  # M of its widest argument
    columns: int
    make: Callable[[], Arguments]
    flops: int = 0  # of the products; 0 for what only moves


class Block(NamedTuple):
    """A dense block's sizes."""

    number: int
    batch: int
    image: int  # height and width
    channels: int  # of its input
    layers: int

    @property
    def pixels(self) -> int:
        return self.batch * self.image * self.image


def blocks_of(network: Network) -> Iterator[Block]:
    """The dense blocks of ``network``, each transition halving channels and sides."""
    image = network.image if network.small_inputs else network.image // 4
    channels = network.num_init_features
    for number, layers in enumerate(network.block_config, start=1):
        yield Block(number, network.batch, image, channels, layers)
        channels = (channels + layers * network.growth_rate) // 2
        image //= 2


def cases(network: Network, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """Every operator at the shapes of ``network``: in each block the middle and the last layer, and between them.

    On a GPU those that have a kernel for it.
    """
    for case in _cases(network, dtype, device):
        if device.type == "cpu" or case.operator not in CPU_OPS:
            yield case


def _cases(network: Network, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    make = _Maker(dtype, device)
    blocks = list(blocks_of(network))
    if not network.small_inputs:
        yield from _stem(make, network)
    for block in blocks:
        yield from _block(make, block, network.growth_rate)
        width = block.channels + block.layers * network.growth_rate
        last = block is blocks[-1]
        window = block.image if last else 2
        yield from _average(make, block, width, window, "head" if last else f"transition {block.number}")
    yield from cases_3x3(network, dtype, device)


def cases_3x3(network: Network, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """The 3x3 convolutions of ``network``, one a block: all layers are alike."""
    make, k = _Maker(dtype, device), network.growth_rate
    for block in blocks_of(network):
        pitch, where = block.channels + block.layers * k, f"block {block.number}"
        given = (make, block, 4 * k, k, pitch)
        flops = 2 * block.pixels * 9 * 4 * k * k
        yield Case("bn_relu_conv3x3", where, block.pixels, 4 * k, functools.partial(_conv3x3, *given), flops)
        backward = functools.partial(_conv3x3_backward, *given)
        yield Case("bn_relu_conv3x3_backward", where, block.pixels, 4 * k, backward, 2 * flops)


def bytes_moved(operator: Any, arguments: Arguments) -> int:
    """The least that a call moves through memory: every argument once, what it adds to once more."""
    total = 0
    for argument in operator._schema.arguments:
        value = arguments.get(argument.name)  # how it multiplies may be left out
        for tensor in value if isinstance(value, list) else [value]:
            if isinstance(tensor, Tensor):
                total += tensor.numel() * tensor.element_size()
    if arguments.get("accumulate"):
        total += arguments["grad_x"].numel() * arguments["grad_x"].element_size()
    return total


def arithmetic(operator: Any, tf32: bool = False) -> Arguments:
    """The argument by which an operator that multiplies is told whether it may use TF32; nothing for the others."""
    return {"tf32": tf32} if any(argument.name == "tf32" for argument in operator._schema.arguments) else {}


class _Maker:
    """Random arguments in one dtype on one device."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device

    def rows(self, M: int, C: int, pitch: int = 0, first: int = 0) -> Tensor:
        """[M, C]: columns from ``first`` on of rows that lie ``pitch`` apart."""
        wide = torch.randn(M, max(pitch, C), dtype=self.dtype, device=self.device)
        return wide[:, first : first + C]

    def vector(self, *size: int) -> Tensor:
        return torch.randn(size, dtype=acc_dtype(self.dtype), device=self.device)

    def norm(self, C: int, prefix: str = "") -> Arguments:
        values = {"mean": self.vector(C), "var": self.vector(C).abs() + 0.5, "weight": self.vector(C)}
        return {f"{prefix}{name}": t for name, t in {**values, "bias": self.vector(C), "eps": EPS}.items()}

    def sums(self, C: int, prefix: str = "") -> Arguments:
        return {f"{prefix}grad_weight": self.vector(C), f"{prefix}grad_bias": self.vector(C)}


def _block(make: _Maker, block: Block, k: int) -> Iterator[Case]:
    M, b, pitch = block.pixels, 4 * k, block.channels + block.layers * k
    none = {"drop_rate": 0.0, "seed": None, "layer": 0}

    def append(C: int, first: int) -> Arguments:
        stats = {"mean": make.vector(C), "var": make.vector(C)}
        return {"src": make.rows(M, C), "out": make.rows(M, C, pitch, first), **stats, **none}

    def case(operator: str, where: str, C: int, arguments: Callable[[], Arguments], flops: int = 0) -> Case:
        return Case(operator, f"block {block.number}{where}", M, C, arguments, flops)

    C0 = block.channels
    yield case("channel_stats", ", input", C0, lambda: _statistics(make, M, C0))
    yield case("append_features", ", input", C0, lambda: append(C0, 0))
    yield case("append_features", "", k, lambda: append(k, C0))
    yield case("bn_relu", "", b, lambda: {"x": make.rows(M, b), **make.norm(b), "out": make.rows(M, b)})
    yield case(
        "bn_relu_backward_reduce",
        "",
        b,
        lambda: {"grad": make.rows(M, b), "x": make.rows(M, b), **make.norm(b), **make.sums(b)},
    )
    yield case(
        "bn_relu_backward",
        "",
        b,
        lambda: {
            "grad": make.rows(M, b),
            "x": make.rows(M, b),
            **make.norm(b),
            **make.sums(b),
            "grad_x": make.rows(M, b),
        },
    )
    yield case(
        "feature_grad",
        "",
        k,
        lambda: {
            "grad": make.rows(M, k, pitch, C0),
            "x": make.rows(M, k, pitch, C0),
            "mean": make.vector(k),
            "grad_mean": make.vector(k),
            "grad_var": make.vector(k),
            **none,
            "out": make.rows(M, k),
        },
    )
    for layer in sorted({block.layers // 2, block.layers - 1}):
        C, where = C0 + layer * k, f", layer {layer + 1}"
        yield case("bn_relu_conv1x1", where, C, functools.partial(_conv1x1, make, M, C, b, pitch), 2 * M * C * b)
        yield case(
            "bn_relu_conv1x1_backward",
            where,
            C,
            functools.partial(_conv1x1_backward, make, M, C, b, pitch),
            4 * M * C * b,
        )
    middle = block.layers // 2
    yield case("cat_bn_relu", f", layer {middle + 1}", C0 + middle * k, lambda: _cat(make, M, C0, k, middle))


def _statistics(make: _Maker, M: int, C: int) -> Arguments:
    return {"x": make.rows(M, C), "mean": make.vector(C), "var": make.vector(C)}


def _conv1x1(make: _Maker, M: int, C: int, b: int, pitch: int) -> Arguments:
    given = {"x": make.rows(M, C, pitch), **make.norm(C), "conv_weight": make.vector(b, C)}
    return {
        **given,
        "out_bias": None,
        "out_relu": False,
        "out": make.rows(M, b),
        "out_mean": make.vector(b),
        "out_var": make.vector(b),
    }


def _conv1x1_backward(make: _Maker, M: int, C: int, b: int, pitch: int) -> Arguments:
    return {
        "x": make.rows(M, C, pitch),
        **make.norm(C),
        "conv_weight": make.vector(b, C),
        "grad_out": make.rows(M, b),
        "z": make.rows(M, b),
        **make.norm(b, "z_"),
        **make.sums(b, "z_"),
        "grad_in": None,
        "accumulate": True,
        "grad_x": make.rows(M, C, pitch),
        "grad_conv_weight": make.vector(b, C),
        **make.sums(C),
        "grad_mean": make.vector(C),
        "grad_var": make.vector(C),
    }


def _conv3x3(make: _Maker, block: Block, b: int, k: int, pitch: int) -> Arguments:
    M = block.pixels
    return {
        **_conv3x3_of(make, block, b, k),
        "conv_bias": None,
        **_NO_DROPOUT,
        "out": make.rows(M, k, pitch, block.channels),
        "out_mean": make.vector(k),
        "out_var": make.vector(k),
    }


def _conv3x3_backward(make: _Maker, block: Block, b: int, k: int, pitch: int) -> Arguments:
    M = block.pixels
    return {
        **_conv3x3_of(make, block, b, k),
        "grad": make.rows(M, k, pitch, block.channels),
        "features": make.rows(M, k, pitch, block.channels),
        "features_mean": make.vector(k),
        "features_grad_mean": make.vector(k),
        "features_grad_var": make.vector(k),
        **_NO_DROPOUT,
        "scaled": False,
        "grad_in": None,
        "accumulate": False,
        "grad_x": make.rows(M, b),
        "grad_conv_weight": make.vector(k, b, 3, 3),
        "grad_conv_bias": None,
        **make.sums(b),
        "grad_mean": None,
        "grad_var": None,
    }


def _conv3x3_of(make: _Maker, block: Block, b: int, k: int) -> Arguments:
    size, weight = [block.batch, 1, block.image, block.image], make.vector(k, b, 3, 3)
    return {"x": make.rows(block.pixels, b), "size": size, **make.norm(b), "conv_weight": weight}


def _cat(make: _Maker, M: int, C0: int, k: int, count: int) -> Arguments:
    features = [make.rows(M, C0), *(make.rows(M, k) for _ in range(count))]
    C = C0 + count * k
    return {"features": features, **make.norm(C), "out": make.rows(M, C)}


def _average(make: _Maker, block: Block, C: int, window: int, where: str) -> Iterator[Case]:
    M, side = block.pixels, block.image // window
    pooled = block.batch * side * side
    place = {"size": [block.batch, 1, block.image, block.image], "window": [1, window, window]}

    def forward() -> Arguments:
        return {"x": make.rows(M, C), **place, **make.norm(C), "out": make.rows(pooled, C)}

    def reduce() -> Arguments:
        given = {"grad_out": make.rows(pooled, C), "x": make.rows(M, C), **place, **make.norm(C)}
        return {**given, "pooled": None, **make.sums(C)}

    def backward() -> Arguments:
        given = {name: value for name, value in reduce().items() if name != "pooled"}
        return {**given, "grad_x": make.rows(M, C)}

    yield Case("bn_relu_avg_pool", where, M, C, forward)
    yield Case("bn_relu_avg_pool_backward_reduce", where, M, C, reduce)
    yield Case("bn_relu_avg_pool_backward", where, M, C, backward)


def _stem(make: _Maker, network: Network) -> Iterator[Case]:
    N, side, C = network.batch, network.image // 2, network.num_init_features
    M, half = N * side * side, (side - 1) // 2 + 1
    pooled = N * half * half
    place = {"size": [N, 1, side, side], "window": [1, 3, 3], "stride": [1, 2, 2], "padding": [0, 1, 1]}

    def index() -> Tensor:
        return torch.full((pooled, C), 4, dtype=torch.uint8, device=make.device)  # the window's centre: always inside

    def forward() -> Arguments:
        return {"x": make.rows(M, C), **place, **make.norm(C), "out": make.rows(pooled, C), "index": index()}

    def reduce() -> Arguments:
        given = {"grad_out": make.rows(pooled, C), "index": index(), "x": make.rows(M, C), **place, **make.norm(C)}
        return {**given, **make.sums(C)}

    yield Case("bn_relu_max_pool", "stem", M, C, forward)
    yield Case("bn_relu_max_pool_backward_reduce", "stem", M, C, reduce)
    yield Case("bn_relu_max_pool_backward", "stem", M, C, lambda: {**reduce(), "grad_x": make.rows(M, C)})
