"""Calls that every operator has to refuse: one valid call each, with one argument made absurd.

``python tests/kernels/operator_abuse.py`` makes them all and prints one JSON line for each, before the call and after
it, so that the line before a crash names its culprit (test_operator_arguments.py reads them).
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from torch import Tensor

from densenet_ext import kernels
from tests.support.kernel_calls import MAKERS, SEED, Call, converted

MATRICES = frozenset(("conv_weight", "grad_conv_weight"))
# Arguments from which the operators take M, C, N and the dtype: where these are wrong, the next one is named.
DEFINING = frozenset(("x", "src", "grad_out", "out", "size", "window", "stride", "padding", "features"))


def freed(x: Tensor) -> Tensor:
    """x over a storage that was freed under it, as FSDP does."""
    x = x.contiguous().clone()
    x.untyped_storage().resize_(0)
    return x


def shortened(x: Tensor) -> Tensor:
    """x over a storage that has become too small for it."""
    x = x.contiguous().clone()
    x.untyped_storage().resize_(x.untyped_storage().nbytes() - 1)
    return x


def misaligned(x: Tensor) -> Tensor:
    size = x.element_size()
    return torch.frombuffer(bytearray(x.numel() * size + 1), dtype=x.dtype, offset=1).view(x.shape)


def other_dtype(x: Tensor) -> Tensor:
    return x.to(torch.float16 if x.dtype != torch.float16 else torch.float32)


ANY_TENSOR: dict[str, Callable[[Tensor], Tensor]] = {
    "on the meta device": lambda x: x.to("meta"),
    "complex": lambda x: x.to(torch.complex64),
    "of integers": lambda x: x.to(torch.int32),
    "of another dtype": other_dtype,
    "without dimensions": lambda x: x.new_ones(()),
    "empty": lambda x: x.new_empty(0),
    "with freed storage": freed,
    "with shortened storage": shortened,
}
A_MAP = ANY_TENSOR | {
    "misaligned": misaligned,
    "with one row more": lambda x: torch.cat([x, x[:1]]),
    "with one column more": lambda x: torch.cat([x, x[:, :1]], 1),
    "with three dimensions": lambda x: x[None],
    "with channels apart": lambda x: x.t().contiguous().t(),
    "one row for all": lambda x: x[:1].expand_as(x),
    "one column for all": lambda x: x[:, :1].expand_as(x),
    "with a pitch below its columns": lambda x: x.new_ones(x.numel()).as_strided(x.shape, (x.shape[1] - 1, 1)),
}
A_VECTOR = ANY_TENSOR | {
    "misaligned": misaligned,
    "one longer": lambda x: torch.cat([x, x[:1]]),
    "one shorter": lambda x: x[1:],
    "with two dimensions": lambda x: x[None],
    "with gaps": lambda x: torch.stack([x, x], 1)[:, 0],
    "one value for all": lambda x: x[:1].expand_as(x),
}
A_MATRIX = ANY_TENSOR | {
    "misaligned": misaligned,
    "flat": lambda x: x.flatten(),
    "transposed": lambda x: x.t().contiguous(),
    "in another layout": lambda x: x.t().contiguous().t(),
    "of windows": lambda x: x[..., None].repeat(1, 1, 3),
}
A_WINDOW = ANY_TENSOR | {
    "misaligned": misaligned,
    "flat": lambda x: x.flatten(1),
    "with a window of one": lambda x: x[:, :, :1],
    "with one dimension more": lambda x: x[..., None],
    "with outputs and inputs exchanged": lambda x: x.transpose(0, 1),
    "in another layout": lambda x: x.transpose(0, 2).contiguous().transpose(0, 2),
}
A_SEED = {
    "on the meta device": lambda x: x.to("meta"),
    "of 32 bits": lambda x: x.to(torch.int32),
    "of floats": lambda x: x.double(),
    "of two": lambda x: x.repeat(2),
    "empty": lambda x: x[:0],
    "with freed storage": freed,
    "missing": lambda x: None,
}
NAN, HUGE = float("nan"), 2**63 - 1
NUMBERS = {
    "eps": [-1e-5, -HUGE, NAN, float("inf")],
    "z_eps": [-1e-5, NAN, float("inf")],
    "drop_rate": [-0.1, 1.1, NAN, float("inf"), -float("inf")],
    "layer": [-1, 2**31, HUGE, -HUGE - 1],
    "drop_rows": [0, -1, -HUGE - 1],
}
LISTS: dict[str, list[Callable[[list[int]], list[int]]]] = {
    "size": [
        lambda _: [1, 1, 2**32, 2**32],
        lambda _: [2**32, 2**32, 1, 1],
        lambda _: [0, 1, 2**32, 2**32],
        lambda _: [0, 2**31, 2**31, 2**31],
        lambda _: [HUGE, HUGE, HUGE, HUGE],
        lambda _: [2**62, 4, 1, 1],
        lambda v: [v[0], 0, *v[2:]],
    ],
    "window": [lambda _: [2**32, 2**32, 1], lambda _: [HUGE, 1, 1], lambda _: [1, 2**62, 4], lambda _: [2**21] * 3],
    "stride": [lambda _: [1, 1, 0]],
    "padding": [lambda v: [v[0], v[1], 2], lambda _: [0, 0, 2**62], lambda _: [HUGE, HUGE, HUGE]],
}
ANY_LIST: list[Callable[[list[int]], list[int]]] = [
    lambda v: v[:-1],
    lambda v: [*v, 1],
    lambda v: [],
    lambda v: [*v[:-1], -1],
    lambda v: [-HUGE - 1, *v[1:]],
    lambda v: [-x for x in v],
]
for _name in LISTS:
    LISTS[_name] += ANY_LIST
    if _name != "padding":
        LISTS[_name].append(lambda v: [*v[:-1], 0] if len(v) == 3 else [*v[:-1], 0])


def changes(name: str, value: Any, optional: set[str]) -> Iterator[tuple[str, Any]]:
    """What argument ``name`` is given instead of ``value``, in words and as a value."""
    if name in NUMBERS:
        yield from ((repr(x), x) for x in NUMBERS[name])
    elif name in LISTS:
        yield from ((repr(x), x) for x in (change(value) for change in LISTS[name]))
    elif name == "features" and isinstance(value, list):
        for text, change in A_MAP.items():
            yield text, [*value[:2], change(value[2])]
        yield "none", []
        yield "one less", value[1:]
    elif isinstance(value, Tensor):
        matrix = A_WINDOW if value.dim() > 2 else A_MATRIX
        table = A_SEED if name == "seed" else matrix if name in MATRICES else A_VECTOR if value.dim() == 1 else A_MAP
        for text, change in table.items():
            if not (text == "misaligned" and value.element_size() == 1):
                yield text, change(value)
        if name not in optional:
            yield "missing", None


# What a kernel may read where it writes: the same rows exactly.
IN_PLACE = {
    ("bn_relu", "out", "x"),
    ("feature_grad", "out", "grad"),
    ("bn_relu_backward", "grad_x", "grad"),
    ("bn_relu_conv1x1_backward", "grad_x", "grad_in"),
    ("bn_relu_conv3x3_backward", "grad_x", "grad_in"),
}


# Where a changed argument makes another valid call.
RIGHT = {("channel_stats", "x", "of another dtype"), ("channel_stats", "x", "with one row more")}


def overlaps(op: str, call: Call, args: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every result over every other argument of its dtype: the same memory, and shifted by one element."""
    for out in call.outputs:
        for other, value in args.items():
            y = value[2] if isinstance(value, list) and other == "features" else value
            if other == out or not isinstance(y, Tensor) or not isinstance(args[out], Tensor):
                continue
            x = args[out]
            if x.dtype != y.dtype or not x.numel() or not y.numel():
                continue
            for shift in (0, 1):
                if shift == 0 and (op, out, other) in IN_PLACE:
                    continue
                memory = torch.ones(x.numel() + y.numel() + 1, dtype=x.dtype)
                over = memory[shift : shift + x.numel()].view(x.shape)
                under = memory[: y.numel()].view(y.shape)
                replaced = [*value[:2], under] if isinstance(value, list) else under
                yield f"{out} over {other}, shifted by {shift}", {**args, out: over, other: replaced}


PAIRS = [("mean", "var"), ("out_mean", "out_var"), ("grad_weight", "grad_bias"), ("grad_mean", "grad_var")]
PAIRS += [("z_grad_weight", "z_grad_bias"), ("z_mean", "z_var")]


def full_call(op: str, dtype: torch.dtype) -> Call:
    """The call of an operator that gives most of its tensors, all packed."""
    found = MAKERS[op](7, 10, False)
    call = max(found, key=lambda c: sum(isinstance(v, Tensor) and v.shape[-1] > 1 for v in c.args.values()))
    if "drop_rate" in call.args and "size" not in call.args:
        call = next(c for c in found if c.args["drop_rate"] == 0.3 or c.args["drop_rate"] == 0.4)
    elif "drop_rate" in call.args:
        call = Call({**call.args, "drop_rate": 0.3, "seed": SEED}, call.outputs)
    packed = {k: v.contiguous() if isinstance(v, Tensor) else v for k, v in call.args.items()}
    return Call(converted(Call(packed, call.outputs), dtype), call.outputs)


def refusals_of_what_is_not_there(call: Call) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """The convolution's backward pass without a norm, without features, without an input's gradient."""
    args = call.args
    features = [name for name in args if name.startswith("features")]
    for name in features[1:]:
        yield f"{name} without features", [name], {**args, **dict.fromkeys(features), name: args[name]}
        yield f"features without {name}", [name], {**args, name: None}
    norm = dict.fromkeys(("mean", "var", "weight", "bias"))
    sums = dict.fromkeys(("grad_weight", "grad_bias", "grad_mean", "grad_var"))
    bare = {**args, **norm, **sums, "scaled": False, "grad_in": None, "accumulate": False}
    yield "scaled without a norm", ["scaled"], {**bare, "scaled": True}
    for name in ("weight", "bias"):
        yield f"{name} without a norm", [name], {**bare, name: args[name]}
    for pair in (("grad_weight", "grad_bias"), ("grad_mean", "grad_var")):
        yield f"{pair[0]} without a norm", [pair[0]], {**bare, **{name: args[name] for name in pair}}
    for name, value in (("grad_in", args["grad_in"]), ("accumulate", True)):
        alone = {**args, "grad_in": None, "accumulate": False, name: value}
        yield f"{name} with a gradient that is not scaled", [name], {**alone, "scaled": False}
        yield f"{name} without grad_x", [name], {**alone, "grad_x": None}


def refusals(op: str) -> Iterator[tuple[str, list[str], dict[str, Any]]]:
    """In words what is wrong, the arguments of which the message has to name one, and the call."""
    everything = list(getattr(torch.ops.densenet_ext, op).default._schema.arguments)
    names = [argument.name for argument in everything]
    call = full_call(op, torch.float32)
    optional = {argument.name for argument in everything if "Optional" in str(argument.type)}
    for name, value in call.args.items():
        for text, changed in changes(name, value, optional):
            if (op, name, text) in RIGHT:
                continue
            defines = name in DEFINING or name == names[0] or (op, name) == ("bn_relu_conv3x3_backward", "grad")
            blamed = names if defines else [name]
            yield f"{name} {text}", blamed, {**call.args, name: changed}
    for text, args in overlaps(op, call, call.args):
        yield text, [text.split()[0], text.split()[2].rstrip(",")], args
    for pair in PAIRS:
        for name in pair:
            if name in optional and isinstance(call.args.get(name), Tensor):
                yield f"{name} without its pair", list(pair), {**call.args, name: None}
    if op == "bn_relu_conv3x3_backward":
        yield from refusals_of_what_is_not_there(call)
    if op == "bn_relu_conv1x1_backward":
        for name in ("z_mean", "z_var", "z_weight", "z_bias"):
            none = dict.fromkeys(("z", "z_mean", "z_var", "z_weight", "z_bias", "z_grad_weight", "z_grad_bias"))
            yield f"{name} without z", [name], {**call.args, **none, name: call.args[name]}


def main() -> None:
    warnings.simplefilter("ignore")  # PyTorch's, on buffers of bytes
    torch.manual_seed(0)
    for op in kernels.OPS:
        for text, blamed, args in refusals(op):
            print(json.dumps([op, text]), flush=True)
            try:
                getattr(torch.ops.densenet_ext, op).default(*args.values())
                error = None
            except Exception as caught:  # whatever comes is looked at by the test
                error = [isinstance(caught, RuntimeError), str(caught).splitlines()[0]]
            print(json.dumps([op, text, blamed, error]), flush=True)


if __name__ == "__main__":
    main()
