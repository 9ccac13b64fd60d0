"""`plan`: bytes kept for the backward pass, the peak of a training step and the largest batch, at each level."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from densenet_ext import checks, kernels
from densenet_ext.fusing.find import Found, find_units
from densenet_ext.fusing.install import check_module, fuse
from densenet_ext.fusing.install import set_level as set_saving
from densenet_ext.fusing.verify import make_plain
from densenet_ext.memory.counting import storage_bytes
from densenet_ext.memory.dry_run import REFUSALS, DryRun, Step, checked_shape, parameter_device, refused
from densenet_ext.text import readable, table
from densenet_ext.units.block import Block

UNFUSED = "unfused"
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Level:
    """A training step at one level, in bytes.

    Attributes:
        name: "bottlenecks", "features" or "unfused".
        kept: what the forward pass saves for the backward pass; parameters, buffers and the input left out.
        kept_per_image: what one more image adds to it.
        peak: the most that is allocated at once, everything included.
        largest_batch: that fits into the memory that was given, 0 when one image is too much; None without one.
    """

    name: str
    kept: int
    kept_per_image: int
    peak: int
    largest_batch: int | None


@dataclass(frozen=True)
class Plan:
    """The needs of a training step at each level; ``str()`` is a table, ``plan["features"]`` one level.

    Attributes:
        levels: the fused ones that were asked for, then the unfused form.
        input_shape: of the batch, [N, C, *spatial].
        dtype: of the step.
        autocast: whether the dtype is autocast's, over parameters of float32.
        parameters: bytes, buffers included.
        gradients: bytes.
        optimizer: bytes of its state.
        memory: bytes that were given, or None.
        notes: what else there is to know: who computes, and which blocks run unfused at every level.
    """

    levels: tuple[Level, ...]
    input_shape: tuple[int, ...]
    dtype: torch.dtype
    autocast: bool
    parameters: int
    gradients: int
    optimizer: int
    memory: int | None
    notes: tuple[str, ...]

    def __iter__(self) -> Iterator[Level]:
        return iter(self.levels)

    def __getitem__(self, name: str) -> Level:
        for level in self.levels:
            if level.name == name:
                return level
        raise KeyError(name)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.") + (" autocast" if self.autocast else "")
        head = ["save", "kept for backward", "per image", "peak of a step"]
        if self.memory is not None:
            head.append(f"largest batch in {readable(self.memory)}")
        cells = [head]
        for level in self.levels:
            cells.append([level.name, *map(readable, (level.kept, level.kept_per_image, level.peak))])
            if self.memory is not None:
                cells[-1].append(str(level.largest_batch))
        held = {"parameters": self.parameters, "gradients": self.gradients, "optimizer state": self.optimizer}
        return "\n".join(
            (
                f"one training step on {list(self.input_shape)}, {dtype}",
                table(cells),
                "the peak includes " + ", ".join(f"{name} {readable(size)}" for name, size in held.items()),
                *self.notes,
            )
        )


def plan(
    model: nn.Module,
    input_shape: Sequence[int],
    dtype: torch.dtype | None = None,
    save: str | None = None,
    memory: int | str | None = None,
    *,
    optimizer_state: int = 0,
) -> Plan:
    """Tells what a training step of ``model`` needs at each level of saving, without running it.

    A copy without data runs a forward and a backward pass (``FakeTensorMode``), in the mode that the model is in:
    ``model.train()`` first. The bytes kept for the backward pass are exactly those that a real forward pass saves. The
    peak is an estimate: what PyTorch is asked for, without the workspaces of cuDNN and cuBLAS, what the allocator
    rounds up, and the CUDA context. Leave some memory free, a tenth perhaps.

    Args:
        model: a model with dense blocks, on any device, "meta" included. One that is not fused is planned as
            ``fuse`` would leave it; in one that is partly fused the rest stays as it is. It is not changed.
        input_shape: of a batch, [N, C, *spatial].
        dtype: float32, float64, bfloat16 or float16; None: the parameters'. A dtype of 16 bits over parameters of
            float32 means training under ``torch.autocast``; otherwise the model is planned as ``model.to(dtype)``.
        save: "bottlenecks" or "features": this level only, beside the unfused form. None: both.
        memory: bytes, or a text such as "80GiB" or "24 GB": the largest batch that fits is computed too.
        optimizer_state: how many tensors the optimizer keeps per trainable parameter: SGD with momentum 1, Adam 2.

    Raises TypeError or ValueError that names the argument: no module, no dense block, a batch that the model does not
    take (with its own words), less memory than the parameters.
    """
    check_module("plan", model)
    shape = checked_shape(input_shape)
    if dtype is not None and dtype not in _DTYPES:
        raise TypeError(f"plan: dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype!r}")
    names = checks.LEVELS if save is None else (checks.choice("save", save, checks.LEVELS),)
    checks.integer("optimizer_state", optimizer_state, 0)
    budget = None if memory is None else checks.memory("memory", memory)
    if not any(unit.kind == Block.kind for unit in find_units(model)):
        raise ValueError(f"plan: model: expected dense blocks, found none in this {type(model).__name__}")

    run = DryRun(model, dtype)
    parameters = storage_bytes([*run.model.parameters(), *run.model.buffers()])
    gradients = storage_bytes(parameter for parameter in run.model.parameters() if parameter.requires_grad)
    if budget is not None and budget < parameters:
        raise ValueError(f"memory: expected more than the parameters' {readable(parameters)}, got {readable(budget)}")
    levels: list[Level] = []
    notes = [_who_computes(run)]
    for name in names:
        units = set_level(run.model, name)
        if not levels:
            notes += _not_fused(units)
        levels.append(_level(name, run, shape, budget, optimizer_state * gradients))
    if make_plain(run.model):
        notes.append("unfused: the library's own memory mode is off")
    levels.append(_level(UNFUSED, run, shape, budget, optimizer_state * gradients))
    return Plan(
        levels=tuple(levels),
        input_shape=shape,
        dtype=run.dtype,
        autocast=run.autocast,
        parameters=parameters,
        gradients=gradients,
        optimizer=optimizer_state * gradients,
        memory=budget,
        notes=tuple(notes),
    )


def set_level(model: nn.Module, level: str) -> list[Found]:
    """Sets what the fused dense blocks of ``model`` keep, after fusing it if nothing is fused; returns the blocks."""
    if not any(unit.is_fused for unit in find_units(model)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fuse(model)
    set_saving(model, level)
    return [found for found in find_units(model) if found.kind == Block.kind]


def _level(name: str, run: DryRun, shape: tuple[int, ...], budget: int | None, optimizer: int) -> Level:
    batch = shape[0]
    larger = (batch + 1, *shape[1:])
    largest = None
    try:
        one = run.step(shape)
        if budget is None:  # what one more image adds to the peak is not asked for
            more = run.forward(larger)
        else:
            other = run.step(larger)
            more, largest = other.saved, _largest_batch(one, other, batch, budget - optimizer)
    except REFUSALS as error:
        raise refused(shape, error) from error
    return Level(
        name=name,
        kept=one.saved.total,
        kept_per_image=more.total - one.saved.total,
        peak=one.standing + optimizer + max(one.timeline, default=0),
        largest_batch=largest,
    )


def _largest_batch(one: Step, other: Step, batch: int, budget: int) -> int:
    """Returns the largest n whose step fits: every point of the timeline is affine in n, so two runs say it for all n.

    ``one`` and ``other``: steps of ``batch`` and ``batch + 1`` images.
    """
    times, more = one.timeline, other.timeline
    if len(times) != len(more):  # a model that does other things for other batches: only the peaks are known
        times, more = [max(times)], [max(more)]
    largest = None
    for here, there in zip(times, more, strict=True):
        here, there = here + one.standing, there + other.standing
        slope = there - here
        fixed = here - slope * batch
        n = (budget - fixed) // slope if slope > 0 else None
        if n is not None and (largest is None or n < largest):
            largest = n
    return max(0, largest or 0)


def _not_fused(blocks: Sequence[Found]) -> Iterator[str]:
    count = sum(not unit.is_fused or unit.reason() is not None for unit in blocks)
    if count:
        yield f"{count} of {len(blocks)} dense blocks run unfused at every level: densenet_ext.report says why"


def _who_computes(run: DryRun) -> str:
    device = parameter_device(run.model)
    who = kernels.backend(device, run.dtype)
    words = "compiled operations" if who == "compiled" else "plain PyTorch, which has temporaries of its own"
    return f"the peak is an estimate, with {words} on {device.type}, without workspaces and rounding of the allocator"
