"""Every way to ask a fused network for gradients, checkpoints included: the same numbers as the unfused one's."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import densenet_ext as dx
from tests.support.fusing_helpers import (
    BLOCK,
    assert_same_gradients,
    assert_same_state,
    close,
    images,
    layer,
    net,
    pair,
)


def test_gradient_accumulation() -> None:
    models = pair()
    for model in models:
        for i in range(3):
            (model(images() + i).square().mean() / 3).backward()
    assert_same_gradients(*models)
    assert_same_state(*models)


def test_gradients_of_some_inputs_and_backward_into_some() -> None:
    found = []
    for model in pair():
        x = images().requires_grad_()
        wanted = [x, layer(model).conv2.weight, model.features.transition1.norm.bias]
        loss = model(x).square().mean()
        found.append(torch.autograd.grad(loss, wanted, retain_graph=True))
        loss.backward(inputs=wanted[1:2])
        assert layer(model).conv1.weight.grad is None
        found[-1] += (wanted[1].grad,)
    close(found)


def test_hooks_on_parameters() -> None:
    models, seen = pair(), []
    for model in models:
        layer(model).conv1.weight.register_hook(lambda grad: grad * 2)
        layer(model).norm1.weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
        model(images()).square().mean().backward()
    assert_same_gradients(*models)
    close(seen)


@pytest.mark.parametrize("save", ["bottlenecks", "features"])
def test_double_backward(save: str) -> None:
    models = dx.fuse(net(), save=save), net()
    found = []
    for model in models:
        x = images().requires_grad_()
        grads = torch.autograd.grad(model(x).square().sum(), [x, *model.parameters()], create_graph=True)
        sum(grad.square().sum() for grad in grads).backward()
        found.append(x.grad)
    close(found)
    assert_same_gradients(*models)


def test_hessian_vector_products() -> None:
    x = images()
    close([torch.autograd.functional.hvp(lambda x, m=m: m(x).square().sum(), x, x)[1] for m in pair()])


def test_functional_gradients_in_training() -> None:
    found = []
    for model in pair():
        parameters = {name: p.detach() for name, p in model.named_parameters()}
        buffers = {name: b.clone() for name, b in model.named_buffers()}

        def loss(parameters: Any, buffers: Any, model: nn.Module = model) -> Tensor:
            return torch.func.functional_call(model, (parameters, buffers), (images(),)).square().sum()

        found.append((torch.func.grad(loss)(parameters, buffers), buffers))
    close(found)
    assert found[0][1]["features.denseblock1.denselayer1.norm1.num_batches_tracked"] == 1


def test_per_sample_gradients_in_training_are_refused_as_eagers() -> None:
    messages = []
    for model in pair():
        with pytest.raises(RuntimeError) as caught:
            torch.func.vmap(lambda image, model=model: model(image[None]))(images())
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_anomaly_mode_names_the_place() -> None:
    models = pair()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that anomaly mode is slow
        with torch.autograd.detect_anomaly():
            for model in models:
                model(images()).square().mean().backward()
            assert_same_gradients(*models)
            with torch.no_grad():
                layer(models[0]).conv1.weight[0, 0] = float("nan")
            with pytest.raises(RuntimeError, match="returned nan values"):
                models[0](images()).square().mean().backward()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("around", [BLOCK, "features", ""])
@pytest.mark.parametrize("drop_rate", [0.0, 0.3])
def test_gradient_checkpointing(around: str, reentrant: bool, drop_rate: float) -> None:
    """Statistics move twice, as in eager (pytorch #96136): that is the checkpoint's doing, not ours."""
    models = dx.fuse(net(drop_rate=drop_rate)), net(drop_rate=drop_rate)
    if drop_rate > 0:  # another draw than eager's: compare with the fused network without checkpoint
        models = models[0], copy.deepcopy(models[0])
    for model in models:
        torch.manual_seed(5)
        if drop_rate == 0 or model is models[0]:
            module = model.get_submodule(around)
            inner = module.forward
            module.forward = lambda x, inner=inner: checkpoint(inner, x, use_reentrant=reentrant)  # type: ignore[method-assign]
        model(images().requires_grad_()).square().mean().backward()
    assert_same_gradients(*models)
    if drop_rate == 0:
        assert_same_state(*models)
        assert int(layer(models[0]).norm1.num_batches_tracked) == 2


def test_checkpoint_of_a_fused_module_called_from_outside() -> None:
    models = pair()
    for model in models:
        checkpoint(model, images().requires_grad_(), use_reentrant=False).square().mean().backward()
    assert_same_gradients(*models)
    assert_same_state(*models)


def test_saved_tensors_on_the_cpu() -> None:
    models = pair()
    for model in models:
        with torch.autograd.graph.save_on_cpu():
            out = model(images())
        out.square().mean().backward()
    assert_same_gradients(*models)


def test_inference_mode_and_no_grad() -> None:
    for mode in (torch.inference_mode, torch.no_grad):
        models = pair()
        with mode():
            close([model(images()) for model in models])
            close([model.eval()(images()) for model in models])
        assert_same_state(*models)
