"""The networks of the command line by their names: ours, timm's and torchvision's."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

import densenet_ext
from densenet_ext import checks
from densenet_ext.fusing.verify import make_plain
from densenet_ext.training.data import vision
from densenet_ext.training.errors import UserError

BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "densenet121": densenet_ext.densenet121,
    "densenet161": densenet_ext.densenet161,
    "densenet169": densenet_ext.densenet169,
    "densenet201": densenet_ext.densenet201,
    "densenet264": densenet_ext.densenet264,
    "densenet_bc": densenet_ext.densenet_bc,
}
FORMS = f"{', '.join(BUILDERS)}, densenet_bc:DEPTH,K, timm:NAME or torchvision:NAME"
"""What ``--model`` takes, in words."""


def check(text: str) -> str:
    """Returns ``text`` when it has the form of a network's name. Raises ValueError in words; no library is imported."""
    name, colon, rest = text.partition(":")
    if name == "densenet_bc" and colon:
        depth, growth_rate = _depth_and_growth_rate(text, rest)
        checks.bc_depth(f"DEPTH of {text}", depth)
        checks.integer(f"K of {text}", growth_rate, 1)
    elif (colon and (name not in ("timm", "torchvision") or not rest)) or (not colon and name not in BUILDERS):
        raise ValueError(f"expected {FORMS}, got {text!r}")
    return text


def build(text: str, *, classes: int, channels: int, save: str, fused: bool = True) -> nn.Module:
    """Returns the network ``text`` for images of ``channels`` and labels below ``classes``; ``fused`` or in usual form.

    Raises UserError for a name that is unknown to its library, a network without dense blocks, and images that it does
    not take.
    """
    name, colon, rest = text.partition(":")
    if name in BUILDERS:
        keywords: dict[str, Any] = {"num_classes": classes, "in_channels": channels, "save": save}
        if colon:
            keywords["depth"], keywords["growth_rate"] = _depth_and_growth_rate(text, rest)
        network = BUILDERS[name](**keywords)
    elif name == "timm":
        network = _of_timm(rest, classes, channels)
    else:
        network = _of_torchvision(rest, classes, channels)
    if not any(row.kind == "dense block" for row in densenet_ext.report(network)):
        raise UserError(f"--model: {text} has no dense blocks: expected a DenseNet")
    if not fused:
        make_plain(network)
    elif name not in BUILDERS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller shows the report
            densenet_ext.fuse(network, save=save)
    return network


def _depth_and_growth_rate(text: str, numbers: str) -> tuple[int, int]:
    try:
        depth, growth_rate = (int(number) for number in numbers.split(","))
    except ValueError:
        raise ValueError(f"expected two numbers as in densenet_bc:100,12, got {text!r}") from None
    return depth, growth_rate


def _of_timm(name: str, classes: int, channels: int) -> nn.Module:
    vision.models()  # timm needs torchvision
    try:
        import timm
    except ImportError as error:
        raise UserError(
            f"--model: timm:{name} needs timm, which can't be imported ({error}): pip install --no-deps timm (so that "
            "no second torch comes)"
        ) from error
    if name not in timm.list_models():
        close = ", ".join(timm.list_models("*densenet*"))
        raise UserError(f"--model: timm has no model {name!r}; its DenseNets: {close}")
    network: nn.Module = timm.create_model(name, num_classes=classes, in_chans=channels)
    return network


def _of_torchvision(name: str, classes: int, channels: int) -> nn.Module:
    models = vision.models()
    names = models.list_models(module=models)
    if name not in names:
        close = ", ".join(other for other in names if other.startswith("densenet"))
        raise UserError(f"--model: torchvision has no model {name!r}; its DenseNets: {close}")
    if channels != 3:
        raise UserError(
            f"--model: torchvision:{name} takes images of 3 channels, these have {channels}; timm's and ours take any"
        )
    network: nn.Module = models.get_model(name, num_classes=classes)
    return network
