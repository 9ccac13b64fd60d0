"""Feature maps between units: eager's memory layout, MONAI's metadata."""

from __future__ import annotations

import sys
from types import ModuleType

import pytest
import torch

from densenet_ext.units.flow import incoming, to_channels_last
from densenet_ext.units.metadata import bare, with_metadata


def test_features_are_shown_in_the_layout_that_they_came_in() -> None:
    x = torch.randn(2, 3, 4, 5)
    flow = incoming(x)
    assert flow.layout == torch.contiguous_format and flow.stats is None
    inside = flow._replace(x=to_channels_last(x))
    assert inside.x.is_contiguous(memory_format=torch.channels_last) and torch.equal(inside.x, x)
    assert inside.shown().is_contiguous()
    weight = torch.randn(4, 3, 3, 3)
    assert flow.behind(weight) == torch.contiguous_format
    assert flow.behind(weight.contiguous(memory_format=torch.channels_last)) == torch.channels_last
    assert incoming(inside.x).layout == torch.channels_last
    line = torch.randn(2, 3, 4)
    assert to_channels_last(line) is line  # there is no such layout in 1-D


def test_metadata_come_back_on_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    class MetaTensor(torch.Tensor):
        pass

    MetaTensor.__module__ = "monai.data.meta_tensor"
    monkeypatch.setitem(sys.modules, "monai.data.meta_tensor", ModuleType("monai.data.meta_tensor"))
    x = torch.arange(3.0).as_subclass(MetaTensor)
    assert type(bare(x)) is torch.Tensor and bare(x).data_ptr() == x.data_ptr() and bare("a") == "a"
    seen: list[type] = []

    def function(y: torch.Tensor) -> torch.Tensor:
        seen.append(type(y))
        return y * 2

    assert type(with_metadata(function, x)) is MetaTensor
    assert type(with_metadata(function, bare(x))) is torch.Tensor
    assert seen == [torch.Tensor, torch.Tensor]
