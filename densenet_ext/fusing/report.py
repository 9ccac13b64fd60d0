"""`report`: which units of a model run fused, and why the others do not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from densenet_ext import kernels
from densenet_ext.fusing.forwards import FusedBlock, installed
from densenet_ext.fusing.matching import Unit, check_module, find_units
from densenet_ext.modules import DenseBlock


@dataclass(frozen=True)
class Row:
    """One unit. ``reason`` is None exactly when it is fused; ``save`` is the level of a fused dense block."""

    kind: str  # "stem", "dense block", "transition" or "head"
    name: str  # the module's name in the model, "" for the model itself
    fused: bool
    reason: str | None
    save: str | None


@dataclass(frozen=True)
class Report:
    """The units of a model in the order of its modules; ``str()`` is a table.

    ``notes`` says who computes: the compiled part or plain PyTorch, and why.
    """

    rows: tuple[Row, ...]
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __str__(self) -> str:
        if not self.rows:
            return "\n".join(("no dense block, transition, stem or head was recognised", *self.notes))
        cells = [("unit", "name", "fused", "save", "why not")]
        for row in self.rows:
            cells.append(
                (row.kind, row.name or "(model)", "yes" if row.fused else "no", row.save or "", row.reason or "")
            )
        return "\n".join((table(cells), *self.notes))


def report(model: nn.Module) -> Report:
    """Per stem, dense block, transition and head of ``model``: whether it runs fused as it stands now, or why not.

    Nothing is run and nothing changed. ``torch.export``, tracing and ``torch.func`` run the unfused form in any case.

    Raises TypeError when ``model`` is no module.
    """
    check_module("report", model)
    rows = tuple(_row(unit) for unit in find_units(model))
    return Report(rows, tuple(_backends(model)))


def _row(unit: Unit) -> Row:
    reason = unit.reason()
    if not unit.is_fused and reason is None:
        reason = "densenet_ext.fuse has not been called"
    functor = installed(unit.module)
    save = None
    if isinstance(functor, FusedBlock):
        save = functor.save
    elif isinstance(unit.module, DenseBlock):
        save = unit.module.save
    return Row(unit.kind, unit.name, reason is None, reason, save if reason is None else None)


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


def table(cells: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns, the first row underlined."""
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    return "\n".join((lines[0], "  ".join("-" * width for width in widths), *lines[1:]))
