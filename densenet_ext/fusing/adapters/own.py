"""densenet_ext's own modules: they run fused by themselves, and `report` shows them so."""

from __future__ import annotations

from torch import nn

from densenet_ext.fc_densenet import TransitionDown
from densenet_ext.fusing.matching import Unit
from densenet_ext.models import DenseNet, Features
from densenet_ext.modules import BasicDenseLayer, DenseBlock, DenseLayer, Transition


class Own:
    """The public modules and models; a subclass with a ``forward`` of its own is not one of them."""

    library = "densenet_ext"

    def match(self, module: nn.Module) -> Unit | None:
        """``module`` as a unit that is fused by nature, or None."""
        if isinstance(module, DenseBlock) and type(module).forward is DenseBlock.forward:
            return Unit("dense block", module, native=module.unfused_reason, settings=self)
        if isinstance(module, Transition) and type(module).forward is Transition.forward:
            return Unit("transition", module, native=module.unfused_reason)
        if isinstance(module, TransitionDown) and type(module).forward is TransitionDown.forward:
            return Unit("transition", module, native=module.unfused_reason)
        if isinstance(module, Features) and type(module).forward is Features.forward:
            return Unit("stem", module, native=module.stem_unfused_reason)
        if isinstance(module, DenseNet) and type(module).forward is DenseNet.forward:
            return Unit("head", module, native=module.head_unfused_reason)
        return None

    def set_deterministic(self, block: nn.Module) -> bool:
        """Sets the drop rates of ``block`` to 0; whether any was above."""
        layers = [layer for layer in block.children() if isinstance(layer, (DenseLayer, BasicDenseLayer))]
        found = any(layer.drop_rate > 0 for layer in layers)
        for layer in layers:
            layer.drop_rate = 0.0
        return found

    def set_memory_mode_off(self, block: nn.Module) -> bool:
        """There is none whose numbers differ."""
        return False
