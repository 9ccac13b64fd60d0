"""Hooks of every kind on every module of a model see and change in a fused model what they do in an unfused one."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules import module as module_hooks
from torch.utils import _pytree as pytree

from tests.peers.twins import (
    NETS,
    assert_all_fused,
    images,
    outcome,
    pair,
    same,
    torchvision_net,
    train_step,
    without_inplace,
)

EACH = pytest.mark.parametrize("name", NETS)
BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])

PLACES = [
    *("", "features", "features.conv0", "features.norm0", "features.relu0", "features.pool0"),
    *("features.denseblock1", "features.denseblock1.denselayer1", "features.denseblock1.denselayer2"),
    *(f"features.denseblock1.denselayer2.{part}{i}" for i in (1, 2) for part in ("norm", "relu", "conv")),
    *("features.transition1", "features.transition1.norm", "features.transition1.relu"),
    *("features.transition1.conv", "features.transition1.pool", "features.denseblock2", "features.norm5"),
    "classifier",
]


def kept(value: Any) -> Any:
    """Copies of the tensors in a hook's arguments, in their layout; hooks see later writes in what they keep."""
    return pytree.tree_map_only(Tensor, lambda t: t.detach().clone(memory_format=torch.preserve_format), value)


def at(model: nn.Module, place: str) -> Any:
    return model.get_submodule(place)


Hook = Callable[[nn.Module, list[Any]], Any]  # sets the hook; what it sees goes into the list


def pre(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_forward_pre_hook(lambda m, args: seen.append(kept(args)))


def pre_with_keywords(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_forward_pre_hook(lambda m, args, kw: seen.append(kept((args, kw))), with_kwargs=True)


def post(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_forward_hook(lambda m, args, out: seen.append(kept((args, out))))


def post_always(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_forward_hook(lambda m, args, out: seen.append(kept((args, out))), always_call=True)


def backward_pre(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_full_backward_pre_hook(lambda m, grads: seen.append(kept(grads)))


def backward(module: nn.Module, seen: list[Any]) -> Any:
    return module.register_full_backward_hook(lambda m, inputs, outputs: seen.append(kept((inputs, outputs))))


def on_tensor(module: nn.Module, seen: list[Any]) -> Any:
    def hook(m: nn.Module, args: Any, out: Tensor) -> None:
        if out.requires_grad:
            out.register_hook(lambda grad: seen.append(kept(grad)))

    return module.register_forward_hook(hook)


HOOKS = [pre, pre_with_keywords, post, post_always, backward_pre, backward, on_tensor]


@BOTH
@pytest.mark.parametrize("place", PLACES)
def test_forward_hooks_see_the_same_tensors(place: str, training: bool) -> None:
    """Values, dtypes and strides, in every kind of forward hook; and the model is fused once they are gone."""

    def run(model: nn.Module) -> Any:
        seen: list[Any] = []
        handles = [hook(at(model, place), seen) for hook in (pre, pre_with_keywords, post, post_always)]
        out = train_step(model)
        for handle in handles:
            handle.remove()
        return out, seen, train_step(model)

    models = pair(torchvision_net().double().train(training))
    same(models, run, layout=True)
    assert_all_fused(models[1])


@pytest.mark.parametrize("hook", [backward_pre, backward, on_tensor], ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("place", PLACES)
def test_backward_hooks_see_the_same_gradients(place: str, hook: Hook) -> None:
    def run(model: nn.Module) -> Any:
        seen: list[Any] = []
        handle = hook(at(model, place), seen)
        result = outcome(train_step, model)  # PyTorch refuses some before a ReLU in place
        handle.remove()
        return result, seen

    same(pair(torchvision_net().double()), run)


@EACH
@pytest.mark.parametrize("hook", [backward_pre, backward], ids=lambda hook: hook.__name__)
def test_backward_hooks_without_relus_in_place(name: str, hook: Hook) -> None:
    def run(model: nn.Module) -> Any:
        seen: list[Any] = []
        for module in model.modules():
            if not isinstance(module, (nn.ReLU, nn.Identity)):
                hook(module, seen)
        return outcome(train_step, model), seen

    same(pair(without_inplace(NETS[name]().double())), run)


@EACH
def test_all_places_at_once(name: str) -> None:
    def run(model: nn.Module) -> Any:
        seen: list[Any] = []
        for path, module in model.named_modules():
            module.register_forward_hook(lambda m, args, out, path=path: seen.append((path, kept(args), kept(out))))
        return train_step(model), seen

    same(pair(NETS[name]().double()), run, layout=True)


@BOTH
@pytest.mark.parametrize("place", PLACES)
def test_hooks_that_return_something_else(place: str, training: bool) -> None:
    def run(model: nn.Module) -> Any:
        module = at(model, place)
        handles = [
            module.register_forward_pre_hook(
                lambda m, args: tuple([t * 0.5 for t in a] if isinstance(a, list) else a * 0.5 for a in args)
            ),
            module.register_forward_hook(lambda m, args, out: out * 2 + 0.1),
        ]
        out = train_step(model)
        for handle in handles:
            handle.remove()
        return out, train_step(model)

    same(pair(torchvision_net().double().train(training)), run)


@BOTH
@pytest.mark.parametrize("place", [place for place in PLACES if place.count(".") < 2])
@pytest.mark.parametrize("how", ["data", "no_grad", "in place", "detached view"])
def test_hooks_that_write(place: str, how: str, training: bool) -> None:
    """What a hook writes into an output is what the next unit reads, and what its statistics are taken of.

    A write that autograd sees may instead be its version error: the block keeps its output for the backward pass.
    """

    def write(module: nn.Module, args: Any, out: Tensor) -> None:
        if how == "data":
            out.data.mul_(1.5).add_(0.25)
        elif how == "no_grad":
            with torch.no_grad():
                out.mul_(1.5).add_(0.25)
        elif how == "in place":
            out.mul_(1.5).add_(0.25)
        else:
            out.detach()[:, ::2].add_(0.25)

    def run(model: nn.Module) -> Any:
        at(model, place).register_forward_hook(write)
        return outcome(train_step, model)

    if how != "data" and outcome(run, pair(torchvision_net().double().train(training))[1]) == "RuntimeError":
        return
    same(pair(torchvision_net().double().train(training)), run)


@BOTH
@pytest.mark.parametrize("place", [place for place in PLACES if place.count(".") < 2 and place])
def test_hooks_that_write_into_the_input(place: str, training: bool) -> None:
    def run(model: nn.Module) -> Any:
        def write(module: nn.Module, args: Any) -> None:
            args[0].data.mul_(1.5).add_(0.25)

        at(model, place).register_forward_pre_hook(write)
        return outcome(train_step, model)

    same(pair(torchvision_net().double().train(training)), run)


@contextlib.contextmanager
def globally(register: Callable[..., Any], hook: Callable[..., Any]) -> Iterator[None]:
    handle = register(hook)
    try:
        yield
    finally:
        handle.remove()


@EACH
@BOTH
def test_global_forward_hooks(name: str, training: bool) -> None:
    """Hooks for all modules, as profilers and printers of shapes register them, meet every module."""

    def run(model: nn.Module) -> Any:
        names = {module: path for path, module in model.named_modules()}
        seen: list[Any] = []
        with (
            globally(
                module_hooks.register_module_forward_pre_hook, lambda m, args: seen.append((names[m], kept(args)))
            ),
            globally(
                module_hooks.register_module_forward_hook, lambda m, args, out: seen.append((names[m], kept(out)))
            ),
        ):
            out = train_step(model)
        assert len(seen) > 40
        return out, seen, train_step(model)

    models = pair(NETS[name]().double().train(training))
    same(models, run, layout=True)
    assert_all_fused(models[1])


def test_global_backward_hooks() -> None:
    def run(model: nn.Module) -> Any:
        seen: list[Any] = []
        with globally(
            module_hooks.register_module_full_backward_hook,
            lambda m, inputs, outputs: seen.append((type(m).__name__, kept(inputs), kept(outputs))),
        ):
            out = outcome(train_step, model)
        return out, seen, train_step(model)

    same(pair(without_inplace(torchvision_net().double())), run)


def test_hooks_on_parameters() -> None:
    """Hooks on leaves and after their accumulation, as DDP and optimisers within backward set them."""

    def run(model: nn.Module) -> Any:
        seen: list[Any] = []
        for name, p in model.named_parameters():
            p.register_hook(lambda grad, name=name: seen.append((name, kept(grad))))
            p.register_post_accumulate_grad_hook(lambda p, name=name: seen.append((name, kept(p.grad))))
        out = train_step(model)
        return out, sorted(((n, g) for n, g in seen), key=lambda pair: pair[0])

    same(pair(torchvision_net().double()), run)


def test_optimiser_inside_backward() -> None:
    """Parameters stepped as soon as their gradient is there: nothing of the backward pass may read them later."""

    def run(model: nn.Module) -> Any:
        def step(p: Tensor) -> None:
            with torch.no_grad():
                p.sub_(p.grad, alpha=0.1)  # type: ignore[arg-type]
            p.grad = None

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        return outcome(train_step, model), list(model.parameters())

    same(pair(torchvision_net().double()), run)


def test_retain_grad_at_every_unit() -> None:
    def run(model: nn.Module) -> Any:
        kept_outputs: list[Tensor] = []

        def retain(m: nn.Module, args: Any, out: Tensor) -> None:
            out.retain_grad()
            kept_outputs.append(out)

        for place in ("features.denseblock1", "features.transition1", "features.denseblock2"):
            at(model, place).register_forward_hook(retain)
        return train_step(model), [out.grad for out in kept_outputs], [out.is_leaf for out in kept_outputs]

    same(pair(torchvision_net().double()), run)


def test_removable_handles_and_order() -> None:
    """Prepended hooks come first, removed ones not at all; a hook may remove itself."""

    def run(model: nn.Module) -> Any:
        order: list[str] = []
        block = model.features.denseblock1
        block.register_forward_hook(lambda *_: order.append("second"))
        block.register_forward_hook(lambda *_: order.append("first"), prepend=True)
        once = block.register_forward_hook(lambda *_: (order.append("once"), once.remove())[0])
        return model(images()), model(images()), order

    same(pair(torchvision_net().double().eval()), run)


def test_hook_that_raises() -> None:
    """An exception in a hook comes out as it is, and the next call is a whole one; statistics as unfused."""

    def run(model: nn.Module) -> Any:
        def fail(*_: Any) -> None:
            raise KeyError("from the hook")

        handle = at(model, "features.transition1").register_forward_hook(fail)
        failed = outcome(train_step, model)
        handle.remove()
        return failed, train_step(model)

    same(pair(torchvision_net().double()), run)


def test_hook_that_calls_a_part_again() -> None:
    """A hook that runs another part of the model inside: statistics of that part move once more."""

    def run(model: nn.Module) -> Any:
        def again(m: nn.Module, args: Any, out: Tensor) -> Tensor:
            return out + model.features.transition1(out).mean()

        model.features.denseblock1.register_forward_hook(again)
        return train_step(model)

    same(pair(torchvision_net().double()), run)


def test_state_dict_hooks() -> None:
    def run(model: nn.Module) -> Any:
        seen: list[str] = []
        block = model.features.denseblock1
        block.register_state_dict_pre_hook(lambda m, prefix, keep: seen.append(f"pre {prefix}"))
        block.register_state_dict_post_hook(lambda m, state, prefix, meta: seen.append(f"post {prefix}"))
        block.register_load_state_dict_pre_hook(lambda m, *args: seen.append(f"load {args[1]}"))
        block.register_load_state_dict_post_hook(lambda m, keys: seen.append("loaded"))
        model.load_state_dict(model.state_dict())
        return seen

    same(pair(torchvision_net().double()), run)
