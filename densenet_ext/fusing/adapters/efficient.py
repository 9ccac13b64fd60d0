"""gpleiss/efficient_densenet_pytorch: layers take the features as arguments, ``efficient``, ``norm_final``."""

from __future__ import annotations

from densenet_ext.fusing.adapters.usual import UsualAdapter


class Efficient(UsualAdapter):
    """``models/densenet.py`` of the memory-efficient implementation by Pleiss et al., wherever it was copied to."""

    library = "efficient_densenet_pytorch"
    memory_mode = "efficient"
    passing = "arguments"
    final_norm = "norm_final"
