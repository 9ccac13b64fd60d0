"""Fake kernels of the compiled operations: what they do to tensors without data."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor


def _tensors(names: Iterable[str], args: Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in zip(names, args, strict=False):
        for x in value if isinstance(value, list | tuple) else (value,):
            if isinstance(x, Tensor):
                yield name, x


def _check_devices(names: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
    """Raises RuntimeError where tensors with and without data come together.

    The dispatcher sends a call here when one of its tensors is on the meta device, whatever the others are. Nothing
    else is to do: the operations allocate nothing and return nothing, and shapes are what the caller made them.
    """
    given = list(_tensors(names, args)) + list(_tensors(kwargs, kwargs.values()))
    for name, x in given:
        expected = given[0][1].device
        if x.device != expected:
            raise RuntimeError(
                f"densenet_ext: {name}: expected a tensor on {expected} as the other arguments, got one on {x.device}"
            )


def register(names: Iterable[str]) -> None:
    """Registers the fake kernel of each operation ``densenet_ext::<name>``."""
    for name in names:
        schema = getattr(torch.ops.densenet_ext, name).default._schema
        arguments = tuple(argument.name for argument in schema.arguments)
        torch.library.register_fake(f"densenet_ext::{name}", partial(_check_devices, arguments))
