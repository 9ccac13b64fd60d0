"""Bytes kept for the backward pass by each unit of a model, as it stands and in the usual formulation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from densenet_ext.fusing.find import Found
from densenet_ext.fusing.verify import make_plain
from densenet_ext.memory.dry_run import REFUSALS, DryRun, checked_shape, refused


class Kept(NamedTuple):
    """Bytes that one more image adds to what is kept."""

    now: int  # as the model stands
    unfused: int


def kept_by_unit(model: nn.Module, units: Sequence[Found], input_shape: Sequence[int]) -> tuple[dict[str, Kept], Kept]:
    """Returns what each of ``units`` keeps, by the unit's name, and the whole model, on a batch of ``input_shape``.

    What is saved before the first block or transition is the stem's, after the last one the head's. A model that has
    several stems or heads gets neither.

    Raises TypeError or ValueError for a shape that is none, or that the model does not take.
    """
    shape = checked_shape(input_shape)
    run = DryRun(model)
    inner = [unit.name for unit in units if unit.kind in ("dense block", "transition")]
    now = _slopes(run, shape, inner)
    make_plain(run.model)
    unfused = _slopes(run, shape, inner)
    owners: dict[str, str | None] = {name: name for name in inner}
    for kind, owner in (("stem", None), ("head", "")):
        alike = [unit.name for unit in units if unit.kind == kind]
        if len(alike) == 1:
            owners[alike[0]] = owner
    kept = {name: Kept(now.get(owner, 0), unfused.get(owner, 0)) for name, owner in owners.items()}
    return kept, Kept(sum(now.values()), sum(unfused.values()))


def _slopes(run: DryRun, shape: tuple[int, ...], owners: Sequence[str]) -> Mapping[str | None, int]:
    try:
        one, other = (run.forward((n, *shape[1:]), owners).by_owner for n in (shape[0], shape[0] + 1))
    except REFUSALS as error:
        raise refused(shape, error) from error
    return {owner: other[owner] - one[owner] for owner in other}
