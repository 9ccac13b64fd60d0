"""Layouts of inputs and outputs, slices of models and aliasing: whoever sees a tensor sees it as unfused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.peers.twins import (
    NETS,
    images,
    library,
    outcome,
    pair,
    same,
    torchvision_net,
)
from tests.support.helpers import generator

EACH = pytest.mark.parametrize("name", NETS)
BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def maps(channels: int = 16, size: int = 6, n: int = 2) -> Tensor:
    values = torch.randn(n, channels, size, size, dtype=torch.float64, generator=generator(4))
    return values


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
    "every other column": lambda x: x.repeat_interleave(2, 3)[..., ::2],
    "channels of more": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "channels of more, channels_last": lambda x: torch.cat([x, x], 1).contiguous(memory_format=torch.channels_last)[
        :, : x.shape[1]
    ],
    "expanded batch": lambda x: x[:1].expand_as(x),
    "expanded pixels": lambda x: x[..., :1].expand_as(x),
    "offset": lambda x: torch.cat([x.flatten().new_zeros(3), x.flatten()])[3:].view_as(x),
}
PARTS = {
    "features.denseblock1": 16,
    "features.denseblock1.denselayer1": 16,
    "features.transition1": 32,
    "features.denseblock2": 16,
    "features.norm5": 32,
}


@BOTH
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("place", PARTS)
def test_layout_of_a_part_by_itself(place: str, layout: str, training: bool) -> None:
    def run(model: nn.Module) -> Any:
        x = LAYOUTS[layout](maps(PARTS[place]))
        out = model.get_submodule(place)(x)
        return out, out.is_contiguous(), out.is_contiguous(memory_format=torch.channels_last)

    same(pair(torchvision_net().double().train(training)), run, layout=True)


@pytest.mark.parametrize("size", [(1, 16, 6, 6), (2, 16, 1, 6), (2, 16, 6, 1), (3, 16, 1, 1), (1, 16, 1, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_layout_of_small_maps(size: tuple[int, ...], layout: str) -> None:
    def run(model: nn.Module) -> Any:
        x = torch.linspace(-1, 1, torch.Size(size).numel(), dtype=torch.float64).view(size)
        out = model.features.denseblock1(LAYOUTS[layout](x))
        return out, outcome(lambda o: o.view(o.shape[0], -1), out)

    same(pair(torchvision_net().double()), run, layout=True)


@EACH
@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "expanded pixels"])  # ties of the pooling
@pytest.mark.parametrize("model_last", [False, True])
def test_layout_of_a_model(name: str, layout: str, model_last: bool) -> None:
    """The features that leave the model, and the gradients that reach its parameters and its input."""

    def run(model: Any) -> Any:
        if model_last:
            model = model.to(memory_format=torch.channels_last)
        x = LAYOUTS[layout](images(2, 40)).detach().requires_grad_()
        features = model.features(x)
        features.square().mean().backward()
        return features, x.grad, [p.grad for p in model.parameters()]

    same(pair(NETS[name]().double()), run, layout=name != "none")


# ---- slices ----------------------------------------------------------------------------------------------------------


@EACH
@BOTH
def test_slices_of_features(name: str, training: bool) -> None:
    """``features[:k]`` and ``features[k:]``, as backbones for detection take them."""
    models = pair(NETS[name]().double().train(training))

    def run(model: Any) -> Any:
        found = []
        for k in range(1, len(model.features)):
            front, back = _sliced(model.features, k)
            middle = front(images(2, 40))
            found.append((middle.clone(), tuple(middle.stride()), back(middle)))
        return found

    same(models, run, layout=True)


def _sliced(features: nn.Sequential, k: int) -> tuple[nn.Sequential, nn.Sequential]:
    children = list(features.children())
    return nn.Sequential(*children[:k]), nn.Sequential(*children[k:])


@BOTH
def test_slices_are_of_the_class_that_is_sliced(training: bool) -> None:
    """``features[:k]`` makes a new Sequential of the same class: a fused one, which knows nothing of the whole."""

    def run(model: Any) -> Any:
        whole, found, x = model.features, [], images(2, 40)
        for k in range(1, len(whole)):
            middle = whole[:k](x)
            found.append((middle.clone(), tuple(middle.stride()), whole[k:](middle), type(whole[:k]).__name__))
        return found, (whole + nn.Sequential(nn.Tanh()))(x)

    same(pair(torchvision_net().double().train(training)), run, layout=True)


@BOTH
def test_children_one_by_one(training: bool) -> None:
    """Every leaf of the network called by hand, with code in between that writes without autograd's knowledge."""

    def run(model: Any) -> Any:
        x, seen = images(2, 40), []
        for child in model.features.children():
            x = child(x)
            seen.append((x.detach().clone(), tuple(x.stride())))
            x.data.add_(0.125)
        return seen, x

    same(pair(torchvision_net().double().train(training)), run, layout=True)


def test_intermediate_layers() -> None:
    utils = library("torchvision.models._utils")

    def run(model: Any) -> Any:
        body = utils.IntermediateLayerGetter(model.features, {"denseblock1": "a", "transition1": "b", "norm5": "c"})
        found = body(images())
        sum(t.square().mean() for t in found.values()).backward()
        return dict(found)

    same(pair(torchvision_net().double()), run, layout=True)


@BOTH
def test_relu_in_place_behind_the_last_block(training: bool) -> None:
    """An in-place ReLU right behind a block has the gradient that eager gives."""

    def run(model: Any) -> Any:
        x = images().requires_grad_()
        out = nn.functional.relu(nn.Sequential(*list(model.features.children())[:-1])(x), inplace=True)
        out.square().mean().backward()
        return out, x.grad

    same(pair(torchvision_net().double().train(training)), run)


def test_aliasing_of_outputs() -> None:
    """No two results share memory, and none shares the input's, unless unfused they do."""

    def run(model: Any) -> Any:
        x = maps()
        block, layer = model.features.denseblock1, model.features.denseblock1.denselayer1
        one, two, new = block(x), block(x), layer(x)
        tensors = [x, one, two, new, model.features.transition1(one)]
        places = [t.untyped_storage().data_ptr() for t in tensors]
        return [places.index(place) for place in places], [t._is_view() for t in tensors]

    same(pair(torchvision_net().double()), run)
