"""DenseNets over one buffer per dense block: the same numbers with less memory and in less time.

`fuse` speeds up a DenseNet that exists; `DenseNet` and its family are models of their own; `DenseLayer`, `DenseBlock`,
`Transition` and `functional` are the parts for other networks. `build_info` tells how the package was built.
"""

from densenet_ext import functional
from densenet_ext._extension import build_info
from densenet_ext._version import __version__
from densenet_ext.fusing import fuse, report, unfuse, verify
from densenet_ext.models import (
    DenseNet,
    densenet121,
    densenet161,
    densenet169,
    densenet201,
    densenet264,
    densenet_bc,
)
from densenet_ext.modules import DenseBlock, DenseLayer, Transition

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "Transition",
    "__version__",
    "build_info",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc",
    "functional",
    "fuse",
    "report",
    "unfuse",
    "verify",
]
