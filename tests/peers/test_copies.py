"""Copies of fused models: replicas, moving averages, pickles and files are fused, their own, and unfuse alike."""

from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn, update_bn

import densenet_ext as dx
from tests.peers.twins import (
    IDENTITY,
    NETS,
    assert_all_fused,
    fuse,
    images,
    library,
    pair,
    same,
    torchvision_net,
    train_step,
)

EACH = pytest.mark.parametrize("name", NETS)


def saved(model: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "pickle protocol 2": lambda model: pickle.loads(pickle.dumps(model, protocol=2)),
    "torch.save": saved,
    "deepcopy of deepcopy": lambda model: copy.deepcopy(copy.deepcopy(model)),
}


@EACH
@pytest.mark.parametrize("how", COPIES)
def test_copies_are_fused_and_their_own(name: str, how: str) -> None:
    models = pair(NETS[name]().double(), save="features")

    def run(model: nn.Module) -> Any:
        twin = COPIES[how](model)
        assert type(twin).__name__ == type(model).__name__ and type(twin).__module__ == type(model).__module__
        with torch.no_grad():
            for p in twin.parameters():
                p.mul_(0.9)
        found = train_step(twin), [p.grad for p in twin.parameters()], list(twin.buffers())
        assert all(p.grad is None for p in model.parameters())
        return *found, train_step(model)

    same(models, run)
    twin = COPIES[how](models[1])
    assert_all_fused(twin)
    assert dx.report(twin).rows == dx.report(models[1]).rows


def test_pickle_is_read_where_only_the_original_is_imported(tmp_path: Path) -> None:
    """Another process reads the file; unfused there, it is the original class again."""
    model = pair(torchvision_net().double().eval())[1]
    torch.save(model, tmp_path / "model.pt")
    torch.save((images(), model(images())), tmp_path / "results.pt")
    code = """
import sys, torch
from tests.peers.twins import library
library("torchvision.models.densenet")
model = torch.load(sys.argv[1] + "/model.pt", weights_only=False)
x, wanted = torch.load(sys.argv[1] + "/results.pt")
torch.testing.assert_close(model(x), wanted)
import densenet_ext as dx
print(sum(row.fused for row in dx.report(model)))
dx.unfuse(model)
from torchvision.models.densenet import DenseNet, _DenseBlock
assert type(model) is DenseNet and type(model.features.denseblock1) is _DenseBlock
torch.testing.assert_close(model(x), wanted)
"""
    path = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    found = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, env=path)
    assert found.returncode == 0, found.stderr
    assert IDENTITY or int(found.stdout) == len(dx.report(model))


def test_unfuse_leaves_nothing_to_pickle() -> None:
    plain, model = pair(torchvision_net().double())
    for _ in range(2):
        train_step(model)
        dx.unfuse(model)
        for got, wanted in zip(model.modules(), plain.modules(), strict=True):
            assert type(got) is type(wanted) and list(got.__dict__) == list(wanted.__dict__)
        assert b"densenet_ext" not in pickle.dumps(model)
        fuse(model)


@EACH
def test_copies_after_calls_and_hooks(name: str) -> None:
    """A model that has run and whose hook was removed again is copied as a fresh one is."""

    def run(model: nn.Module) -> Any:
        handle = model.register_forward_hook(lambda module, args, out: out * 2)
        out = train_step(model)
        handle.remove()
        return out, train_step(copy.deepcopy(model))

    same(pair(NETS[name]().double()), run)


@EACH
def test_data_parallel_replicas(name: str) -> None:
    """What nn.DataParallel does to a module for each device: parameters of the replica are tensors of the graph."""

    def replicate(module: nn.Module, scale: float, made: dict[int, torch.Tensor]) -> Any:
        replica = module._replicate_for_data_parallel()
        for key, child in module._modules.items():
            replica._modules[key] = None if child is None else replicate(child, scale, made)
        for key, p in module._parameters.items():
            setattr(replica, key, None if p is None else made.setdefault(id(p), p * scale))  # no leaf: an attribute
        for key, b in module._buffers.items():
            replica._buffers[key] = None if b is None else b.clone()
        return replica

    def run(model: nn.Module) -> Any:
        replicas = [replicate(model, scale, {}) for scale in (1.0, 0.5)]
        outs = [replica(x) for replica, x in zip(replicas, images(4).chunk(2), strict=True)]
        sum(out.square().mean() for out in outs).backward()
        return outs, [list(replica.buffers()) for replica in replicas]

    same(pair(NETS[name]().double()), run)


def test_data_parallel_without_devices() -> None:
    same(pair(torchvision_net().double()), lambda model: train_step(nn.DataParallel(model)))


@pytest.mark.parametrize("buffers", [True, False])
def test_averaged_model(buffers: bool) -> None:
    def run(model: Any) -> Any:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=buffers)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            model(images() + step).square().mean().backward()
            optimizer.step()
            average.update_parameters(model)
        if not buffers:
            update_bn([images(), images(4)], average)
        return average.eval()(images()), dict(average.named_buffers())

    same(pair(torchvision_net().double()), run)


@EACH
@pytest.mark.parametrize("version", ["ModelEmaV2", "ModelEmaV3"])
def test_timm_moving_average(name: str, version: str) -> None:
    utils = library("timm.utils")

    def run(model: Any) -> Any:
        average = getattr(utils, version)(model, decay=0.5)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for step in range(2):
            optimizer.zero_grad()
            model(images() + step).square().mean().backward()
            optimizer.step()
            average.update(model)
        return average.module(images()), dict(average.module.named_buffers())

    same(pair(NETS[name]().double()), run)


def test_fuse_of_a_copy_whose_original_is_fused() -> None:
    """`fuse` and `unfuse` of a copy leave the original as it is, and the other way round."""
    plain, model = pair(torchvision_net().double())
    twin = copy.deepcopy(model)
    dx.unfuse(twin)
    if not IDENTITY:
        assert not any(row.fused for row in dx.report(twin)) and all(row.fused for row in dx.report(model))
    same((copy.deepcopy(plain), twin), train_step)
    fuse(twin, save="features")
    dx.unfuse(model)
    if not IDENTITY:
        assert all(row.fused for row in dx.report(twin)) and not any(row.fused for row in dx.report(model))
    same((plain, model), train_step)


def test_parts_copied_alone() -> None:
    """A block, a transition and a layer copied out of a fused model run by themselves."""
    names = ["features.denseblock1", "features.transition1", "features.denseblock1.denselayer1"]

    def run(model: nn.Module) -> Any:
        found = []
        for name in names:
            for make in (copy.deepcopy, saved):
                part = make(model.get_submodule(name))
                x = torch.linspace(-1, 1, 2 * 32 * 64, dtype=torch.float64).view(2, 32, 8, 8)
                x = x[:, :16] if "denseblock" in name else x
                found.append(train_step(part, x))
        return found

    same(pair(torchvision_net().double()), run, layout=True)


def test_class_of_a_fused_module_makes_a_fresh_one() -> None:
    """`type(module)(...)`, as some code writes it, is an original one that works, fused or not."""

    def run(model: Any) -> Any:
        torch.manual_seed(0)
        fresh = type(model)(growth_rate=8, block_config=(2, 2), num_init_features=16, num_classes=5).double()
        return train_step(fresh), [name for name, _ in fresh.named_modules()], type(fresh).__name__

    same(pair(torchvision_net().double()), run)


def test_weights_saved_as_a_state_dict() -> None:
    plain, model = pair(torchvision_net().double())
    assert list(plain.state_dict()) == list(model.state_dict())
    assert plain.state_dict()._metadata == model.state_dict()._metadata
    fresh = torchvision_net().double()
    fuse(fresh).load_state_dict(plain.state_dict(), strict=True, assign=True)
    same((plain, fresh), train_step)


def test_apply_and_to_and_requires_grad() -> None:
    """Methods of nn.Module that walk the tree do to a fused model what they do to another."""

    def run(model: Any) -> Any:
        seen: list[str] = []
        model.apply(lambda module: seen.append(type(module).__name__))
        model.requires_grad_(False).double().to(memory_format=torch.channels_last)
        return seen, model(images()), [m._get_name() for m in model.modules()], repr(model)

    same(pair(torchvision_net()), run, tolerance=1e-9)
