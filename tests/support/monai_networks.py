"""A small DenseNet of MONAI in one to three dimensions, and images for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support import peers
from tests.support.helpers import generator

BLOCK = "features.denseblock1"


def small(dims: int, seed: int = 0, **kwargs: Any) -> Any:
    torch.manual_seed(seed)
    settings = {"init_features": 8, "growth_rate": 4, "block_config": (2, 2), "bn_size": 2, **kwargs}
    return peers.monai_densenet().DenseNet(dims, in_channels=2, out_channels=10, **settings).double()


def images(dims: int, n: int = 3) -> Tensor:
    size = (64, 32, 24)[dims - 1]
    return torch.randn(n, 2, *[size] * dims, dtype=torch.float64, generator=generator(1))
