"""Cases for ``worker``: fused models in DistributedDataParallel equal the unfused ones, and one process."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import densenet_ext as dx
from tests.distributed.helpers import close, loss_of, own, synced, usual
from tests.distributed.worker import World
from tests.support.fusing_helpers import images, net


def wrap(model: nn.Module, world: World, **kwargs: Any) -> DistributedDataParallel:
    return DistributedDataParallel(model, device_ids=[world.device] if world.device.type == "cuda" else None, **kwargs)


def train(model: DistributedDataParallel, batches: list[Tensor], accumulate: int = 1) -> list[Tensor]:
    """Outputs of the steps; DDP must not have anything to warn of."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    outs = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i, x in enumerate(batches):
            last = (i + 1) % accumulate == 0
            with nullcontext() if last else model.no_sync():
                out = model(x)
                loss_of(out).backward()
            outs.append(out.detach())
            if last:
                optimizer.step()
                optimizer.zero_grad()
    return outs


def same_training(world: World, fused: nn.Module, plain: nn.Module, accumulate: int = 1) -> None:
    batches = [images(2 + world.rank).to(world.device) + 0.1 * step for step in range(4)]
    for got, wanted in zip(train(fused, batches, accumulate), train(plain, batches, accumulate), strict=True):
        close("output", got, wanted)
    for (name, a), b in zip(fused.state_dict().items(), plain.state_dict().values(), strict=True):
        close(name, a, b)


class Unused(nn.Module):
    """A model with a part that takes no part."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.other = nn.Linear(3, 3, dtype=torch.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)


def case_every_way_of_wrapping(world: World) -> None:
    for kwargs in ({}, {"static_graph": True}, {"gradient_as_bucket_view": True}, {"bucket_cap_mb": 0.001}):
        plain = usual().to(world.device)
        fused = dx.fuse(copy.deepcopy(plain), save="features" if kwargs else None)
        same_training(world, wrap(fused, world, **kwargs), wrap(plain, world, **kwargs))


def case_fuse_after_wrapping(world: World) -> None:
    plain = usual().to(world.device)
    fused = dx.fuse(wrap(copy.deepcopy(plain), world))
    assert all(row.fused for row in dx.report(fused)), str(dx.report(fused))
    same_training(world, fused, wrap(plain, world))
    assert not any(row.fused for row in dx.report(dx.unfuse(fused)))


def case_unused_parameters(world: World) -> None:
    plain = Unused(usual()).to(world.device)
    fused = dx.fuse(copy.deepcopy(plain))
    wrapped = [wrap(model, world, find_unused_parameters=True) for model in (fused, plain)]
    same_training(world, *wrapped)


def case_frozen_part(world: World) -> None:
    plain = usual().to(world.device)
    plain.features.denseblock1.requires_grad_(False)
    plain.features.norm0.eval()
    same_training(world, wrap(dx.fuse(copy.deepcopy(plain)), world), wrap(plain, world))


def case_accumulation(world: World) -> None:
    for kwargs in ({}, {"gradient_as_bucket_view": True}):
        plain = usual().to(world.device)
        same_training(world, wrap(dx.fuse(copy.deepcopy(plain)), world, **kwargs), wrap(plain, world, **kwargs), 2)


def case_own_model(world: World) -> None:
    """densenet_ext's own model, against the same one whose children run one by one."""
    model = own().to(world.device)
    plain = copy.deepcopy(model)
    for module in plain.modules():
        module.register_forward_pre_hook(lambda module, args: None)
    assert not any(row.fused for row in dx.report(plain))
    same_training(world, wrap(model, world, static_graph=True), wrap(plain, world, static_graph=True))


def case_evaluation_equals_one_process(world: World) -> None:
    """With frozen norms the average of the processes' gradients is that of the whole batch."""
    plain = usual().to(world.device)
    fused = wrap(dx.fuse(copy.deepcopy(plain)).eval(), world)
    whole = images(4).to(world.device)
    loss_of(fused(world.share(whole, (2, 2)))).backward()
    (loss_of(plain.eval()(whole)) / 2).backward()
    for (name, p), q in zip(fused.module.named_parameters(), plain.parameters(), strict=True):
        close(name, p.grad, q.grad)


def case_synchronised_statistics(world: World) -> None:
    """DDP takes SyncBatchNorm on GPUs only."""
    plain = usual().to(world.device)
    fused = dx.fuse(synced(plain))
    if world.device.type == "cpu":
        try:
            wrap(fused, world)
        except ValueError as error:
            assert "SyncBatchNorm" in str(error), error
            return
        raise AssertionError("DDP takes SyncBatchNorm on the CPU now: compare here as well")
    whole = images(4).to(world.device)
    wrapped = wrap(fused, world)
    loss_of(wrapped(world.share(whole, (2, 2)))).backward()
    (loss_of(plain(whole)) / 2).backward()
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        close(name, p.grad, q.grad)
    same_training(world, wrap(fused, world), wrap(synced(plain), world))


def case_compiled(world: World) -> None:
    plain = net(block_config=(1,)).to(world.device)
    fused = torch.compile(wrap(dx.fuse(copy.deepcopy(plain)), world), backend="aot_eager")
    out, wanted = fused(images().to(world.device)), wrap(plain, world)(images().to(world.device))
    for result in (out, wanted):
        loss_of(result).backward()
    close("output", out, wanted)
    for (name, p), q in zip(fused.named_parameters(), plain.parameters(), strict=True):
        close(name, p.grad, q.grad)
