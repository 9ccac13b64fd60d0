"""torchxrayvision's DenseNet, as torchvision's was in 2018: layers are Sequentials that return all features."""

from __future__ import annotations

from torch import nn

from densenet_ext.fusing.adapters.usual import UsualAdapter, spelled
from densenet_ext.fusing.forwards import LayerParts


class TorchXRayVision(UsualAdapter):
    """``torchxrayvision.models``; torchxrayvision itself is never imported.

    Its head is not fused: final norm, ReLU and average stand in ``features2``, which users call too, and which resizes
    the image first.
    """

    library = "torchxrayvision"
    memory_mode = None
    passing = "joined"

    def parts(self, layer: nn.Module) -> LayerParts:
        """The children of the layer, which is a Sequential, and drop_rate."""
        return super().parts(layer)._replace(sequence=layer)

    def _is_layer(self, layer: nn.Module) -> bool:
        return isinstance(layer, nn.Sequential) and spelled(layer, self.classes.layer) and hasattr(layer, "drop_rate")

    def _differs_from_model(self, model: nn.Module) -> str | None:
        if hasattr(type(model), "features2"):
            return "its features2, which resizes the image too, normalises and pools"
        return super()._differs_from_model(model)
