"""Random calls of every operator: each is right against the plain form, memory around it too, or refused by name."""

from __future__ import annotations

import contextlib
import re
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from densenet_ext import _extension, kernels
from densenet_ext.kernels import plain
from tests.kernels.test_first_conv import CONVOLUTIONS, Case, computed, layouts, tensors
from tests.support.helpers import DEVICE
from tests.support.kernel_calls import DTYPES

pytest.importorskip("hypothesis")
from hypothesis import event, given
from hypothesis import strategies as st

pytestmark = [
    pytest.mark.fuzz,
    pytest.mark.skipif(_extension.module is None or DEVICE.type != "cpu", reason="calls the compiled CPU operators"),
]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}


class Spec(NamedTuple):
    """A tensor as a window on memory: elements of ``memory`` from ``offset`` on."""

    memory: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    device: str = "cpu"

    @property
    def extent(self) -> int:
        if 0 in self.shape:
            return self.offset
        return self.offset + 1 + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))


@st.composite
def rows(draw: st.DrawFn, name: str, dtype: torch.dtype, M: int, C: int) -> Spec:
    """Rows [M, C], packed or a slice of wider ones."""
    left, right = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    return Spec(name, dtype, (M, C), (left + C + right, 1), left)


def vector(name: str, dtype: torch.dtype, C: int) -> Spec:
    return Spec(name, dtype, (C,), (1,))


def taps(name: str, dtype: torch.dtype, N: int, C: int, dims: int, channels_last: bool) -> Spec:
    """The weight of a 3x3 convolution of so many dimensions."""
    count = 3**dims
    strides = [3**i for i in reversed(range(dims))]
    if channels_last:
        return Spec(name, dtype, (N, C, *[3] * dims), (C * count, 1, *(C * s for s in strides)))
    return Spec(name, dtype, (N, C, *[3] * dims), (C * count, count, *strides))


Arguments = dict[str, Any]


@st.composite
def valid(draw: st.DrawFn, op: str) -> Arguments:
    """Arguments by name that make a valid call of ``op``."""
    dtype = draw(st.sampled_from(DTYPES))
    acc = kernels.acc_dtype(dtype)
    M, C, N = (draw(st.integers(low, high)) for low, high in ((1, 40), (1, 40), (1, 70)))
    Mo = M
    args: Arguments = {}
    dims = draw(st.integers(1, 3))
    if "conv3x3" in op:
        M, N = 1, draw(st.integers(1, 40))
        args["size"] = [draw(st.integers(1, high)) for high in (3, 3 if dims > 2 else 1, 5 if dims > 1 else 1, 7)]
        for n in args["size"]:
            M *= n
        Mo = M
    if "pool" in op:
        size = [draw(st.integers(1, high)) for high in (2, 3, 6, 6)]
        if "max" in op:
            window = [draw(st.integers(1, min(3, n + 1))) for n in size[1:]]
            padding = [draw(st.integers(0, w // 2)) for w in window]
            window = [min(w, n + 2 * p) for w, n, p in zip(window, size[1:], padding, strict=True)]
            padding = [min(p, w // 2) for p, w in zip(padding, window, strict=True)]
            stride = [draw(st.integers(1, 3)) for _ in range(3)]
        else:
            window = [draw(st.integers(1, n)) for n in size[1:]]
            padding, stride = [0] * 3, window
        shape = [(n + 2 * p - w) // s + 1 for n, p, w, s in zip(size[1:], padding, window, stride, strict=True)]
        M, Mo = size[0] * size[1] * size[2] * size[3], size[0] * shape[0] * shape[1] * shape[2]
        args |= {"size": size, "window": window, "stride": stride, "padding": padding}
    schema = getattr(torch.ops.densenet_ext, op).default._schema
    with_z = draw(st.booleans())
    pairs = {pair: draw(st.booleans()) for pair in ("statistics", "frozen", "z_frozen")}
    if op == "cat_bn_relu":
        parts = draw(st.lists(st.integers(0, 20), max_size=4))
        C = sum(parts)
        args["features"] = [draw(rows(f"features{i}", dtype, M, n)) for i, n in enumerate(parts)]
    rate = draw(st.sampled_from([0.0, 0.3, 0.999, 1.0]))
    args |= {
        "eps": 1e-5,
        "z_eps": 1e-3,
        "drop_rate": rate,
        "layer": draw(st.integers(0, 300)),
        "tf32": False,
        "bf16": False,
    }
    args |= {"out_relu": draw(st.booleans()), "accumulate": draw(st.booleans())}
    args |= {"drop_rows": draw(st.sampled_from([1, 3, M])), "scaled": True}
    args["seed"] = Spec("seed", torch.int64, (1,), (1,)) if rate or draw(st.booleans()) else None
    for argument in schema.arguments:
        name, optional = argument.name, "Optional" in str(argument.type)
        if name in args:
            continue
        z_part = name.startswith("z_") or name == "z"
        count = N if z_part or name.startswith(("out_", "features_")) or name in ("conv_bias", "grad_conv_bias") else C
        if name == "grad_out" or name in ("out", "index", "pooled"):
            columns = N if "conv" in op else C
            args[name] = draw(rows(name, torch.uint8 if name == "index" else dtype, Mo, columns))
        elif "conv3x3" in op and name in ("grad", "features"):
            args[name] = draw(rows(name, dtype, M, N))
        elif name in ("x", "src", "grad", "grad_x", "grad_in"):
            args[name] = draw(rows(name, dtype, M, C))
        elif name == "z":
            args[name] = draw(rows(name, dtype, M, N))
        elif name in ("conv_weight", "grad_conv_weight"):
            matrix = Spec(name, acc, (N, C), (C, 1))
            args[name] = taps(name, acc, N, C, dims, draw(st.booleans())) if "conv3x3" in op else matrix
        else:
            args[name] = vector(name, acc, count)
        if optional and "conv3x3" not in op:
            paired = {"mean": "statistics", "var": "statistics", "out_mean": "statistics", "out_var": "statistics"}
            paired |= {"grad_weight": "frozen", "grad_bias": "frozen", "grad_mean": "frozen", "grad_var": "frozen"}
            paired |= {"z_grad_weight": "z_frozen", "z_grad_bias": "z_frozen"}
            keep = pairs[paired[name]] if name in paired else name in ("z_mean", "z_var") or draw(st.booleans())
            if name == "z":
                keep = with_z
            if not keep or (z_part and not with_z) or (name == "index" and "backward" in op and not keep):
                args[name] = None
    if "conv3x3" in op:
        args |= draw(left_out(args))
    return {argument.name: args[argument.name] for argument in schema.arguments}


@st.composite
def left_out(draw: st.DrawFn, args: Arguments) -> Arguments:
    """What a call of the 3x3 convolution does without: each by itself, or with what is nothing without it."""
    groups = [["mean", "var", "weight", "bias", "grad_weight", "grad_bias", "grad_mean", "grad_var"]]
    groups += [["out_mean", "out_var"], ["grad_weight", "grad_bias"], ["grad_mean", "grad_var"], ["grad_x", "grad_in"]]
    groups += [["features", "features_mean", "features_grad_mean", "features_grad_var"]]
    groups += [[name] for name in ("weight", "bias", "conv_bias", "grad_in", "grad_conv_weight", "grad_conv_bias")]
    names = [name for group in groups if draw(st.integers(0, 3)) == 0 for name in group]
    changes: Arguments = dict.fromkeys(name for name in names if name in args)
    if "scaled" in args:
        scaled = draw(st.booleans()) and "mean" not in changes and "grad_x" not in changes
        changes |= {"scaled": scaled, "accumulate": scaled and args["accumulate"]}
        changes |= {} if scaled else {"grad_in": None}
    return changes


@st.composite
def spoiled(draw: st.DrawFn, op: str) -> Arguments:
    """A valid call, with up to two of its arguments changed to whatever comes."""
    args = draw(valid(op))
    arguments = getattr(torch.ops.densenet_ext, op).default._schema.arguments
    written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
    for _ in range(draw(st.integers(0, 2))):
        name = draw(st.sampled_from(list(args)))
        value = args[name]
        if isinstance(value, Spec):
            # Two arguments that are only read may share memory; a mean that is an element of x makes a tie of the ReLU.
            others = [x for other, x in args.items() if isinstance(x, Spec) and (name in written or other in written)]
            args[name] = draw(changed(value, others or [value]))
        elif name == "features" and value:
            i = draw(st.integers(0, len(value) - 1))
            others = [args["out"]] if args["out"] is not None else value
            args[name] = [*value[:i], draw(changed(value[i], others)), *value[i + 1 :]]
        elif isinstance(value, list) and name != "features":
            number = st.one_of(st.integers(-1, 8), st.integers(-(2**63), 2**63 - 1))
            args[name] = draw(st.one_of(st.lists(number, max_size=5), st.just(value[:-1])))
            if value:
                i = draw(st.integers(0, len(value) - 1))
                args[name] = draw(st.sampled_from([args[name], [*value[:i], draw(number), *value[i + 1 :]]]))
        elif isinstance(value, float):
            args[name] = draw(st.floats())
        elif isinstance(value, int) and not isinstance(value, bool):
            args[name] = draw(st.integers(-(2**63), 2**63 - 1))
    return args


@st.composite
def changed(draw: st.DrawFn, spec: Spec, others: list[Spec]) -> Spec | None:
    """Another shape, other strides, another dtype, another's memory, no data, or nothing at all."""
    what = draw(st.sampled_from(["shape", "strides", "dtype", "memory", "meta", "none", "dims"]))
    event(f"changed {what}")
    if what == "shape":
        i = draw(st.integers(0, len(spec.shape) - 1))
        shape = [*spec.shape]
        shape[i] = draw(st.integers(0, 45))
        return spec._replace(shape=tuple(shape))
    if what == "strides":
        i = draw(st.integers(0, len(spec.strides) - 1))
        strides = [*spec.strides]
        strides[i] = draw(st.integers(0, 60))
        return spec._replace(strides=tuple(strides))
    if what == "dtype":
        return spec._replace(dtype=draw(st.sampled_from([*DTYPES, torch.int64, torch.uint8, torch.bool])))
    if what == "memory":
        other = draw(st.sampled_from(others))
        offset = draw(st.one_of(st.just(other.offset), st.integers(0, 80)))
        strides = draw(st.sampled_from([spec.strides, other.strides]))
        same_dims = len(strides) == len(spec.shape)
        return spec._replace(memory=other.memory, offset=offset, strides=strides if same_dims else spec.strides)
    if what == "meta":
        return spec._replace(device="meta")
    if what == "dims":
        return spec._replace(shape=(1, *spec.shape), strides=(1, *spec.strides))
    return None


def specs_of(args: Arguments) -> list[Spec]:
    flat = [x for value in args.values() for x in (value if isinstance(value, list) else [value])]
    return [x for x in flat if isinstance(x, Spec)]


def built(args: Arguments, seed: int) -> tuple[Arguments, dict[tuple[str, torch.dtype], Tensor]]:
    """The arguments as tensors, and the memory that they are windows on: the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    extents: dict[tuple[str, torch.dtype], int] = {}
    for spec in specs_of(args):
        key = (spec.memory, spec.dtype)
        extents[key] = max(extents.get(key, 0), spec.extent + 3)
    memory = {}
    for (name, dtype), extent in sorted(extents.items(), key=str):
        values = torch.rand(extent, generator=generator, dtype=torch.float64) + 0.5
        memory[name, dtype] = (values * 2).to(dtype) if not dtype.is_floating_point else values.to(dtype)

    def tensor(value: Any) -> Any:
        if isinstance(value, list):
            return [tensor(x) for x in value]
        if not isinstance(value, Spec):
            return value
        base = memory[value.memory, value.dtype]
        base = base if value.device == "cpu" else base.to(value.device)
        return base.as_strided(value.shape, value.strides, value.offset)

    tensors = {name: tensor(value) for name, value in args.items()}
    if "index" in tensors and "grad_out" in tensors:
        # positions of maxima, where the arguments allow a forward pass: the plain form follows any, wherever it leads
        with contextlib.suppress(Exception):
            names = ("x", "size", "window", "stride", "padding", "mean", "var", "weight", "bias", "eps")
            forward = [tensors[name] for name in names]
            plain.bn_relu_max_pool(*forward, torch.empty_like(tensors["grad_out"]), tensors["index"])
    return tensors, memory


@pytest.mark.parametrize("op", kernels.OPS)
def test_right_or_refused(op: str) -> None:
    names = [argument.name for argument in getattr(torch.ops.densenet_ext, op).default._schema.arguments]
    by_name = re.compile(rf"\b({'|'.join(names)})\b.*: expected .*got|for argument '({'|'.join(names)})'", re.DOTALL)

    @given(args=spoiled(op), seed=st.integers(0, 1000))
    def check(args: Arguments, seed: int) -> None:
        got, memory = built(args, seed)
        try:
            getattr(torch.ops.densenet_ext, op).default(*got.values())
        except RuntimeError as error:
            assert by_name.search(str(error)), error
            event("refused")
            _, untouched = built(args, seed)
            for key, values in memory.items():
                assert torch.equal(values, untouched[key]), f"{key} was written before the call was refused"
            return
        event("right")
        expected, expected_memory = built(args, seed)
        if all(x.is_meta for value in expected.values() for x in ([value] if isinstance(value, Tensor) else [])):
            return
        main = next(x for x in expected.values() if isinstance(x, Tensor) and x.dim() == 2)
        if 0 in main.shape:  # without rows or channels statistics mean nothing
            return
        getattr(plain, op)(*expected.values())
        tolerance = TOLERANCE[main.dtype]
        for key, values in memory.items():
            if key[0] == "index" and main.dtype in (torch.float16, torch.bfloat16):
                continue  # two that are equal as stored may differ before
            torch.testing.assert_close(
                values,
                expected_memory[key],
                rtol=tolerance,
                atol=tolerance * 10,
                equal_nan=True,
                msg=lambda text, key=key: f"{key}: {text}",
            )

    check()


@st.composite
def convolutions(draw: st.DrawFn) -> Case:
    """A convolution of any window, stride and padding, on images that are not much larger."""
    dims = draw(st.integers(1, 3))
    each = lambda least, most: tuple(draw(st.integers(least, most)) for _ in range(dims))  # noqa: E731
    window, stride, padding, more = each(1, 7), each(1, 4), each(0, 8), each(0, (50, 20, 5)[dims - 1])
    least = (max(1, w - 2 * p) for w, p in zip(window, padding, strict=True))
    spatial = tuple(n + m for n, m in zip(least, more, strict=True))
    return spatial, draw(st.integers(1, 9)), draw(st.integers(1, 70)), window, stride, padding


@given(case=convolutions(), dtype=st.sampled_from(DTYPES), wide=st.booleans(), data=st.data())
def test_first_convolutions(case: Case, dtype: torch.dtype, wide: bool, data: st.DataObject) -> None:
    """Of images in any memory, as the result has them or in the type of its sums."""
    x, weight, bias = tensors(case, kernels.acc_dtype(dtype) if wide else dtype)
    images = layouts(x)[data.draw(st.sampled_from(sorted(layouts(x))))]
    got = computed(images, weight, bias.to(kernels.acc_dtype(dtype)), *case[4:], dtype)
    exact = CONVOLUTIONS[x.dim() - 2](x.double(), weight.double(), bias.double(), *case[4:])
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(got.double(), exact, rtol=tolerance, atol=tolerance)
