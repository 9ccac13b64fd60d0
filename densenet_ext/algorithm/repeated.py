"""The calls of a block over the same parameters, call after call: what they have in common is found once."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from densenet_ext.algorithm.inference import Call, Inferences, Made
from densenet_ext.algorithm.kept import KeptLayers
from densenet_ext.algorithm.layout import is_readable, readable
from densenet_ext.algorithm.operation import Config, Operation, Present, check_data
from densenet_ext.algorithm.packed import Held
from densenet_ext.algorithm.values import Tensors


class BlockCalls:
    """The calls of a block over the same parameters: what they have in common is found once.

    Whoever calls again and again sees to it that the parameters are what they were (``hold``).
    """

    per_layer: int
    """How many parameters a layer has, or could have."""
    convolutions: tuple[int, ...]
    """Which of them are the convolutions' weights."""

    def __init__(self, parameters: Tensors) -> None:
        self.parameters = parameters
        self.held = Held([x for i in self.convolutions for x in parameters[i :: self.per_layer]])
        self._layers: KeptLayers | None = None

    def hold(self) -> bool | None:
        """Returns whether the parameters are as the operations were given them; None: they were not, or have no
        data."""
        return None if self._layers is None else self._layers.hold()

    def check(self, tensors: Tensors) -> None:
        """Raises ValueError where features with data meet parameters without; looks at the parameters once."""
        if self._layers is None:
            check_data(tensors)

    def forward(self, config: Config, tensors: Tensors) -> list[Tensor]:
        """Returns what the operation's ``forward`` does."""
        raise NotImplementedError

    def backward(
        self, config: Config, grad: Tensor, tensors: Tensors, results: Tensors, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """Returns what the operation's ``backward`` does."""
        raise NotImplementedError

    def prepared(self, config: Config, x: Tensor) -> Call | None:
        """Returns ``forward`` on features like ``x`` in evaluation without gradients; None where it is different from
        call to call."""
        raise NotImplementedError

    def repeat(self, run_whole: Any, config: Config, x: Tensor, out: Tensor, scratch: Tensor, statistics: int) -> Call:
        """Returns a call of the operation for features like ``x``, whose result and scratch are like ``out`` and
        ``scratch``; it takes so many ``statistics``, of which there are none."""
        rows, dtype, nothing = [out.shape[0], *out.shape[2:]], out.dtype, (None,) * statistics
        layers, held, as_it_is = self.layers(config, out), self.held, x.dtype == dtype and is_readable(x)
        number, lowered = layers.number, config.lowered

        def compute(x: Tensor, out: Tensor, scratch: Tensor) -> None:
            assert layers  # without which their number means nothing
            x = x if as_it_is else readable(x.to(dtype))
            run_whole(x, number, rows, None, out, *nothing, scratch, bf16=lowered, packed_weights=held.any())

        return Call(compute, Made.like(out), Made.like(scratch), held=held)

    def layers(self, config: Config, like: Tensor) -> KeptLayers:
        """Returns the layers as the operations have them."""
        if self._layers is None:
            self._layers = KeptLayers(like, config, self.parameters, self.per_layer)
        return self._layers

    def layers_again(self, config: Config, like: Tensor, parameters: Tensors) -> KeptLayers:
        """Returns those of the forward pass, unless autograd's hooks, or statistics of that time, are other tensors."""
        if self._layers is not None and self._layers.are(parameters):
            return self._layers
        return KeptLayers(like, config, parameters, self.per_layer)


class Repeated:
    """The operation of a block over the same parameters, call after call."""

    def __init__(self, operation: Operation, calls: BlockCalls) -> None:
        self._plain, self._calls = operation, calls
        self._operation: Operation | None = None
        self._present: Present | None = None
        self.inferences = Inferences()

    @property
    def operation(self) -> Operation:
        """The operation, with what its calls have in common; in compiled code as it is."""
        if torch.compiler.is_compiling():
            return self._plain
        if self._operation is None:
            calls = self._calls
            self._operation = self._plain._replace(forward=calls.forward, backward=calls.backward, check=calls.check)
        return self._operation

    def present(self, tensors: Tensors) -> Present | None:
        """Returns which of a call's tensors are there; in compiled code None, which leaves it to the call."""
        if torch.compiler.is_compiling():
            return None
        if self._present is None:
            wrapped = torch._C._functorch.is_functorch_wrapped_tensor
            plain = not any(x is not None and wrapped(x) for x in tensors[1:])
            self._present = Present([x is not None for x in tensors], plain)
        return self._present

    def keep(self, config: Config, x: Tensor) -> None:
        """Keeps a call on features like ``x`` for the next in evaluation without gradients, where this was one."""
        if not any(config.batch_stats) and not any(config.drop_rates) and not any(config.inner_drop_rates):
            self.inferences.keep(x, lambda: self._calls.prepared(config._replace(save="nothing"), x))

    def hold(self) -> bool | None:
        """Returns whether the parameters have the dtype, the device and the layout that they had; None: nobody
        knows."""
        return self._calls.hold()
