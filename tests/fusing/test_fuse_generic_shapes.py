"""What `fuse` takes for a dense block in somebody's own code, and what it does not."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import densenet_ext as dx
from tests.support import own_code as own
from tests.support.fusing_helpers import rows


def test_modules_that_are_no_dense_blocks() -> None:
    def composite(channels: int, out: int) -> nn.Sequential:
        return nn.Sequential(nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, out, 3, padding=1, bias=False))

    class PreActivation(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn1, self.conv1 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)
            self.bn2, self.conv2 = nn.BatchNorm2d(8), nn.Conv2d(8, 8, 3, padding=1, bias=False)

    class UNet(nn.Module):
        """Concatenates around a single norm and convolution, and adds an activation."""

        def __init__(self, down: nn.Module) -> None:
            super().__init__()
            self.down = nn.Sequential(down)

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.down(x).relu()], 1)

    for model in (
        composite(4, 4),
        nn.Sequential(composite(4, 4)),
        nn.Sequential(composite(4, 4), composite(4, 4)),
        nn.Sequential(composite(4, 2), composite(6, 2)),  # adds up, and cannot run
        nn.Sequential(PreActivation(), PreActivation()),
        nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)),
        own.Narrow(8, 4),
        nn.Sequential(),
        UNet(composite(4, 4)),
    ):
        assert len(dx.report(model)) == 0, model
    (row,) = dx.report(nn.ModuleList([own.Narrow(8, 4), own.Narrow(12, 4)]))
    assert row.reason == "its layers are run by the code of the module that holds them"


def test_wrappers_of_torch_are_left_alone() -> None:
    block = own.chain(own.Narrow)
    assert [row.name for row in dx.report(nn.DataParallel(block))] == ["module"]
    assert [row.name for row in dx.report(torch.optim.swa_utils.AveragedModel(block))] == ["module"]


def test_a_block_inside_a_wrapper_is_one_unit() -> None:
    block = own.Wrapped(own.chain(own.Single).double()).double()
    assert [row.name for row in dx.report(block)] == [""]
    dx.fuse(block.layer)
    assert [(row.name, row.fused) for row in dx.report(block)] == [("layer", True)]

    class Halved(own.Wrapped):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * self.layer(x)

    block = Halved(own.chain(own.Single).double())
    assert [row.name for row in dx.report(block)] == ["layer"]
    dx.fuse(block)
    assert [(row.name, row.fused) for row in dx.report(block)] == [("layer", True)]


def test_layers_of_a_refused_block_are_no_blocks() -> None:
    class Joining(own.Returning):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([x, self.composite(x)], 1)

    block = nn.Sequential(Joining(8, 4), Joining(12, 4), Joining(16, 4))
    block[1].composite[1] = nn.SiLU()
    (row,) = dx.report(block)
    assert row.reason == "1.composite.1 is a SiLU, not a ReLU"


def test_a_forward_of_two_arguments_is_refused() -> None:
    class Conditioned(own.Grown):
        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return super().forward(x) * scale

    assert str(rows(Conditioned(8, (4, 4)))[""].reason).endswith("it takes more than one tensor")


def test_synchronised_norms_do_not_hinder_the_trial() -> None:
    (row,) = dx.report(nn.SyncBatchNorm.convert_sync_batchnorm(own.chain(own.Narrow)))
    assert row.reason in (
        "densenet_ext.fuse has not been called",
        "0.bn1 is a SyncBatchNorm, which has code of its own",
    )
