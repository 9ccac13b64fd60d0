"""Dense blocks and transitions of somebody's own code: found by how they are built, known by trying them out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from densenet_ext.fusing.forwards import installed
from densenet_ext.fusing.generic.anatomy import Anatomy, anatomy_of, configuration
from densenet_ext.fusing.generic.block import FusedGenericBlock
from densenet_ext.fusing.generic.block_trial import try_out_block
from densenet_ext.fusing.generic.transition import (
    FusedGenericTransition,
    TransitionParts,
    transition_parts_of,
    try_out_transition,
)
from densenet_ext.fusing.generic.trial import Refusal
from densenet_ext.fusing.matching import Unit
from densenet_ext.inspection import hooks_on_all_modules

_LIMIT = 256
_known: dict[tuple[object, ...], Any] = {}
"""What trials found, by class and configuration: a model's blocks are alike, and `report` asks again."""

Found = TypeVar("Found")


class Generic:
    """Dense blocks whose layers are norm, ReLU, 1x1, norm, ReLU, 3x3 or norm, ReLU, 3x3, and transitions."""

    library = "your own code (layers of norm, ReLU and convolution over concatenation)"

    def match(self, module: nn.Module) -> Unit | None:
        """``module`` as a dense block or a transition, or None when it is built like neither."""
        functor = installed(module)
        if isinstance(functor, (FusedGenericBlock, FusedGenericTransition)):
            return Unit(functor.kind, module, functor, settings=self)
        unit = self._block(module)
        return self._transition(module) if unit is None else unit

    def _block(self, module: nn.Module) -> Unit | None:
        anatomy = anatomy_of(module)
        if anatomy is None or any(installed(child) for child in module.children()):
            return None
        known = self._tell(module, anatomy)
        if isinstance(known, Anatomy):
            return Unit(FusedGenericBlock.kind, module, FusedGenericBlock(module, known), settings=self)
        if known is None or len(anatomy.layers) == 1:
            return None  # norm, ReLU, convolution and concatenation occur in any network
        if any(self._is_block(holder) for _, holder in anatomy.holders(module)):
            return None  # more than a block: its Sequential is one
        return Unit(FusedGenericBlock.kind, module, refusal=known)

    def _transition(self, module: nn.Module) -> Unit | None:
        parts = transition_parts_of(module)
        if parts is None or hooks_on_all_modules() or any("forward" in inner.__dict__ for inner in module.modules()):
            return None
        found = _tried_out("transition", module, lambda: try_out_transition(module, parts))
        if isinstance(found, TransitionParts):
            return Unit(FusedGenericTransition.kind, module, FusedGenericTransition(module, found))
        if found.stage != "values":
            return None  # norm and convolution occur in any network
        reason = FusedGenericTransition(module, parts).reason()
        unknown = f"{type(module).__name__} is not a known transition: {found.reason}"
        return Unit(FusedGenericTransition.kind, module, refusal=reason or unknown)

    def _tell(self, block: nn.Module, anatomy: Anatomy) -> Anatomy | str | None:
        """What is known of the block in the end; in words why nothing is; None for a module of another kind."""
        if any("forward" in inner.__dict__ for inner in block.modules()):
            return "a forward in it was replaced on the instance"
        functor = FusedGenericBlock(block, anatomy)
        if functor.other_parts():
            return functor.reason()
        found = _tried_out("block", block, lambda: try_out_block(block, anatomy))
        if isinstance(found, Anatomy):
            return found
        if found.stage == "running" and type(block).forward is nn.Sequential.forward:
            return None  # its layers are not made to be chained
        layer = functor.layer_type.__name__
        return functor.reason() or f"this block of {layer} layers is not a known one: {found.reason}"

    def _is_block(self, module: nn.Module) -> bool:
        unit = self._block(module)
        return unit is not None and unit.functor is not None

    def set_deterministic(self, block: nn.Module) -> bool:
        """Sets the drop rates of ``block`` to 0; whether any was above."""
        unit = self.match(block)
        if unit is None or not isinstance(unit.functor, FusedGenericBlock):
            return False
        anatomy = unit.functor.anatomy
        found = [anatomy.set_drop_rate(layer, 0.0) for layer in anatomy.layers_of(block).values()]
        return any(found)

    def set_memory_mode_off(self, block: nn.Module) -> bool:
        """How somebody's own code switches its checkpoints off is not known."""
        return False


def _tried_out(kind: str, module: nn.Module, trial: Callable[[], Found | Refusal]) -> Found | Refusal:
    reason = hooks_on_all_modules()
    if reason is not None:
        return Refusal(reason, "values")  # they would be called for what is tried out
    configured = configuration(module)
    if configured is None:
        return trial()
    key = (kind, *configured)
    if key not in _known:
        if len(_known) >= _LIMIT:
            _known.clear()
        _known[key] = trial()
    return _known[key]
