"""Units that follow one another in a Sequential: looked at as a whole, then run as a whole, as in the last call.

In evaluation without gradients a unit has nothing to do but to run its operation, once it has seen that its modules are
what they were. Behind an operation none of Python's code and data is in the processor's caches: to look at all units
first, as one, takes a fraction of looking at each when its turn comes. Nobody else's code runs in between.
"""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from densenet_ext.algorithm.conversions import without_autocast
from densenet_ext.algorithm.inference import Call, form_of
from densenet_ext.algorithm.workspace import Memory, Workspace
from densenet_ext.units.flow import Flow
from densenet_ext.units.reading import Entry, Record, Records, record


class Repeat(NamedTuple):
    """A unit's call on features of one form, which gives the result in channels_last memory, and without statistics."""

    call: Call  # to run without autocast
    records: Sequence[Record]  # what it depends on of the unit's modules
    tensors: Sequence[Tensor]  # whose form it depends on, but not their values
    scores: bool = False  # whether it gives what `Flow.scored` says


class Chain(NamedTuple):
    """What a stretch is a part of."""

    module: nn.Module  # the Sequential
    units: Hashable  # those that are not its children's
    end: nn.Module | None = None  # whose unit runs in the place of the last child


class Stretch:
    """Units that follow one another, for features of one form."""

    is_whole = False
    """Whether there is no child behind the last unit."""

    def __init__(self, start: int, chain: Chain, flow: Flow, memory: Memory) -> None:
        self.start = self.stop = start  # children
        self.key = key_of(start, flow)
        self._layout = flow.layout
        self._module, self._units = weakref.ref(chain.module), chain.units
        self._repeats: list[Repeat] = []
        self._records = [record([_in_order(chain.module), _by_name(chain.module)])]
        self._standing: Records | None = None
        self._memory = memory
        self._workspace: Workspace | None = None

    def __len__(self) -> int:
        return len(self._repeats)

    def add(self, children: int, repeat: Repeat | None, after: Flow, call: Record | None = None) -> bool:
        """Adds a unit that has run so many ``children``, unless its call can't be repeated.

        ``call``: what it depends on that the child is not called.
        """
        if repeat is None or after.stats is not None:
            return False
        self._repeats.append(repeat)
        self._records += repeat.records
        if call is not None:
            self._records.append(call)
        self.stop += children
        self._layout = after.layout
        return True

    def finish(self, children: int) -> None:
        """Ends a stretch of a Sequential that has so many ``children``."""
        self.is_whole = self.stop == children
        self._standing = Records(self._records, [t for repeat in self._repeats for t in repeat.tensors])

    def holds(self, chain: Chain) -> bool:
        """Returns whether all is as it was."""
        same = self._module() is chain.module and self._units == chain.units
        return same and self._standing is not None and self._standing.hold()

    def run(self, flow: Flow) -> Flow:
        """Returns the features behind the last unit."""
        if self._workspace is None:
            self._workspace = Workspace([repeat.call for repeat in self._repeats], self._memory)
        with without_autocast(flow.x.device.type):
            return Flow(self._workspace.run(flow.x), self._layout, scored=self._repeats[-1].scores)


def _in_order(module: nn.Module) -> Entry:
    return module._modules, len(module._modules), None, tuple(module._modules.values())


def _by_name(module: nn.Module) -> Entry:
    return module._modules, -1, tuple(module._modules), tuple(module._modules.values())


def key_of(start: int, flow: Flow) -> Hashable:
    """Returns what a stretch from the child ``start`` on is found by; None where calls are not repeated."""
    form = form_of(flow.x)
    return None if form is None else (start, flow.layout, form)


class Stretches:
    """Those of a Sequential, or of a model whose unit runs in the place of a Sequential's last child."""

    def __init__(self) -> None:
        self._known: dict[Hashable, Stretch] = {}
        self._memory = Memory(_LITTLE)

    def begin(self, start: int, chain: Chain, flow: Flow) -> Stretch:
        """Returns one without a unit yet, from the child ``start`` on."""
        return Stretch(start, chain, flow, self._memory)

    def find(self, start: int, chain: Chain, flow: Flow) -> Stretch | None:
        """Returns the one for features like those of ``flow``, where all is as it was; else None."""
        found = self._known.get(key_of(start, flow)) if self._known else None
        return found if found is not None and found.holds(chain) else None

    def keep(self, stretch: Stretch, children: int) -> None:
        """Keeps one of a Sequential that has so many ``children``, if it is more than one unit."""
        if len(stretch) > 1 and stretch.key is not None:
            if len(self._known) >= _MOST:
                self._known.clear()
            stretch.finish(children)
            self._known[stretch.key] = stretch


_LITTLE = 2**21  # bytes: what a network of this size for one small image weighs, too
_MOST = 16  # forms: who serves images of every size gains nothing
_of: weakref.WeakKeyDictionary[nn.Module, Stretches] = weakref.WeakKeyDictionary()


def stretches_of(chain: Chain) -> Stretches:
    """Returns those of a Sequential, none at first; of its end's where there is one, which goes first."""
    module = chain.module if chain.end is None else chain.end
    found = _of.get(module)
    if found is None:
        found = _of[module] = Stretches()
    return found
