"""Parts and settings of a model that are changed after `fuse` or before it."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import fusion, parametrizations, parametrize, prune

from tests.peers.twins import NETS, fuse, images, library, outcome, pair, same, torchvision_net, train_step, warm

EACH = pytest.mark.parametrize("name", NETS)
BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
BLOCK = "features.denseblock1"
Change = Callable[[Any], Any]


def layer(model: Any) -> Any:
    return model.features.denseblock1.denselayer1


def _set(path: str, name: str, value: Any) -> Change:
    def change(model: Any) -> None:
        setattr(model.get_submodule(path), name, value)

    return change


def _with_seed(make: Callable[[], nn.Module], path: str, name: str) -> Change:
    def change(model: Any) -> None:
        torch.manual_seed(7)
        setattr(model.get_submodule(path), name, warm(make()).double())

    return change


def _append_layer(model: Any) -> None:
    other = library("torchvision.models.densenet")._DenseLayer(32, 8, 4, 0.0)
    torch.manual_seed(7)
    for p in other.parameters():
        nn.init.normal_(p, std=0.1)
    model.features.denseblock2.add_module("denselayer3", other.double())
    model.features.norm5, model.classifier = nn.Identity(), nn.Identity()


def _delete_layer(model: Any) -> None:
    del model.features.denseblock2.denselayer2
    model.features.norm5, model.classifier = nn.Identity(), nn.Identity()


def _swap_layers(model: Any) -> None:
    one, two = model.features.denseblock1, model.features.denseblock2
    one.denselayer1, two.denselayer1 = two.denselayer1, one.denselayer1


def _tie(model: Any) -> None:
    layer(model).conv2.weight = model.features.denseblock2.denselayer1.conv2.weight


def _share_norm(model: Any) -> None:
    layer(model).norm2 = model.features.denseblock2.denselayer1.norm2


CHANGES: dict[str, Change] = {
    "eps": _set(f"{BLOCK}.denselayer1.norm1", "eps", 0.1),
    "momentum": _set(f"{BLOCK}.denselayer1.norm2", "momentum", 0.5),
    "momentum None": _set("features.transition1.norm", "momentum", None),
    "one norm in evaluation": lambda model: layer(model).norm1.eval(),
    "one layer in evaluation": lambda model: layer(model).eval(),
    "block in evaluation": lambda model: model.features.denseblock1.eval(),
    "norms in evaluation": lambda model: [m.eval() for m in model.modules() if isinstance(m, nn.BatchNorm2d)],
    "no running statistics": _set(f"{BLOCK}.denselayer1.norm1", "running_mean", None),
    "not tracked": _set(f"{BLOCK}.denselayer1.norm1", "track_running_stats", False),
    "no counter": _set(f"{BLOCK}.denselayer1.norm1", "num_batches_tracked", None),
    "no weight": lambda model: layer(model).norm1.register_parameter("weight", None),
    "no bias": lambda model: layer(model).norm1.register_parameter("bias", None),
    "stride": _set(f"{BLOCK}.denselayer1.conv2", "stride", (1, 1)),
    "dilation": lambda model: (
        setattr(layer(model).conv2, "dilation", (2, 2)),
        setattr(layer(model).conv2, "padding", (2, 2)),
    ),
    "circular padding": lambda model: (
        setattr(layer(model).conv2, "padding_mode", "circular"),
        setattr(layer(model).conv2, "_reversed_padding_repeated_twice", [1, 1, 1, 1]),
    ),
    "same padding": _set(f"{BLOCK}.denselayer1.conv2", "padding", "same"),
    "convolution with a bias": lambda model: setattr(
        layer(model).conv1, "bias", nn.Parameter(torch.linspace(-1, 1, 32, dtype=torch.float64))
    ),
    "other pooling": _with_seed(lambda: nn.MaxPool2d(2), "features.transition1", "pool"),
    "no pooling": _with_seed(nn.Identity, "features.transition1", "pool"),
    "global pooling": _with_seed(lambda: nn.AvgPool2d(4, 4, ceil_mode=True), "features.transition1", "pool"),
    "uncounted padding": _with_seed(
        lambda: nn.AvgPool2d(3, 2, 1, count_include_pad=False), "features.transition1", "pool"
    ),
    "GELU": _with_seed(nn.GELU, f"{BLOCK}.denselayer1", "relu1"),
    "ReLU6": _with_seed(nn.ReLU6, "features.transition1", "relu"),
    "GroupNorm": _with_seed(lambda: nn.GroupNorm(4, 16), f"{BLOCK}.denselayer1", "norm1"),
    "InstanceNorm": _with_seed(lambda: nn.InstanceNorm2d(16, affine=True), f"{BLOCK}.denselayer1", "norm1"),
    "grouped convolution": _with_seed(
        lambda: nn.Conv2d(32, 8, 3, padding=1, groups=4, bias=False), f"{BLOCK}.denselayer1", "conv2"
    ),
    "larger kernel": _with_seed(lambda: nn.Conv2d(32, 8, 5, padding=2, bias=False), f"{BLOCK}.denselayer1", "conv2"),
    "another layer": _append_layer,
    "a layer less": _delete_layer,
    "layers of another block": _swap_layers,
    "tied weights": _tie,
    "shared norm": _share_norm,
    "frozen weights": lambda model: layer(model).requires_grad_(False),
    "other classifier": _with_seed(lambda: nn.Linear(32, 3), "", "classifier"),
    "no classifier": _with_seed(nn.Identity, "", "classifier"),
    "dropout in front of the classifier": _with_seed(
        lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(32, 3)), "", "classifier"
    ),
    "other stem": _with_seed(lambda: nn.Conv2d(3, 16, 3, stride=1, padding=1), "features", "conv0"),
    "no stem pooling": _with_seed(nn.Identity, "features", "pool0"),
    "spectral norm": lambda model: (torch.manual_seed(7), parametrizations.spectral_norm(layer(model).conv1)),
    "weight norm": lambda model: parametrizations.weight_norm(layer(model).conv2),
    "old weight norm": lambda model: nn.utils.weight_norm(layer(model).conv2),
    "pruned": lambda model: prune.l1_unstructured(layer(model).conv1, "weight", amount=0.5),
    "pruned for good": lambda model: (
        prune.l1_unstructured(layer(model).conv1, "weight", amount=0.5),
        prune.remove(layer(model).conv1, "weight"),
    ),
    "parametrized norm": lambda model: parametrize.register_parametrization(layer(model).norm1, "weight", nn.Tanh()),
    "new parameter": lambda model: setattr(
        layer(model).conv1, "weight", nn.Parameter(layer(model).conv1.weight.detach() * 2)
    ),
    "parameter data": lambda model: setattr(layer(model).conv1.weight, "data", layer(model).conv1.weight.data * 2),
}


@BOTH
@pytest.mark.parametrize("what", CHANGES)
def test_changed_after_fuse(what: str, training: bool) -> None:
    def run(model: Any) -> Any:
        before = train_step(model)
        CHANGES[what](model)
        return before, outcome(train_step, model), outcome(train_step, model)

    models = pair(torchvision_net().double().train(training))
    same(models, run)


@BOTH
@pytest.mark.parametrize("what", CHANGES)
def test_changed_before_fuse(what: str, training: bool) -> None:
    plain = warm(torchvision_net().double().train(training))
    CHANGES[what](plain)
    try:
        twin = copy.deepcopy(plain)
    except RuntimeError:
        pytest.skip("PyTorch does not copy it")
    same((plain, fuse(twin)), lambda model: outcome(train_step, model))


def test_folding_of_norms_by_pytorch() -> None:
    """`fuse_conv_bn_eval` puts folded convolutions and identities in place of a stem's parts."""

    def run(model: Any) -> Any:
        features = model.features
        features.conv0, features.norm0 = fusion.fuse_conv_bn_eval(features.conv0, features.norm0), nn.Identity()
        one = layer(model)
        one.conv1, one.norm2 = fusion.fuse_conv_bn_eval(one.conv1, one.norm2), nn.Identity()
        return train_step(model)

    same(pair(torchvision_net().double().eval()), run)


def test_sync_batch_norm_converts_and_back() -> None:
    def run(model: Any) -> Any:
        converted = nn.SyncBatchNorm.convert_sync_batchnorm(model)
        return converted.eval()(images())

    same(pair(torchvision_net().double()), run)


@BOTH
def test_block_used_twice(training: bool) -> None:
    """One block in two places of a network: its statistics move twice and its gradients add up."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = torchvision_net()
            self.same_block = self.net.features.denseblock1

        def forward(self, x: Tensor) -> Tensor:
            features = self.net.features
            x = features.pool0(features.relu0(features.norm0(features.conv0(x))))
            once = self.same_block(x)
            return self.same_block(once[:, :16] * 0.5) + features.denseblock1(once[:, 16:])

    torch.manual_seed(0)
    same(pair(Twice().double().train(training)), train_step, layout=True)


def test_threads_do_not_see_each_other() -> None:
    """Two threads that call one model in evaluation, and one that calls its own copy, get what one thread gets."""

    def run(model: nn.Module) -> Any:
        outs: dict[int, Any] = {}

        def call(i: int) -> None:
            for _ in range(3):
                outs[i] = model(images() * (i + 1))

        threads = [threading.Thread(target=call, args=(i,)) for i in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [outs[i] for i in range(3)]

    same(pair(torchvision_net().double().eval()), run)


def test_drop_rate_set_after_fuse() -> None:
    """``drop_rate`` is read at each call, as unfused: it drops in training and not in evaluation."""
    models = pair(torchvision_net().double())
    shares = []
    for model in models:
        for one in model.features.denseblock1.children():
            one.drop_rate = 0.5
        new = model.features.denseblock1(torch.ones(8, 16, 8, 8, dtype=torch.float64).cumsum(2).sin())[:, 16:]
        shares.append((new == 0).double().mean().item())
    assert all(0.4 < share < 0.6 for share in shares), shares
    models[1].load_state_dict(models[0].state_dict())
    same((models[0].eval(), models[1].eval()), train_step)
