"""pytorchcv: stages that begin with their transition, convolutions inside blocks of their own, dropout."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import densenet_ext as dx
from tests.peers.twins import fuse, fused_kinds, images, library, needs_fused, pair, same, train_step


def densenet(**kwargs: Any) -> Any:
    """pytorchcv's DenseNet with its own classes and small numbers, as `get_densenet` puts them together."""
    module = library("pytorchcv.models.densenet")
    torch.manual_seed(0)
    settings = {
        "channels": [[24, 32], [24, 32, 40]],
        "init_block_channels": 16,
        "in_size": (56, 56),
        "num_classes": 5,
        **kwargs,
    }
    return module.DenseNet(**settings)


def cifar(**kwargs: Any) -> Any:
    """pytorchcv's CIFAR form, which takes layers with and without bottleneck."""
    module = library("pytorchcv.models.densenet_cifar")
    torch.manual_seed(0)
    settings = {
        "channels": [[20, 24], [16, 20], [14, 18, 22]],
        "init_block_channels": 16,
        "num_classes": 5,
        "bottleneck": True,
        **kwargs,
    }
    return module.CIFARDenseNet(**settings)


MAKE = {
    "imagenet": densenet,
    "bottleneck": cifar,
    "no bottleneck": lambda **kwargs: cifar(bottleneck=False, **kwargs),
}
SIZE = {"imagenet": 56, "bottleneck": 32, "no bottleneck": 32}  # their last pooling has a fixed size
EACH = pytest.mark.parametrize("name", MAKE)


@EACH
@pytest.mark.parametrize("training", [True, False])
def test_numbers(name: str, training: bool) -> None:
    models = pair(MAKE[name]().double().train(training))
    same(models, lambda model: train_step(model, images(2, SIZE[name])))
    same(models, lambda model: train_step(model, images(3, SIZE[name])))


@needs_fused
@EACH
def test_every_stage_is_a_row_and_fused(name: str) -> None:
    model = fuse(MAKE[name]())
    stages = [name for name, _ in model.features.named_children() if name.startswith("stage")]
    rows = [row for row in dx.report(model) if row.kind == "dense block"]
    assert len(rows) == len(stages), rows
    assert all(row.fused for row in rows), rows


@needs_fused
@EACH
def test_as_many_units_run_as_the_report_says(name: str) -> None:
    model = fuse(MAKE[name]().double())
    result = dx.verify(model, images(2, SIZE[name]))
    assert result.fused_units == len(fused_kinds(model))
    assert result.max_output < 1e-9 and result.max_gradient < 1e-7 and result.max_buffer < 1e-9


@needs_fused
@pytest.mark.parametrize("name", ["densenet121", "densenet40_k12_bc_cifar10"])
def test_published_networks(name: str) -> None:
    provider = library("pytorchcv.model_provider")
    with torch.device("meta"):
        model = provider.get_model(name, pretrained=False)
    rows = [row for row in dx.report(fuse(model)) if row.kind == "dense block"]
    assert len(rows) == (4 if name == "densenet121" else 3), rows
    assert all(row.fused for row in rows), rows


@EACH
def test_dropout_is_off_in_evaluation(name: str) -> None:
    same(pair(MAKE[name](dropout_rate=0.3).double().eval()), lambda model: train_step(model, images(2, SIZE[name])))


@EACH
def test_dropout_of_a_fixed_seed_has_the_gradient_of_its_loss(name: str) -> None:
    """The same seed drops the same features: the gradient is that of the loss by finite differences."""
    model = pair(MAKE[name](dropout_rate=0.3).double())[1]
    x = images(2, SIZE[name])

    def loss() -> torch.Tensor:
        torch.manual_seed(5)
        return model(x).square().sum()

    weight = model.get_parameter("features.stage2.unit2.conv1.conv.weight" if "no" not in name else "output.weight")
    (grad,) = torch.autograd.grad(loss(), weight)
    way = torch.randn_like(weight)
    with torch.no_grad():
        losses = []
        for step in (1e-6, -1e-6):
            weight.add_(way, alpha=step)
            losses.append(loss())
            weight.sub_(way, alpha=step)
    torch.testing.assert_close((grad * way).sum(), (losses[0] - losses[1]) / 2e-6, rtol=1e-4, atol=1e-6)


@EACH
def test_hooks_see_what_they_saw(name: str) -> None:
    def run(model: Any) -> Any:
        seen: list[Any] = []
        for path, module in model.named_modules():
            if path.count(".") in (1, 2):
                module.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        return model(images(2, SIZE[name])), seen

    same(pair(MAKE[name]().double().eval()), run, layout=True)
