"""A unit's norms as the last call found them, which most calls find again."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from densenet_ext.algorithm.single import SingleNorm
from densenet_ext.units.parts import is_usual, norm_of
from densenet_ext.units.reading import ABSENT, Entry, record

_SETTINGS = ("training", "momentum", "eps", "track_running_stats")
NORM_TENSORS = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
"""What a BatchNorm has as parameters and buffers."""


def tensors_of(modules: Iterable[nn.Module]) -> list[Entry]:
    """Returns the parameters and buffers of modules, where they are."""
    holders = [vars(module)[kind] for module in modules for kind in ("_parameters", "_buffers")]
    return [(held, len(held), tuple(held), tuple(held.values())) for held in holders]


def settings_of(norms: Iterable[nn.Module]) -> list[Entry]:
    """Returns the numbers and flags that the values of norms are made of, where they are."""
    found = [(vars(norm), tuple(vars(norm).get(name, ABSENT) for name in _SETTINGS)) for norm in norms]
    return [(values, -1, _SETTINGS, expected) for values, expected in found]


def has_own(module: nn.Module, *names: str) -> bool:
    """Returns whether these are parameters and buffers of ``module``, as they are not of replicas and twins."""
    return {name for holder in (module._parameters, module._buffers) for name in holder}.issuperset(names)


class NormReading:
    """The norm of a unit; and its values as the last call found them."""

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        # What a SyncBatchNorm does follows from the process group, too; replicas have tensors as attributes.
        self._repeats = not isinstance(module, nn.SyncBatchNorm) and has_own(module, *NORM_TENSORS)
        self.records: list[Any] = []
        """What the values depend on, since the last call."""
        self._found: SingleNorm | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """Those that the values of the last call are made of."""
        return [] if self._found is None else [t for t in self._found.norm[:4] if t is not None]

    def now(self) -> SingleNorm | None:
        """Returns the norm as it stands at this call; None where eager does not take its tensors."""
        if not self._repeats or torch.compiler.is_compiling():
            return self._read()
        if self._found is None or not all(each.holds() for each in self.records):
            self.records = [record(tensors_of([self.module]), identical=True), record(settings_of([self.module]))]
            self._found = self._read()
        return self._found

    def _read(self) -> SingleNorm | None:
        values = norm_of(self.module)
        return SingleNorm(values) if is_usual(values) else None
