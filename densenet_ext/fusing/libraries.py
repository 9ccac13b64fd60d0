"""A table of libraries, with what has to be known by name. Dense blocks, transitions and heads are found without it."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from densenet_ext.units.single import Inside


class Library(NamedTuple):
    """A library whose DenseNets are tested."""

    name: str
    taps: tuple[str, ...] = ()  # classes that run a model's parts one by one and return what several of them give


LIBRARIES = (
    Library("densenet_ext"),
    Library("torchvision"),
    Library("efficient_densenet_pytorch"),
    Library("timm", taps=("FeatureListNet", "FeatureDictNet")),
    Library("MONAI"),
    Library("torchxrayvision"),
    Library("your own code (layers of norm, ReLU and convolution over concatenation)"),
)


def taps(module: nn.Module) -> Any:
    """Returns the unit of a model that only runs its parts one by one; None for any other."""
    names = {name for library in LIBRARIES for name in library.taps}
    return Inside() if type(module).__name__ in names else None
