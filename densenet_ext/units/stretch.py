"""Units that follow one another in a Sequential: looked at as a whole, then run as a whole, as in the last call.

In evaluation without gradients a unit has nothing to do but to run its operation, once it has seen that its modules are
what they were. Behind an operation none of Python's code and data is in the processor's caches: to look at all units
first, one after another, takes a fraction of looking at each when its turn comes. Nobody else's code runs in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

from torch import nn

from densenet_ext.algorithm.conversions import without_autocast
from densenet_ext.algorithm.inference import Call, form_of
from densenet_ext.algorithm.workspace import Memory, Workspace
from densenet_ext.units.flow import Flow

Children = Sequence[tuple[str, nn.Module]]


class Repeat(NamedTuple):
    """A unit's call on features of one form, which gives the result in channels_last memory, and without statistics."""

    call: Call  # to run without autocast
    holds: Callable[[nn.Module], bool]  # whether the unit's module is as it was
    scores: bool = False  # whether it gives what `Flow.scored` says


class _Place(NamedTuple):
    """A unit of a stretch."""

    start: int  # the first child that it runs
    unit: object
    inside: bool  # its module is the Sequential, not the child
    repeat: Repeat


class Stretch:
    """Units that follow one another, for features of one form."""

    def __init__(self, start: int, key: Hashable, flow: Flow, memory: Memory) -> None:
        self.start = self.stop = start  # children
        self.key = key
        self._layout = flow.layout
        self._places: list[_Place] = []
        self._memory = memory
        self._workspace: Workspace | None = None

    def __len__(self) -> int:
        return len(self._places)

    def add(self, part: Children, unit: object, inside: bool, repeat: Repeat | None, after: Flow) -> bool:
        """Adds a unit that has run ``part`` of the children, unless its call can't be repeated.

        ``inside``: the unit is the Sequential's, not the child's; None: the child is a plain convolution.
        """
        if repeat is None or after.stats is not None:
            return False
        self._places.append(_Place(self.stop, unit, inside, repeat))
        self.stop += len(part)
        self._layout = after.layout
        return True

    def holds(self, module: nn.Module, children: Children, units: Sequence[Any], segments: dict[str, Any]) -> bool:
        """Returns whether all is as it was; ``units``: of the children, ``segments``: of the module, by first child."""
        if self.stop > len(children):
            return False
        for start, unit, inside, repeat in self._places:
            name, child = children[start]
            if segments.get(name) is not (unit if inside else None):
                return False
            if not (inside or units[start] is unit) or not repeat.holds(module if inside else child):
                return False
        return True

    def run(self, flow: Flow) -> Flow:
        """Returns the features behind the last unit."""
        if self._workspace is None:
            self._workspace = Workspace([place.repeat.call for place in self._places], self._memory)
        with without_autocast(flow.x.device.type):
            return Flow(self._workspace.run(flow.x), self._layout, scored=self._places[-1].repeat.scores)


def key_of(start: int, flow: Flow, ended: bool = False) -> Hashable:
    """Returns what a stretch from the child ``start`` on is found by; None where calls are not repeated.

    ``ended``: a unit of another module runs in the place of the last child.
    """
    form = form_of(flow.x)
    return None if form is None else (start, ended, flow.layout, form)


class Stretches:
    """Those of a Sequential."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Stretch] = {}
        self._memory = Memory()

    def begin(self, start: int, flow: Flow, ended: bool = False) -> Stretch:
        """Returns one without a unit yet; arguments as of `key_of`."""
        return Stretch(start, key_of(start, flow, ended), flow, self._memory)

    def find(self, start: int, flow: Flow, ended: bool = False) -> Stretch | None:
        """Returns the one for features like those of ``flow``; arguments as of `key_of`."""
        return self._known.get(key_of(start, flow, ended)) if self._known else None

    def keep(self, stretch: Stretch) -> None:
        """Keeps it, if it is more than one unit."""
        if len(stretch) > 1 and stretch.key is not None:
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[stretch.key] = stretch


_MOST = 16  # forms: who serves images of every size gains nothing
_of: weakref.WeakKeyDictionary[nn.Module, Stretches] = weakref.WeakKeyDictionary()


def stretches_of(module: nn.Module) -> Stretches:
    """Returns those of a Sequential, none at first."""
    found = _of.get(module)
    if found is None:
        found = _of[module] = Stretches()
    return found
