"""Models that cannot be fused, or not any more: a clear word, and eager's own result or error."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import nn

import densenet_ext as dx
from tests.support.fusing_helpers import (
    BLOCK,
    assert_same_gradients,
    assert_same_state,
    close,
    images,
    layer,
    net,
    rows,
)


def _without_half_a_layer(model: Any) -> None:
    del layer(model).conv2


def _with_a_shared_norm(model: Any) -> None:
    layer(model, "denselayer2").norm2 = layer(model).norm2


def _with_a_layer_elsewhere(model: Any) -> None:
    layer(model, "denselayer2").to("meta")


def _with_a_foreign_layer(model: Any) -> None:
    model.features.denseblock1.denselayer2 = nn.Identity()


def _with_a_quantised_convolution(model: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layer(model, "denselayer2").conv1 = torch.ao.nn.quantized.Conv2d(12, 8, 1, bias=False)


def _with_fake_quantisation(model: Any) -> None:
    conv = layer(model, "denselayer2").conv1
    conv.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    layer(model, "denselayer2").conv1 = torch.ao.nn.qat.Conv2d.from_float(conv)


def _with_a_narrow_norm(model: Any) -> None:
    layer(model, "denselayer2").norm1 = nn.BatchNorm2d(10).double()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (_without_half_a_layer, "conv2"),
        (_with_a_shared_norm, "layers share modules"),
        (_with_a_layer_elsewhere, "denselayer2 is not on cpu in torch.float64, as the first convolution is"),
        (_with_a_foreign_layer, "denselayer2 is a Identity, not a _DenseLayer"),
        (
            _with_a_quantised_convolution,
            "denselayer2.conv1 is a torch.ao.nn.quantized.modules.conv.Conv2d, not a Conv2d",
        ),
        (
            _with_fake_quantisation,
            "denselayer2.conv1 is a torch.ao.nn.qat.modules.conv.Conv2d",
        ),
        (_with_a_narrow_norm, "denselayer2.norm1 and conv1 take 10 and 12 features, where 12 come"),
    ],
)
def test_a_spoilt_block_runs_unfused_and_says_why(spoil: Any, reason: str, when: str) -> None:
    model, plain = net(), net()
    if when == "after":
        dx.fuse(model)
    for each in (model, plain):
        spoil(each)
    if when == "before":
        dx.fuse(model)
    found = rows(model)
    assert not found[BLOCK].fused and reason in (found[BLOCK].reason or "")
    assert found["features.denseblock2"].fused
    block, other = model.get_submodule(BLOCK), plain.get_submodule(BLOCK)
    assert list(block.state_dict()) == list(other.state_dict())
    x = torch.randn(2, 8, 4, 4, dtype=torch.float64)
    results = []
    for each in (block, other):
        try:
            results.append(each(x))
        except (RuntimeError, TypeError, AttributeError, NotImplementedError) as error:
            results.append(str(error))
    if isinstance(results[1], str):
        assert results[0] == results[1]
    else:
        close(results)


@pytest.mark.parametrize(
    "name",
    ["denseblock1.denselayer2.norm1", "denseblock1.denselayer1.norm2", "transition1.norm", "norm0", "norm_final"],
)
def test_a_norm_without_data_is_refused(name: str) -> None:
    for training in (True, False):
        model = dx.fuse(net()).train(training)
        model.features.get_submodule(name).to("meta")
        with pytest.raises(
            ValueError, match=r"expected all parameters on cpu, as the features, got one of \[\d+\] on meta"
        ):
            model(images())
    model = dx.fuse(net())
    norm = model.features.get_submodule(name)
    norm.running_mean = norm.running_mean.to("meta")
    with pytest.raises(ValueError, match="running statistics: expected on cpu, as the features, got on meta"):
        model(images())


def test_a_fused_network_refuses_the_state_of_another() -> None:
    model = dx.fuse(net())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    others = (net(growth_rate=8), net(block_config=(2, 3, 2)), nn.Linear(2, 3))
    for other, words in zip(
        others, ("growth_rate=8", r"block_config=\(2, 3, 2\)", "none of the 2 names fits"), strict=True
    ):
        with pytest.raises(RuntimeError, match=f"state_dict: .*{words}"):
            model.load_state_dict(other.state_dict())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_a_block_that_occurs_twice() -> None:
    models = []
    for fused in (True, False):
        block = net().features.denseblock1
        model = nn.Sequential(block, nn.Conv2d(16, 8, 1).double().requires_grad_(False), block)
        torch.nn.init.constant_(model[1].weight, 0.1)
        torch.nn.init.zeros_(model[1].bias)
        models.append(dx.fuse(model) if fused else model)
    x = torch.randn(2, 8, 6, 6, dtype=torch.float64)
    for model in models:
        model(x).square().mean().backward()
    assert [row.fused for row in dx.report(models[0]) if row.kind == "dense block"] == [True]
    assert_same_gradients(*models)
    assert_same_state(*models)
    assert int(models[0][0].denselayer1.norm1.num_batches_tracked) == 2
