"""Random lives of a fused model and its unfused twin: whatever is done to both, they give the same."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.units.entry import unit_of
from tests.support.fusing_helpers import net
from tests.support.helpers import generator

pytest.importorskip("hypothesis")
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule

pytestmark = pytest.mark.fuzz
NAMES = [name for name, _ in net().named_modules() if name]
INNER = st.sampled_from(NAMES)


class Twins(RuleBasedStateMachine):
    """Two equal networks, of which one is fused and unfused at will."""

    def __init__(self) -> None:
        super().__init__()
        self.models: list[Any] = [net(), net()]
        self.handles: list[Any] = []
        self.seen: list[list[Tensor]] = [[], []]
        self.step = 0

    def both(self, change: Any) -> None:
        for model in self.models:
            change(model)

    @rule(save=st.sampled_from([None, "bottlenecks", "features"]))
    def fuse(self, save: str | None) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dx.fuse(self.models[0], save=save)

    @rule()
    def unfuse(self) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            dx.unfuse(self.models[0])
        assert not any(unit_of(module) for module in self.models[0].modules())
        assert [type(m) for m in self.models[0].modules()] == [type(m) for m in self.models[1].modules()]

    @rule(training=st.booleans(), name=st.one_of(st.just(""), INNER))
    def train(self, training: bool, name: str) -> None:
        self.both(lambda model: model.get_submodule(name).train(training))

    @rule(name=INNER, scale=st.booleans())
    def hook(self, name: str, scale: bool) -> None:
        for model, seen in zip(self.models, self.seen, strict=True):

            def look(module: nn.Module, args: Any, out: Tensor, seen: list[Tensor] = seen) -> Tensor | None:
                seen.append(out.detach().clone())
                return out * 2 if scale else None

            self.handles.append(model.get_submodule(name).register_forward_hook(look))

    @precondition(lambda self: self.handles)
    @rule()
    def unhook(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.handles.clear()

    @rule(name=INNER, wanted=st.booleans())
    def freeze(self, name: str, wanted: bool) -> None:
        self.both(lambda model: model.get_submodule(name).requires_grad_(wanted))

    @precondition(lambda self: not self.handles)
    @rule(way=st.sampled_from(["deepcopy", "pickle"]))
    def copied(self, way: str) -> None:
        clone = {"deepcopy": copy.deepcopy, "pickle": lambda m: pickle.loads(pickle.dumps(m)), "shallow": copy.copy}[
            way
        ]
        self.models = [clone(model) for model in self.models]

    @rule(kind=st.sampled_from(["silu", "group norm", "bias", "momentum"]), layer=st.integers(1, 2))
    def replace(self, kind: str, layer: int) -> None:
        def change(model: Any) -> None:
            part = model.features.denseblock2.get_submodule(f"denselayer{layer}")
            if kind == "silu":
                part.relu1 = nn.SiLU()
            elif kind == "group norm":
                part.norm2 = nn.GroupNorm(1, 8).double()
            elif kind == "momentum":
                part.norm1.momentum = None
            elif part.conv1.bias is None:
                torch.manual_seed(layer)
                part.conv1.bias = nn.Parameter(torch.randn(8, dtype=torch.float64))

        self.both(change)

    @rule(last=st.booleans(), n=st.integers(0, 3), size=st.sampled_from([32, 40]))
    def pass_through(self, last: bool, n: int, size: int) -> None:
        self.step += 1
        x = torch.randn(n, 3, size, size, dtype=torch.float64, generator=generator(self.step))
        x = x.contiguous(memory_format=torch.channels_last) if last else x
        found = []
        for model, seen in zip(self.models, self.seen, strict=True):
            seen.clear()
            model.zero_grad()
            try:
                out = model(x)
                if out.requires_grad:
                    out.square().sum().backward()
            except (RuntimeError, ValueError) as error:
                found.append((type(error),))
                continue
            found.append((out, [p.grad for p in model.parameters()], list(model.buffers()), list(seen)))
        torch.testing.assert_close(*found, rtol=1e-7, atol=1e-9)
        assert [t.stride() for t in self.seen[0]] == [t.stride() for t in self.seen[1]]


TestTwins = Twins.TestCase
TestTwins.settings = settings(stateful_step_count=12, deadline=None)
