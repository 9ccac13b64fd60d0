"""The networks of the command line by their names: ours, timm's and torchvision's."""

from __future__ import annotations

import warnings
from typing import Any

from torch import nn

import densenet_ext
from densenet_ext import checks
from densenet_ext.errors import UserError
from densenet_ext.fusing.verify import make_plain
from densenet_ext.training.data import vision

OURS = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264", "densenet_bc")
"""The builders of this package."""


def check(option: str, text: str) -> str:
    """Returns ``text`` when it has the form of a network's name, else raises ValueError; no library is imported."""
    name, colon, rest = text.partition(":")
    if name == "densenet_bc" and colon:
        depth, growth_rate = _depth_and_growth_rate(text, rest)
        checks.bc_depth(f"{option}: DEPTH of {text}", depth)
        checks.integer(f"{option}: K of {text}", growth_rate, 1)
    elif (name not in ("timm", "torchvision") or not rest) if colon else name not in OURS:
        raise ValueError(
            f"{option}: expected {', '.join(OURS)}, densenet_bc:DEPTH,K, timm:NAME or torchvision:NAME, got {text!r}"
        )
    return text


def build(text: str, *, classes: int, channels: int, save: str, fused: bool = True) -> nn.Module:
    """Returns the network ``text`` for images of ``channels`` and labels below ``classes``; ``fused`` or in usual form.

    Raises UserError for a name that is unknown to its library, and for a network without dense blocks.
    """
    name, colon, rest = text.partition(":")
    if name in OURS:
        keywords: dict[str, Any] = {"num_classes": classes, "in_channels": channels, "save": save}
        if colon:
            keywords["depth"], keywords["growth_rate"] = _depth_and_growth_rate(text, rest)
        network = getattr(densenet_ext, name)(**keywords)
    else:
        network = _of_library(name, rest, classes, channels)
    if not any(row.kind == "dense block" for row in densenet_ext.report(network)):
        raise UserError(f"--model: {text} has no dense blocks: expected a DenseNet")
    if not fused:
        make_plain(network)
    elif name not in OURS:
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


def _of_library(library: str, name: str, classes: int, channels: int) -> nn.Module:
    torchvision = vision.import_torchvision()  # which timm needs, too
    try:
        if library == "torchvision":
            if channels != 3:
                raise UserError(f"--model: torchvision:{name} takes images of 3 channels, these have {channels}")
            return torchvision.models.get_model(name, num_classes=classes)
        import timm

        return timm.create_model(name, num_classes=classes, in_chans=channels)
    except ImportError as error:
        raise UserError(f"--model: timm can't be imported ({error}): pip install --no-deps timm") from error
    except (ValueError, RuntimeError) as error:  # of the library, for a name that it does not know
        if isinstance(error, UserError):
            raise
        raise UserError(f"--model: {library}: {error}") from error
