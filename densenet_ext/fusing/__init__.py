"""`fuse`, `unfuse` and `verify`: the DenseNets that people already have, over one buffer per dense block."""

from densenet_ext.fusing.install import fuse, unfuse
from densenet_ext.fusing.verify import Errors, Verification, verify

__all__ = ["Errors", "Verification", "fuse", "unfuse", "verify"]
