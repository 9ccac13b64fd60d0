"""The structs of csrc/params.h for ctypes, made from tensors as the operators take them (torch.ops.densenet_ext.*)."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import c_bool, c_double, c_int64, c_void_p

import torch


class Rows(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("pitch", c_int64)]


class Norm(ctypes.Structure):
    _fields_ = [("mean", c_void_p), ("var", c_void_p), ("weight", c_void_p), ("bias", c_void_p), ("eps", c_double)]


class Pooling(ctypes.Structure):
    _fields_ = [
        ("batch", c_int64),
        ("size", c_int64 * 3),
        ("out", c_int64 * 3),
        ("window", c_int64 * 3),
        ("stride", c_int64 * 3),
        ("padding", c_int64 * 3),
    ]


class Taps(ctypes.Structure):
    _fields_ = [("data", c_void_p), ("output", c_int64), ("input", c_int64), ("tap", c_int64)]


class TapsCopy(ctypes.Structure):
    _fields_ = [("N", c_int64), ("C", c_int64), ("taps", c_int64), ("from_", Taps), ("to", Taps)]


class Images(ctypes.Structure):
    _fields_ = [("batch", c_int64), ("size", c_int64 * 3)]


_TYPES = {"r": Rows, "n": Norm, "p": Pooling, "m": Images, "w": c_int64 * 3, "t": Taps}
_TYPES |= {"i": c_int64, "v": c_void_p, "d": c_double, "b": c_bool}


def _struct(name: str, fields: str) -> type[ctypes.Structure]:
    """``fields``: words like ``x:r``; the letter is a key of _TYPES."""
    members = [(field.split(":")[0], _TYPES[field.split(":")[1]]) for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": members})


STRUCTS = {
    "ChannelStats": "M:i C:i x:r mean:v var:v",
    "AppendFeatures": "M:i C:i src:r out:r mean:v var:v drop_rate:d seed:v layer:i drop_rows:i",
    "BnRelu": "M:i C:i x:r norm:n out:r",
    "FeatureGrad": "M:i C:i grad:r x:r mean:v grad_mean:v grad_var:v drop_rate:d seed:v layer:i drop_rows:i out:r",
    "BnReluBackwardReduce": "M:i C:i grad:r x:r norm:n out:r grad_weight:v grad_bias:v",
    "BnReluBackward": "M:i C:i grad:r x:r norm:n grad_weight:v grad_bias:v grad_x:r",
    "BnReluConv1x1": "M:i C:i N:i x:r norm:n weight:v out_bias:v out_relu:b out:r out_mean:v out_var:v tf32:b bf16:b",
    "BnReluConv1x1Backward": "M:i C:i N:i x:r norm:n weight:v grad_out:r z:r z_norm:n z_grad_weight:v z_grad_bias:v "
    "grad_in:r accumulate:b grad_x:r grad_conv_weight:v grad_weight:v grad_bias:v grad_mean:v grad_var:v tf32:b bf16:b",
    "BnReluConv3x3": "C:i N:i images:m window:w x:r norm:n weight:t bias:v drop_rate:d seed:v layer:i drop_rows:i "
    "out:r out_mean:v out_var:v tf32:b bf16:b",
    "BnReluConv3x3Backward": "C:i N:i images:m window:w x:r norm:n weight:t grad:r features:r features_mean:v "
    "features_grad_mean:v features_grad_var:v drop_rate:d seed:v layer:i drop_rows:i scaled:b grad_in:r accumulate:b "
    "grad_x:r grad_conv_weight:t grad_conv_bias:v grad_weight:v grad_bias:v grad_mean:v grad_var:v tf32:b bf16:b",
    "BnReluPool": "C:i pooling:p x:r norm:n out:r index:r",
    "BnReluPoolBackwardReduce": "C:i pooling:p grad_out:r index:r x:r norm:n pooled:r grad_weight:v grad_bias:v",
    "BnReluPoolBackward": "C:i pooling:p grad_out:r index:r x:r norm:n grad_weight:v grad_bias:v grad_x:r",
}
STRUCT = {name: _struct(name, fields) for name, fields in STRUCTS.items()}

# Which struct each operator takes, and which of its arguments it writes.
OPERATORS = {
    "channel_stats": ("ChannelStats", "mean var"),
    "append_features": ("AppendFeatures", "out mean var"),
    "bn_relu": ("BnRelu", "out"),
    "feature_grad": ("FeatureGrad", "out"),
    "bn_relu_backward_reduce": ("BnReluBackwardReduce", "grad_weight grad_bias out"),
    "bn_relu_backward": ("BnReluBackward", "grad_x"),
    "bn_relu_conv1x1": ("BnReluConv1x1", "out out_mean out_var"),
    "bn_relu_conv1x1_backward": (
        "BnReluConv1x1Backward",
        "grad_x grad_conv_weight grad_weight grad_bias grad_mean grad_var",
    ),
    "bn_relu_conv3x3": ("BnReluConv3x3", "out out_mean out_var"),
    "bn_relu_conv3x3_backward": (
        "BnReluConv3x3Backward",
        "grad_x grad_conv_weight grad_conv_bias grad_weight grad_bias grad_mean grad_var",
    ),
    "bn_relu_avg_pool": ("BnReluPool", "out"),
    "bn_relu_avg_pool_backward_reduce": ("BnReluPoolBackwardReduce", "pooled grad_weight grad_bias"),
    "bn_relu_avg_pool_backward": ("BnReluPoolBackward", "grad_x"),
    "bn_relu_max_pool": ("BnReluPool", "out index"),
    "bn_relu_max_pool_backward_reduce": ("BnReluPoolBackwardReduce", "grad_weight grad_bias"),
    "bn_relu_max_pool_backward": ("BnReluPoolBackward", "grad_x"),
}


def rows(t: torch.Tensor | None) -> Rows:
    if t is None:
        return Rows(None, 0)
    assert t.dim() == 2 and (t.shape[1] <= 1 or t.stride(1) == 1), (t.shape, t.stride())
    return Rows(t.data_ptr(), t.stride(0) if t.shape[0] > 1 else t.shape[1])


def vector(t: torch.Tensor | None) -> int | None:
    assert t is None or t.is_contiguous()
    return None if t is None else t.data_ptr()


def norm(mean, var, weight, bias, eps) -> Norm:
    return Norm(vector(mean), vector(var), vector(weight), vector(bias), eps)


def taps(t: torch.Tensor | None) -> Taps:
    """A weight [N, C, taps] or [N, C, *window], contiguous or channels_last."""
    return Taps(None, 0, 0, 0) if t is None else Taps(t.data_ptr(), t.stride(0), t.stride(1), t.stride(-1))


def images(size: Sequence[int]) -> Images:
    """Of ``size`` [N, D, H, W]."""
    return Images(size[0], (c_int64 * 3)(*size[1:]))


def window(weight: torch.Tensor) -> ctypes.Array:
    sizes = weight.shape[2:]
    return (c_int64 * 3)(*[1] * (3 - len(sizes)), *sizes)


def pooling(size, window, stride=None, padding=(0, 0, 0)) -> Pooling:
    stride = window if stride is None else stride
    three = c_int64 * 3
    out = [(n + 2 * p - w) // s + 1 for n, w, s, p in zip(size[1:], window, stride, padding, strict=True)]
    return Pooling(size[0], three(*size[1:]), three(*out), three(*window), three(*stride), three(*padding))


def make(name: str, arguments: dict) -> ctypes.Structure:
    """The struct ``name`` from arguments by the operators' names; norms and the pooling are put together here."""
    members = {}
    first = next(v for v in (arguments.get(k) for k in ("x", "src", "grad")) if v is not None)
    a = dict(arguments, M=first.shape[0], C=first.shape[1])
    if "conv_weight" in a:
        a["N"] = a["conv_weight"].shape[0]
    for field in STRUCTS[name].split():
        key, kind = field.split(":")
        if kind == "n" and key == "norm":
            members[key] = norm(a["mean"], a["var"], a["weight"], a["bias"], a["eps"])
        elif kind == "n":
            z = [a.get(f"z_{k}") for k in ("mean", "var", "weight", "bias")]
            members[key] = norm(*z, a.get("z_eps", 0.0))
        elif kind == "p":
            members[key] = pooling(*(a[k] for k in ("size", "window", "stride", "padding") if k in a))
        elif kind == "m":
            members[key] = images(a["size"])
        elif kind == "w":
            members[key] = window(a["conv_weight"])
        elif kind == "t":
            members[key] = taps(a["conv_weight" if key == "weight" else key])
        elif kind == "r":
            members[key] = rows(a.get(key))
        elif kind == "v":
            members[key] = vector(a.get({"weight": "conv_weight", "bias": "conv_bias"}.get(key, key)))
        else:
            members[key] = a.get(key, 0)
    return STRUCT[name](**members)
