"""`fuse` on a DenseNet of the efficient implementation's names and structure."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from tests.support import lookalikes
from tests.support.fusing_helpers import assert_same_state, rows, three_steps
from tests.support.helpers import generator


def small(**kwargs: object) -> lookalikes.DenseNet:
    torch.manual_seed(0)
    return lookalikes.DenseNet(**{"growth_rate": 8, **kwargs}).double()  # type: ignore[arg-type]


def images(size: int = 16) -> Tensor:
    return torch.randn(4, 3, size, size, dtype=torch.float64, generator=generator(1))


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
@pytest.mark.parametrize("small_inputs", [True, False])
def test_three_steps_equal_the_unfused(small_inputs: bool, save: str) -> None:
    plain = small(small_inputs=small_inputs)
    fused = dx.fuse(copy.deepcopy(plain), save=save)
    x = images(16 if small_inputs else 64)
    assert_same_state(three_steps(fused, x), three_steps(plain, x))
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))


def test_report_of_a_fused_model() -> None:
    model = small(small_inputs=False)
    assert not any(row.fused for row in dx.report(model))
    assert all(row.fused for row in dx.report(dx.fuse(model)))
    found = rows(dx.fuse(small()))
    assert "features" not in found and all(row.fused for row in found.values())  # there is no stem


def test_efficient_model_saves_features_and_moves_statistics_once() -> None:
    plain, fused = small(), dx.fuse(small(efficient=True))
    assert {row.save for row in dx.report(fused) if row.kind == "dense block"} == {"features"}
    x = images()
    assert_same_state(three_steps(fused, x), three_steps(plain, x))


def test_half_efficient_block_saves_features() -> None:
    model = small()
    model.features.denseblock2.denselayer1.efficient = True
    saves = {row.name: row.save for row in dx.report(dx.fuse(model)) if row.kind == "dense block"}
    assert saves["features.denseblock1"] == "bottlenecks" and saves["features.denseblock2"] == "features"


def test_a_layer_that_takes_a_list_is_fused_as_well() -> None:
    class _DenseLayer(lookalikes._DenseLayer):
        def forward(self, features: list[Tensor]) -> Tensor:  # type: ignore[override]
            return super().forward(*features)

    class _DenseBlock(lookalikes._DenseBlock):
        def forward(self, x: Tensor) -> Tensor:
            so_far = [x]
            for layer in self.children():
                so_far.append(layer(so_far))
            return torch.cat(so_far, 1)

    model = small()
    for block in model.features.children():
        if isinstance(block, lookalikes._DenseBlock):
            block.__class__ = _DenseBlock
            for layer in block.children():
                layer.__class__ = _DenseLayer
    assert all(row.fused for row in dx.report(dx.fuse(model)))
    x = images()
    assert_same_state(three_steps(model, x), three_steps(small(), x))


def test_dropout_in_training_and_evaluation() -> None:
    plain = small(drop_rate=0.4)
    fused = dx.fuse(copy.deepcopy(plain))
    x = images()
    torch.testing.assert_close(fused.eval()(x), plain.eval()(x))
    fused.train()
    assert not torch.equal(fused(x), fused(x))


def test_a_classifier_of_ones_own() -> None:
    plain = small()
    plain.classifier = nn.Sequential(nn.Linear(plain.classifier.in_features, 5), nn.ReLU(), nn.Linear(5, 2)).double()
    seen = []
    plain.classifier[1].register_forward_hook(lambda module, args, out: seen.append(out))
    fused = dx.fuse(copy.deepcopy(plain))
    x = images()
    torch.testing.assert_close(fused(x), plain(x))
    assert len(seen) == 2 and all(row.fused for row in dx.report(fused) if row.kind == "head")
