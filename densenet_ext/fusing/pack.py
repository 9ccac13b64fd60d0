"""`packed_weights`: leave weights as the kernels read them, from call to call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from densenet_ext.algorithm.packed import hold, release
from densenet_ext.fusing.install import check_module
from densenet_ext.units.entry import unit_of
from densenet_ext.units.head import Head

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def packed_weights(model: nn.Module) -> Iterator[None]:
    """Keeps the convolution weights of ``model``'s fused units packed, as kernels read them, inside the ``with``.

    So does it the classifier's behind a fused head in autocast's dtype, and the memory of the features between units.

    Without it every call packs them anew, which is a tenth of an inference of one image, or two. The numbers are the
    same but for rounding: more convolutions are worth Winograd's products when their weights are ready. The model may
    be trained, loaded and switched inside. A weight whose version has changed (by an optimizer, ``load_state_dict``,
    any operation on it) is packed again at the next call.

    As in ``torch.nn.utils.parametrize.cached``, who enters says that weights don't change in ways that PyTorch doesn't
    see: writes through ``.data``, through NumPy or another process leave the packed ones as they were.

    On a processor it takes about as much memory as the weights do; with Winograd's products up to 16/9 of that in
    float32, four times the float32 weights' in bf16 and fp16; and the memory that the largest call so far has needed.
    On a GPU, where kernels read weights as they are and PyTorch keeps memory, it does nothing.

    Args:
        model: any module, usually a fused one; that which isn't fused runs as ever.

    Raises TypeError when ``model`` is no module.
    """
    check_module("packed_weights", model)
    found = {id(m): m.weight for m in model.modules() if isinstance(m, _CONVOLUTIONS)}
    for head in model.modules():
        unit = unit_of(head)
        if isinstance(unit, Head):
            found.update((id(weight), weight) for weight in unit.weights(head))
    held = hold(found.values())
    try:
        yield
    finally:
        release(held)
