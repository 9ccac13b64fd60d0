"""torchvision's DenseNet, and copies of its file: layers take a list, ``memory_efficient``, ``norm5``."""

from __future__ import annotations

from densenet_ext.fusing.adapters.usual import UsualAdapter


class Torchvision(UsualAdapter):
    """``torchvision.models.densenet``; torchvision itself is never imported."""

    library = "torchvision"
    memory_mode = "memory_efficient"
    passing = "list"
