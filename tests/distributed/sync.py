"""Cases for ``worker``: SyncBatchNorm in fused units equals one process that has the whole batch.

Each process also computes the whole batch alone, in the usual formulation with BatchNorm, and compares. The loss is a
sum over images, so the gradients of the processes add up to those of the whole batch.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import densenet_ext as dx
from densenet_ext import kernels
from densenet_ext.algorithm import sync
from densenet_ext.algorithm.block import dense_block
from densenet_ext.algorithm.head import head
from densenet_ext.algorithm.layer import dense_layer
from densenet_ext.algorithm.values import Layer
from densenet_ext.fc_densenet import TransitionDown
from densenet_ext.units.parts import norm_of
from tests.distributed.helpers import F64, close, compare, counted, loss_of, own, synced, usual
from tests.distributed.worker import World
from tests.support import own_code
from tests.support.fusing_helpers import images, net


def case_usual_model_converted_after_fuse(world: World) -> None:
    for save, sizes in (("bottlenecks", (3, 2)), ("features", (2, 2))):
        plain = usual().to(world.device)
        fused = synced(dx.fuse(copy.deepcopy(plain), save=save))
        assert all(row.fused for row in dx.report(fused)), str(dx.report(fused))
        compare(world, fused, plain, fused, plain, images(sum(sizes)), sizes)
        close("evaluation", fused.eval()(images().to(world.device)), plain.eval()(images().to(world.device)))


def case_usual_model_converted_before_fuse(world: World) -> None:
    plain = usual().to(world.device)
    fused = dx.fuse(synced(plain, dist.new_group(list(range(dist.get_world_size())))))
    assert all(row.fused for row in dx.report(fused)), str(dx.report(fused))
    compare(world, fused, plain, fused, plain, images(4), (1, 3))


def case_own_model(world: World) -> None:
    for save in ("bottlenecks", "features"):
        plain = own(save=save).to(world.device)
        model = synced(plain)
        assert all(row.fused for row in dx.report(model)), str(dx.report(model))
        compare(world, model, plain, model, plain, images(5), (3, 2))


def case_empty_local_batch(world: World) -> None:
    for save in ("bottlenecks", "features"):
        plain = usual().to(world.device)
        fused = synced(dx.fuse(copy.deepcopy(plain), save=save))
        compare(world, fused, plain, fused, plain, images(4), (4, 0))
        compare(world, fused, plain, fused, plain, images(4), (0, 4))
    with kernels.force_plain():
        plain, fused = own().to(world.device), synced(own()).to(world.device)
        compare(world, fused, plain, fused, plain, images(4), (0, 4))


def case_one_pixel_in_each_process(world: World) -> None:
    torch.manual_seed(0)
    block = dx.DenseBlock(2, 6, 2, 4, 0.0, dims=1).double().to(world.device)
    model = synced(block)
    compare(world, model, block, model, block, torch.randn(2, 6, 1, dtype=F64), (1, 1))


def case_layers_and_dimensions(world: World) -> None:
    torch.manual_seed(0)
    for dims, size in ((1, (5,)), (3, (2, 4, 3))):
        x = torch.randn(5, 6, *size, dtype=F64)
        for save in ("bottlenecks", "features"):
            block = dx.DenseBlock(3, 6, 2, 4, 0.0, dims=dims, save=save, returns="new").double().to(world.device)
            model = synced(block)
            compare(world, model, block, model, block, x, (2, 3))
            layer = dx.DenseLayer(6, 4, 2, 0.0, dims=dims, save=save).double().to(world.device)
            model = synced(layer)
            for sizes in ((2, 3), (5, 0)):
                halves = lambda x, layer: layer([x[:, :2], x[:, 2:]])  # noqa: E731
                compare(world, lambda x: halves(x, model), lambda x: halves(x, layer), model, layer, x, sizes)  # noqa: B023


def case_blocks_without_bottlenecks(world: World) -> None:
    """Each with one norm frozen as well; a loss that asks for the input's gradient and one that does not."""
    torch.manual_seed(0)
    for dims, returns, size in ((1, "all", (5,)), (2, "new", (5, 4)), (3, "all", (2, 4, 3))):
        block = dx.DenseBlock(3, 6, None, 4, 0.0, dims=dims, returns=returns).double().to(world.device)  # type: ignore[arg-type]
        check_block(world, block, synced(block), torch.randn(5, 6, *size, dtype=F64), "denselayer2.norm1")
    with kernels.force_plain():
        check_block(world, block, synced(block), torch.randn(5, 6, *size, dtype=F64), "denselayer1.norm1")


def case_blocks_of_somebodys_own_code(world: World) -> None:
    torch.manual_seed(0)
    x = torch.randn(5, 6, 5, 4, dtype=F64)
    group = dist.new_group(list(range(dist.get_world_size())))
    for layer in (own_code.Single, own_code.SingleInFront, own_code.Narrow):
        plain = own_code.chain(layer, 6, (4, 2, 3)).double().to(world.device)
        for fused in (synced(dx.fuse(copy.deepcopy(plain))), dx.fuse(synced(plain, group))):
            assert [row.fused for row in dx.report(fused)] == [True], str(dx.report(fused))
            check_block(world, copy.deepcopy(plain), fused, x, "1.bn1")


def check_block(world: World, plain: nn.Module, model: nn.Module, x: Tensor, norm: str) -> None:
    for sizes in ((3, 2), (5, 0), (0, 5)):
        compare(world, model, plain, model, plain, x, sizes)
    for module in (plain, model):
        module.get_submodule(norm).eval().requires_grad_(False)
    compare(world, model, plain, model, plain, x, (2, 3))
    for module in (plain, model):
        module.zero_grad()
    loss_of(model(world.share(x.to(world.device), (2, 3)))).backward()
    loss_of(plain(x.to(world.device))).backward()
    close_gradients(world, model, plain)


def close_gradients(world: World, model: nn.Module, plain: nn.Module) -> None:
    for (name, p), q in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            close(name, world.total(p.grad), q.grad)


class _Biased(nn.Module):
    """A dense layer whose convolutions have a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(6), nn.Conv2d(6, 5, 1)
        self.norm2, self.conv2 = nn.BatchNorm2d(5), nn.Conv2d(5, 3, 3, padding=1)

    def layer(self) -> Layer:
        biases = self.conv1.bias, self.conv2.bias
        return Layer(norm_of(self.norm1), self.conv1.weight, norm_of(self.norm2), self.conv2.weight, 0.0, *biases)


def case_convolutions_with_a_bias(world: World) -> None:
    """A process's own gradient of a bias in front of shared statistics is not 0: only that of all is.

    The whole batch has a bias for each image, whose gradients are added up over the images of a process. Statistics
    that a block returns are this process's own, and serve the head behind it.
    """
    torch.manual_seed(0)
    x = torch.randn(5, 6, 4, 3, dtype=F64).to(world.device)
    for save, sizes, alone in itertools.product(("bottlenecks", "features"), ((3, 2), (5, 0)), (False, True)):
        plain, last = _Biased().double().to(world.device), nn.BatchNorm2d(9).double().to(world.device)
        model, end = synced(plain), synced(last)
        bias = plain.conv1.bias.detach()[None, :, None, None].expand(5, -1, 1, 1).clone().requires_grad_()
        z = F.conv2d(plain.norm1(x).relu(), plain.conv1.weight) + bias
        wanted = torch.cat([x, plain.conv2(plain.norm2(z).relu())], 1)
        part, stats = world.share(x, sizes), None
        if alone:
            out = torch.cat([part, dense_layer([part], model.layer(), save)], 1)
        else:
            out, stats = dense_block(part, [model.layer()], save)
            assert stats is not None
        close("output", out, world.share(wanted, sizes))
        ours, theirs = head(out, norm_of(end), stats=stats), last(wanted).relu().mean((2, 3))
        close("head", ours, world.share(theirs, sizes))
        (out.pow(3).sum() + ours.square().sum()).backward()
        (wanted.pow(3).sum() + theirs.square().sum()).backward()
        close("conv1.bias", model.conv1.bias.grad, world.share(bias.grad, sizes).sum((0, 2, 3)))
        close("conv2.bias", world.total(model.conv2.bias.grad), plain.conv2.bias.grad)
        for (name, a), b in zip(model.named_buffers(), plain.buffers(), strict=True):
            close(name, a, b)


def case_segmentation(world: World) -> None:
    torch.manual_seed(0)
    settings: Any = {"growth_rate": 4, "block_config": (2,), "bottleneck_layers": 2, "num_init_features": 6}
    plain = dx.FCDenseNet(3, **settings, drop_rate=0.0).double().to(world.device)
    model = synced(plain)
    assert all(row.fused for row in dx.report(model)), str(dx.report(model))
    for sizes in ((3, 2), (5, 0)):
        compare(world, model, plain, model, plain, images(5, 8), sizes)


def case_rules_of_the_norms(world: World) -> None:
    """Average over all batches, no running statistics, no parameters."""

    def changed(model: nn.Module) -> nn.Module:
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.momentum = None
        for name, settings in {"norm2": {"affine": False}, "norm": {"track_running_stats": False}}.items():
            for parent in list(model.modules()):
                if name in parent._modules:
                    parent._modules[name] = nn.BatchNorm2d(parent._modules[name].num_features, **settings).double()
        return model

    plain = changed(usual()).to(world.device)
    fused = dx.fuse(synced(plain))
    compare(world, fused, plain, fused, plain, images(5), (3, 2), steps=3)


def case_frozen_parts(world: World) -> None:
    def frozen(model: Any) -> Any:
        features = model.features
        features.conv0.requires_grad_(False)
        features.norm0.requires_grad_(False)
        features.denseblock1.denselayer1.requires_grad_(False)
        features.denseblock1.denselayer2.norm2.eval()
        features.denseblock2.denselayer1.norm1.eval().requires_grad_(False)
        features.denseblock2.denselayer2.requires_grad_(False)
        return model

    for needs_input in (True, False):
        plain = frozen(usual()).to(world.device)
        fused = dx.fuse(synced(plain))
        whole = images(5).to(world.device)
        if needs_input:
            compare(world, fused, plain, fused, plain, whole, (2, 3))
            continue
        loss_of(fused(world.share(whole, (2, 3)))).backward()
        loss_of(plain(whole)).backward()
        close_gradients(world, fused, plain)


def case_statistics_without_gradients(world: World) -> None:
    plain = usual().to(world.device)
    fused = dx.fuse(synced(plain))
    x = images(5).to(world.device)
    with torch.no_grad():
        close("output", fused(world.share(x, (3, 2))), world.share(plain(x), (3, 2)))
    for (name, a), b in zip(fused.named_buffers(), plain.buffers(), strict=True):
        close(name, a, b)


def case_norms_of_different_groups(world: World) -> None:
    """Two groups of all processes: the block has no statistics that all its norms could share."""
    plain = usual().to(world.device)
    fused = dx.fuse(synced(plain))
    other = dist.new_group(list(range(dist.get_world_size())))
    fused.features.denseblock1.denselayer2.norm1.process_group = other
    fused.features.denseblock2.denselayer1.norm2.process_group = other
    compare(world, fused, plain, fused, plain, images(5), (3, 2))
    for new_first in (False, True):
        layer = own_code.SingleInFront if new_first else own_code.Single
        block = own_code.chain(layer, 3, (4, 2, 3)).double().to(world.device)
        model = dx.fuse(synced(block))
        model[1].bn1.process_group = other
        model[2].bn1.eval()
        block[2].bn1.eval()
        for sizes in ((3, 2), (0, 5)):
            compare(world, model, block, model, block, images(5, 6), sizes)


def case_a_group_of_one_is_an_ordinary_norm(world: World) -> None:
    groups = [dist.new_group([rank]) for rank in range(dist.get_world_size())]
    plain = usual().to(world.device)
    fused = dx.fuse(synced(plain, groups[world.rank]))
    x = images(2 + world.rank).to(world.device)
    with counted() as count:
        outs = fused(x), plain(x)
        for out in outs:
            loss_of(out).backward()
    assert count[0] == 0
    close("output", *outs)
    for (name, a), b in zip(fused.named_parameters(), plain.parameters(), strict=True):
        close(name, a.grad, b.grad)


def case_statistics_beside_a_tensor_are_local(world: World) -> None:
    """A unit that shares statistics behind one that does not, and the other way round."""
    for bn_size in (2, None):
        torch.manual_seed(0)
        block, transition = dx.DenseBlock(2, 6, bn_size, 4, 0.0).double(), dx.Transition(14, 7).double()
        check_statistics_beside_a_tensor(world, nn.Sequential(block, transition).to(world.device))


def check_statistics_beside_a_tensor(world: World, plain: nn.Sequential) -> None:
    sizes = (3, 2)
    x = torch.randn(5, 6, 6, 6, dtype=F64)

    def each_alone(module: nn.Module, x: Tensor) -> Tensor:
        return torch.cat([module(part) for part in x.split(sizes)])

    def without_statistics(model: nn.Sequential, index: int) -> nn.Sequential:
        for norm in model[index].modules():  # those that see two batches where the other model sees one
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                norm.running_mean = norm.running_var = norm.num_batches_tracked = None
                norm.track_running_stats = False
        return model

    wanted = without_statistics(copy.deepcopy(plain), 1)
    got = nn.Sequential(synced(wanted[0]), copy.deepcopy(wanted[1]))
    compare(world, got, lambda x: each_alone(wanted[1], wanted[0](x)), got, wanted, x, sizes)
    wanted = without_statistics(copy.deepcopy(plain), 0)
    got = nn.Sequential(copy.deepcopy(wanted[0]), synced(wanted[1]))
    compare(world, got, lambda x: wanted[1](each_alone(wanted[0], x)), got, wanted, x, sizes)


def case_statistics_beside_a_tensor_stay_local(world: World) -> None:
    """What a unit that shares statistics notes beside its input serves one that does not."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 6, 6, dtype=F64).add(world.rank).to(world.device).requires_grad_()
    for plain in (dx.Transition(6, 4), dx.DenseLayer(6, 4, 2, 0.0), TransitionDown(6, 0.0)):
        plain.double().to(world.device)
        shared = 1 * x
        synced(plain)(shared)
        close("output", plain(shared), copy.deepcopy(plain)(1 * x))


def case_evaluation_without_running_statistics(world: World) -> None:
    """The batch's own statistics, but each process's: as nn.SyncBatchNorm, which synchronises in training only."""
    plain = usual().to(world.device)
    for norm in plain.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean = norm.running_var = norm.num_batches_tracked = None
            norm.track_running_stats = False
    fused = dx.fuse(synced(plain)).eval()
    x = images(2 + world.rank).to(world.device)
    with counted() as count:
        close("output", fused(x), plain.eval()(x))
    assert count[0] == 0


def case_exchanges(world: World) -> None:
    """One a norm in the forward pass and one in the backward pass; none for a recomputation, none in evaluation."""
    torch.manual_seed(0)
    layers = 3
    x = torch.randn(2, 6, 5, 5, dtype=F64, device=world.device).requires_grad_()
    for save in ("bottlenecks", "features"):
        model = synced(dx.DenseBlock(layers, 6, 2, 4, 0.0, save=save).double().to(world.device))
        with counted() as count:
            out = model(x)
            assert count[0] == 2 * layers, count
            loss_of(out).backward()
            assert count[0] == 4 * layers, count
            loss_of(model.eval()(x)).backward()
            assert count[0] == 4 * layers, count
    model = synced(dx.DenseBlock(layers, 6, None, 4, 0.0).double().to(world.device))
    with counted() as count:
        loss_of(model(x)).backward()
        loss_of(model.eval()(x)).backward()
        assert count[0] == 2 * layers, count


def case_compiled(world: World) -> None:
    """Every kind of unit, one layer of each block: each process traces them all."""
    plain = net(block_config=(1, 1)).to(world.device)
    fused = dx.fuse(synced(plain), save="features")
    compiled = torch.compile(fused, backend="aot_eager", fullgraph=True, dynamic=True)
    compare(world, compiled, plain, fused, plain, images(5), (3, 2))
    plain = nn.Sequential(dx.DenseBlock(1, 3, None, 4, 0.0), TransitionDown(7, 0.0)).double().to(world.device)
    model = synced(plain)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    compare(world, compiled, plain, model, plain, images(5, 8), (3, 2))


def case_second_derivatives_are_refused(world: World) -> None:
    model = synced(own()).to(world.device)
    x = images(2).to(world.device).requires_grad_()
    out = model(x)
    try:
        torch.autograd.grad(out.sum(), x, create_graph=True)
    except RuntimeError as error:
        assert "SyncBatchNorm" in str(error) and "unfuse" in str(error), error
    else:
        raise AssertionError("create_graph=True was accepted")


def case_large_mean_in_float32(world: World) -> None:
    """Mean 1e4, deviation 1, and another mean in each process."""
    rows = [1e4 + 3 * rank + torch.randn(500, 4, generator=torch.Generator().manual_seed(rank)) for rank in (0, 1)]
    var, mean = torch.var_mean(torch.cat(rows).double(), 0, correction=0)
    x = rows[world.rank].to(world.device)
    m, v = torch.empty(2, 4, device=world.device)
    kernels.select(x).channel_stats(x, m, v)
    count = sync.merge_stats(m, v, len(x), dist.group.WORLD.group_name)
    assert count.tolist() == [1000]
    torch.testing.assert_close(m.cpu().double(), mean, rtol=1e-7, atol=0)
    # the processes' means are rounded by up to 5e-4, and lie 1.5 from the common one
    torch.testing.assert_close(v.cpu().double(), var, rtol=1e-6, atol=2 * 1.5 * 5e-4)
