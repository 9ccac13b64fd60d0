"""One small file per library: how it spells a dense block, a layer, a transition, a stem and a head."""

from __future__ import annotations

from densenet_ext.fusing.adapters.efficient import Efficient
from densenet_ext.fusing.adapters.generic import Generic
from densenet_ext.fusing.adapters.monai import Monai
from densenet_ext.fusing.adapters.own import Own
from densenet_ext.fusing.adapters.timm import Timm
from densenet_ext.fusing.adapters.torchvision import Torchvision
from densenet_ext.fusing.adapters.torchxrayvision import TorchXRayVision
from densenet_ext.fusing.matching import Adapter

ADAPTERS: tuple[Adapter, ...] = (Own(), Torchvision(), Efficient(), Timm(), Monai(), TorchXRayVision(), Generic())
"""Asked in this order; the first that recognises a module has it."""

__all__ = ["ADAPTERS", "Efficient", "Generic", "Monai", "Own", "Timm", "TorchXRayVision", "Torchvision"]
