"""Networks of other packages' structure: every dense block is recognised, and the numbers are the same."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import densenet_ext as dx
from tests.peers import structures
from tests.peers.twins import IDENTITY, fuse, fused_kinds, images, needs_fused, pair, same, train_step

# network, how many dense blocks it has
NETS: dict[str, tuple[Callable[..., Any], int]] = {
    "mmpretrain": (structures.MMPretrain, 2),
    "torchvision 0.3": (structures.TorchvisionOld, 2),
    "condensenet": (structures.Condense, 2),
    "d2l": (structures.book, 2),
    "tiramisu": (lambda: structures.Tiramisu(p=0.0), 3),
    "twice dropped": (lambda: structures.TwiceDropped(droprate=0.0), 2),
}
DROPPING: dict[str, Callable[[], Any]] = {
    "mmpretrain": lambda: structures.MMPretrain(drop_rate=0.3),
    "torchvision 0.3": lambda: structures.TorchvisionOld(drop_rate=0.3),
    "tiramisu": lambda: structures.Tiramisu(p=0.3),
    "twice dropped": lambda: structures.TwiceDropped(droprate=0.3),
}
EACH = pytest.mark.parametrize("name", NETS)
BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])


def made(name: str) -> Any:
    torch.manual_seed(0)
    return NETS[name][0]().double()


def dense_blocks(model: nn.Module) -> list[Any]:
    return [row for row in dx.report(model) if row.kind == "dense block"]


@EACH
@BOTH
@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_numbers(name: str, training: bool, save: str) -> None:
    models = pair(made(name).train(training), save=save)
    same(models, train_step)
    same(models, lambda model: train_step(model, images(3, 40)))


@EACH
def test_layout_of_the_output(name: str) -> None:
    same(pair(made(name).eval()), train_step, layout=True)


@needs_fused
@EACH
def test_every_block_is_fused(name: str) -> None:
    rows = dense_blocks(fuse(made(name)))
    assert len(rows) == NETS[name][1], rows
    assert all(row.fused for row in rows), rows


@needs_fused
@EACH
def test_verify_counts_what_ran(name: str) -> None:
    result = dx.verify(fuse(made(name)), images())
    assert result.fused_units == len(fused_kinds(fuse(made(name)))), result
    assert max(result.max_output, result.max_buffer) < 1e-8
    # a bias in front of a norm has no gradient in training but what rounding leaves: no error relative to it
    assert max(error for name, error in result.gradients.items() if not name.endswith("bias")) < 1e-8


@needs_fused
@pytest.mark.parametrize("name", DROPPING)
def test_dropping_blocks_are_fused(name: str) -> None:
    rows = dense_blocks(fuse(DROPPING[name]()))
    assert len(rows) == NETS[name][1] and all(row.fused for row in rows), rows


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_of_a_fixed_seed_has_the_gradient_of_its_loss(name: str) -> None:
    """One seed drops the same features in the forward and the backward pass: finite differences agree."""
    torch.manual_seed(0)
    model = pair(DROPPING[name]().double())[1]
    x = images(8, 16)

    def loss() -> Tensor:
        torch.manual_seed(5)
        out = model(x)
        return sum(t.square().sum() for t in (out if isinstance(out, tuple) else (out,)))

    parameters = list(model.parameters())
    gradients = torch.autograd.grad(loss(), parameters)
    ways = [torch.randn_like(p) for p in parameters]
    losses = []
    with torch.no_grad():
        for step in (1e-8, -1e-8):
            for p, way in zip(parameters, ways, strict=True):
                p.add_(way, alpha=step)
            losses.append(loss())
            for p, way in zip(parameters, ways, strict=True):
                p.sub_(way, alpha=step)
    expected = (losses[0] - losses[1]) / 2e-8
    torch.testing.assert_close(
        sum((g * w).sum() for g, w in zip(gradients, ways, strict=True)), expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("name", DROPPING)
def test_dropout_drops_as_often_as_unfused(name: str) -> None:
    """The share of zeros among the new features of the first block, and their mean, are those of the drop rate."""
    torch.manual_seed(0)
    models = pair(DROPPING[name]().double())
    shares = []
    for model in models:
        block = {"mmpretrain": "stages.0", "torchvision 0.3": "features.denseblock1", "tiramisu": "denseBlocksDown.0"}
        part = model.get_submodule(block.get(name, "block1"))
        x = torch.linspace(-1, 1, 16 * 16 * 64, dtype=torch.float64).view(16, 16, 8, 8).sin()
        found = []
        for _ in range(8):
            new = part(x)[:, 16:]
            found.append((new == 0).double().mean().item())
        shares.append(sum(found) / len(found))
    assert abs(shares[1] - 0.3) < 0.05 and abs(shares[0] - shares[1]) < 0.05, shares


def test_dropout2d_drops_whole_channels() -> None:
    model = pair(structures.Tiramisu(p=0.5).double())[1]
    x = torch.randn(8, 16, 5, 5, dtype=torch.float64)
    new = model.denseBlocksDown[0](x)[:, 16:]
    zeros = (new == 0).double().mean((2, 3))
    assert bool(((zeros == 0) | (zeros == 1)).all()) and 0.2 < zeros.mean() < 0.8


@EACH
def test_dropout_off_is_exact(name: str) -> None:
    if name not in DROPPING:
        pytest.skip("no dropout")
    torch.manual_seed(0)
    same(pair(DROPPING[name]().double().eval()), train_step)


def test_biases_have_gradients() -> None:
    plain, model = pair(made("d2l"))
    for m in (plain, model):
        train_step(m)
    found = {name: p.grad for name, p in model.named_parameters() if name.endswith("bias")}
    assert any(g is not None and bool(g.abs().sum() > 0) for n, g in found.items() if n.startswith("1.net"))
    for name, p in plain.named_parameters():
        torch.testing.assert_close(
            model.get_parameter(name).grad, p.grad, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("memory_efficient", [False, True])
@pytest.mark.parametrize("frozen", [0, 1])
def test_mmpretrain_modes(memory_efficient: bool, frozen: int) -> None:
    """The memory mode moves running statistics twice, unfused; so it is compared where they do not move."""
    model = structures.MMPretrain(memory_efficient=memory_efficient, frozen_stages=frozen).double()
    models = pair(model.eval() if memory_efficient else model.train())
    same(models, train_step)
    if not IDENTITY:
        assert fused_kinds(models[1]).count("dense block") == 2


def test_a_list_is_still_required() -> None:
    """A layer that takes only lists refuses a tensor, fused or not."""
    for model in pair(structures.MMPretrain().double()):
        with pytest.raises(AssertionError):
            model.stages[0].block[0](torch.randn(1, 16, 4, 4, dtype=torch.float64))


@EACH
def test_hooks_everywhere_see_the_same(name: str) -> None:
    def run(model: nn.Module) -> Any:
        seen: list[Any] = []
        for module in model.modules():
            module.register_forward_hook(
                lambda module, args, out: seen.append(
                    (type(module).__name__, copy.deepcopy(_detached(args)), copy.deepcopy(_detached(out)))
                )
            )
        return model(images()), seen

    same(pair(made(name).eval()), run, layout=True)


def _detached(value: Any) -> Any:
    return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach(), value)


@EACH
def test_parts_of_a_sequential(name: str) -> None:
    """Children called one after the other by hand, as feature extractors do."""

    def run(model: nn.Module) -> Any:
        parts = getattr(model, "features", model)
        if not isinstance(parts, nn.Sequential):
            return train_step(model)
        x, outs = images(), []
        for part in parts:
            x = part(x)
            outs.append(x.clone())
        return outs

    same(pair(made(name).eval()), run, layout=True)


@EACH
def test_state_dict_and_class(name: str) -> None:
    plain, model = pair(made(name))
    assert list(plain.state_dict()) == list(model.state_dict())
    assert isinstance(model, type(plain)) and type(model).__name__ == type(plain).__name__
    dx.unfuse(model)
    for got, wanted in zip(model.modules(), plain.modules(), strict=True):
        assert type(got) is type(wanted) and list(got.__dict__) == list(wanted.__dict__)
