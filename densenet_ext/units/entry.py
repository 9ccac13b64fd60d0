"""The one way in: a module's class becomes a subclass made on the fly, whose ``forward`` runs a unit.

That is how PyTorch itself does it in ``parametrize`` and ``fully_shard``. The class has the name and the place of the
original, ``forward`` is a plain function that is given the module it is called on, and the module carries no more than
the unit: a value that says which of its children are what, by name. So copies, replicas, pickles and twins made from
``__dict__`` work by themselves; where the unit cannot run, the original ``forward`` does.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from densenet_ext.units import captures
from densenet_ext.units.flow import Flow, incoming
from densenet_ext.units.metadata import bare
from densenet_ext.units.parts import hook_on
from densenet_ext.units.reading import ABSENT, HOOKS, NO_HOOKS, Record, code_changed, know_code, record
from densenet_ext.units.stretch import Repeat


class Mismatch(NamedTuple):
    """Says what was expected of an input and what came; of several, also which ("features[1]: ...")."""

    words: str


UNIT = "_densenet_ext"
"""The attribute of a module that holds its unit."""

Forward = Callable[..., Any]


class Unit(Protocol):
    """A module's computation in one piece: a value that pickles and knows the module's parts by their names only."""

    kind: ClassVar[str]

    def reason(self, module: nn.Module) -> str | None:
        """Returns why the unit cannot run on ``module`` as it stands now, or None."""

    def call(self, module: nn.Module, usual: Forward, x: Any) -> Any:
        """Returns what ``usual(module, x)`` does; runs that where the unit cannot run."""


class MapUnit:
    """A unit that takes feature maps and gives feature maps, so that units can be chained."""

    kind: ClassVar[str]

    def reason(self, module: nn.Module) -> str | None:
        """Returns why the unit cannot run on ``module`` as it stands now, or None."""
        raise NotImplementedError

    def step(self, module: nn.Module, flow: Flow) -> Flow | Mismatch | None:
        """Returns the features behind the unit; None where it cannot run, and in words why ``flow`` does not fit."""
        raise NotImplementedError

    def repeated(self, module: nn.Module, x: Tensor) -> Repeat | None:
        """Returns a call on features like x that can be repeated without `step`; None where there is none."""
        return None

    def call(self, module: nn.Module, usual: Forward, x: Any) -> Any:
        """Returns what ``usual(module, x)`` does, in eager's layout."""
        found = self.step(module, incoming(x)) if isinstance(x, Tensor) else not_a_tensor(x)
        if isinstance(found, Flow):
            return found.shown()
        return usual(module, x) if found is None else as_eager(found, usual, module, x)


def straight(module: nn.Module) -> Any:
    """Returns the unit of ``module`` when running it is all that a call of the module would do; else None."""
    unit = module.__dict__.get(UNIT)
    if unit is None or hook_on(module) is not None or reason_outside(module) is not None:
        return None
    return unit


def straightness(module: nn.Module) -> Record:
    """Returns what `straight` depends on, but for the code of the module's class."""
    values = vars(module)
    names = ("forward", UNIT)
    expected = (*NO_HOOKS, *(values.get(name, ABSENT) for name in names))
    return record([(values, -1, (*HOOKS, *names), expected)], [(module, type(module))])


def unit_of(module: nn.Module) -> Any:
    """Returns the unit that ``module`` runs as, or None."""
    return module.__dict__.get(UNIT)


def enter(module: nn.Module, unit: Unit) -> None:
    """Makes ``module`` run as ``unit``. Its class becomes one made from its own."""
    if unit_of(module) is None:
        know_code(type(module))
        module.__class__ = _fused_class(type(module))
    module.__dict__[UNIT] = unit


def leave(module: nn.Module) -> bool:
    """Undoes `enter`; returns whether there was anything to undo."""
    if module.__dict__.pop(UNIT, None) is None:
        return False
    if type(module) in _originals:  # else somebody derived another class since: it runs the usual forward from now on
        module.__class__ = _originals[type(module)]
    return True


def original_class(module: nn.Module) -> type[nn.Module]:
    """Returns the class that ``module`` had before it was fused."""
    return _originals.get(type(module), type(module))


def reason_outside(module: nn.Module) -> str | None:
    """Returns why ``module``'s unit would not be asked at all: its class or itself has another ``forward``; or None."""
    cls = original_class(module)
    if code_changed(cls) or _usual.get(cls, cls.forward) is not cls.forward:
        return f"a function of {cls.__name__} was replaced since it was fused"
    own = module.__dict__.get("forward")
    if own is None or getattr(own, "__func__", None) in (_fused_forward(cls), cls.forward):
        return None
    return "its forward was replaced on the instance"


_fused: dict[type, type] = {}
_originals: dict[type, type] = {}
_usual: dict[type, Any] = {}  # the original's forward at that time
_observers: list[Callable[[nn.Module, str], None]] = []


@contextmanager
def observed(note: Callable[[nn.Module, str], None]) -> Iterator[None]:
    """Calls ``note(module, kind)`` for every unit that runs fused inside the ``with``."""
    _observers.append(note)
    try:
        yield
    finally:
        _observers.remove(note)


def is_observed() -> bool:
    """Returns whether somebody is told which units run."""
    return bool(_observers)


def ran(module: nn.Module, kind: str) -> None:
    """Says that a unit of ``module`` runs fused now."""
    for note in _observers:
        note(module, kind)


def not_a_tensor(x: Any) -> Mismatch:
    """Says that x is none."""
    return Mismatch(f"expected a tensor, got {type(x).__name__}")


def as_eager(mismatch: Mismatch, usual: Forward, module: nn.Module, x: Any) -> Any:
    """Returns ``usual(module, x)`` for an input that does not fit; its error is told in our words, too."""
    try:
        return usual(module, x)
    except Exception as error:
        if type(error) in (RuntimeError, ValueError, TypeError, IndexError):
            words = mismatch.words
            if not words.startswith("features"):
                words = f"{list(inspect.signature(usual).parameters)[1]}: {words}"
            cause = error.__cause__ if hasattr(error, "in_our_words") and error.__cause__ is not None else error
            told: Any = type(error)(f"{words} ({cause})")
            told.in_our_words = True  # whoever called this unit names its own argument instead
            raise told from cause
        raise


def _fused_forward(cls: type) -> Any:
    made = _fused.get(cls)
    return None if made is None else vars(made)["forward"]


# Keeps the original's __init_subclass__ from being called: no class of the user's is defined here. (No docstring: a
# class without one would inherit it.)
class _Quiet:
    def __init_subclass__(cls, **kwargs: Any) -> None:
        pass


def _fused_class(cls: Any) -> type:
    made = _fused.get(cls)
    if made is None:
        names = {"__module__": cls.__module__, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__}
        methods = {
            "forward": _forward_over(cls),
            "__setattr__": _setattr_over(cls),
            "__reduce_ex__": _reduce_ex_over(cls),
        }
        made = type(cls)(cls.__name__, (_Quiet, cls), {**names, **methods})
        _fused[cls], _originals[made], _usual[cls] = made, cls, cls.forward
    return made


def _forward_over(cls: Any) -> Forward:
    usual, name, run = cls.forward, UNIT, _run

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        unit = self.__dict__.get(name)
        if unit is None or cls.forward is not usual:
            return cls.forward(self, *args, **kwargs)
        return run(unit, self, usual, args, kwargs)

    # With the globals of the original: torch.jit.script compiles the original's source, and looks its names up there.
    names = getattr(usual, "__globals__", globals())
    return functools.wraps(usual)(types.FunctionType(forward.__code__, names, "forward", None, forward.__closure__))


def _setattr_over(cls: Any) -> Callable[[nn.Module, str, Any], None]:
    def __setattr__(self: nn.Module, name: str, value: Any) -> None:
        # Tools that take their wrappers off again follow __wrapped__ (accelerate), one step too far.
        if name == "forward" and getattr(value, "__func__", None) is cls.forward:
            value = types.MethodType(type(self).forward, self)
        made: Any = _fused[cls]
        super(made, self).__setattr__(name, value)

    return __setattr__


def _reduce_ex_over(cls: Any) -> Callable[[nn.Module, Any], Any]:
    def __reduce_ex__(self: nn.Module, protocol: Any) -> Any:
        """Names the original class, which other processes can import."""
        made: Any = _fused[cls]
        reduced = super(made, self).__reduce_ex__(protocol)
        if type(self) is not made or not isinstance(reduced, tuple):
            return reduced
        function, args, *rest = reduced
        return (_rebuild, (cls, function, *(cls if value is made else value for value in args)), *rest)

    return __reduce_ex__


def _rebuild(cls: type, function: Callable[..., Any], *args: Any) -> Any:
    """Makes the object of which ``__reduce_ex__`` told; its state, the unit included, comes afterwards."""
    know_code(cls)
    made = _fused_class(cls)
    return function(*(made if value is cls else value for value in args))


def _run(unit: Unit, module: nn.Module, usual: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if kwargs or len(args) != 1:
        try:
            args = inspect.signature(usual).bind(module, *args, **kwargs).args[1:]
        except TypeError:
            return usual(module, *args, **kwargs)  # which says what is missing
        if len(args) != 1:
            return usual(module, *args)
    x = args[0]
    inputs = x if isinstance(x, (list, tuple)) else (x,)
    if captures.reason(*map(bare, inputs)) is not None:
        return usual(module, x)
    return unit.call(module, usual, x)
