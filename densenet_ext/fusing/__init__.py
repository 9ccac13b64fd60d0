"""`fuse` and its kin: the DenseNets that people already have, over one buffer per dense block."""

from densenet_ext.fusing.install import fuse, unfuse
from densenet_ext.fusing.pack import packed_weights
from densenet_ext.fusing.verify import Errors, Verification, verify

__all__ = ["Errors", "Verification", "fuse", "packed_weights", "unfuse", "verify"]
