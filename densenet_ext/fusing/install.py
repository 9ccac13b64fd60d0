"""`fuse` and `unfuse`: put the functors into a model and take them away again."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TypeVar

from torch import nn

from densenet_ext import checks
from densenet_ext.fusing.adapters import ADAPTERS
from densenet_ext.fusing.forwards import FusedBlock, installed
from densenet_ext.fusing.matching import Unit, check_module, find_units
from densenet_ext.models import DenseNet
from densenet_ext.modules import DenseBlock, DenseLayer
from densenet_ext.state_dict import adapt_state_dict

Model = TypeVar("Model", bound=nn.Module)


def fuse(model: Model, save: str | None = None) -> Model:
    """Makes the DenseNet in ``model`` run over one buffer per dense block, in place, and returns ``model``.

    Class, names, parameters, state dict, hooks and optimizer state stay as they are; `unfuse` is the exact inverse.
    ``model`` is a whole model, a part of one, or a model that contains DenseNets. Its ``load_state_dict`` learns the
    names of the other libraries besides (``densenet_ext.state_dict``).

    Args:
        model: any module; the DenseNets of torchvision, timm, MONAI, torchxrayvision and the efficient implementation
            are recognised.
        save: what the blocks keep for the backward pass: "bottlenecks" (their outputs and every 1x1 convolution's) or
            "features" (their outputs; the 1x1 convolutions run again). None: "features" for a block whose own memory
            mode (``memory_efficient``, ``efficient``, ``grad_checkpointing``) is on, else "bottlenecks". In
            densenet_ext's own blocks, which run fused in any case, a level that is given is set.

    Warns when there is nothing to fuse, with the model unchanged, and when no dense block runs fused, with the reasons.
    Raises TypeError when ``model`` is no module, ValueError for an unknown level.
    """
    check_module("fuse", model)
    if save is not None:
        checks.choice("save", save, checks.LEVELS)
    units = find_units(model)
    blocks = [unit for unit in units if unit.kind == FusedBlock.kind]
    for unit in blocks:
        if save is not None and isinstance(unit.module, DenseBlock):
            unit.module.save = save
    if save is not None:
        _note_level(model, save)
    news = [unit for unit in units if unit.functor is not None and not unit.is_fused]
    if any(unit.is_fused or unit.functor is not None for unit in blocks):
        if news:
            _install(news, save)
            _learn_names(model, units)
        elif not (save is not None and all(unit.native is not None for unit in blocks)):
            _warn(
                f"fuse: this {type(model).__name__} runs fused already, it is unchanged{_how_to_change(blocks, save)}"
            )
    if all(unit.reason() is not None for unit in blocks):
        _warn(_no_block(model, blocks))
    return model


def unfuse(model: Model) -> Model:
    """Takes away all that `fuse` put into ``model``, in place, and returns ``model``.

    Needed before ``torch.jit.script``; ``torch.export`` and tracing run the unfused form by themselves.

    Warns, with the model unchanged, when nothing in it was fused. Raises TypeError when ``model`` is no module.
    """
    check_module("unfuse", model)
    functors = [functor for functor in map(installed, model.modules()) if functor is not None]
    if not functors:
        _warn(f"unfuse: nothing in this {type(model).__name__} was fused by densenet_ext.fuse, it is unchanged")
    for functor in functors:
        functor.remove()
    if functors:
        for module in model.modules():
            _forget_names(module)
    return model


def _install(units: Sequence[Unit], save: str | None) -> None:
    for unit in units:
        assert unit.functor is not None
        if isinstance(unit.functor, FusedBlock) and save is not None:
            unit.functor.save = save
        unit.functor.install()


def _learn_names(model: nn.Module, units: Sequence[Unit]) -> None:
    # the whole, and each DenseNet in it: either may be what a state dict is loaded into
    for module in {id(module): module for module in (model, *_owners(units))}.values():
        _forget_names(module)
        if not _learned_by_nature(module):
            module.register_load_state_dict_pre_hook(adapt_state_dict)


def _owners(units: Iterable[Unit]) -> list[nn.Module]:
    return [unit.module for unit in units if unit.kind == "head"]


def _learned_by_nature(module: nn.Module) -> bool:
    return isinstance(module, (DenseNet, DenseBlock, DenseLayer))


def _forget_names(module: nn.Module) -> None:
    if not _learned_by_nature(module):
        hooks = module._load_state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "hook", hook) is adapt_state_dict]:
            del hooks[key]


def _note_level(model: nn.Module, save: str) -> None:
    for module in model.modules():
        if isinstance(module, DenseNet):
            module.save = save


def _how_to_change(blocks: Iterable[Unit], save: str | None) -> str:
    levels = {
        functor.save for functor in (installed(unit.module) for unit in blocks) if isinstance(functor, FusedBlock)
    }
    if save is None or levels <= {save}:
        return ""
    return f" (save={', '.join(map(repr, sorted(levels)))}; for save={save!r} call unfuse first)"


def _no_block(model: nn.Module, blocks: Sequence[Unit]) -> str:
    if not blocks:
        known = ", ".join(adapter.library for adapter in ADAPTERS)
        return (
            f"fuse: no dense block was recognised in this {type(model).__name__}, it is unchanged; "
            f"recognised are those of {known}"
        )
    reasons = [f"{unit.name or 'the block'}: {unit.reason()}" for unit in blocks]
    shown = reasons[:3] + ([f"and {len(reasons) - 3} more"] if len(reasons) > 3 else [])
    return f"fuse: none of the {len(blocks)} dense blocks of this {type(model).__name__} runs fused: {'; '.join(shown)}"


def _warn(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)
