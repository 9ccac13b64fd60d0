"""The networks of the command line by their names: ours, timm's and torchvision's."""

from __future__ import annotations

import re
import warnings

from torch import nn

import densenet_ext
from densenet_ext import checks, vision
from densenet_ext.errors import UserError
from densenet_ext.fusing.verify import make_plain

OURS = ("densenet121", "densenet161", "densenet169", "densenet201", "densenet264", "densenet_bc")
"""The builders of this package."""
NAMES = "densenet121 to 264, densenet_bc, densenet_bc:DEPTH,K, timm:NAME or torchvision:NAME."
_BC = re.compile(r"densenet_bc:(\d+),(\d+)")
_OTHERS = re.compile(r"(timm|torchvision):(.+)")


def check(option: str, text: str) -> str:
    """Returns ``text`` when it has the form of a network's name, else raises ValueError; no library is imported."""
    if numbers := _BC.fullmatch(text):
        checks.bc_depth(f"{option}: DEPTH of {text}", int(numbers[1]))
        checks.integer(f"{option}: K of {text}", int(numbers[2]), 1)
    elif text not in OURS and not _OTHERS.fullmatch(text):
        raise ValueError(f"{option}: expected {NAMES[:-1]}, got {text!r}")
    return text


def build(text: str, *, classes: int, channels: int, save: str, fused: bool = True) -> nn.Module:
    """Returns the network ``text`` for images of ``channels`` and labels below ``classes``; ``fused`` or in usual form.

    Raises UserError for a name that is unknown to its library, and for a network without dense blocks.
    """
    other, numbers = _OTHERS.fullmatch(text), _BC.fullmatch(text)
    if other:
        network = _of_library(other[1], other[2], classes, channels)
    else:
        size = {"depth": int(numbers[1]), "growth_rate": int(numbers[2])} if numbers else {}
        builder = getattr(densenet_ext, text.partition(":")[0])
        network = builder(num_classes=classes, in_channels=channels, save=save, **size)
    if not any(row.kind == "dense block" for row in densenet_ext.report(network)):
        raise UserError(f"--model: {text} has no dense blocks: expected a DenseNet")
    if not fused:
        make_plain(network)
    elif other:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the caller shows the report
            densenet_ext.fuse(network, save=save)
    return network


def _of_library(library: str, name: str, classes: int, channels: int) -> nn.Module:
    torchvision = vision.import_torchvision()  # which timm needs, too
    try:
        if library == "torchvision":
            return torchvision.models.get_model(name, num_classes=classes)  # for 3 channels
        import timm

        return timm.create_model(name, num_classes=classes, in_chans=channels)
    except ImportError as error:
        raise UserError(f"--model: timm can't be imported ({error}): pip install --no-deps timm") from error
    except (ValueError, RuntimeError) as error:  # of the library, for a name that it does not know
        raise UserError(f"--model: {library}: {error}") from error
