"""What a dense block of somebody's own code computes: its ``forward`` is tried out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from densenet_ext import reference
from densenet_ext.algorithm.values import Layer
from densenet_ext.fusing.generic.anatomy import Anatomy, part
from densenet_ext.fusing.generic.trial import Pattern, Refusal, Refused, Trial, attempt, close, factors

_SPATIAL = {1: (7,), 2: (3, 4), 3: (3, 2, 3)}
_RATE = 0.28125


def try_out_block(block: nn.Module, anatomy: Anatomy) -> Anatomy | Refusal:
    """The anatomy with what ``forward`` does with it, or why no fused unit does the same."""
    return attempt(lambda: _arrangement(block, anatomy))


def _arrangement(block: nn.Module, anatomy: Anatomy) -> Anatomy:
    try:
        return _BlockTrial(block, anatomy).run(dropping=True)
    except Refused as refused:
        try:  # one that drops elsewhere too is known as long as its rates stay 0
            return _BlockTrial(block, anatomy).run(dropping=False)
        except Refused:
            raise refused from None


class _BlockTrial(Trial):
    def __init__(self, block: nn.Module, anatomy: Anatomy) -> None:
        self.anatomy = anatomy
        first = self._weight(next(iter(anatomy.layers_of(block).values())), 0)
        super().__init__(block, first.shape[1], first.dim() - 2, _SPATIAL[first.dim() - 2])

    def _weight(self, layer: nn.Module, i: int = -1) -> Tensor:
        conv: Any = part(layer, self.anatomy.parts.convs[i])
        return conv.weight

    @property
    def words(self) -> str:
        layer = "norm, ReLU, 1x1, norm, ReLU, 3x3" if len(self.anatomy.parts.convs) == 2 else "norm, ReLU, 3x3"
        return f"{layer}{', dropout' if self.anatomy.drop else ''} and concatenation"

    def run(self, dropping: bool) -> Anatomy:
        """``dropping``: whatever its drop rates are, else only with those that it has."""
        self.anatomy = replace(self.anatomy, drop=self._drop() if dropping else None)
        if dropping:
            self.forget_statistics()
            for block in (self.theirs, self.ours):
                for i, layer in enumerate(self.anatomy.layers_of(block).values()):
                    self.anatomy.set_drop_rate(layer, 0.2 + 0.5 * i / len(self.anatomy.layers))
        self.anatomy = self._arranged()
        self.compare()
        return replace(self.anatomy, recomputes=self.recomputes)

    def _drop(self) -> tuple[str, str] | None:
        """Where the layers' drop rate stands: their attribute whose value arrives at F.dropout, or the module."""
        layers = list(self.anatomy.layers_of(self.theirs).values())
        self.set_training(lambda i: True)
        for name, value in list(vars(layers[0]).items()):
            if type(value) not in (int, float) or not 0 <= value < 1 or not all(hasattr(l, name) for l in layers):
                continue
            before = [getattr(layer, name) for layer in layers]
            try:
                for layer in layers:
                    setattr(layer, name, _RATE)
                with Pattern() as pattern, torch.no_grad():
                    self.theirs(self.input())
            except Exception:  # it has another meaning
                continue
            finally:
                for layer, rate in zip(layers, before, strict=True):
                    setattr(layer, name, rate)
            if _RATE in pattern.rates:
                return "", name
        return self.anatomy.drop

    def _arranged(self) -> Anatomy:
        """The order of concatenation and what is returned, from one run in evaluation."""
        self.set_training(lambda i: False)
        x = self.input()
        layers = self.anatomy.layers_of(self.ours).values()
        growth = sum(self._weight(layer).shape[0] for layer in layers)
        everything, news = ([x.shape[0], C, *x.shape[2:]] for C in (x.shape[1] + growth, growth))
        with torch.no_grad():
            got = self.their_result(x)
            if list(got.shape) == everything:
                choices = [replace(self.anatomy, new_first=new_first) for new_first in (False, True)]
            elif list(got.shape) == news and len(layers) > 1:
                choices = [replace(self.anatomy, returns="new")]
            else:
                raise Refused(f"it returns {list(got.shape)} where all features are {everything}", "shape")
            for choice in choices:
                if close(got, self._result(x, choice)):
                    return choice
        raise Refused(f"its values are not those of {self.words}")

    def our_result(self, x: Tensor) -> Tensor:
        return self._result(x, self.anatomy)

    def _result(self, x: Tensor, anatomy: Anatomy) -> Tensor:
        layers, dropped = [], []
        like = x[:, :1]
        for module in anatomy.layers_of(self.ours).values():
            layer = anatomy.as_layer(module)
            layers.append(layer)
            k, rate = self._weight(module).shape[0], layer.drop_rate
            dropped.append(factors(like.expand(-1, k, *like.shape[2:]), rate) if rate > 0 else None)
        block: Any = reference.dense_block if isinstance(layers[0], Layer) else reference.basic_block
        out = block(x, layers, new_first=anatomy.new_first, factors=dropped)
        return out if anatomy.returns == "all" else out[:, x.shape[1] :]
