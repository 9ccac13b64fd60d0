"""segmentation_models_pytorch: its DenseNet encoder calls stem and transitions child by child."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import densenet_ext as dx
from tests.peers.twins import IDENTITY, fuse, fused_kinds, images, library, needs_fused, pair, same, train_step, warm


def unet(kind: str = "Unet") -> Any:
    """A small U-Net over DenseNet-121's encoder, made thin: the encoder's class with other numbers."""
    smp = library("segmentation_models_pytorch")
    torch.manual_seed(0)
    model = getattr(smp, kind)("densenet121", encoder_weights=None, classes=2, **_decoder(kind))
    return model


def _decoder(kind: str) -> dict[str, Any]:
    return {"decoder_channels": (16, 8, 8, 8, 8)} if kind == "Unet" else {}


@pytest.fixture(scope="module")
def plain() -> Any:
    return warm(unet())


@pytest.mark.parametrize("training", [True, False])
def test_unet_trains_and_evaluates(plain: Any, training: bool) -> None:
    models = copy.deepcopy(plain).double().train(training), fuse(copy.deepcopy(plain).double().train(training))
    same(models, lambda model: train_step(model, images(2, 32)), tolerance=1e-6)
    if not IDENTITY:
        assert fused_kinds(models[1]).count("dense block") == 4


@needs_fused
def test_report_and_verify_agree(plain: Any) -> None:
    """`verify` counts the units that ran fused, `report` says which can."""
    model = copy.deepcopy(plain)
    fuse(model)
    result = dx.verify(model, images(2, 64, torch.float32))
    assert result.fused_units == 4
    rows = list(dx.report(model))
    blocks = [row for row in rows if row.kind == "dense block" and row.name.startswith("encoder")]
    assert len(blocks) == 4 and all(row.fused for row in blocks)


def test_features_of_the_encoder(plain: Any) -> None:
    """Each stage's features, which the decoder concatenates, have eager's values and layout."""
    models = copy.deepcopy(plain).double().eval(), fuse(copy.deepcopy(plain).double().eval())
    same(models, lambda model: model.encoder(images(1, 32)), layout=True)


def test_hook_on_a_transition_part(plain: Any) -> None:
    """The encoder reads what stands behind norm and ReLU of a transition."""

    def run(model: Any) -> Any:
        seen: list[Any] = []
        for name in ("relu", "conv"):
            part = model.encoder.features.transition1.get_submodule(name)
            part.register_forward_hook(lambda module, args, out: seen.append(out.clone()))
        return model.encoder(images(1, 32))[-1], seen

    models = copy.deepcopy(plain).double().eval(), fuse(copy.deepcopy(plain).double().eval())
    same(models, run, layout=True)


def test_another_decoder() -> None:
    models = pair(unet("Linknet").double().eval())
    same(models, lambda model: train_step(model, images(1, 32)), tolerance=1e-7)


def test_frozen_encoder(plain: Any) -> None:
    def run(model: nn.Module) -> Any:
        model.encoder.requires_grad_(False).eval()
        return train_step(model, images(2, 32))

    models = copy.deepcopy(plain).double(), fuse(copy.deepcopy(plain).double())
    same(models, run, tolerance=1e-7)
