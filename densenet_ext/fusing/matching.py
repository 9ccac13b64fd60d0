"""Finds the units of a model: stems, dense blocks, transitions and heads, by the adapters that know their spelling."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Protocol

from torch import nn

from densenet_ext.fusing.forwards import Fused, FusedBlock, installed


class Settings(Protocol):
    """What `verify` has to change in a dense block of a library before it can compare."""

    def set_deterministic(self, block: nn.Module) -> bool:
        """Sets the drop rates of ``block`` to 0 for good; whether any was above."""

    def set_memory_mode_off(self, block: nn.Module) -> bool:
        """Switches the library's own memory mode off in ``block`` for good; whether it was on."""


@dataclass(frozen=True)
class Unit:
    """A module that some adapter recognises.

    ``functor``: what `fuse` installs; None where that can never be, and ``refusal`` says why. ``native``: of modules of
    densenet_ext, which run fused by themselves; says why not, or None.
    """

    kind: str
    module: nn.Module
    functor: Fused | None = None
    refusal: str | None = None
    native: Callable[[], str | None] | None = None
    settings: Settings | None = None  # of a dense block
    name: str = ""  # the module's place in the model

    @property
    def is_fused(self) -> bool:
        """Whether a functor is installed, or the module is densenet_ext's own."""
        return self.native is not None or installed(self.module) is not None

    def reason(self) -> str | None:
        """Why the unit would not run fused, as it stands now and were it fused; or None."""
        if self.native is not None:
            return self.native()
        functor = installed(self.module) or self.functor
        return self.refusal if functor is None else functor.reason()


class Adapter(Protocol):
    """Knows how one library spells its units."""

    @property
    def library(self) -> str:
        """What to call the library in messages."""

    def match(self, module: nn.Module) -> Unit | None:
        """``module`` as a unit of this library, or None when it is not spelled like one."""


def find_units(model: nn.Module) -> list[Unit]:
    """The units in ``model``, itself included, in the order of ``named_modules``; each module once.

    Inside a dense block that can be fused nothing else is a unit.
    """
    return list(_find(model))


def _find(model: nn.Module) -> Iterator[Unit]:
    from densenet_ext.fusing.adapters import ADAPTERS  # they build Units: they import this module

    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if module in inside:
            continue
        for adapter in ADAPTERS:
            unit = adapter.match(module)
            if unit is not None:
                if unit.kind == FusedBlock.kind and unit.refusal is None:
                    inside.update(module.modules())
                yield replace(unit, name=name)
                break


def check_module(caller: str, model: object) -> None:
    """TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model: expected a torch.nn.Module, got {type(model).__name__}")
