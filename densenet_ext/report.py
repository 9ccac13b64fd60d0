"""`report`: which units of a model run fused, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from densenet_ext import kernels
from densenet_ext.fusing.find import Found, find_units
from densenet_ext.fusing.install import check_module
from densenet_ext.memory.units import kept_by_unit
from densenet_ext.text import readable, table
from densenet_ext.units.block import Block


@dataclass(frozen=True)
class Row:
    """One unit of a model.

    Attributes:
        kind: "stem", "dense block", "transition" or "head".
        name: the module's name in the model, "" for the model itself.
        fused: whether it runs fused now.
        reason: why it does not; None exactly when it does.
        save: what a fused dense block keeps, "bottlenecks" or "features"; None for other units.
        kept: bytes kept for the backward pass per image; None where no input shape was given.
        kept_unfused: the same in the usual formulation.
    """

    kind: str
    name: str
    fused: bool
    reason: str | None
    save: str | None
    kept: int | None = None
    kept_unfused: int | None = None


@dataclass(frozen=True)
class Report:
    """The units of a model in the order of its modules; ``str()`` is a table.

    Attributes:
        rows: one for each unit.
        notes: who computes: the compiled part or plain PyTorch, and why.
        kept: bytes kept for the backward pass per image by the whole model; None where no input shape was given.
        kept_unfused: the same in the usual formulation.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    kept: int | None = None
    kept_unfused: int | None = None

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(("no dense block, transition, stem or head was recognised", *self.notes))
        weighed = self.kept is not None and self.kept_unfused is not None
        head = ["unit", "name", "fused", "save", *(("kept/image", "unfused") if weighed else ()), "why not"]
        cells = [head]
        for row in self.rows:
            sizes = [_size(row.kept), _size(row.kept_unfused)] if weighed else []
            fused = "yes" if row.fused else "no"
            cells.append([row.kind, row.name or "(model)", fused, row.save or "", *sizes, row.reason or ""])
        if weighed:
            cells.append(["all", "", "", "", _size(self.kept), _size(self.kept_unfused), ""])
        return "\n".join((table(cells), *self.notes))


def report(model: nn.Module, input_shape: Sequence[int] | None = None) -> Report:
    """Tells of each stem, dense block, transition and head of ``model`` whether it runs fused now, or why not.

    Nothing is changed, and nothing runs but for the bytes. ``torch.export``, tracing and ``torch.func`` run the unfused
    form in any case.

    Args:
        input_shape: of a batch, [N, C, *spatial]. With it the table says besides how many bytes each unit keeps for
            the backward pass per image, as it stands and unfused: a copy without data runs (`densenet_ext.plan`),
            in the model's mode and dtype. What comes before the first block is the stem's, after the last the head's.

    Raises TypeError when ``model`` is no module, TypeError or ValueError for an ``input_shape`` that the model does not
    take.
    """
    check_module("report", model)
    units = find_units(model)
    rows, notes = [_row(unit) for unit in units], tuple(_backends(model))
    if input_shape is None:
        return Report(tuple(rows), notes)
    kept, whole = kept_by_unit(model, units, input_shape)
    rows = [
        replace(row, kept=kept[row.name].now, kept_unfused=kept[row.name].unfused) if row.name in kept else row
        for row in rows
    ]
    return Report(tuple(rows), notes, whole.now, whole.unfused)


def _row(found: Found) -> Row:
    reason = found.reason()
    if not found.is_fused and reason is None:
        reason = "densenet_ext.fuse has not been called"
    save = found.unit.level(found.module) if isinstance(found.unit, Block) and reason is None else None
    return Row(found.kind, found.name, reason is None, reason, save)


def _backends(model: nn.Module) -> Iterator[str]:
    kinds = {(parameter.device.type, parameter.dtype) for parameter in model.parameters()}
    for device, dtype in sorted(kinds, key=str):
        if not dtype.is_floating_point or device == "meta":
            continue
        who = kernels.backend(torch.device(device), dtype)
        why = kernels.why_plain(torch.device(device)) if who == "plain" else None
        name = str(dtype).removeprefix("torch.")
        if who == "compiled":
            yield f"{name} on {device}: the compiled part computes"
        else:
            why = why or "there are no compiled kernels for this dtype"
            yield f"{name} on {device}: plain PyTorch computes, with the same memory: {why}"


def _size(size: int | None) -> str:
    return "" if size is None else readable(size)
