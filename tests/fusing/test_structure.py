"""Recognition: what could be a dense layer, a block, a transition or a head, and what trying it out says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext.fusing.find import tell_block
from densenet_ext.fusing.heads import head_of
from densenet_ext.fusing.install import check_module, set_level
from densenet_ext.fusing.structure import (
    block_of,
    candidates,
    is_own_code,
    parts_of,
    transition_of,
    what_else,
    with_children,
)
from densenet_ext.fusing.trial import Refusal, Refused, attempt
from densenet_ext.fusing.trials import try_out_block, try_out_norm, try_out_transition
from densenet_ext.fusing.verify import make_plain
from densenet_ext.units.entry import unit_of


class Layer(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.reduce = nn.BatchNorm2d(channels), nn.Conv2d(channels, 8, 1, bias=False)
        self.second, self.conv = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.reduce(torch.relu(self.first(x)))
        return torch.cat([x, self.conv(torch.relu(self.second(y)))], 1)


class Doubling(Layer):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Activated(nn.BatchNorm2d):
    def __init__(self, channels: int, act: nn.Module) -> None:
        super().__init__(channels)
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        return self.act(super().forward(x))


class Reducing(nn.Module):
    """A transition, or, with max-pooling in its forward, none."""

    def __init__(self, pooling: Any = None) -> None:
        super().__init__()
        self.norm, self.conv, self.pool = nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1, bias=False), nn.AvgPool2d(2)
        self.pooling = pooling

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(torch.relu(self.norm(x)))
        return self.pool(y) if self.pooling is None else self.pooling(y, 2)


class Model(nn.Module):
    def __init__(self, average: Any = None) -> None:
        super().__init__()
        self.features, self.average, self.classifier = nn.Sequential(nn.BatchNorm2d(8)), average, nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.features(x))
        y = y.mean((2, 3)) if self.average is None else self.average(y)
        return self.classifier(y)


def chain(kind: type[Layer] = Layer) -> nn.Sequential:
    return nn.Sequential(*(kind(8 + 4 * i) for i in range(3)))


def test_layers_whose_channels_add_up_are_a_candidate() -> None:
    (candidate,) = candidates(chain())
    assert candidate.whole and candidate.block.layers == ("0", "1", "2")
    parts = parts_of(Layer(8))
    assert parts is not None and parts.norms == ("first", "second") and parts.convs == ("reduce", "conv")
    assert parts_of(nn.Sequential(nn.BatchNorm2d(8), nn.Conv2d(8, 4, 5))) is None
    assert candidates(nn.Sequential(Layer(8), Layer(8)))[0].whole is False
    assert candidates(chain().add_module("end", nn.Linear(1, 1)) or nn.Sequential(*chain(), nn.Linear(1, 1)))
    assert candidates(dx.fuse(chain())[0]) == []


def test_what_stands_beside_the_layers_is_named() -> None:
    module = nn.Sequential(*chain(), nn.Linear(1, 1))
    (candidate,) = candidates(module)
    assert not candidate.whole and what_else(module, candidate) == "3 is a Linear, not a Layer"


def test_code_of_torch_is_nobodys_own() -> None:
    assert is_own_code(nn.Sequential()) and is_own_code(Layer(8))
    assert not is_own_code(nn.DataParallel(Layer(8))) and not is_own_code(nn.Conv2d(1, 1, 1))


def test_activations_inside_of_norms_are_children() -> None:
    module = nn.Sequential(Activated(4, nn.ReLU()), nn.BatchNorm2d(4))
    assert with_children(module, "0") == ["0", "0.act"] and with_children(module, "1") == ["1"]


def test_blocks_are_tried_out() -> None:
    for kind, expected in ((Layer, True), (Doubling, False)):
        module = chain(kind)
        parts = parts_of(module[0])
        assert parts is not None
        block = block_of(module, ("0", "1", "2"), parts, ("",))
        found, told = try_out_block(module, block), tell_block(module, block)
        assert isinstance(found, Refusal) is not expected
        if expected:
            assert told == found
        else:
            assert isinstance(told, str) and told.startswith("this block of Doubling layers is not a known one")


def test_transitions_are_tried_out() -> None:
    module = Reducing()
    found = transition_of(module)
    assert found is not None and (found.norm, found.conv, found.pools) == ("norm", "conv", ("pool",))
    assert try_out_transition(module, found) == found
    other = Reducing(nn.functional.max_pool2d)
    maximum = transition_of(other)
    assert maximum is not None and isinstance(try_out_transition(other, maximum), Refusal)
    assert transition_of(Layer(8)) is None


def test_norms_with_an_activation_inside_are_tried_out() -> None:
    assert isinstance(try_out_norm(Activated(4, nn.ReLU())), Activated)
    assert isinstance(try_out_norm(Activated(4, nn.Sigmoid())), Refusal)


def test_an_attempt_leaves_the_generators_and_says_why_it_ended() -> None:
    before = torch.get_rng_state()
    assert attempt(lambda: torch.randn(3).shape) == (3,)
    assert torch.equal(torch.get_rng_state(), before)

    def refuse() -> None:
        raise Refused("it is another one", "shape")

    assert attempt(refuse) == Refusal("it is another one", "shape")
    broken = attempt(lambda: [][0])
    assert isinstance(broken, Refusal) and broken.reason.startswith("it could not be compared (IndexError")


def test_heads_are_followed_through_a_forward() -> None:
    head: Any = head_of(Model(), "features")
    assert head.features == "features" and head.rest == ("classifier",) and head.dims == 2
    other = head_of(Model(lambda y: y.amax((2, 3))), "features")
    assert isinstance(other, str) and other.startswith("its forward runs features, relu, amax")


def test_levels_of_fused_blocks() -> None:
    model = dx.fuse(nn.Sequential(nn.Conv2d(3, 8, 1), chain()))
    assert not set_level(model, "bottlenecks") and set_level(model, "features")
    assert [row.save for row in dx.report(model)] == ["features"]


def test_make_plain_takes_the_units_and_the_librarys_own_mode() -> None:
    model: Any = dx.fuse(nn.Sequential(nn.Conv2d(3, 8, 1), chain()))
    assert not make_plain(model) and unit_of(model[1]) is None
    model[1][0].memory_efficient = True
    assert make_plain(model) and model[1][0].memory_efficient is False


def test_check_module() -> None:
    check_module("fuse", nn.ReLU())
    with pytest.raises(TypeError, match="^fuse: model: expected a torch.nn.Module, got int$"):
        check_module("fuse", 3)
