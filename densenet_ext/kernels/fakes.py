"""What the compiled operations do to tensors without data (fake kernels), and to those that no kernel takes."""

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


def _check_devices(names: tuple[str, ...], result: Any, *args: Any, **kwargs: Any) -> Any:
    """Returns ``result``; raises RuntimeError where tensors with and without data come together.

    The dispatcher sends a call here when one of its tensors is on the meta device, whatever the others are. Nothing
    else is to do: shapes are what the caller made them, and who wants gradients without data makes them himself.
    """
    given = list(_tensors(names, args)) + list(_tensors(kwargs, kwargs.values()))
    for name, x in given:
        expected = given[0][1].device
        if x.device != expected:
            raise RuntimeError(
                f"densenet_ext: {name}: expected a tensor on {expected} as the other arguments, got one on {x.device}"
            )
    return result


def _refuse(names: tuple[str, ...], devices: tuple[str, ...], *args: Any, **kwargs: Any) -> None:
    """Raises RuntimeError for the tensor that no kernel takes: sparse, quantized, or on a device without kernels.

    The dispatcher sends a call here when one of its tensors is of a kind that nothing else is registered for.
    """
    for name, x in [*_tensors(names, args), *_tensors(kwargs, kwargs.values())]:
        if x.layout != torch.strided or x.is_quantized or x.device.type not in devices:
            kind = "quantized" if x.is_quantized else str(x.layout).removeprefix("torch.")
            raise RuntimeError(
                f"densenet_ext: {name}: expected a strided tensor on {' or '.join(devices)}, "
                f"got a {kind} one on {x.device}"
            )
    raise RuntimeError("densenet_ext: expected tensors that have a kernel, got some that this build has none for")


_fragment = torch.library.Library("densenet_ext", "FRAGMENT")  # what it registers lives as long as it does


def register(names: Iterable[str], devices: tuple[str, ...]) -> None:
    """Registers what each operation ``densenet_ext::<name>`` does beside its kernels for ``devices``."""
    for name in names:
        schema = getattr(torch.ops.densenet_ext, name).default._schema
        arguments = tuple(argument.name for argument in schema.arguments)
        torch.library.register_fake(
            f"densenet_ext::{name}", partial(_check_devices, arguments, [] if schema.returns else None)
        )
        _fragment.impl(name, partial(_refuse, arguments, devices), "CompositeExplicitAutograd")
