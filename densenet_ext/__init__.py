"""DenseNets over one buffer per dense block: the same numbers with less memory and in less time.

`fuse` speeds up a DenseNet that exists; `DenseNet`, `FCDenseNet` and their families are models of their own;
`DenseLayer`, `DenseBlock`, `Transition` and `functional` are the parts for other networks. `plan` says what a training
step will need in memory, `build_info` how the package was built.
"""

from densenet_ext import functional
from densenet_ext._extension import build_info
from densenet_ext._version import __version__
from densenet_ext.fc_densenet import FCDenseNet, fc_densenet56, fc_densenet67, fc_densenet103
from densenet_ext.fusing import fuse, packed_weights, unfuse, verify
from densenet_ext.memory.plan import plan
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
from densenet_ext.report import report

__all__ = [
    "DenseBlock",
    "DenseLayer",
    "DenseNet",
    "FCDenseNet",
    "Transition",
    "__version__",
    "build_info",
    "densenet121",
    "densenet161",
    "densenet169",
    "densenet201",
    "densenet264",
    "densenet_bc",
    "fc_densenet56",
    "fc_densenet67",
    "fc_densenet103",
    "functional",
    "fuse",
    "packed_weights",
    "plan",
    "report",
    "unfuse",
    "verify",
]
