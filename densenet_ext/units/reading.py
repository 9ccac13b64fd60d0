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
from operator import is_
from types import CodeType, FunctionType
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from densenet_ext import _extension

_POOLING = ("kernel_size", "stride", "padding", "ceil_mode")
_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
_KINDS: tuple[tuple[tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    (
        (nn.Conv1d, nn.Conv2d, nn.Conv3d),
        ("kernel_size", "stride", "padding", "dilation", "groups", "padding_mode"),
    ),
    ((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), (*_POOLING, "divisor_override")),
    ((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), (*_POOLING, "dilation", "return_indices")),
    ((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)),
    ((nn.Flatten,), ("start_dim", "end_dim")),
    (_DROPOUTS, ("p",)),  # of those that a unit takes for none, too
)
_SETTINGS = {kind: names for kinds, names in _KINDS for kind in kinds}
"""The attributes of a module that say which operation it is, but for those that a unit reads at every call."""

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
NO_HOOKS = (OrderedDict[int, Any](),) * len(HOOKS)


class Part(NamedTuple):
    """A module that a reading depends on, and the names of its attributes that do."""

    module: nn.Module
    settings: tuple[str, ...] = ()
    hooks: bool = True  # whether hooks on it stand in the way


Entry = tuple[Any, int, "tuple[str, ...] | None", tuple[Any, ...]]
"""A dictionary, how many entries it has (-1: any number), some of their names, and their values; names of None: all
values, in their order. ``ABSENT`` stands for an entry that is not there."""
ABSENT = object()


class Record:
    """What dictionaries hold, and of which classes objects are; ``identical``: as the same objects, else equal ones."""

    def __init__(self, entries: list[Entry], typed: list[tuple[Any, type]], absent: object, identical: bool) -> None:
        self._entries, self._typed, self._absent, self._identical = entries, typed, absent, identical

    def holds(self) -> bool:
        """Returns whether they hold it still."""
        return all(type(thing) is kind for thing, kind in self._typed) and all(map(self._holds, self._entries))

    def _holds(self, entry: Entry) -> bool:
        values, count, names, expected = entry
        if count >= 0 and len(values) != count:
            return False
        now = tuple(values.values()) if names is None else tuple(values.get(name, self._absent) for name in names)
        if self._identical or names is None:
            return len(now) == len(expected) and all(map(is_, now, expected))
        return now == expected


_Form: Any = Record if _extension.module is None else _extension.module.Record


def record(entries: list[Entry], typed: list[tuple[Any, type]] | None = None, identical: bool = False) -> Record:
    """Returns what ``entries`` are now, and of which classes the objects of ``typed`` are, compiled where that is
    there."""
    made: Record = _Form(entries, typed or [], ABSENT, identical)
    return made


class Records:
    """Records, and the form of tensors (dtype, device, sizes and strides), that are looked at as one.

    There is no such thing where nothing is compiled.
    """

    def __init__(self, records: Sequence[Record], tensors: Sequence[Tensor]) -> None:
        number = torch.ops.densenet_ext.keep_tensors(list(tensors))
        self._records: Any = _extension.module.Records(list(records), number)  # type: ignore[union-attr]
        torch.ops.densenet_ext.drop_kept(number)

    def hold(self) -> bool:
        """Returns whether all records hold, and all tensors have the form that they had."""
        return bool(self._records.hold())


class Watch:
    """Tells whether modules are what they were: children, classes, hooks, forwards and settings.

    ``parts``: the unit's own module first, which is not kept alive.
    """

    def __init__(self, parts: Iterable[Part]) -> None:
        parts = list(parts)
        # vars(), not attributes: a module looks its attributes up in Python, which costs ten times as much
        children = [part.module._modules for part in parts if part.module._modules]
        entries: list[Entry] = [(held, len(held), None, tuple(held.values())) for held in children]
        classes = _own_classes(*dict.fromkeys(type(part.module) for part in parts))
        entries += [entry for kind in classes if kind in _code for entry in _code_of(kind)]
        entries += map(self._fact, parts)
        # not the first, the unit's own module: what remembers it would keep it alive
        self.record = record(entries, [(part.module, type(part.module)) for part in parts[1:]])

    def _fact(self, part: Part) -> Entry:
        # how many attributes: a new one might hide a function of the class
        values = vars(part.module)
        names = ("forward", *_SETTINGS.get(type(part.module), ()), *part.settings)
        expected = tuple(values.get(name, ABSENT) for name in names)
        hooks = HOOKS if part.hooks else ()
        return values, len(values), (*hooks, *names), (*NO_HOOKS[: len(hooks)], *expected)

    def holds(self) -> bool:
        """Returns whether all is as it was when the watch began."""
        return self.record.holds()


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

    def record(self, module: nn.Module, key: object) -> Record:
        """Returns what the last reading of ``module`` under ``key`` depends on."""
        return self._known[module][id(key)][1].record


_code: dict[type, tuple[tuple[str, ...], tuple[Any, ...]]] = {}
"""The functions of classes that are not PyTorch's, by name as they were when the class was first met."""
_globals: dict[type, list[tuple[dict[str, Any], str, Any]]] = {}
"""The numbers and words that these functions read from their files."""


_as_noted: dict[type, Record] = {}
"""The classes whose code, with that of those they derive from, was found unchanged: as long as it is this."""


def know_code(cls: type) -> None:
    """Notes the functions of ``cls`` and of the classes that it derives from, unless that was done."""
    for kind in _own_classes(cls):
        if kind not in _code:
            functions = {name: value for name, value in vars(kind).items() if isinstance(value, FunctionType)}
            _code[kind] = tuple(functions), tuple(functions.values())
            read = [(f.__globals__, name) for f in functions.values() for name in f.__code__.co_names]
            constants = [(names, name, names.get(name)) for names, name in read]
            _globals[kind] = [entry for entry in constants if type(entry[2]) in (bool, int, float, str)]
            _as_noted.clear()  # somebody may derive from it


@torch.compiler.assume_constant_result
def code_changed(cls: type) -> bool:
    """Returns whether a function of ``cls``, or of a class that it derives from, was replaced since it was noted.

    So does a number or a word in their files that they read.
    """
    known = _as_noted.get(cls)
    if known is not None and known.holds():
        return False
    kinds = [kind for kind in _own_classes(cls) if kind in _code]
    if any(map(_changed, kinds)):
        return True
    _as_noted[cls] = record([entry for kind in kinds for entry in _code_of(kind)])
    return False


def _changed(kind: type) -> bool:
    names, functions = _code[kind]
    now = vars(kind)
    if sum(isinstance(value, FunctionType) for value in now.values()) != len(names):
        return True
    if any(now.get(name) is not function for name, function in zip(names, functions, strict=True)):
        return True
    return any(names.get(name) != value for names, name, value in _globals[kind])


def _code_of(kind: type) -> list[Entry]:
    """The functions of a class and what they read, as they were noted."""
    constants: list[Entry] = [(names, -1, (name,), (value,)) for names, name, value in _globals[kind]]
    return [(vars(kind), len(vars(kind)), *_code[kind]), *constants]


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
