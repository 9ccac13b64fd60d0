"""Prepared calls: who repeats a call in evaluation without gradients gets the same numbers, whatever has changed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext import kernels, reference
from densenet_ext.algorithm.conversions import without_autocast
from densenet_ext.algorithm.head import prepared_scores
from densenet_ext.algorithm.inference import Inferences, form_of
from densenet_ext.algorithm.single import single
from densenet_ext.algorithm.stem import stem
from densenet_ext.algorithm.transition import key_of, transition
from densenet_ext.units.stretch import Stretch
from tests.support.helpers import make_norm

compiled = pytest.mark.skipif(kernels.why_plain("cpu") is not None, reason="plain PyTorch has nothing to prepare")
LAST = torch.channels_last


def features(*shape: int) -> Tensor:
    return torch.randn(*(shape or (2, 8, 6, 6))).contiguous(memory_format=LAST)


@pytest.fixture
def found(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call of a unit found a prepared one; of units that follow one another, all did."""
    seen: list[bool] = []
    run = Inferences.run

    def noted(self: Inferences, *args: Any) -> Tensor | None:
        out = run(self, *args)
        seen.append(out is not None)
        return out

    together = Stretch.run

    def noted_together(self: Stretch, *args: Any) -> Any:
        seen.append(True)
        return together(self, *args)

    monkeypatch.setattr(Inferences, "run", noted)
    monkeypatch.setattr(Stretch, "run", noted_together)
    return seen


@torch.no_grad()
def test_a_call_is_found_by_the_form_of_its_features() -> None:
    calls = Inferences()
    x = features()
    assert calls.run(x) is None
    calls.keep(x, lambda: lambda y: y + 1)
    assert_same(calls.run(x), x + 1)
    calls.keep(x, lambda: lambda y: y * 3, key="another")
    assert_same(calls.run(x, "another"), x * 3)
    assert calls.run(x, "a third") is None
    for other in (x.double(), x.contiguous(), features(2, 8, 6, 5), nn.Parameter(x)):
        assert calls.run(other) is None
    with torch.enable_grad():
        assert calls.run(x) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert calls.run(x) is None
    with kernels.force_plain():
        assert calls.run(x) is None
    assert form_of(x) == form_of(x + 1) and form_of(x) != form_of(x.double())
    assert_same(calls.run(x), x + 1)


@torch.no_grad()
def test_only_calls_that_can_be_repeated_are_kept() -> None:
    calls, x = Inferences(), features()
    calls.keep(x, lambda: None)
    with torch.enable_grad():
        calls.keep(x, lambda: lambda y: y)
    assert calls.run(x) is None
    for n in range(1, 40):
        calls.keep(features(n, 8, 2, 2), lambda: lambda y: y)
    assert 0 < len(calls._known) < 20


@torch.no_grad()
def test_prepared_calls_run_without_autocast() -> None:
    calls, x = Inferences(), features()
    with torch.autocast("cpu", torch.bfloat16):
        calls.keep(x, lambda: lambda y: y.flatten(1) @ y.flatten(1).t())
        out = calls.run(x)
        assert out is not None and out.dtype == torch.float32 and torch.is_autocast_enabled("cpu")
        with pytest.raises(ZeroDivisionError), without_autocast("cpu"):
            assert not torch.is_autocast_enabled("cpu")
            raise ZeroDivisionError
        assert torch.is_autocast_enabled("cpu")
    with without_autocast("cpu"):
        assert not torch.is_autocast_enabled("cpu")
    assert not torch.is_autocast_enabled("cpu")


def network() -> Any:
    torch.manual_seed(1)
    model = dx.DenseNet(4, (2, 3), 8, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model.eval().to(memory_format=LAST)


def one_norm(model: Any) -> Any:
    return model.features.transition1.norm


CHANGES: dict[str, Callable[[Any], object]] = {
    "a weight in place": lambda m: m.features.denseblock1.denselayer1.conv1.weight.mul_(2),
    "a weight's memory": lambda m: setattr(
        m.features.denseblock2.denselayer1.conv2.weight,
        "data",
        m.features.denseblock2.denselayer1.conv2.weight.data * 2,
    ),
    "another weight": lambda m: setattr(
        m.features.transition1.conv, "weight", nn.Parameter(m.features.transition1.conv.weight * 2)
    ),
    "more features of a transition": lambda m: setattr(
        m.features.transition1.conv.weight, "data", torch.randn(9, *m.features.transition1.conv.weight.shape[1:])
    ),
    "running statistics in place": lambda m: one_norm(m).running_var.mul_(2),
    "running statistics' memory": lambda m: setattr(
        one_norm(m).running_mean, "data", one_norm(m).running_mean.data + 1
    ),
    "another eps": lambda m: setattr(one_norm(m), "eps", 0.5),
    "a bias": lambda m: setattr(
        m.features.transition1.conv, "bias", nn.Parameter(torch.ones(m.features.transition1.conv.weight.shape[0]))
    ),
    "a norm in training": lambda m: one_norm(m).train(),
    "the last norm": lambda m: m.features.norm5.weight.neg_(),
    "the stem's window": lambda m: setattr(m.features.pool0, "padding", 0),
    "another layout": lambda m: m.to(memory_format=torch.contiguous_format),
    "float64": lambda m: m.double(),
    "other weights loaded": lambda m: m.load_state_dict(
        {name: value * 1.5 for name, value in m.state_dict().items() if "track" not in name}, strict=False
    ),
}


def scores(model: Any, images: Tensor) -> Any:
    """The result, or in words why there is none: both as the unfused model's."""
    try:
        return model(images)
    except Exception as error:
        return type(error)


@compiled
@pytest.mark.parametrize("what", CHANGES)
@pytest.mark.parametrize("packed", [False, True], ids=["as they are", "packed"])
@torch.no_grad()
def test_whatever_changes_between_two_calls(what: str, packed: bool, found: list[bool]) -> None:
    if packed and what == "a weight's memory":
        pytest.skip("who holds packed weights says that they are not written through .data")
    model = network()
    usual = dx.unfuse(copy.deepcopy(model))
    images = features(2, 3, 40, 40)
    with dx.packed_weights(model if packed else nn.Identity()):
        model(images)
        found.clear()
        assert_close(model(images), usual(images))
        assert found and all(found)
        for each in (model, usual):
            CHANGES[what](each)
        if what == "float64":
            images = images.double()
        for _ in range(3):
            ours, theirs = scores(model, images), scores(usual, images)
            assert isinstance(ours, Tensor) == isinstance(theirs, Tensor)
            if isinstance(ours, Tensor):
                assert_close(ours, theirs)
            else:
                assert ours is theirs


@compiled
@torch.no_grad()
def test_forms_of_images_take_turns(found: list[bool]) -> None:
    model = network()
    usual = dx.unfuse(copy.deepcopy(model))
    forms = [features(1, 3, 32, 32), features(2, 3, 33, 40), features(2, 3, 33, 40).contiguous()]
    for turn in range(3):
        found.clear()
        for images in forms:
            for lowered in (None, torch.bfloat16):
                with torch.autocast("cpu", lowered, enabled=lowered is not None):
                    ours, theirs = model(images), usual(images)
                assert ours.dtype == theirs.dtype
                assert_close(ours, theirs, 1e-5 if lowered is None else 0.05)
        assert all(found) == (turn > 0)
    with torch.enable_grad():
        assert model(forms[0]).requires_grad
    with torch.inference_mode():
        assert model(forms[0]).is_inference()
    assert not model(forms[0]).is_inference()


@compiled
@torch.no_grad()
def test_the_same_norm_with_another_window_or_convolution(found: list[bool]) -> None:
    x, norm = features(2, 8, 9, 9), single(make_norm(8, torch.float32, batch=False))
    for window, stride, padding in ((3, 2, 1), (2, 2, 0), (3, 1, 1), (3, 2, 1)):
        theirs = reference.stem(x, norm.norm, window, stride, padding)
        assert_close(stem(x, norm, window, stride, padding), theirs)
    weight = torch.randn(4, 8, 1, 1)
    assert key_of(weight, 2, None) != key_of(weight, 2, torch.ones(4)) != key_of(weight, 3, None)
    for _ in range(2):
        assert_close(transition(x, norm, weight), reference.transition(x, norm.norm, weight))
        weight.data = torch.randn(6, 8, 1, 1)
    assert found == [False, False, False, True, False, False]


@compiled
@pytest.mark.parametrize("biased", [True, False])
@torch.no_grad()
def test_a_small_linear_layer_behind_the_head(biased: bool) -> None:
    x, norm = features(3, 37, 6, 5), single(make_norm(37, torch.float32, batch=False))
    weight, bias = torch.randn(19, 37), torch.randn(19) if biased else None
    call = prepared_scores(x, norm, weight, bias)
    assert call is not None
    for _ in range(2):
        assert_close(call(x), F.linear(reference.head(x, norm.norm), weight, bias))
        x = x + 1
    assert call.held is not None and not call.held.any()
    large, training = torch.randn(2**16 // 37 + 1, 37), single(make_norm(37, torch.float32))
    assert prepared_scores(x, norm, large, None) is None and prepared_scores(x, training, weight, bias) is None
    assert prepared_scores(x, norm, weight.double(), None) is None
    assert prepared_scores(x.bfloat16(), norm, weight.bfloat16(), None) is None
    with kernels.force_plain():
        assert prepared_scores(x, norm, weight, bias) is None


def assert_same(ours: Tensor | None, theirs: Tensor) -> None:
    assert ours is not None and torch.equal(ours, theirs)


def assert_close(ours: Tensor, theirs: Tensor, bound: float = 1e-5) -> None:
    assert ours.shape == theirs.shape
    difference = (ours.double() - theirs.double()).abs().max()
    assert difference <= bound * theirs.double().abs().max(), difference
