"""Remembers what a unit has seen of its modules, so that a call need not look at everything again.

A reading holds as long as nothing that it depends on has changed: which modules there are, their classes and the code
of these, hooks, a replaced ``forward``, settings. Values (parameters, statistics, training flags, drop rates) are not
part of it: every call takes them from the modules.
"""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from types import CodeType, FunctionType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import nn

_POOLING = ("kernel_size", "stride", "padding", "ceil_mode")
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    ),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _POOLING),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), (*_POOLING, "dilation", "return_indices")),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)),
    ((nn.Flatten,), ("start_dim", "end_dim")),
)
_SETTINGS = {kind: names for kinds, names in _KINDS for kind in kinds}
"""The attributes of a module that say which operation it is, but for those that a unit reads at every call."""

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_NO_HOOKS = (OrderedDict[int, Any](),) * len(_HOOKS)


class Part(NamedTuple):
    """A module that a reading depends on, and the names of its attributes that do."""

    module: nn.Module
    settings: tuple[str, ...] = ()
    hooks: bool = True  # whether hooks on it stand in the way


class Watch:
    """Tells whether modules are what they were: children, classes, hooks, forwards and settings.

    ``parts``: the unit's own module first, which is not kept alive.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        parts = list(parts)
        # vars(), not attributes: a module looks its attributes up in Python, which costs ten times as much
        self._holders = [part.module._modules for part in parts if part.module._modules]
        self._children = self._now()
        # not the first, the unit's own module: what remembers it would keep it alive
        self._modules = [part.module for part in parts[1:]]
        self._types = list(map(type, self._modules))
        classes = _own_classes(*dict.fromkeys(type(part.module) for part in parts))
        self._classes = [(*_code[kind][:2], vars(kind), len(vars(kind))) for kind in classes if kind in _code]
        self._constants = [entry for kind in classes for entry in _globals.get(kind, ())]
        self._facts = [self._fact(part) for part in parts]

    def _now(self) -> list[nn.Module | None]:
        return list(chain.from_iterable(map(dict.values, self._holders)))

    def _fact(self, part: Part) -> tuple[dict[str, Any], int, Any, Callable[[Any], Any], tuple[Any, ...]]:
        # how many attributes: a new one might hide a function of the class
        values, count = vars(part.module), len(vars(part.module))
        names = (*(_HOOKS if part.hooks else ()), *_SETTINGS.get(type(part.module), ()), *part.settings)
        if len(names) < 2:
            names = (*names, "training", "training")[:2]  # itemgetter of one name returns no tuple
            return values, count, values.get("forward"), itemgetter("_modules", "_modules"), (values["_modules"],) * 2
        expected = (*(_NO_HOOKS if part.hooks else ()), *(values[name] for name in names[len(_HOOKS) * part.hooks :]))
        return values, count, values.get("forward"), itemgetter(*names), expected

    def holds(self) -> bool:
        """Returns whether all is as it was when the watch began."""
        if self._now() != self._children or list(map(type, self._modules)) != self._types:
            return False
        try:
            for get, expected, now, count in self._classes:
                if len(now) != count or get(now) != expected:
                    return False
            for names, name, value in self._constants:
                if names[name] != value:
                    return False
            for values, count, forward, get, expected in self._facts:
                if len(values) != count or values.get("forward") is not forward or get(values) != expected:
                    return False
        except KeyError:  # an attribute is gone
            return False
        return True


Value = TypeVar("Value")


class Readings(Generic[Value]):
    """The last reading of each module of a kind, with the watch that says whether it still holds."""

    def __init__(self) -> None:
        self._known: weakref.WeakKeyDictionary[nn.Module, dict[int, tuple[object, Watch, Value]]]
        self._known = weakref.WeakKeyDictionary()

    def get(
        self,
        module: nn.Module,
        key: object,
        read: Callable[[], Value | None],
        parts: Callable[[], Sequence[Part]],
    ) -> Value | None:
        """Returns what was read of ``module`` under ``key``, or reads it again where its ``parts`` have changed.

        None, which says that something stands in the way, is not remembered.
        """
        of_module = self._known.get(module)
        known = None if of_module is None else of_module.get(id(key))
        if known is not None and known[0] is key and known[1].holds():
            return known[2]
        value = read()
        if value is not None:
            if of_module is None:
                of_module = self._known[module] = {}
            of_module[id(key)] = key, Watch(parts()), value
        return value


_code: dict[type, tuple[Callable[[Any], Any], tuple[Any, ...], int]] = {}
"""The functions of classes that are not PyTorch's, as they were when the class was first met, and their number."""
_globals: dict[type, list[tuple[dict[str, Any], str, Any]]] = {}
"""The numbers and words that these functions read from their files."""


def know_code(cls: type) -> None:
    """Notes the functions of ``cls`` and of the classes that it derives from, unless that was done."""
    for kind in _own_classes(cls):
        if kind not in _code:
            functions = {name: value for name, value in vars(kind).items() if isinstance(value, FunctionType)}
            get = itemgetter("__module__", "__module__", *functions)
            _code[kind] = get, get(vars(kind)), len(functions)
            read = [(f.__globals__, name) for f in functions.values() for name in f.__code__.co_names]
            constants = [(names, name, names.get(name)) for names, name in read]
            _globals[kind] = [entry for entry in constants if type(entry[2]) in (bool, int, float, str)]


@torch.compiler.assume_constant_result
def code_changed(cls: type) -> bool:
    """Returns whether a function of ``cls``, or of a class that it derives from, was replaced since it was noted.

    So does a number or a word in their files that they read.
    """
    for kind in _own_classes(cls):
        known = _code.get(kind)
        if known is None:
            continue
        if sum(isinstance(value, FunctionType) for value in vars(kind).values()) != known[2]:
            return True
        try:
            if known[0](vars(kind)) != known[1]:
                return True
        except KeyError:
            return True
        if any(names.get(name) != value for names, name, value in _globals[kind]):
            return True
    return False


def _own_classes(*classes: type) -> list[type]:
    kinds = {kind: None for cls in dict.fromkeys(classes) for kind in cls.__mro__}
    return [kind for kind in kinds if not kind.__module__.startswith(("torch.", "builtins", "typing", "abc"))]


_words: dict[type, frozenset[str]] = {}


def names_in_code(cls: type) -> frozenset[str]:
    """Returns every name and word in ``forward`` of ``cls`` and in the methods and functions that it mentions.

    An attribute whose name is not among them cannot change what ``forward`` computes.
    """
    if cls not in _words:
        _words[cls] = frozenset(_names_in_code(cls))
    return _words[cls]


def _names_in_code(cls: type) -> set[str]:
    words: set[str] = set()
    waiting: list[Any] = [cls.forward]  # type: ignore[attr-defined]
    seen: set[int] = set()
    while waiting:
        found = waiting.pop()
        found = getattr(found, "__wrapped__", found)
        code = found if isinstance(found, CodeType) else getattr(found, "__code__", None)
        if code is None or id(code) in seen:
            continue
        seen.add(id(code))
        here = {*code.co_names, *(value for value in code.co_consts if isinstance(value, str))}
        words |= here
        waiting += [value for value in code.co_consts if isinstance(value, CodeType)]
        around = getattr(found, "__globals__", {})
        own = around.get("__name__", "")
        for name in here:
            method = inspect.getattr_static(cls, name, None)
            waiting.append(getattr(method, "fget", getattr(method, "__func__", method)))
            function = around.get(name)
            if isinstance(function, FunctionType) and function.__module__ == own:
                waiting.append(function)
    return words
