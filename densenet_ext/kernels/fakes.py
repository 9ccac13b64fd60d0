"""Fake kernels of the compiled operations: what they do to tensors without data."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def _nothing(*args: Any) -> None:
    # The operations allocate nothing and return nothing: shapes are what the caller made them.
    return None


def register(names: Iterable[str]) -> None:
    """Registers the fake kernel of each operation ``densenet_ext::<name>``."""
    for name in names:
        torch.library.register_fake(f"densenet_ext::{name}", _nothing)
