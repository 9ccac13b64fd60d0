"""Checks of what users pass in: they say which argument, what was expected and what came, and read no tensor's data."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

LEVELS = ("bottlenecks", "features")
"""The levels of saving: what a dense block keeps for its backward pass."""

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([kmgt])(i?)b?|b?)\s*", re.IGNORECASE)


def integer(name: str, value: Any, minimum: int, maximum: int | None = None) -> int:
    """Returns ``value`` as an int from ``minimum`` to ``maximum``.

    Raises TypeError or ValueError that names the argument, as all of these checks do.
    """
    expected = f"an integer of at least {minimum}" if maximum is None else f"an integer from {minimum} to {maximum}"
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    number = int(value.__index__())
    if number < minimum or (maximum is not None and number > maximum):
        raise ValueError(f"{name}: expected {expected}, got {number}")
    return number


def bc_depth(name: str, value: Any) -> int:
    """Returns ``value`` as the depth of a DenseNet-BC with three blocks: 6 n + 4 with n of at least 1."""
    depth = integer(name, value, 10)
    if (depth - 4) % 6:
        raise ValueError(f"{name}: expected 6 n + 4 (10, 16, 22, ..., 100), got {depth}")
    return depth


def block_depths(name: str, value: Any) -> tuple[int, ...]:
    """Returns ``value`` as the layers of each dense block: integers of at least 1, and at least one of them."""
    expected = "expected a sequence of integers of at least 1, the layers of each block"
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise TypeError(f"{name}: {expected}, got {value!r}")
    if not value:
        raise ValueError(f"{name}: {expected}, got an empty one")
    return tuple(integer(f"{name}[{i}]", depth, 1) for i, depth in enumerate(value))


def _real(name: str, value: Any, expected: str) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    return float(value)


def probability(name: str, value: Any) -> float:
    """Returns ``value`` as a float in [0, 1]."""
    number = _real(name, value, "a number from 0 to 1")
    if not 0.0 <= number <= 1.0:
        raise ValueError(f"{name}: expected a number from 0 to 1, got {number}")
    return number


def compression_factor(name: str, value: Any) -> float:
    """Returns ``value`` as a float in (0, 1], the paper's theta."""
    number = _real(name, value, "a number above 0 and at most 1")
    if not 0.0 < number <= 1.0:
        raise ValueError(f"{name}: expected a number above 0 and at most 1, got {number}")
    return number


def positive(name: str, value: Any) -> float:
    """Returns ``value`` as a finite float above 0."""
    number = _real(name, value, "a finite number above 0")
    if not (number > 0.0 and math.isfinite(number)):
        raise ValueError(f"{name}: expected a finite number above 0, got {number}")
    return number


def memory(name: str, value: Any) -> int:
    """Returns ``value`` as bytes: an integer of at least 1, or a text with a unit ("80GiB", "24 GB", "512 MiB")."""
    expected = "bytes, or a text such as '80GiB' or '24 GB'"
    if isinstance(value, str):
        match = _SIZE.fullmatch(value)
        if match is None:
            raise ValueError(f"{name}: expected {expected}, got {value!r}")
        number, prefix, binary = match.groups()
        power = 0 if prefix is None else "kmgt".index(prefix.lower()) + 1
        value = int(float(number) * (1024 if binary else 1000) ** power)
    elif isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected {expected}, got {value!r}")
    return integer(name, value, 1)


def choice(name: str, value: Any, choices: tuple[str, ...]) -> str:
    """Returns ``value``, which has to be one of ``choices``."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(map(repr, choices))}, got {value!r}")
    return value


def save_level(save: Any, *memory_modes: Any) -> str:
    """Returns ``save`` when it is given, else "features" when one of the other libraries' memory modes is on."""
    if save is not None:
        return choice("save", save, LEVELS)
    return "features" if any(memory_modes) else "bottlenecks"


def tensor(name: str, x: Any) -> None:
    """Refuses what is neither a tensor nor a placeholder that FX traces with."""
    if not isinstance(x, (Tensor, Proxy)):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")


def autocast_enabled(kind: str) -> bool:
    """Returns whether autocast is on for a device type; off for "meta", which ``torch.is_autocast_enabled`` refuses."""
    return kind != "meta" and torch.is_autocast_enabled(kind)


def mismatch(x: Tensor, channels: int | None, dims: int, weight: Tensor) -> str | None:
    """Returns why x is not [N, channels, *spatial] of ``dims`` dimensions, with ``weight``'s device and dtype; or None.

    ``channels`` None: any number. The dtype is free under autocast, which casts it.
    """
    spatial = ", ".join(("D", "H", "W")[3 - dims :])
    layout = f"[N, {'C' if channels is None else channels}, {spatial}]"
    if x.dim() != dims + 2:
        return f"expected {dims + 2} dimensions {layout}, got shape {list(x.shape)}"
    if channels is not None and x.shape[1] != channels:
        return f"expected {channels} channels, {layout}, got shape {list(x.shape)}"
    if x.device != weight.device:
        return f"expected a tensor on {weight.device}, as the parameters, got one on {x.device}"
    if x.dtype != weight.dtype and not (x.is_floating_point() and autocast_enabled(x.device.type)):
        return f"expected dtype {weight.dtype}, that of the parameters, got {x.dtype}"
    return None
