"""Cases for ``worker``: fused models under FSDP2 (``fully_shard``) train as an unsharded one does."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import densenet_ext as dx
from densenet_ext.units import entry
from tests.distributed.helpers import close, loss_of, own, synced, usual
from tests.distributed.worker import World
from tests.support.fusing_helpers import images, net

SIZES = (2, 2)


def shard(world: World, modules: Iterable[nn.Module], **kwargs: Any) -> None:
    mesh = init_device_mesh(world.device.type, (len(SIZES),))
    for module in modules:
        fully_shard(module, mesh=mesh, **kwargs)


def blocks(model: Any) -> list[nn.Module]:
    return [model.features.denseblock1, model.features.denseblock2]


def train(world: World, model: nn.Module, parts: bool) -> list[Tensor]:
    """Three steps on this process's part of the batch, or on both parts in turn as if they were two processes."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    outs = []
    for step in range(3):
        whole = images(sum(SIZES)).to(world.device) + 0.1 * step
        found = [model(x) for x in ([world.share(whole, SIZES)] if parts else whole.split(SIZES))]
        sum(loss_of(out) / (1 if parts else len(SIZES)) for out in found).backward()
        outs.append(found[0 if parts else world.rank].detach())
        optimizer.step()
        optimizer.zero_grad()
    return outs


def same_training(world: World, sharded: nn.Module, alone: nn.Module) -> None:
    for got, wanted in zip(train(world, sharded, True), train(world, alone, False), strict=True):
        close("output", got, wanted)
    for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        close(name, p.full_tensor(), q)


def fixed(model: nn.Module) -> nn.Module:
    """Norms without running statistics: those are each process's own, and alone they would see both batches."""
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    return model


def each(world: World, prepare: Callable[[Any], Iterable[nn.Module]], *, native: bool) -> nn.Module:
    """Trains a model with the modules of ``prepare`` sharded, fused before and after; the last one of them."""
    model = None
    for first in ("fuse", "shard"):
        alone = fixed(own() if native else usual()).to(world.device)
        model = copy.deepcopy(alone)
        if first == "fuse" and not native:
            dx.fuse(model)
        shard(world, prepare(model))
        if first == "shard" and not native:
            dx.fuse(model)
        ran: list[nn.Module] = []
        with entry.observed(lambda module, kind, ran=ran: ran.append(module)):
            same_training(world, model, alone)
        assert ran.count(model.features.denseblock2) == 3, (first, len(ran), str(dx.report(model)))  # once a step
    assert model is not None
    return model


def fused(model: nn.Module) -> dict[str, bool]:
    return {row.name: row.fused for row in dx.report(model)}


def case_whole_model(world: World) -> None:
    for native in (False, True):
        model = each(world, lambda model: [model], native=native)
        assert all(fused(model).values()), str(dx.report(model))


def takes_subclasses_of_dicts() -> bool:
    """Whether fully_shard takes a ModuleDict with a forward, as a DenseBlock is: not in torch 2.11."""

    class Block(nn.ModuleDict):
        def forward(self, x: Tensor) -> Tensor:
            return x

    try:
        fully_shard(Block({"linear": nn.Linear(2, 2)}))
    except ValueError:
        return False
    return True


def case_per_block(world: World) -> None:
    for native in (False, True) if takes_subclasses_of_dicts() else (False,):
        model = each(world, lambda model: [*blocks(model), model], native=native)
        assert all(fused(model).values()), str(dx.report(model))


def case_per_child_of_features(world: World) -> None:
    model = each(world, lambda model: [*model.features, model], native=False)
    found = fused(model)
    assert found["features.denseblock1"] and found["features.transition1"], str(dx.report(model))
    assert not found["features"] and not found[""], str(dx.report(model))  # norm0 and the last norm are called


def case_an_inner_layer(world: World) -> None:
    for native in (False, True):
        model = each(world, lambda model: [model.features.denseblock1.denselayer2, model], native=native)
        rows = {row.name: row for row in dx.report(model)}
        assert "denselayer2 is sharded" in (rows.pop("features.denseblock1").reason or ""), str(dx.report(model))
        assert all(row.fused for row in rows.values()), str(dx.report(model))


def case_state_dict(world: World) -> None:
    model, other = dx.fuse(usual()).to(world.device), dx.fuse(usual()).to(world.device)
    shard(world, [model])
    shard(world, [other])
    for p in other.parameters():
        p.data.zero_()
    model(images().to(world.device))
    other.load_state_dict(model.state_dict())
    for (name, a), b in zip(other.state_dict().items(), model.state_dict().values(), strict=True):
        close(name, *(x.full_tensor() if isinstance(x, DTensor) else x for x in (a, b)))


def case_compiled_blocks(world: World) -> None:
    alone = net(block_config=(1, 1)).to(world.device)
    sharded = dx.fuse(copy.deepcopy(alone))
    for block in blocks(sharded):
        block.compile(backend="aot_eager", fullgraph=True)
    shard(world, [*blocks(sharded), sharded])
    x = images().to(world.device)
    outs = sharded(x), alone(x)
    close("output", *outs)
    for out in outs:
        loss_of(out).backward()
    for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        close(name, p.grad.full_tensor(), q.grad)


def case_synchronised_statistics(world: World) -> None:
    alone = usual().to(world.device)
    sharded = dx.fuse(synced(alone))
    shard(world, [*blocks(sharded), sharded])
    for step in range(2):
        whole = images(4).to(world.device) + 0.1 * step
        alone.zero_grad()
        sharded.zero_grad()
        out, wanted = sharded(world.share(whole, SIZES)), alone(whole)
        close("output", out, world.share(wanted, SIZES))
        loss_of(out).backward()
        (loss_of(wanted) / 2).backward()
        for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
            close(name, p.grad.full_tensor(), q.grad)
    for (name, a), b in zip(sharded.named_buffers(), alone.buffers(), strict=True):
        close(name, a, b)


def case_mixed_precision(world: World) -> None:
    """bfloat16 parameters and feature maps beside float32 statistics, as the fused model has them without sharding.

    The unfused model is no measure: PyTorch's BatchNorm refuses these dtypes together on the CPU.
    """
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    x = images().float().to(world.device)
    alone = dx.fuse(usual().float().to(world.device))
    sharded = copy.deepcopy(alone)
    shard(world, [sharded], mp_policy=policy)
    for p in alone.parameters():
        p.data = p.data.bfloat16()
    outs = sharded(x), alone(x.bfloat16())
    for out in outs:
        out.square().sum().backward()
    torch.testing.assert_close(*outs)
    for (name, p), q in zip(sharded.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(p.grad.full_tensor(), q.grad.float(), msg=lambda text, name=name: f"{name}: {text}")
    for a, b in zip(sharded.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(a, b)
