"""`fuse` and `unfuse`: have the modules of a model run as units, and as they are."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

from densenet_ext import checks
from densenet_ext.fusing.find import Finder, Found
from densenet_ext.fusing.libraries import LIBRARIES
from densenet_ext.models import DenseNet
from densenet_ext.modules import DenseBlock, DenseLayer
from densenet_ext.state_dict import adapt_state_dict
from densenet_ext.units.block import Block
from densenet_ext.units.entry import enter, leave, unit_of
from densenet_ext.units.sequence import Run
from densenet_ext.units.sequence import Sequence as FusedSequence

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, save: str | None = None) -> Model:
    """Makes the DenseNet in ``model`` run over one buffer per dense block, in place, and returns ``model``.

    Class, names, parameters, state dict, hooks and optimizer state stay as they are; `unfuse` is the exact inverse.
    ``model`` is a whole model, a part of one, or a model that contains DenseNets. Its ``load_state_dict`` learns the
    names of the other libraries besides (``densenet_ext.state_dict``).

    Args:
        model: any module. Dense blocks and transitions are found by how they are built, whatever their names are, and
            are tried out against the usual formulation.
        save: what the blocks keep for the backward pass: "bottlenecks" (their outputs and every 1x1 convolution's) or
            "features" (their outputs; the 1x1 convolutions run again). None: "features" for a block whose own memory
            mode (``memory_efficient``, ``efficient``, ``grad_checkpointing``) is on, else "bottlenecks". A level
            that is given is also set in blocks that run fused already.

    Warns when there is nothing to fuse, with the model unchanged, and when no dense block runs fused, with the reasons.
    Raises TypeError when ``model`` is no module, ValueError for an unknown level.
    """
    check_module("fuse", model)
    if save is not None:
        checks.choice("save", save, checks.LEVELS)
    found = Finder(model).all()
    blocks = [unit for unit in found if unit.kind == Block.kind]
    fusible = [unit for unit in blocks if unit.unit is not None]
    if fusible:
        news = [unit for unit in found if unit.unit is not None and not unit.part and not unit.is_fused]
        for unit in news:
            enter(unit.module, unit.unit)
        changed = save is not None and set_level(model, save)
        if news:
            _learn_names(model, found)
        elif not changed:
            _warn(f"fuse: this {type(model).__name__} runs fused already, it is unchanged")
    if all(unit.reason() is not None for unit in blocks):
        _warn(_no_block(model, blocks))
    return model


def unfuse(model: Model) -> Model:
    """Has every module of ``model`` run its usual form again, in place, and returns ``model``; `fuse`'s exact inverse.

    Scripting, export and tracing run the usual form by themselves.

    Warns, with the model unchanged, when nothing in it was fused. Raises TypeError when ``model`` is no module.
    """
    check_module("unfuse", model)
    left = [module for module in model.modules() if leave(module)]
    if not left:
        _warn(f"unfuse: nothing in this {type(model).__name__} runs fused, it is unchanged")
    for module in model.modules() if left else ():
        _forget_names(module)
    return model


def set_level(model: nn.Module, save: str) -> bool:
    """Sets what the fused dense blocks of ``model`` keep for the backward pass; returns whether that changed any."""
    changed = False
    for module in model.modules():
        unit = unit_of(module)
        if isinstance(unit, Block):
            changed |= unit.level(module) != save
            enter(module, unit.with_level(module, save))
        elif isinstance(unit, FusedSequence) and any(isinstance(segment, Run) for segment in unit.segments):
            changed |= any(isinstance(run, Run) and run.block.save != save for run in unit.segments)
            enter(module, unit.with_level(save))
    for module in model.modules():
        if isinstance(module, DenseNet):
            module.save = save
    return changed


def _learn_names(model: nn.Module, units: Sequence[Found]) -> None:
    # the whole, and each DenseNet in it: either may be what a state dict is loaded into
    for module in {id(module): module for module in (model, *_owners(units))}.values():
        _forget_names(module)
        if not _learned_by_nature(module):
            module.register_load_state_dict_pre_hook(adapt_state_dict)


def _owners(units: Iterable[Found]) -> list[nn.Module]:
    return [unit.module for unit in units if unit.kind == "head"]


def _learned_by_nature(module: nn.Module) -> bool:
    return isinstance(module, (DenseNet, DenseBlock, DenseLayer))


def _forget_names(module: nn.Module) -> None:
    if not _learned_by_nature(module):
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is adapt_state_dict]:
            del hooks[key]


def _no_block(model: nn.Module, blocks: Sequence[Found]) -> str:
    if not blocks:
        known = ", ".join(library.name for library in LIBRARIES)
        return (
            f"fuse: no dense block was recognised in this {type(model).__name__}, it is unchanged; "
            f"recognised are those of {known}"
        )
    reasons = [f"{unit.name or 'the block'}: {unit.reason()}" for unit in blocks]
    shown = reasons[:3] + ([f"and {len(reasons) - 3} more"] if len(reasons) > 3 else [])
    return f"fuse: none of the {len(blocks)} dense blocks of this {type(model).__name__} runs fused: {'; '.join(shown)}"


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def check_module(caller: str, model: object) -> None:
    """Raises TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{caller}: model: expected a torch.nn.Module, got {type(model).__name__}")
