"""Networks by the names that `--model` takes: ours, timm's, torchvision's."""

from __future__ import annotations

import pytest
import torch

from tests.support import peers

pytest.importorskip("tqdm")

import densenet_ext as dx
from densenet_ext.errors import UserError
from densenet_ext.training import networks


@pytest.mark.parametrize("name", [*networks.OURS, "densenet_bc:16,8"])
def test_every_builder_has_a_name(name):
    with torch.device("meta"):
        model = networks.build(name, classes=7, channels=2, save="features")
    assert model.classifier.out_features == 7 and model.features.conv0.in_channels == 2 and model.save == "features"


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_networks_of_other_libraries_are_fused(library):
    peers.timm_densenet() if library == "timm" else peers.torchvision_densenet()
    for fused in (True, False):
        model = networks.build(f"{library}:densenet121", classes=7, channels=3, save="features", fused=fused)
        rows = [row for row in dx.report(model) if row.kind == "dense block"]
        assert len(rows) == 4 and all(row.fused == fused for row in rows)
        assert not fused or {row.save for row in rows} == {"features"}


@pytest.mark.parametrize(
    "name, message",
    [
        ("timm:densenet0", "--model: timm: .*densenet0"),
        ("timm:resnet18", "has no dense blocks"),
        ("torchvision:densenet0", "--model: torchvision: .*densenet0"),
    ],
)
def test_unknown_networks_of_other_libraries_are_refused(name, message):
    peers.timm_densenet() if name.startswith("timm") else peers.torchvision_densenet()
    with pytest.raises(UserError, match=message):
        networks.build(name, classes=7, channels=3, save="features")
