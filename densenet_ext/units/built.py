"""Notes how a module was built and set when its ``forward`` became known, and tells what has changed since."""

from __future__ import annotations

from collections.abc import Iterable
from types import BuiltinFunctionType, FunctionType
from typing import Any, NamedTuple

import torch
from torch import nn

from densenet_ext.units.entry import UNIT, original_class
from densenet_ext.units.parts import hidden_function, kind_of, obstacle, own_attributes, submodule
from densenet_ext.units.reading import Part, code_changed, know_code, names_in_code

_STANDARD = frozenset((*nn.Module().__dict__, UNIT))
_VALUES = (bool, int, float, str, type(None), type, FunctionType, BuiltinFunctionType, torch.dtype, torch.device)

Settings = tuple[tuple[str, Any], ...]
"""Attributes by name, with values that can be compared."""


class Own(NamedTuple):
    """A module with code of its own, which is never called: only its parts' values are read."""

    name: str
    cls: type[nn.Module]
    settings: Settings
    attributes: tuple[str, ...]  # all that the instance has


class Built(NamedTuple):
    """The modules that take part in a unit, by name within its module, and those that have code of their own."""

    names: tuple[str, ...]
    own: tuple[Own, ...]  # the unit's module itself, "", among them

    def changed(self, module: nn.Module) -> str | None:
        """Returns what is no longer as it was when the forward became known; or None."""
        names = set(self.names)
        for name, cls, settings, attributes in self.own:
            found: Any = submodule(module, name)
            if found is None:
                return f"{name} is missing"
            reason = obstacle(found) if name else None
            hidden = hidden_function(found)
            if reason is None and name and original_class(found) is not cls:
                reason = f"is a {kind_of(found)}, not a {cls.__name__}"
            elif hidden is not None:
                reason = f"has a {hidden} that was replaced on the instance"
            elif code_changed(cls):
                reason = f"is a {cls.__name__}, of which a function was replaced since its forward became known"
            for attribute, value in settings:
                now = getattr(found, attribute, None)
                if now != value:
                    reason = f"has {attribute} {now!r}, which was {value!r} when its forward was tried out"
            new = [key for key in own_attributes(found) if key not in attributes and key not in _STANDARD]
            if reason is None and new and not names_in_code(cls).isdisjoint(new):
                reason = f"has {', '.join(new)}, which it had not when its forward became known"
            if reason is None:
                prefix = f"{name}." if name else ""
                for key, child in found._modules.items():
                    if child is not None and prefix + key not in names:
                        reason = f"has a child {key} that it had not when its forward became known"
            if reason is not None:
                return f"{name or 'it'} {reason}"
        return next((f"{name} is missing" for name in self.names if submodule(module, name) is None), None)

    def watched(self, module: nn.Module) -> list[Part]:
        """Returns the modules on which all that was read depends."""
        settings = {own.name: tuple(name for name, _ in own.settings) for own in self.own}
        named = [(name, submodule(module, name)) for name in dict.fromkeys(("", *self.names))]
        return [Part(found, settings.get(name, ()), bool(name)) for name, found in named if found is not None]


def built(module: nn.Module, names: Iterable[str], own: Iterable[str], but: Iterable[str] = ()) -> Built:
    """Returns how ``module`` is built now: ``own`` names those of its modules that have code of their own.

    ``but``: attributes that may change without another meaning. Those that no code of ``forward`` names are left out.
    """
    found = []
    for name in own:
        part = submodule(module, name)
        assert part is not None, name
        cls = original_class(part)
        know_code(cls)
        words = names_in_code(cls)
        settings = tuple((key, value) for key, value in settings_of(part) if key in words and key not in but)
        found.append(Own(name, cls, settings, tuple(key for key in part.__dict__ if key not in _STANDARD)))
    return Built(tuple(names), tuple(found))


def settings_of(module: nn.Module) -> Settings:
    """Returns the attributes of ``module`` that not every module has and that can be compared."""
    return tuple((name, value) for name, value in module.__dict__.items() if name not in _STANDARD and plain(value))


def plain(value: Any) -> bool:
    """Returns whether a value can be compared by what it is."""
    return isinstance(value, _VALUES) or (isinstance(value, tuple) and all(map(plain, value)))
