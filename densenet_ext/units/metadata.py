"""MONAI's MetaTensor, what its data loaders give: a tensor whose operations hand its metadata on to their results.

To the tensor a fused unit is one operation: the unit computes on plain tensors, and MetaTensor's own code decides about
the metadata of the result. MONAI is never imported.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def bare(x: Any) -> Any:
    """Returns ``x`` without its metadata, sharing its memory and its place in the graph; any other object as it is."""
    return x.as_subclass(Tensor) if _carries_metadata(x) else x


def with_metadata(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Returns ``function`` of ``x`` without its metadata, which the result gets back."""
    if not _carries_metadata(x):
        return function(x)
    return type(x).__torch_function__(lambda y: function(bare(y)), (type(x),), (x,), {})


def _carries_metadata(x: Any) -> bool:
    kind = type(x)
    # the compiler follows plain tensors: it gets the unfused form of these
    return (
        kind is not Tensor
        and kind.__name__ == "MetaTensor"
        and kind.__module__.startswith("monai.")
        and not torch.compiler.is_compiling()
    )
