"""How fast the 3x3 convolution's operators are beside PyTorch's own convolution between this package's other operators.

``python -m benchmarks.conv3x3 --threads 1`` prints, for the shapes of whole networks, GFLOP/s in both directions, the
share of what the processor's multiply-adds can give and the time of PyTorch's way as a multiple of ours. One thread is
timed by the processor time that it uses, so that other programs on the machine count little; several by the wall clock.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

from benchmarks.measure import interleave, median, ratio
from benchmarks.peaks import multiply_adds
from densenet_ext.algorithm.conv import conv_same, conv_same_backward

ops = torch.ops.densenet_ext


class Shape(NamedTuple):
    """A layer's convolution."""

    where: str
    batch: int
    image: tuple[int, ...]
    C: int
    k: int

    @property
    def rows(self) -> int:
        return self.batch * math.prod(self.image)

    @property
    def flops(self) -> int:
        """Of one direction's products, those with the padding included; dgrad and wgrad have as many each."""
        return int(2 * self.rows * self.C * self.k * 3 ** len(self.image))


def shapes(batch: int | None = None) -> list[Shape]:
    """Of DenseNet-121, DenseNet-BC-100 and a 3-D network; ``batch``: instead of their own."""
    found = [Shape("DenseNet-121", 16, (side, side), 128, 32) for side in (56, 28, 14, 7)]
    found += [Shape("BC-100", 64, (side, side), 48, 12) for side in (32, 16, 8)]
    found += [Shape("3-D", 2, (side, side, side), 128, 32) for side in (16, 8)]
    return found if batch is None else [shape._replace(batch=batch) for shape in found]


class Layer:
    """One layer's tensors, and both directions in two ways."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        M, C, k = shape.rows, shape.C, shape.k
        self.size = (shape.batch, C, *shape.image)
        self.images = [shape.batch, *[1] * (3 - len(shape.image)), *shape.image]
        self.x = torch.randn(M, C).to(dtype)
        self.norm = (torch.zeros(C), torch.ones(C), torch.ones(C), torch.zeros(C), 1e-5)
        self.weight = torch.randn(k, C, *[3] * len(shape.image)) / (C * 3 ** len(shape.image)) ** 0.5
        self.buffer = torch.randn(M, 4 * k).to(dtype)  # new features go into columns of it
        self.out = self.buffer[:, k : 2 * k]
        self.grad = torch.randn(M, k).to(dtype)
        self.vectors = torch.randn(4, k)
        self.a, self.g, self.dx = torch.empty_like(self.x), torch.empty_like(self.grad), torch.empty_like(self.x)
        self.dW, self.sums = torch.empty_like(self.weight), torch.empty(2, C)

    def ours(self) -> None:
        """Forward."""
        given = (self.x, self.images, *self.norm, self.weight, None, 0.0, None, 0, 1)
        ops.bn_relu_conv3x3(*given, self.out, self.vectors[0], self.vectors[1])

    def theirs(self) -> None:
        """Forward."""
        ops.bn_relu(self.x, *self.norm, self.a)
        new = conv_same(self.a, self.size, self.weight.to(self.x.dtype))
        ops.append_features(new, self.out, self.vectors[0], self.vectors[1], 0.0, None, 0)

    def ours_backward(self) -> None:
        """The gradients of relu(bn(x)), of the weight, and the norm's two sums."""
        ops.bn_relu_conv3x3_backward(
            self.x, self.images, *self.norm, self.weight, self.grad, self.out, self.vectors[0], *self.vectors[2:],
            0.0, None, 0, 1, False, None, False, self.dx, self.dW, None, *self.sums, None, None,
        )  # fmt: skip

    def theirs_backward(self) -> None:
        """The same."""
        ops.feature_grad(self.grad, self.out, self.vectors[0], *self.vectors[2:], 0.0, None, 0, self.g)
        ops.bn_relu(self.x, *self.norm, self.a)
        weight = self.weight.to(self.x.dtype)
        da, _ = conv_same_backward(self.g, self.a, self.size, weight, (True, True))
        assert da is not None
        ops.bn_relu_backward_reduce(da, self.x, *self.norm, *self.sums)


def stopwatch(calls: int) -> Callable[[Callable[[], object]], float]:
    """Seconds of one of ``calls`` calls."""
    now = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter

    def clock(call: Callable[[], object]) -> float:
        begin = now()
        for _ in range(calls):
            call()
        return (now() - begin) / calls

    return clock


def measure(shape: Shape, dtype: torch.dtype, rounds: int, peak: float | None) -> str:
    """A line of the table."""
    layer, words = Layer(shape, dtype), []
    ways: tuple[tuple[Callable[[], None], Callable[[], None], int], ...] = (
        (layer.ours, layer.theirs, shape.flops),
        (layer.ours_backward, layer.theirs_backward, 2 * shape.flops),
    )
    for ours, theirs, flops in ways:
        clock = stopwatch(max(1, int(4e8 / flops)))
        clock(ours), clock(theirs)
        times = interleave({"ours": ours, "theirs": theirs}, rounds, clock=clock)
        speed = flops / median(times["ours"]) / 1e9
        share = f"{speed / peak:5.0%}" if peak else "     "
        words.append(f"{speed:7.1f} {share} {ratio(times['theirs'], times['ours']).median:6.2f}")
    size = "x".join(map(str, shape.image))
    return f"{shape.where:13} {shape.batch:3} {size:9} {shape.C:4} {shape.k:3} {str(dtype)[6:]:9}" + " |".join(words)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    found = multiply_adds()
    print(f"{'network':13} {'N':>3} {'image':9} {'C':>4} {'k':>3} {'dtype':9}", end="")
    print(" |".join(f"{way:>7} {'peak':>5} {'times':>6}" for way in ("forward", "backwd")))
    for dtype in (torch.float32, torch.bfloat16):
        peak = found[dtype] * options.threads if found else None
        for shape in shapes() + shapes(batch=1):
            print(measure(shape, dtype, options.rounds, peak), flush=True)


if __name__ == "__main__":
    main()
