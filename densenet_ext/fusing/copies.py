"""What copies and pickles of a fused module are made of."""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any


class FusedState(dict[str, Any]):
    """The attributes of a fused module without those that `fuse` installed, ``installed``.

    ``copy.copy`` takes them as they are: the functor could not tell the shallow copy from the module, so the copy runs
    unfused. ``copy.deepcopy`` and ``pickle`` take all attributes, and make the functor anew for the new module.
    """

    def __init__(self, attributes: dict[str, Any], installed: Collection[str]) -> None:
        super().__init__({name: value for name, value in attributes.items() if name not in installed})
        self._attributes = attributes

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Any]:
        return copy.deepcopy(self._attributes, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (self._attributes,)
