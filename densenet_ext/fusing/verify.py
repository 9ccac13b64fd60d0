"""`verify`: one forward and backward pass of a model, fused against unfused, on copies."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from densenet_ext.fusing.find import find_units
from densenet_ext.fusing.install import check_module, fuse
from densenet_ext.fusing.structure import MEMORY_MODES
from densenet_ext.text import table
from densenet_ext.units.block import Block
from densenet_ext.units.entry import leave, observed
from densenet_ext.units.single import TransitionDown

Results = tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]
"""Outputs, gradients and buffers by name."""


@dataclass(frozen=True)
class Errors:
    """Relative errors per tensor, by name: max |got - expected| / max |expected|.

    Infinite where only one of both is there, where shape or dtype differ, or where NaN and infinity do.

    Attributes:
        outputs: of "output", or of "output 0", "output 1" and so on where there are several.
        gradients: of every parameter that gets one, and of "input".
        buffers: after the pass, running statistics and counters.
    """

    outputs: Mapping[str, float]
    gradients: Mapping[str, float]
    buffers: Mapping[str, float]

    @property
    def max_output(self) -> float:
        """The largest error among the outputs."""
        return max(self.outputs.values(), default=0.0)

    @property
    def max_gradient(self) -> float:
        """The largest error among the gradients."""
        return max(self.gradients.values(), default=0.0)

    @property
    def max_buffer(self) -> float:
        """The largest error among the buffers."""
        return max(self.buffers.values(), default=0.0)


@dataclass(frozen=True)
class Verification(Errors):
    """Errors of fused against unfused; ``str()`` is a table.

    Attributes:
        rounding: errors of unfused against unfused in float64: what the model's dtype costs in any case. Errors of the
            same size mean the same numbers. None when the model is in float64 itself, or cannot run in it.
        fused_units: how many stems, blocks, transitions and heads ran fused.
        notes: what was off in both forms, and whether nothing ran fused at all.
    """

    rounding: Errors | None
    fused_units: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        cells = [("max relative error", "tensors", "fused: unfused", "unfused: float64", "largest fused: unfused in")]
        for name in ("outputs", "gradients", "buffers"):
            errors: Mapping[str, float] = getattr(self, name)
            worst = max(errors, key=lambda key: errors[key], default="")
            largest = errors[worst] if errors else 0.0
            rounding = "" if self.rounding is None else f"{max(getattr(self.rounding, name).values(), default=0.0):.1e}"
            cells.append((name, str(len(errors)), f"{largest:.1e}", rounding, worst if largest > 0 else ""))
        return "\n".join((table(cells), f"{self.fused_units} units ran fused", *self.notes))


def verify(model: nn.Module, x: Tensor) -> Verification:
    """Runs ``model`` on ``x`` fused and unfused, forward and backward, in the mode it is in, and compares.

    Copies run, one after the other, from the same random state; the model, its buffers and gradients, and the random
    state stay as they are. A model that is not fused is fused in its copy. Compared are outputs, the gradient of every
    parameter and of the input (from fixed random gradients of the outputs), and every buffer afterwards.

    Some gradients of a DenseNet nearly cancel (a norm in front of norms), and their relative error is large in float32
    with any formulation. So a third copy in float64 shows what the model's dtype costs without fusing.
    Dropout of the dense layers is off in all copies, since the fused mask is another draw from the same distribution;
    so is a library's own memory mode in the unfused ones, because its recomputation moves running statistics twice.

    Raises TypeError when ``model`` is no module or ``x`` no tensor, and what the model raises on ``x``.
    """
    check_module("verify", model)
    if not isinstance(x, Tensor):
        raise TypeError(f"verify: x: expected a tensor, got {type(x).__name__}")
    notes = []
    fused = copy.deepcopy(model)
    if not any(unit.is_fused for unit in find_units(fused)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fuse(fused)
    without_dropout = _without_dropout(fused)
    ran: set[tuple[nn.Module, str]] = set()
    with observed(lambda module, kind: ran.add((module, kind))):
        got = _run(fused, x)
    if not ran:
        notes.append("nothing runs fused in this model, so both ran the same code: densenet_ext.report says why")
    if without_dropout:
        notes.append("dropout of the dense layers was off")
    count = len(ran)
    ran.clear()
    del fused

    plain = copy.deepcopy(model)
    _without_dropout(plain)
    if make_plain(plain):
        notes.append("the library's own memory mode was off: it moves running statistics twice")
    again = copy.deepcopy(plain)
    wanted = _run(plain, x)
    del plain
    exact = _run_in_double(again, x)
    rounding = None if exact is None else Errors(**_compare(wanted, exact, same_dtype=False))
    return Verification(**_compare(got, wanted), rounding=rounding, fused_units=count, notes=tuple(notes))


def _without_dropout(model: nn.Module) -> bool:
    dropping = False
    for found in find_units(model):
        if isinstance(found.unit, (Block, TransitionDown)):
            dropping |= found.unit.stop_dropping(found.module)
    return dropping


def make_plain(model: nn.Module) -> bool:
    """Has ``model`` run the usual formulation for good; returns whether a library's own memory mode was on. It is off
    then."""
    modes = [(module, mode) for module in model.modules() for mode in MEMORY_MODES]
    on = [(module, mode) for module, mode in modes if module.__dict__.get(mode) is True]
    for module, mode in on:
        setattr(module, mode, False)
    for module in model.modules():
        leave(module)
    return bool(on)


def _run_in_double(model: nn.Module, x: Tensor) -> Results | None:
    tensors = (x, *model.parameters(), *model.buffers())
    if not any(tensor.is_floating_point() and tensor.dtype != torch.float64 for tensor in tensors):
        return None
    try:
        with torch.autocast(x.device.type, enabled=False):
            return _run(model.double(), x.double() if x.is_floating_point() else x)
    except (RuntimeError, TypeError):  # a device without float64, or a model with a dtype written into it
        return None


def _run(model: nn.Module, x: Tensor) -> Results:
    for parameter in model.parameters():
        parameter.grad = None
    x = x.detach().clone()
    devices = {tensor.device for tensor in (x, *model.parameters()) if tensor.device.type == "cuda"}
    with torch.random.fork_rng(devices=list(devices)), torch.enable_grad():
        if x.is_floating_point() or x.is_complex():
            x.requires_grad_()
        leaves = [leaf for leaf in tree_flatten(model(x))[0] if isinstance(leaf, Tensor)]
        outputs = {f"output {i}" if len(leaves) > 1 else "output": leaf for i, leaf in enumerate(leaves)}
        wanting = [leaf for leaf in leaves if leaf.requires_grad]
        if wanting:
            torch.autograd.backward(wanting, [_fixed_gradient(leaf) for leaf in wanting])
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    if x.grad is not None:
        gradients["input"] = x.grad
    buffers = {name: buffer.detach() for name, buffer in model.named_buffers()}
    return {name: leaf.detach() for name, leaf in outputs.items()}, gradients, buffers


def _fixed_gradient(output: Tensor) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(output.shape, generator=generator, dtype=torch.float64, device="cpu")
    return gradient.to(device=output.device, dtype=output.dtype)


def _compare(got: Results, wanted: Results, same_dtype: bool = True) -> dict[str, Mapping[str, float]]:
    return {
        kind: {name: _error(ours.get(name), theirs.get(name), same_dtype) for name in {**theirs, **ours}}
        for kind, ours, theirs in zip(("outputs", "gradients", "buffers"), got, wanted, strict=True)
    }


def _error(got: Tensor | None, wanted: Tensor | None, same_dtype: bool) -> float:
    if got is None or wanted is None or got.shape != wanted.shape or (same_dtype and got.dtype != wanted.dtype):
        return float("inf")
    if got.numel() == 0:
        return 0.0
    a, b = (tensor.detach().to(device="cpu", dtype=torch.float64) for tensor in (got, wanted))
    same = (a == b) | (a.isnan() & b.isnan())
    difference = torch.where(same, torch.zeros_like(a), (a - b).abs()).max().item()
    if difference == 0.0:
        return 0.0
    scale = b[b.isfinite()].abs().max().item() if bool(b.isfinite().any()) else 0.0
    return difference / scale if scale > 0.0 and difference == difference else float("inf")
