"""Meta-learning on fused models: twins made from ``__dict__``, higher's monkey-patched models, functional calls.

Such twins are given other parameters than the module that they were made from: they must compute with their own.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.peers.twins import (
    NETS,
    assert_alike,
    assert_all_fused,
    images,
    library,
    pair,
    same,
    torchvision_net,
    train_step,
)

BOTH = pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
EACH = pytest.mark.parametrize("name", NETS)


def clone_module(module: nn.Module, memo: dict[int, Any] | None = None) -> Any:
    """A twin whose parameters are differentiable functions of the module's, as learn2learn.clone_module makes it."""
    memo = {} if memo is None else memo
    clone: Any = module.__new__(type(module))
    clone.__dict__ = module.__dict__.copy()
    for kind in ("_parameters", "_buffers", "_modules"):
        setattr_of: dict[str, Any] = clone.__dict__[kind].copy()
        for name, value in setattr_of.items():
            if value is None:
                continue
            if kind == "_modules":
                setattr_of[name] = clone_module(value, memo)
            else:
                setattr_of[name] = memo.setdefault(id(value), value.clone())
        clone.__dict__[kind] = setattr_of
    return clone


def update_module(module: nn.Module, step: float, gradients: list[Tensor]) -> None:
    """Replaces the twin's parameters by those after one step of gradient descent, which stays differentiable."""
    found = iter(gradients)
    for child in module.modules():
        for name, p in child._parameters.items():
            if p is not None:
                child._parameters[name] = p - step * next(found)


def parameters_of(module: nn.Module) -> list[Tensor]:
    return [p for child in module.modules() for p in child._parameters.values() if p is not None]


def maml_step(model: nn.Module, steps: int = 1, first_order: bool = False) -> Any:
    """The output after ``steps`` of a clone's adaptation; the gradient goes to the model's parameters."""
    learner = clone_module(model)
    for i in range(steps):
        loss = learner(images() + i).square().mean()
        gradients = torch.autograd.grad(loss, parameters_of(learner), create_graph=not first_order)
        update_module(learner, 0.1, list(gradients))
    out = learner(images().flip(0) * 2)
    out.square().mean().backward()
    return out


@EACH
@BOTH
def test_twin_from_dict_computes_with_its_own_parameters(name: str, training: bool) -> None:
    models = pair(NETS[name]().double().train(training))
    assert_all_fused(models[1])

    def run(model: nn.Module) -> Any:
        twin = clone_module(model)
        for child in twin.modules():
            for key, p in child._parameters.items():
                child._parameters[key] = None if p is None else p.detach() * 0.5
        return twin(images())

    got = same(models, run)
    with pytest.raises(AssertionError):  # the twin's parameters matter
        assert_alike(models[1](images()), got[1])


@BOTH
def test_zeroed_twin_gives_zero(training: bool) -> None:
    model = pair(torchvision_net().double().train(training))[1]
    twin = clone_module(model)
    for child in twin.modules():
        for key, p in child._parameters.items():
            child._parameters[key] = None if p is None else torch.zeros_like(p)
    assert not twin(images()).any()


@BOTH
@pytest.mark.parametrize("first_order", [False, True])
def test_maml_gradients(training: bool, first_order: bool) -> None:
    models = pair(torchvision_net().double().train(training))
    same(models, lambda model: maml_step(model, first_order=first_order))


@EACH
def test_maml_of_each_library(name: str) -> None:
    same(pair(NETS[name]().double()), lambda model: maml_step(model))


def test_clone_of_a_clone() -> None:
    def run(model: nn.Module) -> Any:
        return train_step(clone_module(clone_module(model)))

    same(pair(torchvision_net().double()), run)


@BOTH
def test_clones_own_their_statistics(training: bool) -> None:
    """The clone's pass moves the clone's running statistics, once, and leaves the model's alone."""

    def run(model: nn.Module) -> Any:
        twin = clone_module(model)
        twin(images())
        return [b.clone() for b in twin.buffers()], [b.clone() for b in model.buffers()]

    same(pair(torchvision_net().double().train(training)), run)


@BOTH
def test_higher_meta_gradients(training: bool) -> None:
    higher = library("higher")

    def run(model: Any) -> Any:
        inner = torch.optim.SGD(model.parameters(), lr=0.1)
        with higher.innerloop_ctx(model, inner, copy_initial_weights=False) as (functional, optimiser):
            optimiser.step(functional(images()).square().mean())
            out = functional(images().flip(0) * 2)
            out.square().mean().backward()
        return out

    same(pair(torchvision_net().double().train(training)), run)


def test_higher_monkeypatch_leaves_the_model_alone() -> None:
    higher = library("higher")

    def run(model: Any) -> Any:
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        functional = higher.monkeypatch(model, copy_initial_weights=True)
        halved = [p.detach() * 0.5 for p in functional.parameters()]
        out = functional(images(), params=halved)
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, before[name]), name
        return out, functional.state_dict() if hasattr(functional, "state_dict") else None, model(images())

    same(pair(torchvision_net().double()), run)


@BOTH
def test_functional_call_with_other_parameters(training: bool) -> None:
    def run(model: nn.Module) -> Any:
        other = {name: (p.detach() * 0.5).requires_grad_() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}
        out = torch.func.functional_call(model, (other, buffers), (images(),))
        out.square().mean().backward()
        return out, {name: p.grad for name, p in other.items()}, buffers, [p.grad for p in model.parameters()]

    same(pair(torchvision_net().double().train(training)), run)


def test_grad_of_functional_call() -> None:
    def run(model: nn.Module) -> Any:
        parameters = {name: p.detach() for name, p in model.named_parameters()}

        def loss(p: dict[str, Tensor], x: Tensor) -> Tensor:
            return torch.func.functional_call(model, p, (x,)).square().mean()

        once = torch.func.grad(loss)(parameters, images())
        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images()[:, None])
        return once, each

    same(pair(torchvision_net().double().eval()), run)


def test_ensemble_by_vmap_over_stacked_parameters() -> None:
    models = pair(torchvision_net().double().eval())

    def run(model: Any) -> Any:
        several = [model, copy.deepcopy(model)]
        with torch.no_grad():
            for p in several[1].parameters():
                p.mul_(0.5)
        parameters, buffers = torch.func.stack_module_state(several)
        base, x = copy.deepcopy(model).to("meta"), images()

        def call(p: dict[str, Tensor], b: dict[str, Tensor]) -> Tensor:
            return torch.func.functional_call(base, (p, b), (x,))

        return torch.func.vmap(call)(parameters, buffers), several[1](x)

    same(models, run)


@BOTH
def test_jacobian_in_batches(training: bool) -> None:
    models = pair(torchvision_net(num_classes=3).double().train(training))
    x = images(size=16 if not training else 32)
    for vectorize in (False, True):
        same(models, lambda model, v=vectorize: torch.autograd.functional.jacobian(model, x, vectorize=v))


def test_batched_gradients() -> None:
    def run(model: nn.Module) -> Any:
        x = images().requires_grad_()
        out = model(x)
        wanted = torch.eye(out.numel(), dtype=out.dtype).reshape(-1, *out.shape)
        inputs = [x, *model.parameters()]
        return torch.autograd.grad(out, inputs, wanted, is_grads_batched=True)

    same(pair(torchvision_net(num_classes=2).double()), run)


def test_hessian_vector_product() -> None:
    def run(model: nn.Module) -> Any:
        return torch.autograd.functional.hvp(lambda x: model(x).square().mean(), images(), images().flip(0))

    same(pair(torchvision_net().double()), run, tolerance=1e-8)


def test_forward_mode() -> None:
    def run(model: nn.Module) -> Any:
        return torch.func.jvp(model, (images(),), (images().flip(0),))

    same(pair(torchvision_net().double().eval()), run)
